"""Reserves the GPUs of a run's actors in one placement group: the run starts whole, or reports what is missing.

Actors without a GPU are placed anywhere; a run without GPUs has no group.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from common.config.gpus import parts_of_one_gpu, reserved_gpus
from common.config.model import Config, RolloutConfig

START_TIMEOUT_S = 900.0


class PlacementError(RuntimeError):
    """The cluster cannot hold the run; the text says what the run needs, what is free, and what to lower."""


@dataclass(frozen=True, slots=True)
class Bundle:
    """GPUs on one node, for one actor or for several that share one GPU. `parts` are (actor's name, GPUs), with names
    as ``worker 0``, ``rank 1``, ``teacher default``.
    """

    parts: tuple[tuple[str, float], ...]

    @property
    def gpus(self) -> float:
        """Sum over the parts, as precise as Ray counts."""
        return round(sum(gpus for _, gpus in self.parts), 4)

    @property
    def name(self) -> str:
        """Names of the actors."""
        return " and ".join(name for name, _ in self.parts)


def bundles_of(config: Config, *, workers_only: bool = False) -> list[Bundle]:
    """Bundles of the run, or of its rollout workers alone, the largest first; actors without a GPU are left out.

    Actors with parts of a GPU are on one GPU if it holds them all; otherwise Ray places each by itself.
    """
    reserved = reserved_gpus(config.learner, config.rollout, config.named_teachers())
    if workers_only:
        reserved = {name: gpus for name, gpus in reserved.items() if name.startswith("worker ")}
    together = parts_of_one_gpu(reserved)
    bundles = [Bundle(((name, gpus),)) for name, gpus in reserved.items() if name not in together]
    bundles.append(Bundle(tuple(together.items())))
    return sorted((bundle for bundle in bundles if bundle.gpus), key=lambda bundle: -bundle.gpus)


def shortfall(bundles: Sequence[Bundle], free: Mapping[str, float]) -> str | None:
    """Explain why `bundles` do not fit on nodes with `free` GPUs (node name -> GPUs); None if they fit.

    First fit, largest first. As in Ray, a fraction lies on one GPU, and more than one GPU means whole GPUs. Ray does
    not report how much each GPU of a node has left, so free GPUs count as whole ones plus one remainder.
    """
    if (why := impossible(bundles)) is not None:
        return why
    left = {name: [1.0] * int(gpus) + ([gpus % 1] if gpus % 1 else []) for name, gpus in free.items()}
    for bundle in bundles:
        node = next((name for name, gpus in left.items() if _taken(gpus, bundle.gpus) is not None), None)
        if node is None:
            needed = sum(one.gpus for one in bundles)
            nodes = ", ".join(f"{name}: {gpus:g}" for name, gpus in free.items()) or "none"
            return (
                f"the run asks for {needed:g} GPUs, {bundle.gpus:g} of them on one node for {bundle.name}; free are "
                f"{sum(free.values()):g} ({nodes}). Lower rollout.workers, rollout.tensor_parallel_size, learner.ranks "
                "or their gpus, or name a running teacher with teacher.url"
            )
        left[node] = _taken(left[node], bundle.gpus) or []
    return None


def impossible(bundles: Sequence[Bundle]) -> str | None:
    """Explain why no cluster can ever hold `bundles`; None if one can."""
    odd = next((bundle for bundle in bundles if bundle.gpus > 1 and bundle.gpus % 1), None)
    if odd is None:
        return None
    return (
        f"{odd.name} asks for {odd.gpus:g} GPUs: Ray gives out parts of one GPU, or whole ones. Change "
        "rollout.gpus_per_worker, rollout.tensor_parallel_size, learner.gpus_per_rank or the teacher's gpus"
    )


def _taken(gpus: Sequence[float], asked: float) -> list[float] | None:
    """The rest of a node's GPUs (free share of each) after `asked` GPUs are taken; None if they do not fit."""
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
    """The placement group of one run; `options` gives the Ray options of an actor by its name."""

    def __init__(self, bundles: Sequence[Bundle]) -> None:
        self._slots = {
            name: (index, gpus) for index, bundle in enumerate(bundles) for name, gpus in bundle.parts if gpus
        }
        self._group: PlacementGroup | None = None
        if bundles:
            self._group = placement_group([{"GPU": bundle.gpus} for bundle in bundles], strategy="PACK")

    @classmethod
    def reserve(cls, config: Config, *, workers_only: bool = False, placement_timeout_s: float = 0.0) -> Placement:
        """Reserve the GPUs of the run, or of its workers alone, and wait until they are free.

        Raises PlacementError: at once without a `placement_timeout_s`, else after it. Meanwhile nodes may join or GPUs
        become free; an autoscaler sees the pending placement group as demand.
        """
        bundles = bundles_of(config, workers_only=workers_only)
        why = impossible(bundles) if placement_timeout_s else shortfall(bundles, free_gpus())
        if why is not None:
            raise PlacementError(why)
        placement = cls(bundles)
        limit_s = placement_timeout_s or START_TIMEOUT_S
        if placement._group is not None and not placement._group.wait(limit_s):
            why = shortfall(bundles, free_gpus())  # a pending group holds no GPU
            placement.release()
            needed = sum(bundle.gpus for bundle in bundles)
            what = f"{needed:g} GPUs were not free together within {limit_s:.0f} s (run.placement_timeout_s)"
            raise PlacementError(what if why is None else f"{what}: {why}")
        return placement

    def options(self, name: str) -> dict[str, Any]:
        """Ray options for the actor `name`; a replacement gets those of the actor it replaces."""
        if self._group is None or name not in self._slots:
            return {"num_cpus": 0, "num_gpus": 0}
        index, gpus = self._slots[name]
        strategy = PlacementGroupSchedulingStrategy(self._group, placement_group_bundle_index=index)
        return {"num_cpus": 0, "num_gpus": gpus, "scheduling_strategy": strategy}

    def release(self) -> None:
        """Free the GPUs; actors that use them end."""
        if self._group is not None:
            remove_placement_group(self._group)
            self._group = None


def unused_gpus(config: Config, gpus: float, *, workers_only: bool = False) -> str | None:
    """Name the run's actors that reserve no GPU on a cluster with `gpus` GPUs, and so run on CPU; None if none does."""
    rollout, learner = config.rollout, config.learner
    keys = {} if rollout.gpus_per_worker else {"rollout.gpus_per_worker": "rollout workers"}
    if not workers_only:
        keys |= {} if learner.gpus_per_rank else {"learner.gpus_per_rank": "ranks of the learner"}
        for name, one in config.named_teachers().items():
            if not one.gpus and one.url is None and one.kind != "base":
                section = "teacher" if name == "default" else f"teachers.{name}"
                keys[f"{section}.gpus"] = f"teacher {name}"
    if not gpus or not keys:
        return None
    return (
        f"the cluster has {gpus:g} GPUs, but these reserve none and run on CPU: {', '.join(keys.values())}. Set "
        f"{', '.join(keys)}"
    )


def cluster_gpus() -> float:
    """GPUs of the whole cluster, used or free."""
    return float(ray.cluster_resources().get("GPU", 0.0))


def free_gpus() -> dict[str, float]:
    """Free GPUs of each living node, by its address."""
    per_node = ray._private.state.available_resources_per_node()
    names = {node["NodeID"]: node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"]}
    return {
        f"{names[node]}#{node[:6]}": float(resources.get("GPU", 0.0))
        for node, resources in per_node.items()
        if node in names and resources.get("GPU", 0.0)
    }


def outside_options(rollout: RolloutConfig) -> dict[str, Any]:
    """Ray options for a rollout worker outside the group, on any node that has room, now or later."""
    gpus = rollout.gpus_per_worker * rollout.tensor_parallel_size
    return {"num_cpus": 0, "num_gpus": gpus, "scheduling_strategy": "SPREAD"}


def draining_nodes() -> set[str]:
    """Ray's ids of nodes about to be removed: idle ones of an autoscaler, preempted ones."""
    return set(ray._private.state.state.get_draining_nodes())
