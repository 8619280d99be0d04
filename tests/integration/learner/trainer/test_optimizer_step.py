"""Real DeepSpeed optimiser steps, on one rank and on two, against plain transformers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from common.config.model import Config
from common.protocol.schema import LOGPROB_FLOOR, PAD_ID, ScoredTrajectory
from learner.trainer.reports import StepReport
from tests.support.learner_oracle import expected_change, expected_gradients, relative_difference
from tests.support.learner_ranks import STAGES, Cut, Ranks, smooth_config, step, totals, weights_now
from tests.support.scored import learner_config, make_scored


@pytest.mark.parametrize("stage", STAGES)
def test_the_step_does_not_depend_on_the_cut(one: Ranks, two: Ranks, tiny_model: Path, stage: int) -> None:
    """1 rank × 1 batch = 1 × 4 = 2 × 2 = everything on one of two ranks = plain transformers."""
    scored = make_scored(8)
    config = smooth_config(tiny_model, stage, learner={"micro_batch_tokens": 4096})
    expected = expected_change(config, expected_gradients(config, scored))
    quarters = [scored[i::4] for i in range(4)]
    cuts: dict[str, tuple[Ranks, list[Cut]]] = {
        "1x1": (one, [[scored]]),
        "1x4": (one, [quarters]),
        "2x2": (two, [quarters[:2], quarters[2:]]),
        "uneven": (two, [[scored[:3], scored[3:]], [[], []]]),
    }
    for name, (ranks, cut) in cuts.items():
        for change, report, _ in ranks.call(step, config, cut):
            assert relative_difference(change, expected) < 1e-5, name
            assert report.applied
    computed = {}
    for packing in ("auto", "off"):
        small = smooth_config(tiny_model, stage, learner={"micro_batch_tokens": 32, "packing": packing})
        ((change, _, reports),) = one.call(step, small, [[scored]])
        assert relative_difference(change, expected) < 1e-5, packing
        computed[packing] = reports[0].padded_tokens
    real = sum(len(item.trajectory.prompt.student_ids) + len(item.trajectory.response_ids) for item in scored)
    assert 4 * 32 < computed["auto"] == real < computed["off"]  # five micro-batches or more


@pytest.mark.parametrize("shift", [-1, 1])
def test_a_position_shifted_by_one_is_detected(one: Ranks, tiny_model: Path, shift: int) -> None:
    scored = make_scored(8, prompt_tokens=(4, 8))
    config = smooth_config(tiny_model)
    ((change, _, _),) = one.call(step, config, [[scored]])
    assert relative_difference(change, expected_change(config, expected_gradients(config, scored))) < 1e-5
    assert relative_difference(change, expected_change(config, expected_gradients(config, scored, shift=shift))) > 0.5


@pytest.mark.parametrize(
    "loss",
    [
        {"normalize": "sequence"},
        {"temperature": 0.6},
        {"skip_first_tokens": 3},
        {"skip_first_tokens": 3, "normalize": "sequence"},
        {"clip_per_token": 0.4},
        {"clip_per_entry": 0.1},
        {"form": "raw"},
        {"form": "renorm", "direction": "forward"},
        {"form": "generalized"},
        {"direction": "jsd", "beta": 0.3},
    ],
    ids=str,
)
def test_every_setting_of_the_loss_reaches_the_gradient(two: Ranks, tiny_model: Path, loss: dict[str, Any]) -> None:
    scored = make_scored(6)  # some responses are shorter than the skipped tokens
    config = smooth_config(tiny_model, 2, loss=loss)
    gradients = expected_gradients(config, scored)
    for change, _, _ in two.call(step, config, [[scored[:4]], [scored[4:]]]):
        assert relative_difference(change, expected_change(config, gradients)) < 1e-5
    usual = expected_gradients(smooth_config(tiny_model), scored)
    assert relative_difference(gradients, usual) > 1e-2  # the setting matters here


@pytest.mark.parametrize("stage", STAGES)
def test_gradients_are_divided_before_they_are_clipped(two: Ranks, tiny_model: Path, stage: int) -> None:
    scored = make_scored(8)
    config = smooth_config(tiny_model, stage, learner={"grad_clip": 0.1})
    gradients = expected_gradients(config, scored)
    norm = torch.stack([gradient.norm() for gradient in gradients.values()]).norm().item()
    assert norm > 0.2  # clipping bites
    for change, report, _ in two.call(step, config, [[scored[:4]], [scored[4:]]]):
        assert report.metrics["grad_norm"] == pytest.approx(norm, rel=1e-4)
        assert relative_difference(change, expected_change(config, gradients)) < 1e-5


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_optimiser_state_in_host_memory_changes_nothing(two: Ranks, tiny_model: Path, stage: int) -> None:
    scored = make_scored(6)
    config = smooth_config(tiny_model, stage, learner={"cpu_offload": True, "grad_clip": 0.1})
    for change, _, _ in two.call(step, config, [[scored[:4], scored[4:]], [[], []]]):
        assert relative_difference(change, expected_change(config, expected_gradients(config, scored))) < 1e-5


def threads_of(rank: int, config: Config) -> tuple[int, int]:
    """Threads of a rank's engine, and the cores that it may use."""
    from common.openmp import usable_cores
    from learner.trainer.engine import LearnerEngine

    before = torch.get_num_threads()
    LearnerEngine(config)
    threads = torch.get_num_threads()
    torch.set_num_threads(before)
    return threads, usable_cores()


