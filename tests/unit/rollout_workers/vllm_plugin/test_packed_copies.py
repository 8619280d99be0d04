"""Packed weights of a CPU engine's layers after a reload."""

from __future__ import annotations

from typing import Any

import pytest
from torch import nn

from common.weight_sync.collective import SyncError
from rollout_workers.vllm_plugin.packed_copies import PackedCopies


class Method:
    """Packs a layer, as vLLM's methods do."""

    def process_weights_after_loading(self, layer: Any) -> None:
        layer.cpu_linear = object()


def model(*, tied: bool = True) -> Any:
    built = nn.Module()
    for name in ("embed", "head"):
        layer: Any = nn.Linear(2, 3)
        layer.quant_method = Method()
        layer.cpu_linear = object()
        setattr(built, name, layer)
    if tied:
        built.head.weight = built.embed.weight
    return built


def test_a_tied_output_layer_takes_the_new_copy_of_the_embedding() -> None:
    loaded = model()
    packed = PackedCopies(loaded)
    loaded.embed.cpu_linear = new = object()
    packed.renew()
    assert loaded.head.cpu_linear is loaded.embed.cpu_linear is new


def test_an_old_copy_is_packed_again_from_the_weight() -> None:
    loaded = model(tied=False)
    packed, old = PackedCopies(loaded), loaded.head.cpu_linear
    loaded.embed.cpu_linear = new = object()
    packed.renew()
    assert loaded.embed.cpu_linear is new
    assert loaded.head.cpu_linear not in (old, new)


def test_an_old_copy_without_a_weight_is_named() -> None:
    loaded = model(tied=False)
    packed = PackedCopies(loaded)
    loaded.head.weight = nn.Parameter(loaded.head.weight.new_empty(0))
    with pytest.raises(SyncError, match="packed weights of head"):
        packed.renew()
