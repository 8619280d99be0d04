"""The files of an export that are not weights: the source's own, and what older readers need of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from learner.trainer.source_files import (
    check_reading,
    exported_files,
    read_source_files,
    with_dtype,
    with_older_rope_keys,
    with_older_tokenizer_keys,
)
from tests.support.tiny import make_tiny_model

ROPE_KEYS_OF_4_57 = {
    "llama": {"rope_theta", "rope_scaling"},
    "qwen3": {"rope_theta", "rope_scaling"},
    "phi3": {"rope_theta", "rope_scaling", "partial_rotary_factor"},
    "glm4": {"rope_theta", "partial_rotary_factor"},
    "gemma3_text": {"rope_theta", "rope_scaling", "rope_local_base_freq"},
}
"""Arguments of the configuration classes of transformers 4.57.3, by model type: all that it reads of a rope."""


def test_files_are_taken_over_byte_by_byte_and_weights_and_others_are_not(tmp_path: Path) -> None:
    source = make_tiny_model(tmp_path / "source")
    own = {
        "generation_config.json": '{"temperature": 0.6, "top_p": 0.9}',  # transformers refuses to save this
        "modeling_own.py": "class Own: ...\n",
        "layers/attention.py": "",
        "preprocessor_config.json": "{}",
        "additional_chat_templates/tools.jinja": "{{ tools }}",
        "tokenizer.model": "\x00\x01",
        "LICENSE.md": "free",
    }
    others = ["model.safetensors.index.json", "pytorch_model.bin", ".cache/x.json", "data/train.json", "README.md"]
    for name in [*own, *others]:
        (source / name).parent.mkdir(exist_ok=True)
        (source / name).write_text(own.get(name, "other"))
    files = exported_files(read_source_files(str(source)), "float32")
    assert {name: files[name].decode() for name in own} == own
    assert files["tokenizer.json"] == (source / "tokenizer.json").read_bytes()
    assert files["chat_template.jinja"] == (source / "chat_template.jinja").read_bytes()
    assert not {*others, "model.safetensors"} & files.keys()


def test_a_configuration_with_the_older_keys_stays_to_the_byte() -> None:
    hub = {"model_type": "llama", "torch_dtype": "bfloat16", "rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3"}}
    tokenizer = {"tokenizer_class": "GPT2Tokenizer", "additional_special_tokens": ["<a>"]}
    source = {"config.json": json.dumps(hub).encode(), "tokenizer_config.json": json.dumps(tokenizer).encode()}
    assert exported_files(source, "bfloat16") == source
    assert json.loads(exported_files(source, "float32")["config.json"]) == {**hub, "torch_dtype": "float32"}


@pytest.mark.parametrize(
    ("kind", "parameters", "expected"),
    [
        ("llama", {"rope_type": "default", "rope_theta": 1e5}, {"rope_theta": 1e5}),
        (
            "qwen3",
            {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "rope_theta": 1e6},
            {
                "rope_theta": 1e6,
                "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
            },
        ),
        (
            "glm4",
            {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5},
            {"rope_theta": 1e4, "partial_rotary_factor": 0.5},
        ),
        (
            "gemma3_text",
            {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            },
            {
                "rope_theta": 1e6,
                "rope_scaling": {"rope_type": "linear", "factor": 8.0},
                "rope_local_base_freq": 1e4,
            },
        ),
    ],
)
def test_a_configuration_of_transformers_5_gets_the_rope_keys_that_4_57_reads(
    kind: str, parameters: dict[str, Any], expected: dict[str, Any]
) -> None:
    config = {"model_type": kind, "max_position_embeddings": 256, "rope_parameters": parameters}
    assert with_older_rope_keys(config) == {**config, **expected}
    assert expected.keys() <= ROPE_KEYS_OF_4_57[kind]


def test_rope_keys_are_added_only_if_the_installed_version_reads_the_same() -> None:
    unknown = {"model_type": "ourown", "rope_parameters": {"rope_type": "default", "rope_theta": 1e5}}
    assert with_older_rope_keys(unknown) == unknown
    assert with_older_rope_keys({"model_type": "gpt2"}) == {"model_type": "gpt2"}


def test_a_tokenizer_of_transformers_5_gets_the_names_that_4_57_knows() -> None:
    written = {"tokenizer_class": "TokenizersBackend", "extra_special_tokens": ["<a>"], "eos_token": "<b>"}
    assert with_older_tokenizer_keys(written) == {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "additional_special_tokens": ["<a>"],
        "eos_token": "<b>",
    }
    named = {"tokenizer_class": "LlamaTokenizer", "extra_special_tokens": {"image_token": "<i>"}}
    assert with_older_tokenizer_keys(named) == named


def test_the_dtype_keeps_its_name() -> None:
    assert with_dtype({"torch_dtype": "bfloat16"}, "float32") == {"torch_dtype": "float32"}
    assert with_dtype({}, "float32") == {"dtype": "float32"}


@pytest.mark.parametrize("damage", ["rope", "vocabulary"])
def test_an_export_that_is_read_otherwise_is_named(tmp_path: Path, damage: str) -> None:
    source, folder = make_tiny_model(tmp_path / "source"), tmp_path / "export"
    folder.mkdir()
    for name, content in exported_files(read_source_files(str(source)), "float32").items():
        (folder / name).write_bytes(content)
    check_reading(folder, str(source))
    path = folder / ("config.json" if damage == "rope" else "tokenizer_config.json")
    changed = json.loads(path.read_text())
    if damage == "rope":
        changed["rope_parameters"]["rope_theta"] = 5.0
    else:
        changed["eos_token"] = "<|im_start|>"
    path.write_text(json.dumps(changed))
    with pytest.raises(
        OSError, match=r"is read otherwise than that of .*rope_parameters" if damage == "rope" else "tokenizer"
    ):
        check_reading(folder, str(source))