def test_an_optimiser_in_host_memory_gets_its_share_of_the_cores(one: Ranks, two: Ranks, tiny_model: Path) -> None:
    keys = {"cpu_offload": True, "threads": None}
    for ranks, count in ((one, 1), (two, 2)):
        for threads, cores in ranks.call(threads_of, smooth_config(tiny_model, 2, learner=keys)):
            assert threads == max(1, cores // count)
    assert one.call(threads_of, smooth_config(tiny_model, 2, learner={**keys, "threads": 3}))[0][0] == 3


def with_support(scored: list[ScoredTrajectory], support: str, k: int) -> list[ScoredTrajectory]:
    """Scores of a teacher that picks the support: the student's k ids and k others (`union`), or only others."""
    answers = []
    for item in scored:
        own, extra = item.trajectory.topk_ids[:, :k], item.trajectory.topk_ids[:, k : 2 * k].copy()
        values = item.score.logprobs.copy()
        if support == "union":  # one of the teacher's ids is the student's too: its column stays empty
            extra[:, -1], values[:, 2 * k - 1] = PAD_ID, LOGPROB_FLOOR
        ids = np.concatenate([own, extra], -1) if support == "union" else extra
        values = values[:, : 2 * k] if support == "union" else values[:, k : 2 * k]
        answers.append(
            replace(
                item,
                trajectory=replace(item.trajectory, topk_ids=own),
                score=replace(item.score, logprobs=values, topk_ids=ids),
            )
        )
    return answers


@pytest.mark.parametrize("support", ["teacher", "union"])
def test_a_support_the_teacher_picked_reaches_the_gradient(one: Ranks, tiny_model: Path, support: str) -> None:
    k = 4
    scored = with_support(make_scored(4), support, k)
    plain = smooth_config(tiny_model)
    config = plain.model_copy(update={"loss": plain.loss.model_copy(update={"support": support, "top_k": k})})
    ((change, report, _),) = one.call(step, config, [[scored]])
    # The oracle knows no padding: drop the empty column, which holds no mass.
    width = 2 * k - 1 if support == "union" else k
    bare = [
        replace(
            item,
            trajectory=replace(item.trajectory, topk_ids=item.score.topk_ids[:, :width]),
            score=replace(item.score, logprobs=item.score.logprobs[:, :width], topk_ids=None),
        )
        for item in scored
        if item.score.topk_ids is not None
    ]
    assert relative_difference(change, expected_change(config, expected_gradients(config, bare))) < 1e-5
    metrics = report.metrics
    if support == "union":
        assert metrics["topk_overlap"] == pytest.approx(1 / k)
        assert 0 < metrics["support_coverage"] < metrics["mass/student_topk"]
    else:
        assert metrics["topk_overlap"] == 0
        assert "support_coverage" not in metrics  # only those of the student's ids that the teacher picked are known


def test_the_policy_gradient_baseline_reaches_the_gradient(one: Ranks, tiny_model: Path) -> None:
    from transformers import AutoModelForCausalLM

    scored = make_scored(4)
    config = smooth_config(tiny_model, loss={"form": "policy_gradient", "ratio_clip": 2.0})
    ((change, _, _),) = one.call(step, config, [[scored]])
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    total = torch.zeros(())
    for item in scored:
        prompt, response = item.trajectory.prompt.student_ids, item.trajectory.response_ids
        ids = torch.tensor([[*prompt.tolist(), *response.tolist()]])
        logprobs = model(ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        chosen = logprobs.gather(-1, ids[0, len(prompt) :, None]).squeeze(-1)
        teacher, engine = (torch.from_numpy(x) for x in (item.score.sampled_logprob, item.trajectory.sampled_logprobs))
        ratio = (chosen - engine).exp().clamp(max=2.0)
        total = total + (ratio * (chosen - teacher).detach()).sum()
    (total / totals(scored)[0]).backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert relative_difference(change, expected_change(config, gradients)) < 1e-5


@pytest.mark.parametrize("stage", STAGES)
def test_an_untied_output_layer_is_trained(one: Ranks, two: Ranks, tiny_untied_model: Path, stage: int) -> None:
    scored = make_scored(4)
    config = smooth_config(tiny_untied_model, stage)
    expected = expected_change(config, expected_gradients(config, scored))
    alone = one.call(step, config, [[scored]])
    for change, _, _ in [*alone, *two.call(step, config, [[scored[:3]], [scored[3:]]])]:
        assert "lm_head.weight" in change
        assert relative_difference(change, expected) < 1e-5


@pytest.mark.parametrize("stage", [0, 3])
def test_gradient_checkpointing_changes_nothing(one: Ranks, tiny_model: Path, stage: int) -> None:
    scored = make_scored(4)
    config = smooth_config(tiny_model, stage, learner={"gradient_checkpointing": True})
    ((change, _, _),) = one.call(step, config, [[scored]])
    assert relative_difference(change, expected_change(config, expected_gradients(config, scored))) < 1e-5


def test_a_model_with_dropout_is_trained_without_it(one: Ranks, tiny_model: Path, tmp_path: Path) -> None:
    import shutil

    folder = tmp_path / "dropout"
    shutil.copytree(tiny_model, folder)
    text = (folder / "config.json").read_text().replace('"attention_dropout": 0.0', '"attention_dropout": 0.5')
    (folder / "config.json").write_text(text)
    assert "0.5" in text
    scored = make_scored(4)
    ((change, _, _),) = one.call(step, smooth_config(folder), [[scored]])
    config = smooth_config(tiny_model)
    assert relative_difference(change, expected_change(config, expected_gradients(config, scored))) < 1e-5


# --- several steps --------------------------------------------------------------------------------------------------


def train(
    rank: int, config: Config, scored: list[ScoredTrajectory], steps: int
) -> tuple[dict[str, Tensor], list[StepReport]]:
    """`steps` steps on the same samples, spread over the ranks."""
    import torch.distributed as dist

    from learner.trainer.engine import LearnerEngine

    engine = LearnerEngine(config)
    reports = []
    for _ in range(steps):
        engine.accumulate(scored[rank :: dist.get_world_size()])
        reports.append(engine.finish_step(*totals(scored)))
    return weights_now(engine), reports


def test_stages_and_worlds_train_alike(one: Ranks, two: Ranks, tiny_model: Path) -> None:
    """Five real AdamW steps with warm-up: the same losses, which fall, and the same learning rates."""
    scored = make_scored(8)
    runs = []
    for stage in STAGES:
        config = learner_config(tiny_model, learner={"zero_stage": stage, "warmup_steps": 4, "lr": 3e-3})
        runs += [reports for ranks in (one, two) for _, reports in ranks.call(train, config, scored, 5)]
    losses = np.array([[report.metrics["loss"] for report in reports] for reports in runs])
    np.testing.assert_allclose(losses, losses[:1].repeat(len(losses), 0), rtol=2e-3)
    assert losses[0, -1] < 0.9 * losses[0, 0]
    assert [report.metrics["lr"] for report in runs[0]] == pytest.approx([0.75e-3, 1.5e-3, 2.25e-3, 3e-3, 3e-3])
    assert [report.weight_version for report in runs[0]] == [1, 2, 3, 4, 5]


def resumed(rank: int, config: Config, scored: list[ScoredTrajectory], folder: Path) -> list[float]:
    """Learning rates of two steps, a checkpoint, and two steps of another engine that resumes it."""
    import torch.distributed as dist

    from learner.trainer.engine import LearnerEngine

    rates = []
    for begin in (True, False):
        engine = LearnerEngine(config)
        if not begin:
            engine.load_state(folder)
        for _ in range(2):
            engine.accumulate(scored[rank :: dist.get_world_size()])
            rates.append(engine.finish_step(*totals(scored)).metrics["lr"])
        if begin:
            engine.save_state(folder)
    return rates


def test_a_resumed_engine_continues_the_schedule(one: Ranks, tiny_model: Path, tmp_path: Path) -> None:
    schedule = {"lr": 4e-4, "min_lr": 0.0, "lr_schedule": "linear", "steps": 4}
    (rates,) = one.call(resumed, learner_config(tiny_model, learner=schedule), make_scored(4), tmp_path)
    assert rates == pytest.approx([4e-4, 3e-4, 2e-4, 1e-4])


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_bfloat16_trains_on_float32_sums(one: Ranks, tiny_model: Path, stage: int) -> None:
    scored = make_scored(8)
    config = learner_config(tiny_model, student={"dtype": "bfloat16"}, learner={"zero_stage": stage, "lr": 3e-3})
    reference = learner_config(tiny_model, learner={"lr": 3e-3})
    ((weights, reports),) = one.call(train, config, scored, 5)
    ((_, expected),) = one.call(train, reference, scored, 5)
    assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16}
    got = [report.metrics["loss"] for report in reports]
    assert got == pytest.approx([report.metrics["loss"] for report in expected], rel=0.05)
