"""The baselines' losses through the policy's output layer, against plain transformers and the full formulas."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from common.config.model import Config
from common.protocol.schema import ItemScore, ScoredTrajectory, as_ids
from learner.trainer.micro_batch import build_micro_batch
from learner.trainer.objective import Objective
from learner.trainer.policy import Policy
from learner.trainer.step_metrics import step_means
from tests.support.scored import learner_config, make_scored

CONTEXT = [7, 11, 13, 17, 19]


def load(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder)


def logits_of(model: Any, prompt: list[int], response: list[int]) -> Tensor:
    """At the positions that predict the response, ``[T, V]``."""
    ids = torch.tensor([[*prompt, *response]])
    return model(ids).logits[0, len(prompt) - 1 : -1]


def stored_answers() -> list[ScoredTrajectory]:
    """Responses that the student did not sample: no top-k ids, no log-probs."""
    return [
        replace(
            item,
            trajectory=replace(
                item.trajectory,
                topk_ids=as_ids(np.empty((len(item.trajectory.response_ids), 0))),
                sampled_logprobs=np.full(len(item.trajectory.response_ids), np.nan, np.float32),
                from_teacher=True,
            ),
        )
        for item in make_scored(4, seed=5)
    ]


def as_teacher(teacher: Any, items: list[ScoredTrajectory], k: int) -> list[ScoredTrajectory]:
    """Score in mode `teacher_topk` with a plain forward pass after the context."""
    scored = []
    for item in items:
        prompt, response = item.trajectory.prompt.student_ids.tolist(), item.trajectory.response_ids.tolist()
        with torch.no_grad():
            logprobs = logits_of(teacher, CONTEXT + prompt, response).log_softmax(-1)
        best = logprobs.topk(k, dim=-1)
        rest = logprobs.scatter(-1, best.indices, -torch.inf).logsumexp(-1) if k < logprobs.shape[1] else None
        score = ItemScore(
            logprobs=best.values.numpy().astype(np.float16),
            sampled_logprob=logprobs[range(len(response)), response].numpy(),
            tail_logprob=np.full(len(response), -1e4, np.float32) if rest is None else rest.numpy(),
            topk_ids=as_ids(best.indices.numpy()),
        )
        scored.append(replace(item, score=score))
    return scored


def step(config: Config, model: Any, items: list[ScoredTrajectory]) -> tuple[float, dict[str, Tensor]]:
    """Return the step's loss and the gradient by parameter, as the learner computes them."""
    policy, batch = Policy(model, chunk_tokens=7), build_micro_batch(items, config.loss)
    value = policy(batch, Objective(batch, config.loss, config.mixed_losses()))
    tokens = sum(len(item.trajectory.response_ids) for item in items)
    (value / tokens).backward()
    return value.item() / tokens, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def expected(model: Any, items: list[ScoredTrajectory], per_token: Any) -> tuple[float, dict[str, Tensor]]:
    """The same for ``per_token(logits [T, V], item) -> [T]``, by plain autograd."""
    values = [
        per_token(logits_of(model, i.trajectory.prompt.student_ids.tolist(), i.trajectory.response_ids.tolist()), i)
        for i in items
    ]
    loss = torch.cat(values).mean()
    loss.backward()
    return loss.item(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_same(
    found: tuple[float, dict[str, Tensor]], wanted: tuple[float, dict[str, Tensor]], rel: float = 1e-4
) -> None:
    assert found[0] == pytest.approx(wanted[0], rel=rel)
    assert found[1].keys() == wanted[1].keys()
    for name, gradient in wanted[1].items():
        assert (found[1][name] - gradient).norm() <= rel * gradient.norm() + 1e-7, name


def test_nll_is_cross_entropy_on_the_stored_answers(tiny_model: Path, tiny_untied_model: Path) -> None:
    items = as_teacher(load(tiny_untied_model), stored_answers(), k=8)
    config = learner_config(
        tiny_model, rollout={"source": "teacher"}, loss={"form": "nll", "support": "teacher", "top_k": 8}
    )

    def cross_entropy(logits: Tensor, item: ScoredTrajectory) -> Tensor:
        targets = torch.from_numpy(item.trajectory.response_ids.astype("int64"))
        return torch.nn.functional.cross_entropy(logits, targets, reduction="none")

    assert_same(step(config, load(tiny_model), items), expected(load(tiny_model), items, cross_entropy))


@pytest.mark.parametrize("k", [8, 512])
def test_forward_kl_on_the_teachers_ids_is_the_full_formula(tiny_model: Path, tiny_untied_model: Path, k: int) -> None:
    """KL(q‖p) over the whole vocabulary, or over the support and one bucket for the rest."""
    teacher, items = load(tiny_untied_model), stored_answers()
    config = learner_config(
        tiny_model,
        rollout={"source": "teacher"},
        loss={"direction": "forward", "support": "teacher", "top_k": k, "form": "tail"},
    )

    def forward_kl(logits: Tensor, item: ScoredTrajectory) -> Tensor:
        prompt, response = item.trajectory.prompt.student_ids.tolist(), item.trajectory.response_ids.tolist()
        with torch.no_grad():
            log_q = logits_of(teacher, CONTEXT + prompt, response).log_softmax(-1)
        log_p = logits.log_softmax(-1)
        if k < log_q.shape[1]:
            best = log_q.topk(k, dim=-1).indices
            log_p, log_q = (
                torch.cat([x.gather(-1, best), x.scatter(-1, best, -torch.inf).logsumexp(-1, keepdim=True)], dim=-1)
                for x in (log_p, log_q)
            )
        return (log_q.exp() * (log_q - log_p)).sum(-1)

    found = step(config, load(tiny_model), as_teacher(teacher, items, k))
    assert_same(found, expected(load(tiny_model), items, forward_kl), rel=3e-3)  # the teacher's values are sent as f16


@pytest.mark.parametrize("clip", [None, 1.2])
def test_a_reward_adds_its_policy_gradient_to_the_divergence(tiny_model: Path, clip: float | None) -> None:
    """Against plain autograd of divergence + weight * (-ratio * advantage), token by token."""
    weight = 0.3
    loss = {"reward_weight": weight, "ratio_clip": clip, "clip_per_token": 2.0}
    config = learner_config(tiny_model, loss=loss, rollout={"samples_per_prompt": 2})
    items = []
    for item, value in zip(make_scored(4), (1.0, -0.5, 0.0, 2.0), strict=True):
        sampled = item.trajectory.sampled_logprobs / 2 - 4.7  # around the tiny model's own: ratios on both sides of 1
        items.append(replace(item, advantage=value, trajectory=replace(item.trajectory, sampled_logprobs=sampled)))

    def per_token(logits: Tensor, item: ScoredTrajectory) -> Tensor:
        log_p, ids = logits.log_softmax(-1), torch.from_numpy(item.trajectory.topk_ids.astype("int64"))
        inside, rest = log_p.gather(-1, ids), log_p.scatter(-1, ids, -torch.inf).logsumexp(-1)
        log_q = torch.from_numpy(item.score.logprobs.astype("float32"))
        tail_q = torch.from_numpy(item.score.tail_logprob)
        kl = (inside.exp() * (inside - log_q)).sum(-1) + rest.exp() * (rest - tail_q)
        sampled = log_p.gather(-1, torch.from_numpy(item.trajectory.response_ids.astype("int64"))[:, None])[:, 0]
        ratio = (sampled - torch.from_numpy(item.trajectory.sampled_logprobs)).exp()
        return kl.clamp(max=2.0) - weight * (ratio if clip is None else ratio.clamp(max=clip)) * item.advantage

    found = step(config, load(tiny_model), items)
    assert_same(found, expected(load(tiny_model), items, per_token))
    without = step(config, load(tiny_model), [replace(item, advantage=0.0) for item in items])
    assert abs(found[0] - without[0]) > 0.05
    if clip is not None:
        free = learner_config(tiny_model, loss={**loss, "ratio_clip": None}, rollout={"samples_per_prompt": 2})
        assert abs(found[0] - step(free, load(tiny_model), items)[0]) > 1e-3  # the bound matters here


def test_each_set_of_rows_has_its_loss_and_weight(tiny_model: Path) -> None:
    """Two losses in one micro-batch, of which chunks hold tokens of both, against plain autograd."""
    mix = {"general": {"train": "x", "share": 0.5, "loss": {"direction": "forward", "form": "renorm", "weight": 0.3}}}
    loss = {"reward_weight": 0.2, "clip_per_token": 3.0}
    config = learner_config(tiny_model, loss=loss, rollout={"samples_per_prompt": 2}, data={"mix": mix})
    names = ("train", "general", "general", "train", "general")
    items = [replace(one, data_set=name, advantage=0.5) for one, name in zip(make_scored(5), names, strict=True)]

    def per_token(logits: Tensor, item: ScoredTrajectory) -> Tensor:
        log_p, ids = logits.log_softmax(-1), torch.from_numpy(item.trajectory.topk_ids.astype("int64"))
        inside, rest = log_p.gather(-1, ids), log_p.scatter(-1, ids, -torch.inf).logsumexp(-1)
        log_q = torch.from_numpy(item.score.logprobs.astype("float32"))
        if item.data_set == "general":
            kl = torch.nn.functional.kl_div(inside.log_softmax(-1), log_q.softmax(-1), reduction="none").sum(-1)
        else:
            tail_q = torch.from_numpy(item.score.tail_logprob)
            kl = (inside.exp() * (inside - log_q)).sum(-1) + rest.exp() * (rest - tail_q)
        sampled = log_p.gather(-1, torch.from_numpy(item.trajectory.response_ids.astype("int64"))[:, None])[:, 0]
        ratio = (sampled - torch.from_numpy(item.trajectory.sampled_logprobs)).exp()
        return (0.3 if item.data_set == "general" else 1.0) * (kl.clamp(max=3.0) - 0.2 * ratio * item.advantage)

    assert_same(step(config, load(tiny_model), items), expected(load(tiny_model), items, per_token))


def test_metrics_that_need_the_students_samples_are_left_out(tiny_model: Path, tiny_untied_model: Path) -> None:
    items = as_teacher(load(tiny_untied_model), stored_answers(), k=8)
    config = learner_config(tiny_model, rollout={"source": "teacher"}, loss={"support": "teacher", "top_k": 8})
    batch = build_micro_batch(items, config.loss)
    objective = Objective(batch, config.loss)
    Policy(load(tiny_model), chunk_tokens=7)(batch, objective)
    sums = objective.metric_sums()
    assert np.isnan(sums["topk_overlap"])
    assert sums["mismatch/counted"] == 0
    means = step_means(sums, 50, config.loss, config.rollout)
    assert not means.keys() & {"topk_overlap", "mismatch/abs", "mismatch/rms", "mismatch/outside", "mismatch/counted"}
    assert all(np.isfinite(sums[name]) for name in ("loss", "kl/support", "kl/tail", "mass/teacher_topk", "entropy"))
    assert objective.nonfinite_samples() == ()


def test_in_a_mix_the_mismatch_is_that_of_the_students_tokens_alone(tiny_model: Path, tiny_untied_model: Path) -> None:
    teacher = load(tiny_untied_model)
    ours = as_teacher(teacher, make_scored(3), k=8)
    both = [*ours, *as_teacher(teacher, stored_answers(), k=8)]
    config = learner_config(tiny_model, rollout={"mix": {"teacher": 0.5}}, loss={"support": "teacher", "top_k": 8})
    found = []
    for items in (ours, both):
        batch = build_micro_batch(items, config.loss)
        objective = Objective(batch, config.loss)
        Policy(load(tiny_model), chunk_tokens=7)(batch, objective)
        tokens = sum(len(item.trajectory.response_ids) for item in items)
        found.append(step_means(objective.metric_sums(), tokens, config.loss, config.rollout))
    for name in ("mismatch/abs", "mismatch/rms", "mismatch/outside"):
        assert found[1][name] == pytest.approx(found[0][name], rel=1e-5)
    assert found[1]["loss"] != pytest.approx(found[0]["loss"], rel=1e-3)
