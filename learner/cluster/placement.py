"""Where a run's actors go: one placement group for all of them, so that a run starts whole or says what is missing.

Actors of the CPU need no place; without GPUs there is no group.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from common.config.model import Config, RolloutConfig

START_TIMEOUT_S = 900.0


class PlacementError(RuntimeError):
    """The cluster cannot hold the run; the text says what is asked for, what is there, and what would fit."""


@dataclass(frozen=True, slots=True)
class Bundle:
    """GPUs that must lie on one node, for one actor or for two that share them; each by name (``worker 0``, ``rank 1``,
    ``teacher default``) with its part.
    """

    parts: tuple[tuple[str, float], ...]

    @property
    def gpus(self) -> float:
        """All parts together."""
        return sum(gpus for _, gpus in self.parts)

    @property
    def name(self) -> str:
        """The actors that sit here."""
        return " and ".join(name for name, _ in self.parts)


def bundles_of(config: Config, *, workers_only: bool = False) -> list[Bundle]:
    """What the run asks for, or its rollout workers alone, the largest first; actors without a GPU are left out."""
    rollout, learner = config.rollout, config.learner
    teachers = [(f"teacher {n}", one.gpus) for n, one in config.named_teachers().items() if one.url is None]
    ranks = [(f"rank {rank}", learner.gpus_per_rank) for rank in range(learner.ranks)]
    per_worker = rollout.gpus_per_worker * rollout.tensor_parallel_size
    workers = [(f"worker {seat}", per_worker) for seat in range(rollout.workers)]
    if workers_only:
        teachers, shared = [], [Bundle((part,)) for part in workers]
    elif rollout.colocated:
        shared = [Bundle(pair) for pair in zip(workers, ranks, strict=True)]
    else:
        shared = [Bundle((part,)) for part in (*ranks, *workers)]
    asked = [*(Bundle((part,)) for part in teachers), *shared]
    return sorted((bundle for bundle in asked if bundle.gpus), key=lambda bundle: -bundle.gpus)


def shortfall(bundles: Sequence[Bundle], free: Mapping[str, float]) -> str | None:
    """Why `bundles` do not fit on nodes with `free` GPUs each (by node name); None where they do.

    First fit, largest first. A part of a GPU lies on one GPU, as Ray places it, and more than one are whole ones. What
    is free of a node's GPUs is taken to be whole GPUs and one rest: Ray does not say which GPU has how much left.
    """
    if (why := impossible(bundles)) is not None:
        return why
    left = {name: [1.0] * int(gpus) + ([gpus % 1] if gpus % 1 else []) for name, gpus in free.items()}
    for bundle in bundles:
        node = next((name for name, gpus in left.items() if _taken(gpus, bundle.gpus) is not None), None)
        if node is None:
            asked = sum(one.gpus for one in bundles)
            there = ", ".join(f"{name}: {gpus:g}" for name, gpus in free.items()) or "none"
            return (
                f"the run asks for {asked:g} GPUs, {bundle.gpus:g} of them on one node for {bundle.name}; free are "
                f"{sum(free.values()):g} ({there}). Lower rollout.workers, rollout.tensor_parallel_size, learner.ranks "
                "or their gpus, or name a running teacher with teacher.url"
            )
        left[node] = _taken(left[node], bundle.gpus) or []
    return None


def impossible(bundles: Sequence[Bundle]) -> str | None:
    """Why no cluster can ever hold `bundles`; None where one can."""
    odd = next((bundle for bundle in bundles if bundle.gpus > 1 and bundle.gpus % 1), None)
    if odd is None:
        return None
    return (
        f"{odd.name} asks for {odd.gpus:g} GPUs: Ray gives out parts of one GPU, or whole ones. Change "
        "rollout.gpus_per_worker, rollout.tensor_parallel_size, learner.gpus_per_rank or the teacher's gpus"
    )


def _taken(gpus: Sequence[float], asked: float) -> list[float] | None:
    """What is left of a node's GPUs (of each, how much) after `asked`; None where it does not fit."""
    whole = [gpu for gpu in gpus if gpu == 1]
    if asked >= 1:
        rest = [gpu for gpu in gpus if gpu < 1]
        return rest + whole[int(asked) :] if len(whole) >= asked else None
    fitting = min((gpu for gpu in gpus if gpu >= asked - 1e-9), default=None)
    if fitting is None:
        return None
    left = [*gpus]
    left.remove(fitting)
    return [*left, fitting - asked]


class Placement:
    """The placement group of one run; `options` of an actor by its name."""

    def __init__(self, bundles: Sequence[Bundle]) -> None:
        self._places = {
            name: (index, gpus) for index, bundle in enumerate(bundles) for name, gpus in bundle.parts if gpus
        }
        self._group: PlacementGroup | None = None
        if bundles:
            self._group = placement_group([{"GPU": bundle.gpus} for bundle in bundles], strategy="PACK")

    @classmethod
    def reserve(cls, config: Config, *, workers_only: bool = False, placement_timeout_s: float = 0.0) -> Placement:
        """Reserve what the run, or its workers alone, ask for and wait until it is there.

        Raises PlacementError where it cannot be: at once, or after `placement_timeout_s`, where nodes may come (an autoscaler's,
        one that is being replaced) or GPUs be given back. The placement group is there meanwhile: it is what an
        autoscaler sees.
        """
        bundles = bundles_of(config, workers_only=workers_only)
        why = impossible(bundles) if placement_timeout_s else shortfall(bundles, free_gpus())
        if why is not None:
            raise PlacementError(why)
        placement = cls(bundles)
        limit_s = placement_timeout_s or START_TIMEOUT_S
        if placement._group is not None and not placement._group.wait(limit_s):
            why = shortfall(bundles, free_gpus())  # a group that waits holds nothing
            placement.release()
            asked = sum(bundle.gpus for bundle in bundles)
            what = f"{asked:g} GPUs were not free together within {limit_s:.0f} s (run.placement_timeout_s)"
            raise PlacementError(what if why is None else f"{what}: {why}")
        return placement

    def options(self, name: str) -> dict[str, Any]:
        """Options for the actor `name`; a replacement takes the place of the one it replaces."""
        if self._group is None or name not in self._places:
            return {"num_cpus": 0, "num_gpus": 0}
        index, gpus = self._places[name]
        strategy = PlacementGroupSchedulingStrategy(self._group, placement_group_bundle_index=index)
        return {"num_cpus": 0, "num_gpus": gpus, "scheduling_strategy": strategy}

    def release(self) -> None:
        """Give the places back; actors in them end."""
        if self._group is not None:
            remove_placement_group(self._group)
            self._group = None


def free_gpus() -> dict[str, float]:
    """Free GPUs of each living node, by its address."""
    per_node = ray._private.state.available_resources_per_node()
    names = {node["NodeID"]: node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"]}
    return {
        f"{names[node]}#{node[:6]}": float(resources.get("GPU", 0.0))
        for node, resources in per_node.items()
        if node in names and resources.get("GPU", 0.0)
    }


def elsewhere(rollout: RolloutConfig) -> dict[str, Any]:
    """Options for a rollout worker outside of the group: wherever the cluster has room, now or later."""
    gpus = rollout.gpus_per_worker * rollout.tensor_parallel_size
    return {"num_cpus": 0, "num_gpus": gpus, "scheduling_strategy": "SPREAD"}


def draining_nodes() -> set[str]:
    """Ray's names of the nodes that are going to be taken away: idle ones of an autoscaler, preempted ones."""
    return set(ray._private.state.state.get_draining_nodes())
