"""GPT-OSS's experts in the form in which vLLM can reload them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

from torch import Tensor, nn

FUSED = re.compile(r"(.*\.mlp\.experts)\.((?:gate_up|down)_proj(?:_bias)?)")


def one_expert_at_a_time(model: nn.Module, weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """Yield (checkpoint name, tensor); of GPT-OSS the slice of each expert under a name with its number.

    vLLM's loader copies the fused tensors past the parameters' weight loaders, so that a reload would lose them. It
    takes single experts through the weight loaders.
    """
    from vllm.model_executor.models.gpt_oss import GptOssRoutedExperts

    fused = any(isinstance(layer, GptOssRoutedExperts) for layer in model.modules())
    for name, tensor in weights:
        match = FUSED.fullmatch(name) if fused else None
        if match is None:
            yield name, tensor
            continue
        for expert, part in enumerate(tensor):
            yield f"{match[1]}.{expert}.{match[2]}", part
