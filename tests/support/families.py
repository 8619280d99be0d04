"""Tiny random models of many families: the smallest configurations that have each family's peculiarities."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from tests.support.tiny import make_tokenizer

WINDOW = 16
"""Tokens of every sliding window."""
ORIGINAL = 64
"""Original length of every scaled rope."""
BASE: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 128,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "initializer_range": 0.12,
    "tie_word_embeddings": False,
}
FAMILIES: dict[str, dict[str, Any]] = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text())
"""Settings by family: `type`, the settings that differ from `BASE`, and for vision models `text` and `vision`."""

CORE = (
    "llama-tied-llama3rope",
    "qwen3",
    "qwen3_moe",
    "mistral-sliding",
    "gemma2",
    "gemma3-text",
    "phi4-mini-longrope",
    "olmo3",
    "granite",
    "cohere",
    "deepseek_v3",
    "gpt_oss",
    "qwen3_5-text",
    "granite4-hybrid",
    "stablelm",
)
"""Families that every run of the tests covers: one for each peculiarity."""

NO_LIMIT = ("mamba", "mamba2", "bloom")
"""Model types whose configurations name no longest sequence."""


def family_config(name: str) -> Any:
    """Return the configuration of family `name`."""
    from transformers import AutoConfig

    settings = dict(FAMILIES[name])
    kind = settings.pop("type")
    eos = make_tokenizer().eos_token_id
    ids = {"bos_token_id": None, "eos_token_id": eos, "pad_token_id": eos}
    special = {field: 500 + number for number, field in enumerate(settings.pop("special", []))}
    base = {key: value for key, value in BASE.items() if kind not in NO_LIMIT or key != "max_position_embeddings"}
    if "text" not in settings:
        return AutoConfig.for_model(kind, **{**base, **ids, **settings})
    text, vision = settings.pop("text"), settings.pop("vision")
    return AutoConfig.for_model(
        kind, text_config={**base, **ids, **text}, vision_config=vision, **{**ids, **special, **settings}
    )


def make_family(name: str, folder: Path) -> Path:
    """Save a random float32 model of family `name` in `folder`, with a tokenizer.

    Vectors (norms, biases, sinks) and routing corrections are random too: at their initial zeros and ones a mix-up
    would not show.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    config = family_config(name)
    kind = AutoModelForImageTextToText if "text" in FAMILIES[name] else AutoModelForCausalLM
    torch.manual_seed(0)
    model = kind.from_config(config).to(torch.float32)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for key, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if key.endswith("e_score_correction_bias"):
                tensor.copy_(0.2 * torch.randn(tensor.shape, generator=generator))
            elif isinstance(tensor, torch.nn.Parameter) and tensor.ndim == 1:
                tensor.add_(0.1 * torch.randn(tensor.shape, generator=generator))
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


class Families:
    """Folders of families below `root`, each made at its first use."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def __truediv__(self, name: str) -> Path:
        folder = self._root / name
        return folder if folder.exists() else make_family(name, folder)
