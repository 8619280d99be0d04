"""The process group of the learner's ranks: devices that do not agree."""

from __future__ import annotations

import pytest
import torch

from learner.trainer.distributed import free_port, join_ranks


def test_a_rank_for_a_gpu_is_refused_where_deepspeed_finds_none() -> None:
    with pytest.raises(RuntimeError, match=r"DeepSpeed computes on cpu, this rank of the learner on cuda: learner\.g"):
        join_ranks(0, 1, "127.0.0.1", free_port(), torch.device("cuda"), 5.0)
    assert not torch.distributed.is_initialized()
