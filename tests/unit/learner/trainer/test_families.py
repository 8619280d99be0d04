"""Every family in the learner: gradients of a plain eager forward pass, and log-probs that no other row changes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from learner.trainer.micro_batch import student_sequence
from tests.support.families import CORE, ORIGINAL, Families
from tests.support.family_matrix import LONGEST, assert_same_alone, four_rows, gradients, load_learner
from tests.support.learner_oracle import expected_gradients, relative_difference


@pytest.mark.parametrize("name", [*CORE, "phimoe"])  # the latter's router picks at random in training mode
def test_gradients_and_log_probs(name: str, families: Families) -> None:
    config, inference = load_learner(families / name)
    scored = four_rows()
    expected = expected_gradients(config, scored, pad_to=LONGEST)
    assert relative_difference(gradients(inference, config, scored), expected) < 2e-5
    assert_same_alone(inference, scored)


@pytest.mark.parametrize("name", ["qwen3_moe", "qwen2_moe"])  # packed, and padded
def test_experts_are_those_of_each_sequence_alone(name: str, families: Families) -> None:
    _, inference = load_learner(families / name)
    sequences = [student_sequence(item) for item in four_rows()]
    model = AutoModelForCausalLM.from_pretrained(families / name)
    for sequence, found in zip(sequences, inference.experts(sequences), strict=True):
        ids = [*sequence.prompt_ids.tolist(), *sequence.response_ids.tolist()]
        logits = model(torch.tensor([ids]), output_router_logits=True).router_logits
        assert list(found) == list(range(len(logits)))
        for layer, scores in enumerate(logits):
            expected = scores[len(sequence.prompt_ids) - 1 : -1].topk(2).indices
            np.testing.assert_array_equal(np.sort(found[layer]), np.sort(expected))


def test_longrope_takes_the_short_factors_if_no_sequence_is_long(families: Families) -> None:
    folder = families / "phi4-mini-longrope"
    config, inference = load_learner(folder, ORIGINAL)
    scored = four_rows()[:2]
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
        load_learner(families / "llama-dynamic-ntk", 1024)
    load_learner(families / "llama-dynamic-ntk", 512)


def test_what_a_family_fixes_is_not_trained(families: Families) -> None:
    _, inference = load_learner(families / "ernie4_5_moe")
    parameters = dict(inference._policy.model.named_parameters())
    fixed = [name for name, parameter in parameters.items() if not parameter.requires_grad]
    assert fixed == ["model.layers.1.mlp.gate.moe_statics.e_score_correction_bias"]
    assert parameters[fixed[0]].abs().max() > 0.1  # as loaded
