"""A teacher that follows its student takes the tensors that the learner sends, under their checkpoint names."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

from common.models.checkpoint_layout import other_modules
from common.weight_sync.collective import SyncError
from learner.trainer.export import WeightView
from teacher_server.backends.hf.live_weights import LiveWeights
from tests.support.families import Families


@pytest.mark.parametrize("decay", [None, 0.5])
@pytest.mark.parametrize("name", ["qwen3_moe", "mixtral", "deepseek_v3", "gemma3-vl"])
def test_it_follows_families_with_other_names(name: str, decay: float | None, families: Families) -> None:
    student, model, before = (AutoModelForCausalLM.from_pretrained(families / name) for _ in range(3))
    others = tuple(f"{module}." for module in other_modules(student))
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(torch.randn_like(parameter))
    LiveWeights(model, decay).load(WeightView(student).gathered(1))
    start, end = dict(before.named_parameters()), dict(student.named_parameters())
    for key, parameter in model.named_parameters():
        share = 0.0 if key.startswith(others) else 1.0 if decay is None else 1 - decay
        torch.testing.assert_close(parameter, torch.lerp(start[key], end[key], share), rtol=0, atol=1e-6)


def test_an_expert_that_does_not_arrive_is_named(families: Families) -> None:
    model = AutoModelForCausalLM.from_pretrained(families / "qwen3_moe")
    missing = "model.layers.1.mlp.experts.2.up_proj.weight"
    with pytest.raises(SyncError, match=f"1 parameters did not arrive, the first is {missing}"):
        LiveWeights(model, None).load(pair for pair in WeightView(model).gathered(1) if pair[0] != missing)
