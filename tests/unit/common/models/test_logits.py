"""The transform of the logits: read from the configuration, and refused by name where the model has another."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from common.models.logits import LogitTransform, check_logit_transform, logit_transform


def tiny(kind: str, **settings: Any) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0}
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **sizes, **heads, **settings))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("kind", "settings", "transform"),
    [
        ("gemma2", {"final_logit_softcapping": 30.0}, LogitTransform(softcap=30.0)),
        ("nanochat", {"final_logit_softcapping": 15.0}, LogitTransform(softcap=15.0)),
        ("cohere", {"logit_scale": 0.0625}, LogitTransform(scale=0.0625)),
        ("granite", {"logits_scaling": 1.1}, LogitTransform(scale=1 / 1.1)),
        ("llama", {}, LogitTransform()),
    ],
)
def test_known_transforms_pass_and_others_are_refused(
    kind: str, settings: dict[str, Any], transform: LogitTransform, dtype: torch.dtype
) -> None:
    """The logits of these weights are about 0.01: only a probe of known logits shows a cap."""
    model = tiny(kind, **settings).to(dtype)
    assert logit_transform(model.config) == transform
    check_logit_transform(model, model.base_model, transform)
    for other in {LogitTransform(), LogitTransform(scale=0.9), LogitTransform(softcap=50.0)} - {transform}:
        with pytest.raises(ValueError, match=type(model).__name__):
            check_logit_transform(model, model.base_model, other)


def test_other_input_of_the_output_layer_is_refused() -> None:
    model = tiny("llama")
    hook = model.lm_head.register_forward_pre_hook(lambda _, inputs: (inputs[0] + 0.1,))
    with pytest.raises(ValueError, match="LlamaForCausalLM"):
        check_logit_transform(model, model.base_model, LogitTransform())
    hook.remove()
