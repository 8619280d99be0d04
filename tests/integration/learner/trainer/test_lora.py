"""Low-rank adapters: only they are trained, engines and checkpoints get merged weights, the base does not change."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from common.config.model import Config
from common.protocol.schema import ItemScore, ScoredTrajectory, Trajectory
from tests.support.learner_oracle import weights_of
from tests.support.learner_ranks import Ranks, smooth_config, step, totals, weights_now
from tests.support.scored import make_scored
from tests.support.teacher_oracle import Oracle, assert_score

LORA = {"rank": 4, "alpha": 8}
BIG_STEPS = {"lr": 3e-3, "eps": 1e-8}


def lora_config(model: Path, stage: int = 0, **lora: Any) -> Config:
    return smooth_config(model, stage, learner={**BIG_STEPS, "lora": {**LORA, **lora}})


def several_steps(rank: int, config: Config, scored: list[ScoredTrajectory], folder: str | None) -> dict[str, Any]:
    """Three steps; return the published weights, the learner's log-probs, and the number of trained parameters."""
    from learner.trainer.engine import LearnerEngine
    from learner.trainer.micro_batch import student_sequence

    engine = LearnerEngine(config)
    for _ in range(3):
        engine.accumulate(scored if rank == 0 else [])
        assert engine.finish_step(*totals(scored)).applied
    if folder is not None:
        engine.save(Path(folder))
    return {
        "weights": weights_now(engine),
        "specs": engine.weight_specs(),
        "logprobs": engine.inference.logprobs([student_sequence(item) for item in scored]),
        "trained": engine.info().parameters,
    }


def logprobs_of(model: Any, scored: Sequence[ScoredTrajectory]) -> list[np.ndarray]:
    """Log-probs of the responses by a plain forward pass."""
    found = []
    for item in scored:
        prompt, response = item.trajectory.prompt.student_ids, item.trajectory.response_ids
        ids = torch.tensor([[*prompt.tolist(), *response.tolist()]])
        with torch.no_grad():
            logprobs = model(ids).logits[0].log_softmax(-1)
        rows = logprobs[len(prompt) - 1 : -1]
        found.append(rows.gather(-1, ids[0, len(prompt) :, None]).squeeze(-1).numpy())
    return found


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_published_weights_are_the_merged_ones_and_compute_what_the_learner_computes(
    two: Ranks, tiny_model: Path, tmp_path: Path, stage: int
) -> None:
    from transformers import AutoModelForCausalLM

    scored = make_scored(4)
    folder = tmp_path / "checkpoint"
    before = weights_of(tiny_model)
    results = two.call(several_steps, lora_config(tiny_model, stage), scored, str(folder))
    merged = AutoModelForCausalLM.from_pretrained(folder)
    expected = logprobs_of(merged, scored)
    start = logprobs_of(AutoModelForCausalLM.from_pretrained(tiny_model), scored)
    assert (
        max(float(np.abs(a - b).max()) for a, b in zip(expected, start, strict=True)) > 0.05
    )  # training changed something
    for result in results:
        assert result["weights"].keys() == before.keys()  # an engine sees the names it knows
        names = [spec.name for spec in result["specs"]]
        assert sorted(names) == sorted(before)
        assert names[-1] == "model.embed_tokens.weight"  # the largest is last
        for name, tensor in merged.state_dict().items():
            if name in result["weights"]:
                torch.testing.assert_close(result["weights"][name], tensor, rtol=0, atol=0)
        for got, wanted in zip(result["logprobs"], expected, strict=True):
            np.testing.assert_allclose(got, wanted, atol=2e-5)
        unchanged = [name for name, tensor in result["weights"].items() if torch.equal(tensor, before[name])]
        assert sorted(unchanged) == sorted(n for n in before if "proj" not in n)  # embeddings and norms are frozen
        assert 0 < result["trained"] < 0.2 * sum(tensor.numel() for tensor in before.values())


def logprobs_by_learner(rank: int, config: Config, scored: list[ScoredTrajectory]) -> list[np.ndarray]:
    from learner.trainer.engine import LearnerEngine
    from learner.trainer.micro_batch import student_sequence

    return LearnerEngine(config).inference.logprobs([student_sequence(item) for item in scored])


