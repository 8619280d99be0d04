"""Checksums of weights: the one for devices sees every change that the one for host memory sees."""

from __future__ import annotations

import pytest
import torch
import xxhash

from common.weight_sync import checksum
from common.weight_sync.checksum import mixed_sum


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checksum, "WORDS_AT_A_TIME", 7)


def data(length: int) -> torch.Tensor:
    return torch.randint(0, 256, (length,), dtype=torch.uint8, generator=torch.Generator().manual_seed(length))


def test_host_memory_is_hashed_with_xxh3() -> None:
    assert checksum.checksum(data(1000)) == xxhash.xxh3_64_digest(data(1000).numpy().tobytes())


@pytest.mark.parametrize("length", [1, 3, 4, 29, 64, 131])
def test_any_changed_bit_changes_the_sum(length: int) -> None:
    original = data(length)
    seen = {mixed_sum(original)}
    for bit in range(8 * length):
        changed = original.clone()
        changed[bit // 8] ^= 1 << bit % 8
        seen.add(mixed_sum(changed))
    assert len(seen) == 8 * length + 1


def test_words_that_change_places_change_the_sum() -> None:
    words = data(400).view(torch.int32)
    seen = {mixed_sum(words.roll(shift).view(torch.uint8)) for shift in range(100)}
    assert len(seen) == 100


def test_zeros_are_not_alike() -> None:
    assert len({mixed_sum(torch.zeros(length, dtype=torch.uint8)) for length in range(50)}) == 50


def test_pieces_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    small = mixed_sum(data(1000))
    monkeypatch.setattr(checksum, "WORDS_AT_A_TIME", 1 << 20)
    assert mixed_sum(data(1000)) == small


def test_the_sum_is_the_formula_modulo_two_to_the_64() -> None:
    """Against Python's own integers."""
    words = data(400).view(torch.int32)
    total = 400
    for position, word in enumerate(words.tolist()):
        key = (position * checksum.SPREAD + 2**63) % 2**64 - 2**63
        total += (word + 1) * ((key ^ key >> 29) | 1)
    assert int.from_bytes(mixed_sum(words.view(torch.uint8)), "little") == total % 2**64
