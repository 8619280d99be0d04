"""The longest answer against the memory that a rank finds on its GPU."""

from __future__ import annotations

from pathlib import Path

import pytest

from common.config.model import ConfigError
from common.sizing.memory import CUDA_BYTES, longest_trainable
from common.sizing.model_size import read_model_size
from learner.loop.run import check_longest
from tests.support.configs import config_of


def test_an_answer_beyond_a_ranks_memory_is_refused_or_a_warning(tiny_model: Path) -> None:
    config, size, memory = config_of(student={"model": str(tiny_model)}), read_model_size(str(tiny_model)), 2**30
    assert size is not None
    trainable = longest_trainable(config, size, memory - CUDA_BYTES)
    assert trainable > 0
    assert check_longest(config, memory, trainable) is None
    assert f"about {trainable:,} tokens" in str(check_longest(config, memory, trainable + 1))
    with pytest.raises(ConfigError, match=r"prompt plus rollout.max_tokens has"):
        check_longest(config, memory, 2 * trainable)


def test_nothing_is_refused_where_the_memory_or_the_model_is_unknown(tiny_model: Path) -> None:
    assert check_longest(config_of(student={"model": str(tiny_model)}), 0, 10**9) is None
    assert check_longest(config_of(student={"model": "nobody/has-this"}), 2**30, 10**9) is None
