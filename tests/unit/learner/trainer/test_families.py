"""Every family in the learner: gradients of a plain eager forward pass, and log-probs that no other row changes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from common.config.model import Config
from common.protocol.schema import ScoredTrajectory
from learner.trainer.inference import PolicyInference
from learner.trainer.micro_batch import build_micro_batch, count_loss_tokens, student_sequence
from learner.trainer.objective import Objective
from learner.trainer.packing import pack
from learner.trainer.policy import load_policy
from tests.support.configs import config_of
from tests.support.families import CORE, ORIGINAL, Families
from tests.support.learner_oracle import expected_gradients, relative_difference
from tests.support.scored import make_scored

LONGEST = 128
"""Tokens of the longest sequence, above every window and every original length."""


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """More threads than free cores make models this small a hundred times slower."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def learner(folder: Path, max_sequence_tokens: int = LONGEST) -> tuple[Config, PolicyInference]:
    config = config_of(
        student={"model": str(folder), "max_sequence_tokens": max_sequence_tokens},
        learner={"micro_batch_tokens": 4096},
    )
    device = torch.device("cpu")
    policy = load_policy(config.student, config.learner, device, torch.float32)
    policy.check()
    return config, PolicyInference(policy, pack(policy.model), config.learner, 1.0, device)


def rows() -> list[ScoredTrajectory]:
    """Four rows of one micro-batch: two below every window and original length, two above."""
    short = make_scored(2, prompt_tokens=(4, 6), response_tokens=(6, 9))
    return short + make_scored(2, seed=1, prompt_tokens=(40, 70), response_tokens=(30, 50))


def gradients(inference: PolicyInference, config: Config, scored: list[ScoredTrajectory]) -> dict[str, torch.Tensor]:
    policy = inference._policy
    batch = build_micro_batch(scored, config.loss, inference._layout)
    (policy(batch, Objective(batch, config.loss, scale=1.0))).backward()
    tokens = sum(count_loss_tokens(item.trajectory, config.loss) for item in scored)
    return {name: p.grad / tokens for name, p in policy.model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", CORE)
def test_gradients_and_log_probs(name: str, families: Families) -> None:
    config, inference = learner(families / name)
    scored = rows()
    expected = expected_gradients(config, scored, pad_to=LONGEST)
    assert relative_difference(gradients(inference, config, scored), expected) < 2e-5
    sequences = [student_sequence(item) for item in scored]
    together = inference.logprobs(sequences)
    for sequence, among_others in zip(sequences, together, strict=True):
        (alone,) = inference.logprobs([sequence])
        np.testing.assert_allclose(among_others, alone, rtol=0, atol=1e-4)


def test_longrope_takes_the_short_factors_if_no_sequence_is_long(families: Families) -> None:
    folder = families / "phi4-mini-longrope"
    config, inference = learner(folder, ORIGINAL)
    scored = rows()[:2]
    assert relative_difference(gradients(inference, config, scored), expected_gradients(config, scored)) < 2e-5


def test_positions_that_depend_on_the_batch_are_refused(tmp_path: Path) -> None:
    """Phi-3.5-MoE scales rotations by the longest position outside transformers' own rule."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from common.models.positions import fix_rope

    factors = {"short_factor": [1.0] * 16, "long_factor": [2.0] * 16, "short_mscale": 1.0, "long_mscale": 1.3}
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 64, **factors}
    settings = AutoConfig.for_model(
        "phimoe", vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, num_local_experts=2, rope_parameters=rope,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(settings)
    with pytest.raises(ValueError, match="longest sequence of a forward pass"):
        fix_rope(model, 128)


def test_dynamic_positions_are_refused_where_they_change(families: Families) -> None:
    with pytest.raises(ValueError, match="set max_sequence_tokens to at most that, not 1024"):
        learner(families / "llama-dynamic-ntk", 1024)
    learner(families / "llama-dynamic-ntk", 512)
