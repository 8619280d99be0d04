"""What a run asks of a cluster, and whether it fits."""

from __future__ import annotations

from typing import Any

from learner.cluster.placement import Bundle, bundles_of, shortfall
from tests.support.configs import config_of


def test_a_run_on_cpu_asks_for_nothing() -> None:
    assert bundles_of(config_of()) == []


def test_every_actor_with_a_gpu_has_a_bundle_the_largest_first() -> None:
    config = config_of(
        rollout={"workers": 2, "gpus_per_worker": 1, "tensor_parallel_size": 4},
        learner={"ranks": 2, "gpus_per_rank": 1},
        teacher={"gpus": 2},
        teachers={"far": {"url": "http://x", "gpus": 8}},
    )
    assert bundles_of(config) == [
        Bundle((("worker 0", 4),)),
        Bundle((("worker 1", 4),)),
        Bundle((("teacher default", 2),)),
        Bundle((("rank 0", 1),)),
        Bundle((("rank 1", 1),)),
    ]


def test_an_evaluation_asks_for_its_workers_alone() -> None:
    config = config_of(rollout={"workers": 2, "gpus_per_worker": 1}, learner={"gpus_per_rank": 1}, teacher={"gpus": 1})
    assert [bundle.name for bundle in bundles_of(config, workers_only=True)] == ["worker 0", "worker 1"]


def test_processes_that_fit_on_one_gpu_have_one_bundle() -> None:
    parts: dict[str, Any] = {
        "rollout": {"workers": 2, "gpus_per_worker": 0.1},
        "learner": {"gpus_per_rank": 0.7},
        "teacher": {"gpus": 0.1},
    }
    bundles = [(bundle.name, bundle.gpus) for bundle in bundles_of(config_of(**parts))]
    assert bundles == [("teacher default and rank 0 and worker 0 and worker 1", 1.0)]
    with_another = bundles_of(config_of(**parts, teachers={"big": {"gpus": 4}}))
    assert [bundle.gpus for bundle in with_another] == [4, 1.0]
    assert len(bundles_of(config_of(**{**parts, "teacher": {"gpus": 0.2}}))) == 4  # 1.1 GPUs: each by itself
    assert [bundle.name for bundle in bundles_of(config_of(**parts), workers_only=True)] == ["worker 0 and worker 1"]


def test_what_does_not_fit_is_named_with_the_numbers() -> None:
    bundles = [Bundle((("worker 0", 4),)), Bundle((("rank 0", 1),))]
    assert shortfall(bundles, {"a": 4, "b": 1}) is None
    assert shortfall(bundles, {"a": 5}) is None
    why = shortfall(bundles, {"a": 3, "b": 3})
    assert why is not None
    assert "asks for 5 GPUs, 4 of them on one node for worker 0; free are 6 (a: 3, b: 3)" in why
    assert "teacher.url" in why
    assert "free are 0 (none)" in str(shortfall(bundles, {}))


def parts(*gpus: float) -> list[Bundle]:
    return [Bundle(((f"worker {slot}", part),)) for slot, part in enumerate(gpus)]


def test_a_part_of_a_gpu_lies_on_one() -> None:
    assert shortfall(parts(0.6, 0.6), {"a": 2}) is None
    why = shortfall(parts(0.6, 0.6, 0.6), {"a": 2})  # 1.8 of 2, and no GPU has 0.6 left
    assert why is not None
    assert "0.6 of them on one node for worker 2; free are 2" in why
    assert shortfall(parts(1, 0.5, 0.5), {"a": 2}) is None
    assert shortfall(parts(1, 0.5), {"a": 0.5, "b": 1}) is None
    assert shortfall(parts(2), {"a": 1.5}) is not None
    assert shortfall(parts(0.3, 0.3, 0.3), {"a": 0.9}) is None


def test_one_gpu_and_a_half_are_refused_by_name() -> None:
    why = shortfall(parts(1.5), {"a": 8})
    assert why is not None
    assert why.startswith("worker 0 asks for 1.5 GPUs")
    assert "rollout.gpus_per_worker" in why
