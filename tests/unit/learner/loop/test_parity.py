"""The parity gate on numbers: what passes, what must not."""

from __future__ import annotations

import numpy as np
import pytest

from common.config.model import SyncConfig
from learner.loop.parity import ParityBounds, ParityError, ParityGate, parity_bounds

RNG = np.random.default_rng(0)
TOKENS, NOISE = 200, 1e-6
BOUNDS = parity_bounds(SyncConfig(), "float32")
BF16_BOUNDS = parity_bounds(SyncConfig(), "bfloat16")


def split(values: np.ndarray) -> list[np.ndarray]:
    return np.split(values.astype(np.float32), 4)


def noisy(values: np.ndarray) -> list[np.ndarray]:
    return split(values + RNG.normal(0, NOISE, TOKENS))


def begun() -> tuple[ParityGate, np.ndarray]:
    level = RNG.uniform(-5, -0.1, TOKENS)
    gate = ParityGate(BOUNDS)
    gate.begin(noisy(level), split(level))
    return gate, level


def test_an_engine_that_follows_passes_at_every_size_of_step() -> None:
    gate, level = begun()
    for version, size in enumerate([1e-2, 1e-4, 1e-6, 1e-8], start=1):
        level = level + RNG.normal(0, size, TOKENS)
        report = gate.check(version, noisy(level), split(level))
        assert report.max_nats < 1e-5
        assert report.noise_nats == pytest.approx(NOISE, rel=0.2)


def test_an_engine_whose_noise_grows_by_half_is_not_stopped() -> None:
    gate, level = begun()
    for version in range(1, 51):
        level = level + RNG.normal(0, 1e-6, TOKENS)
        gate.check(version, split(level + RNG.normal(0, 1.5 * NOISE, TOKENS)), split(level))


def test_an_engine_that_keeps_its_old_weights_fails_though_the_level_is_within_the_bound() -> None:
    gate, level = begun()
    moved = level + RNG.normal(0, 2e-5, TOKENS)
    with pytest.raises(ParityError, match="left with old weights"):
        gate.check(1, noisy(level), split(moved))


def test_one_stale_layer_of_several_fails() -> None:
    gate, level = begun()
    rest, layer = RNG.normal(0, 2e-5, TOKENS), RNG.normal(0, 5e-6, TOKENS)
    with pytest.raises(ParityError, match="since version 0"):
        gate.check(1, noisy(level + rest), split(level + rest + layer))


def test_steps_below_the_noise_add_up_until_a_stale_layer_is_found() -> None:
    gate, level = begun()
    direction = RNG.normal(0, 5e-7, TOKENS)

    def stale_for(versions: int) -> None:
        for version in range(1, 1 + versions):
            gate.check(version, noisy(level), split(level + version * direction))

    stale_for(2)  # not yet visible
    with pytest.raises(ParityError, match="since version 0"):
        stale_for(20)


@pytest.mark.parametrize(
    ("tokens", "nats", "why"),
    [
        (3, 3e-4, r"and 3\.0\de-04 \(99% of the tokens; at most 2\.00e-04, sync\.parity_q99_nats"),
        (60, 1.5e-4, r"differ by \d\.\d\de-05 nats \(rms over 200 tokens; at most 5\.00e-05, sync\.parity_rms_nats"),
    ],
)
def test_a_difference_beyond_a_bound_fails_and_names_the_numbers(tokens: int, nats: float, why: str) -> None:
    gate, level = begun()
    off = level.copy()
    off[:tokens] += nats
    with pytest.raises(ParityError, match=rf"weight version 3: .*{why}"):
        gate.check(3, split(off), split(level))


def test_a_single_token_of_a_hundred_does_not_stop_a_run() -> None:
    gate, level = begun()
    off = level.copy()
    off[[7, 90]] += 3.0
    report = gate.check(1, split(off), split(level))
    assert report.max_nats == pytest.approx(3.0)
    assert report.q99_nats < 1e-5


def test_a_difference_before_the_first_step_is_no_matter_of_weights() -> None:
    level = RNG.uniform(-5, -0.1, TOKENS)
    with pytest.raises(ParityError, match=r"before the first step.*same weights.*student\.dtype=float32") as failure:
        ParityGate(BF16_BOUNDS).begin(split(level + RNG.normal(0, 0.3, TOKENS)), split(level))
    assert "did not get" not in str(failure.value)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_a_number_fails(bad: float) -> None:
    gate, level = begun()
    broken = level.copy()
    broken[0] = bad
    with pytest.raises(ParityError, match="weight version 1 the engine computes NaN"):
        gate.check(1, split(broken), split(level))
    with pytest.raises(ParityError, match="weight version 1 the learner computes NaN"):
        gate.check(1, split(level), split(broken))
    with pytest.raises(ParityError, match=r"before the first step the engine computes NaN .*: train another model"):
        ParityGate(BOUNDS).begin(split(broken), split(level))


def test_missing_tokens_fail() -> None:
    gate, level = begun()
    with pytest.raises(ParityError, match="engine scored"):
        gate.check(1, split(level)[:3], split(level))
    with pytest.raises(ParityError):
        gate.check(1, split(level)[:3], split(level)[:3])
    with pytest.raises(ParityError):
        ParityGate(ParityBounds(1.0, 1.0, 1.0)).begin([], [])


def test_a_check_without_a_floor_fails() -> None:
    with pytest.raises(ParityError, match="version 0"):
        ParityGate(ParityBounds(1.0, 1.0, 1.0)).check(1, split(np.zeros(4)), split(np.zeros(4)))


# In bfloat16 at lr 1e-6, measured with SmolLM2-135M: a step of the full learning rate moves the probe's log-probs by
# 0.07 nats, and two correct programs differ by 0.056.
BF16_NOISE, BF16_STEP, BF16_TOKENS = 0.056, 0.07, 256


def bf16_noise(rng: np.random.Generator) -> np.ndarray:
    """Noise of one side, with more large values than a normal distribution has."""
    return rng.standard_t(6, BF16_TOKENS) / np.sqrt(1.5) * BF16_NOISE / np.sqrt(2)


def follow_in_bf16(seed: int, missing: float, versions: int) -> None:
    """An engine that misses a share of every step; raises ParityError."""
    rng = np.random.default_rng(seed)
    level, step = rng.uniform(-5, -0.1, BF16_TOKENS), rng.normal(0, BF16_STEP, BF16_TOKENS)
    gate = ParityGate(BF16_BOUNDS)
    gate.begin(split(level + bf16_noise(rng)), split(level + bf16_noise(rng)))
    for version in range(1, versions + 1):
        moved = level + version * step
        gate.check(version, split(moved - missing * version * step + bf16_noise(rng)), split(moved + bf16_noise(rng)))


@pytest.mark.parametrize(("missing", "versions"), [(1.0, 3), (0.5, 6), (0.2, 15)])
def test_in_bfloat16_a_missing_share_is_found_within_some_versions(missing: float, versions: int) -> None:
    for seed in range(20):
        with pytest.raises(ParityError):
            follow_in_bf16(seed, missing, versions)


def test_in_bfloat16_an_engine_that_follows_is_not_stopped() -> None:
    for seed in range(200):
        follow_in_bf16(seed, 0.0, 25)
