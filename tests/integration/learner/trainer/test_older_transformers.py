"""Exports in transformers 4.57, which other tools still serve with: same tokens, same chat text, same log-probs.

`make older` installs that version into a folder of .venv; a separate process reads the exports with it.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from learner.trainer.export import save_model
from learner.trainer.source_files import exported_files, read_source_files
from tests.support.tiny import make_tokenizer

OLDER = Path(sys.prefix) / "transformers-4.57"
pytestmark = pytest.mark.skipif(not OLDER.is_dir(), reason=f"{OLDER} is not there: make older")

SIZE: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 4096,
    "initializer_range": 0.2,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
MODELS: dict[str, dict[str, Any]] = {
    "qwen3": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
    "llama": {"rope_parameters": LLAMA3},
    "gemma3_text": {
        "sliding_window": 32,
        "layer_types": ["sliding_attention", "full_attention"],
        "rope_parameters": {
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        },
    },
}
"""Families whose position embeddings 4.57 reads from other keys."""
TEXT = "Plural nouns: " + "cat cats, box boxes, city cities; " * 6
CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Plural of dog?"}]

READER = """
import json, sys
import torch, transformers
from transformers import AutoModelForCausalLM, AutoTokenizer
text, chat, *folders = json.loads(sys.argv[1])
found = {"version": transformers.__version__}
for folder in folders:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(text)["input_ids"]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        logprobs = model(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
    found[folder] = {
        "ids": ids,
        "chat": tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True),
        "special": tokenizer.special_tokens_map,
        "logprobs": logprobs.gather(-1, torch.tensor(ids[1:])[:, None])[:, 0].tolist(),
    }
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Path]]:
    """Family -> (source as transformers 5 saves it, export of the same weights)."""
    made = {}
    for kind, keys in MODELS.items():
        source, export = (tmp_path_factory.mktemp(f"{kind}-{name}") for name in ("source", "export"))
        tokenizer = make_tokenizer()
        ends = {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.eos_token_id}
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(
            AutoConfig.for_model(kind, **SIZE, **keys, **ends), dtype=torch.float32
        )
        model.save_pretrained(source)
        tokenizer.save_pretrained(source)
        state = {name: parameter.detach() for name, parameter in model.named_parameters()}
        save_model(export, state, exported_files(read_source_files(str(source)), "float32"))
        made[kind] = source, export
    return made


@pytest.fixture(scope="module")
def read(folders: dict[str, tuple[Path, Path]]) -> dict[str, Any]:
    """What 4.57 reads from every export, and from one with its source's configuration, as transformers 5 wrote it."""
    source, export = folders["qwen3"]
    bare = shutil.copytree(export, export.with_name("bare"))
    shutil.copy(source / "config.json", bare)
    asked = [TEXT, CHAT, *(str(export) for _, export in folders.values()), str(bare)]
    done = subprocess.run(
        [sys.executable, "-c", READER, json.dumps(asked)],
        env={**os.environ, "PYTHONPATH": str(OLDER), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    assert found["version"].startswith("4.57.")
    return found


def expected_logprobs(source: Path, ids: list[int]) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        logprobs = model(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
    return logprobs.gather(-1, torch.tensor(ids[1:])[:, None])[:, 0]


@pytest.mark.parametrize("kind", MODELS)
def test_an_export_means_the_same(kind: str, folders: dict[str, tuple[Path, Path]], read: dict[str, Any]) -> None:
    source, export = folders[kind]
    found, tokenizer = read[str(export)], AutoTokenizer.from_pretrained(source)
    assert found["ids"] == tokenizer(TEXT)["input_ids"]
    assert found["chat"] == tokenizer.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True)
    assert found["special"]["eos_token"] == "<|im_end|>"
    expected = expected_logprobs(source, found["ids"])
    torch.testing.assert_close(torch.tensor(found["logprobs"]), expected, atol=1e-4, rtol=0)


def test_without_the_older_keys_it_would_not(folders: dict[str, tuple[Path, Path]], read: dict[str, Any]) -> None:
    """The comparison sees a wrong base of the positions."""
    source, _ = folders["qwen3"]
    (bare,) = [one for name, one in read.items() if Path(name).name == "bare"]
    assert (torch.tensor(bare["logprobs"]) - expected_logprobs(source, bare["ids"])).abs().max() > 0.1
