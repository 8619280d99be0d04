"""Exports of families that transformers keeps under other names: the names of the source, the rest of it as it was."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.core_model_loading import Chunk, WeightConverter

from common.config.model import LoraConfig
from common.models.checkpoint_layout import checkpoint_units
from common.models.families import model_on_meta
from learner.trainer.export import WeightView
from learner.trainer.lora import add_adapters
from learner.trainer.source_files import exported_files, read_source_files
from learner.trainer.untrained import freeze_untrained
from tests.support.families import Families, family_config

RENAMED = {
    "qwen3_moe": 0,
    "mixtral": 0,
    "deepseek_v3": 0,
    "gpt_oss": 0,
    "nemotron_h": 0,
    "gpt_neox": 0,
    "ernie4_5_moe": 0,
    "qwen3_5-vl": 33,
    "gemma3-vl": 50,
}
"""Families, and the number of tensors in their checkpoints that training leaves alone."""


def stored(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


@pytest.mark.parametrize("name", RENAMED)
def test_an_export_has_the_names_of_its_source_and_reloads_to_the_bit(
    name: str, families: Families, tmp_path: Path
) -> None:
    source, folder = families / name, tmp_path / "export"
    model = AutoModelForCausalLM.from_pretrained(source)
    freeze_untrained(model)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.01)
    view = WeightView(model)
    untrained = view.untrained(str(source))
    assert len(untrained) == RENAMED[name]
    files = exported_files(read_source_files(str(source)), "float32")
    view.export(folder, files, None, str(source), untrained, write=True, group_bytes=1)
    before, after = stored(source), stored(folder)
    assert view.export_bytes(None, untrained) == sum(tensor.nbytes for tensor in after.values())
    assert {key: value.shape for key, value in after.items()} == {key: value.shape for key, value in before.items()}
    for key in untrained:
        assert torch.equal(after[key], before[key])
    sent = dict(view.gathered(1))
    assert [spec.name for spec in view.specs] == list(sent)
    assert all(torch.equal(after[key], value) for key, value in sent.items())
    assert not sent.keys() & untrained.keys()
    reloaded = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    for key, value in model.state_dict().items():
        assert torch.equal(value, reloaded[key]), key


def test_layers_are_sent_in_order_and_embeddings_last(families: Families) -> None:
    """Experts too, although they are as large: an engine that waited for them would hold all layers twice."""
    view = WeightView(AutoModelForCausalLM.from_pretrained(families / "qwen3_moe"))
    names = [spec.name for spec in view.specs]
    assert names[-2:] == ["model.embed_tokens.weight", "lm_head.weight"]
    layers = [name.split(".")[2] for name in names[:-3]]
    assert layers == sorted(layers)


class Joined(nn.Module):
    """A model of which two weights are one tensor of the checkpoint."""

    def __init__(self) -> None:
        super().__init__()
        self.config: Any = None
        self._weight_conversions = [WeightConverter("both.weight", ["a.weight", "b.weight"], [Chunk(dim=0)])]
        self.a, self.b = nn.Linear(2, 3, bias=False), nn.Linear(2, 3, bias=False)


def test_weights_that_the_checkpoint_joins_are_refused() -> None:
    with torch.device("meta"):
        model = Joined()
    with pytest.raises(ValueError, match="Joined: its checkpoint joins weights"):
        checkpoint_units(model, {name: p.detach() for name, p in model.named_parameters()})


def test_adapters_leave_a_vision_tower_alone() -> None:
    model, lora = model_on_meta(family_config("gemma3-vl")), LoraConfig(rank=4, publish="adapter")
    add_adapters(model, lora)
    adapted = [name for name, module in model.named_modules() if hasattr(module, "lora_A")]
    assert adapted
    assert all("language_model" in name for name in adapted)
    size = sum(parameter.nbytes for parameter in model.parameters() if parameter.requires_grad)
    assert WeightView(model).export_bytes(lora, {}) == size
