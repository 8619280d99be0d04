"""Loss form `exact` needs all ids of one vocabulary."""

from __future__ import annotations

import pytest

from common.config.model import ConfigError, LossConfig
from learner.loop.run import check_exact


def test_exact_covers_the_whole_vocabulary_of_student_and_teachers() -> None:
    exact, tail = LossConfig(form="exact", top_k=512), LossConfig(top_k=512)
    check_exact(exact, 512, {"default": 512})
    check_exact(tail, 640, {"default": 1024})
    with pytest.raises(ConfigError, match=r"vocabulary of 640, loss.top_k is 512; set loss.top_k=640"):
        check_exact(exact, 640, {})
    with pytest.raises(ConfigError, match=r"the student has 512 outputs, teacher 'big' 1024"):
        check_exact(exact, 512, {"default": 512, "big": 1024})
