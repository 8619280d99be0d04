"""A model larger than one device: under ZeRO-3 no rank ever holds all weights."""

from __future__ import annotations

import math
from pathlib import Path

from common.config.model import Config
from tests.support.learner_ranks import Ranks, smooth_config


def held_after_load(rank: int, config: Config) -> tuple[int, int, int]:
    """Count parameter elements right after loading: whole ones here, this rank's partitions, the model's."""
    import torch
    import torch.distributed as dist

    from learner.trainer.export import full_shape
    from learner.trainer.optimizer import deepspeed_config
    from learner.trainer.policy import load_policy

    settings = deepspeed_config(config.learner, 3, torch.float32, dist.get_world_size())
    policy = load_policy(config.student, config.learner, torch.device("cpu"), torch.float32, settings)
    parameters = list(policy.model.parameters())
    parts = sum(parameter.ds_tensor.numel() for parameter in parameters)
    return sum(p.numel() for p in parameters), parts, sum(math.prod(full_shape(p)) for p in parameters)


def test_weights_are_partitioned_as_they_are_loaded(two: Ranks, tiny_model: Path) -> None:
    for whole, part, total in two.call(held_after_load, smooth_config(tiny_model, 3)):
        assert whole == 0
        assert total / 2 <= part < 0.51 * total
