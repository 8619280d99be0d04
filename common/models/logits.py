"""An architecture's changes to its logits after the output layer: one rule for learner and teacher."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

PROBE_LOGIT = 60.0
"""Largest logit of the probe: far above every soft cap."""
RELATIVE_TOLERANCE = 0.01
"""Allowed relative difference of probe logits and hidden states: twice the rounding of bfloat16."""


@dataclass(frozen=True, slots=True)
class LogitTransform:
    """Scale, then soft cap."""

    scale: float = 1.0
    softcap: float | None = None

    def __call__(self, logits: Tensor) -> Tensor:
        """Apply to the float32 product; may overwrite `logits`."""
        if self.scale != 1.0:
            logits = logits.mul_(self.scale)
        if self.softcap is not None:
            logits = logits.div_(self.softcap).tanh_().mul_(self.softcap)
        return logits


def logit_transform(config: Any) -> LogitTransform:
    """Read the transform of the logits from a Hugging Face configuration.

    Cohere multiplies by ``logit_scale``, Granite divides by ``logits_scaling``, Falcon-H1 multiplies by
    ``lm_head_multiplier``, Gemma caps with ``final_logit_softcapping``. `check_logit_transform` catches others.
    """
    text = config.get_text_config()
    scale = float(getattr(text, "logit_scale", None) or 1.0)
    scale *= float(getattr(text, "lm_head_multiplier", None) or 1.0)
    scale /= float(getattr(text, "logits_scaling", None) or 1.0)
    return LogitTransform(scale=scale, softcap=getattr(text, "final_logit_softcapping", None) or None)


def check_logit_transform(model: Any, decoder: Any, transform: LogitTransform) -> None:
    """Run a few tokens and put known logits in place of the output layer's; under ZeRO-3 a collective.

    So the comparison does not depend on weights or precision. Raises ValueError, naming the architecture, if the model
    makes other logits of them than `transform`, or feeds its output layer anything but a multiple of the hidden states
    of `decoder`: scores would be silently wrong.
    """
    import torch

    seen: dict[str, Tensor] = {}
    vocabulary = model.config.get_text_config().vocab_size  # a partitioned weight has no shape

    def known_logits(_module: Any, inputs: Any, output: Tensor) -> Tensor:
        seen["input"] = inputs[0]
        ramp = torch.linspace(-PROBE_LOGIT, PROBE_LOGIT, output.shape[-1], device=output.device)
        return ramp.expand(output.shape).clone()

    head = model.get_output_embeddings()
    hook = head.register_forward_hook(known_logits)
    ids = torch.arange(8, device=head.weight.device).mul(7).remainder(vocabulary).unsqueeze(0)
    try:
        with torch.no_grad():
            hidden = decoder(input_ids=ids, use_cache=False).last_hidden_state
            logits = model(input_ids=ids, use_cache=False).logits.float()
    finally:
        hook.remove()
    hidden, fed = hidden.float().flatten(), seen["input"].float().flatten()
    factor = float(fed @ hidden / (hidden @ hidden))
    ramp = torch.linspace(-PROBE_LOGIT, PROBE_LOGIT, logits.shape[-1], device=logits.device)
    difference = float((logits - transform(ramp / factor)).abs().max() / transform(ramp / factor).abs().max())
    stray = float((fed - factor * hidden).norm() / fed.norm())
    if not max(difference, stray) < RELATIVE_TOLERANCE:
        raise ValueError(
            f"{type(model).__name__} changes its logits after the output layer in an unknown way (by "
            f"{max(difference, stray):.2g} of their size): add it to common.models.logits.logit_transform"
        )
