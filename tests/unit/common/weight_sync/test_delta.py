"""Deltas between two buckets: exact in every bit and never longer than the bucket."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from common.weight_sync import delta


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(delta, "CHUNK_ITEMS", 1000)


def pair(items: int, item_bytes: int, changed: float, seed: int) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Random bits, and the same with a share of the items changed."""
    random = np.random.default_rng(seed)
    old = random.integers(0, 256**item_bytes, items, dtype=f"u{item_bytes}")
    new = old.copy()
    new[random.random(items) < changed] ^= 1
    return old.view(np.uint8), new.view(np.uint8)


@settings(max_examples=200)
@given(
    items=st.integers(0, 3500),
    item_bytes=st.sampled_from([2, 4]),
    changed=st.sampled_from([0.0, 0.0005, 0.003, 0.02, 0.1, 0.5, 1.0]),
    seed=st.integers(0, 100),
)
def test_an_applied_delta_restores_every_bit(items: int, item_bytes: int, changed: float, seed: int) -> None:
    old, new = pair(items, item_bytes, changed, seed)
    patch = delta.encode(old, new, item_bytes)
    if patch is None:
        assert changed >= 0.5 or items < 20
        return
    assert patch.nbytes < new.nbytes or not items
    delta.apply(old, patch, item_bytes)
    assert (old == new).all()


@pytest.mark.parametrize(("changed", "form"), [(0, 0), (0.005, 1), (0.2, 2), (1, 3)])
def test_each_form_is_taken_where_it_is_the_smallest(changed: float, form: int) -> None:
    old, new = pair(1000, 2, changed, 0)
    patch = delta.encode(old, new, 2, limit=10_000)
    assert patch is not None
    assert delta.HEADER.unpack(patch[: delta.HEADER.size].tobytes())[0] == form
    delta.apply(old, patch, 2)
    assert (old == new).all()


def test_one_change_far_from_the_start_costs_a_few_bytes() -> None:
    old = np.zeros(1000, np.uint16)
    new = old.copy()
    new[997] = 7
    patch = delta.encode(old.view(np.uint8), new.view(np.uint8), 2)
    assert patch is not None
    assert patch.nbytes == delta.HEADER.size + 4 * (1 + 2)  # three bridges of 256, and the change


def test_nothing_is_rounded_away() -> None:
    old = np.array([0.0, np.nan, 1.0], np.float32)
    new = np.array([-0.0, -np.nan, 1.0], np.float32)
    patch = delta.encode(old.view(np.uint8), new.view(np.uint8), 4, limit=1000)
    assert patch is not None
    delta.apply(old.view(np.uint8), patch, 4)
    assert old.tobytes() == new.tobytes()


@given(seed=st.integers(0, 1000))
def test_a_damaged_delta_is_an_error_or_gives_other_bytes(seed: int) -> None:
    """Never a crash of another kind: the checksum after it finds the rest."""
    random = np.random.default_rng(seed)
    old, new = pair(2500, 2, 0.01, seed)
    patch = delta.encode(old, new, 2)
    assert patch is not None
    damaged = patch.copy()
    damaged[random.integers(len(damaged))] ^= 1 << random.integers(8)
    try:
        delta.apply(old, damaged, 2)
    except delta.DeltaError:
        return
    assert (old != new).any()


def test_a_delta_for_another_bucket_is_an_error() -> None:
    old, new = pair(2500, 2, 0.01, 0)
    patch = delta.encode(old, new, 2)
    assert patch is not None
    for wrong in (old[:2000], np.concatenate([old, old])):
        with pytest.raises(delta.DeltaError):
            delta.apply(wrong.copy(), patch, 2)
