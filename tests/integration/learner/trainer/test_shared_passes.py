"""Passes without gradients over several ranks: collective under ZeRO-3, and each rank computes its share alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray

from common.config.model import Config
from common.protocol.schema import ScoredTrajectory
from learner.cluster.services import Services
from learner.trainer.micro_batch import student_sequence
from tests.support.learner_ranks import Ranks, smooth_config
from tests.support.scored import make_scored

LORA = {"rank": 4, "alpha": 8}


def computed(rank: int, config: Config, shares: list[list[ScoredTrajectory]]) -> dict[str, Any]:
    """Every kind of pass over this rank's share, and the tokens of its forward passes."""
    from torch import nn

    from learner.trainer.engine import LearnerEngine

    inference = LearnerEngine(config).inference
    tokens = 0

    def count(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        nonlocal tokens
        tokens += inputs[0].numel() if isinstance(module, nn.Embedding) else 0

    hook = nn.modules.module.register_module_forward_pre_hook(count)
    share = shares[rank]
    sequences = [student_sequence(item) for item in share]
    results = {
        "logprobs": inference.logprobs(sequences),
        "topk": inference.topk(sequences, 4),
        "base": inference.score_with_base([(one.trajectory, one.trajectory.prompt.teacher_ids) for one in share]),
    }
    hook.remove()
    return {**results, "tokens": tokens}


@pytest.mark.parametrize("cut", [2, 0, 8], ids=["uneven", "all on one", "all on the other"])
def test_two_ranks_share_a_pass_and_change_no_value(one: Ranks, two: Ranks, tiny_model: Path, cut: int) -> None:
    """One sequence a pass, so that the ranks' passes differ in number."""
    config = smooth_config(tiny_model, 3, learner={"micro_batch_tokens": 1, "lora": LORA})
    scored = make_scored(8)
    (alone,) = one.call(computed, config, [scored])
    first, second = two.call(computed, config, [scored[:cut], scored[cut:]])
    assert len(first["logprobs"]) == cut
    for name in ("logprobs", "topk"):
        for shared, expected in zip([*first[name], *second[name]], alone[name], strict=True):
            np.testing.assert_array_equal(shared, expected)
    for shared, expected in zip([*first["base"], *second["base"]], alone["base"], strict=True):
        np.testing.assert_array_equal(shared.logprobs, expected.logprobs)
        np.testing.assert_array_equal(shared.tail_logprob, expected.tail_logprob)
    fillers = 2 * 3 * abs(len(scored) - 2 * cut)  # two tokens in each of the three kinds' passes
    assert first["tokens"] + second["tokens"] == alone["tokens"] + fillers


async def test_the_driver_gives_each_rank_its_share(cluster: None, tiny_model: Path) -> None:
    sections = {"rollout": {"topk_from": "learner"}, "teacher": {"kind": "base"}, "loss": {"top_k": 4}}
    config = smooth_config(tiny_model, 3, learner={"ranks": 2, "lora": LORA}, **sections)
    services = Services(config)
    await services.wait_ranks(services.begin_ranks())
    await services.give_contexts({})
    scored = make_scored(3, k=4)
    items = [ray.put(one.trajectory) for one in scored]
    for group in ([items[:2], items[2:]], [items, []], [[], items]):
        prepared = await services.prepare(group)
        values = ray.get([one.item for one in prepared])
        assert [one.trajectory.sample_id for one in values] == [one.trajectory.sample_id for one in scored]
        assert {one.span.track for one in prepared} == {f"rank {n}" for n, share in enumerate(group) if share}
    sequences = [student_sequence(one) for one in scored]
    both = await services.probe_learner(sequences)
    assert [len(one) for one in both] == [len(one.response_ids) for one in sequences]
    services.close()
