"""Lower bounds of a step, against the same arithmetic written out for Qwen 3 8B and 32B."""

from __future__ import annotations

import pytest

from deploy.docs_tools import roofline
from deploy.docs_tools.roofline import Layout
from deploy.docs_tools.sizes import PAGE, qwen3

ONE_NODE = Layout("8B", "32B", 2, 2, 4)
WEIGHTS_8B = 7_568_405_504
"""Weights in 36 layers, the norms and the output layer."""


def test_a_decode_step_reads_the_weights_and_the_keys_of_what_fits() -> None:
    kv = 2 * 36 * 8 * 128 * 2
    fits = (72e9 - 2 * 8_190_735_360) / (1536 * kv)
    assert fits < 256  # of a worker's share
    assert roofline.concurrent(ONE_NODE) == pytest.approx(fits)
    assert roofline.concurrent(Layout("8B", "32B", 8, 16, 8)) == 64
    step = (2 * WEIGHTS_8B + fits * 1024 * kv) / 3.35e12
    prefill = 256 * 512 * (2 * WEIGHTS_8B + 4 * 36 * 4096 * 256) / 989e12
    assert roofline.rollout_s(ONE_NODE) == pytest.approx(prefill + 256 / fits * 1024 * step)


def test_a_stored_context_costs_its_keys_only() -> None:
    weights = 32_762_123_264 - 151_936 * 5120
    tokens = 512 * 1536
    assert roofline.score_s(ONE_NODE) == pytest.approx(
        tokens * (2 * weights + 4 * 64 * 8192 * (2048 + 768)) / (2 * 989e12)
    )
    again = 512 * 2048 * (2 * weights + 4 * 64 * 8192 * 1024) / (2 * 989e12)
    assert roofline.score_without_store_s(ONE_NODE) - roofline.score_s(ONE_NODE) == pytest.approx(again)


def test_training_takes_four_forward_passes() -> None:
    forward = 512 * 1536 * (2 * WEIGHTS_8B + 4 * 36 * 4096 * 768)
    assert roofline.train_s(ONE_NODE) == pytest.approx(4 * forward / (4 * 989e12))


def test_a_sync_sends_the_weights_once() -> None:
    assert roofline.sync_s(qwen3("8B"), 50e9) == pytest.approx(0.3276, abs=1e-4)
    assert roofline.sync_s(qwen3("32B"), 50e9) == pytest.approx(1.31, abs=1e-2)  # the page says 1.3 s


def test_the_page_is_current() -> None:
    assert roofline.table() in PAGE.read_text()