@pytest.mark.parametrize("stage", [0, 3])
def test_in_bfloat16_the_learner_trains_the_policy_that_it_publishes(
    two: Ranks, tiny_model: Path, tmp_path: Path, stage: int
) -> None:
    """Bit for bit: rounding loses part of a step, and the learner loses the same part."""
    scored, folder = make_scored(4), tmp_path / "checkpoint"
    config = lora_config(tiny_model, stage)
    config = config.model_copy(update={"student": config.student.model_copy(update={"dtype": "bfloat16"})})
    results = two.call(several_steps, config, scored, str(folder))
    student = config.student.model_copy(update={"model": str(folder)})
    merged = config.model_copy(update={"student": student, "learner": config.learner.model_copy(update={"lora": None})})
    expected, start = two.call(logprobs_by_learner, merged, scored)[0], two.call(logprobs_by_learner, config, scored)[0]
    for result in results:
        for got, wanted in zip(result["logprobs"], expected, strict=True):
            np.testing.assert_array_equal(got, wanted)
    assert max(float(np.abs(a - b).max()) for a, b in zip(expected, start, strict=True)) > 0.01


def test_an_adapter_alone_is_saved_as_peft_opens_it(one: Ranks, tiny_model: Path, tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    scored = make_scored(3)
    folder = tmp_path / "adapter"
    (result,) = one.call(several_steps, lora_config(tiny_model, publish="adapter"), scored, str(folder))
    assert sorted(path.name for path in folder.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    opened = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model), str(folder))
    for got, wanted in zip(logprobs_of(opened, scored), result["logprobs"], strict=True):
        np.testing.assert_allclose(got, wanted, atol=2e-5)


def test_named_layers_alone_get_adapters(one: Ranks, tiny_model: Path) -> None:
    config = lora_config(tiny_model, target_modules=["q_proj", "v_proj"])
    ((change, _, _),) = one.call(step, config, [[make_scored(4)]])
    moved = {name for name, tensor in change.items() if tensor.abs().max() > 0}
    assert moved == {n for n in change if "q_proj" in n or "v_proj" in n}
    with pytest.raises(Exception, match="nowhere"):
        one.call(step, lora_config(tiny_model, target_modules=["nowhere"]), [[make_scored(1)]])


def resumed(rank: int, config: Config, scored: list[ScoredTrajectory], folder: str | None) -> dict[str, Tensor]:
    from learner.trainer.engine import LearnerEngine

    engine = LearnerEngine(config)
    for number in range(4):
        if number == 2 and folder is not None:
            engine.save_state(Path(folder))
            engine = LearnerEngine(config)
            engine.load_state(Path(folder))
        engine.accumulate(scored)
        engine.finish_step(*totals(scored))
    return weights_now(engine)


@pytest.mark.parametrize("stage", [0, 3])
def test_a_resumed_adapter_ends_bit_equal_and_the_base_is_not_stored(
    one: Ranks, tiny_model: Path, tmp_path: Path, stage: int
) -> None:
    config, scored = lora_config(tiny_model, stage), make_scored(3)
    (through,) = one.call(resumed, config, scored, None)
    (cut,) = one.call(resumed, config, scored, str(tmp_path / "state"))
    for name in through:
        assert torch.equal(through[name], cut[name]), name
    stored = sum(path.stat().st_size for path in (tmp_path / "state").rglob("*model_states.pt"))
    assert stored < 4 * sum(tensor.numel() for tensor in through.values())


def base_scores(rank: int, config: Config, scored: list[ScoredTrajectory]) -> tuple[list[ItemScore], list[ItemScore]]:
    """Scores of the base model before and after training the adapters."""
    from learner.trainer.engine import LearnerEngine

    engine = LearnerEngine(config)
    items = [(item.trajectory, item.trajectory.prompt.teacher_ids) for item in scored]
    before = engine.inference.score_with_base(items)
    engine.accumulate(scored if rank == 0 else [])
    engine.finish_step(*totals(scored))
    return before, engine.inference.score_with_base(items)


@pytest.mark.parametrize("stage", [0, 3])
def test_with_the_adapter_off_the_learner_is_the_teacher(two: Ranks, tiny_model: Path, stage: int) -> None:
    """Scores of the base model with the context are within the oracle's bounds, and bit-identical after training."""
    scored = make_scored(5)
    oracle = Oracle.load(tiny_model)
    for before, after in two.call(base_scores, lora_config(tiny_model, stage), scored):
        for item, first, second in zip(scored, before, after, strict=True):
            trajectory: Trajectory = item.trajectory
            nothing = trajectory.response_ids[:0]
            logprobs = oracle.logprobs(nothing, trajectory.prompt.teacher_ids, trajectory.response_ids)
            for score in (first, second):
                assert_score(score, logprobs, trajectory)
            np.testing.assert_array_equal(first.sampled_logprob, second.sampled_logprob)
