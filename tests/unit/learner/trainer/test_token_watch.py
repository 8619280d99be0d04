"""Token records: exact values, and the same samples whatever the order of arrival and the split into batches."""

from __future__ import annotations

import json
import zlib
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from common.config.model import LossConfig
from common.protocol.schema import Context, Prompt, ScoredTrajectory, as_ids
from common.telemetry.run_files import RunFiles
from deploy.report.token_view import tokens_of
from learner.trainer.micro_batch import build_micro_batch
from learner.trainer.objective import Objective
from learner.trainer.output_layer import LogitTransform, OutputLayer
from learner.trainer.token_records import (
    MAX_TOKENS,
    TokenRecord,
    TokenRecordFiles,
    choose_records,
    choose_samples,
    record_tokens,
)
from learner.trainer.token_watch import TokenRecorder
from tests.support.scored import VOCABULARY, make_scored
from tests.support.tiny import make_tokenizer

HIDDEN = 8


def records_of(
    scored: list[ScoredTrajectory], max_samples: int, *, cut: int = 4, loss: LossConfig | None = None, chunk: int = 5
) -> dict[str, TokenRecord]:
    """Records of micro-batches of `cut` samples through a random output layer."""
    loss = loss or LossConfig()
    recorder = TokenRecorder(max_samples)
    for start in range(0, len(scored), cut):
        answers = scored[start : start + cut]
        batch = build_micro_batch(answers, loss)
        watch = recorder.watch(batch)
        layer, hidden = head(chunk), torch.cat([states(one) for one in answers])
        targets = torch.cat([torch.from_numpy(one.trajectory.response_ids.astype(np.int64)) for one in answers])
        layer(hidden, batch.ids, targets, loss=Objective(batch, loss, watch=watch))
        if watch is not None:
            recorder.keep(watch)
        recorder.add_trajectories(answers)
    return {one.sample_id: one for one in recorder.records(loss)}


def head(chunk: int) -> OutputLayer:
    torch.manual_seed(5)
    linear = torch.nn.Linear(HIDDEN, VOCABULARY, bias=False)
    torch.nn.init.normal_(linear.weight, std=1.0)
    return OutputLayer(linear, LogitTransform(), chunk)


def states(scored: ScoredTrajectory) -> torch.Tensor:
    """Hidden states of each position, a function of the sample alone."""
    seed = zlib.crc32(scored.trajectory.sample_id.encode())
    shape = (len(scored.trajectory.response_ids), HIDDEN)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).requires_grad_()


def test_the_values_are_those_of_the_whole_vocabulary() -> None:
    scored = make_scored(6, k=16)
    found = records_of(scored, 3)
    assert len(found) == 3
    for one in scored:
        if one.trajectory.sample_id not in found:
            continue
        values = found[one.trajectory.sample_id].values
        full = (states(one) @ head(1).weight.T).log_softmax(-1).detach().numpy()
        at = np.arange(len(full))
        assert values["student_logprobs"] == pytest.approx(full[at, one.trajectory.response_ids], abs=2e-5)
        assert values["teacher_logprobs"] == pytest.approx(one.score.sampled_logprob, abs=2e-5)
        assert values["kl"] == pytest.approx(divergence(full, one), abs=1e-4)
        ids = one.trajectory.topk_ids.astype(np.int64)
        for position in at:
            order = np.argsort(-full[position, ids[position]])[:3]
            expected = [(ids[position, i], full[position, ids[position, i]]) for i in order]
            assert [pair[0] for pair in values["student_top"][position]] == [pair[0] for pair in expected]
            assert [p[1] for p in values["student_top"][position]] == pytest.approx([p[1] for p in expected], abs=2e-5)
            best = np.argmax(one.score.logprobs[position])
            assert values["teacher_top"][position][0][0] == ids[position, best]


def divergence(student: np.ndarray, one: ScoredTrajectory) -> np.ndarray:
    """Reverse KL on the support and the tail bucket, in float64."""
    p = np.exp(np.take_along_axis(student.astype(np.float64), one.trajectory.topk_ids.astype(np.int64), -1))
    q = np.exp(one.score.logprobs.astype(np.float64))
    rest = 1 - p.sum(-1)
    return (p * np.log(p / q)).sum(-1) + rest * (np.log(rest) - one.score.tail_logprob)


@pytest.mark.parametrize("cut", [1, 3, 12])
def test_the_same_samples_are_kept_in_any_order_and_split(cut: int) -> None:
    scored = make_scored(12)
    expected = choose_samples([one.trajectory.sample_id for one in scored], 2)
    assert list(records_of(scored, 2, cut=cut)) == expected
    assert list(records_of(scored[::-1], 2, cut=cut)) == expected


def test_ranks_together_keep_the_same_samples_as_one() -> None:
    scored = make_scored(12)
    alone = records_of(scored, 2)
    ranks = [*records_of(scored[::2], 2).values(), *records_of(scored[1::2], 2).values()]
    assert [one.sample_id for one in choose_records(ranks, 2)] == list(alone)


def test_all_samples_are_equally_likely_to_be_chosen() -> None:
    kept: Counter[int] = Counter()
    for step in range(2000):
        (chosen,) = choose_samples([f"{step}/{slot}/row/0" for slot in range(8)], 1)
        kept[int(chosen.split("/")[1])] += 1
    assert min(kept.values()) > 190  # of 250 expected: 4 standard deviations
    assert len(kept) == 8


def test_zero_samples_record_nothing() -> None:
    assert records_of(make_scored(3), 0) == {}


def test_tokens_that_the_loss_skips_are_marked() -> None:
    scored = make_scored(1, response_tokens=(5, 6))
    (found,) = records_of(scored, 1, loss=LossConfig(skip_first_tokens=2)).values()
    assert found.values["counted"] == [False, False, True, True, True]


def test_long_responses_are_recorded_from_their_start() -> None:
    scored = make_scored(2, response_tokens=(MAX_TOKENS + 88, MAX_TOKENS + 89))
    kept = records_of(scored, 2, chunk=100).values()
    assert len(kept) == 2
    for found in kept:
        assert found.values["response_tokens"] == MAX_TOKENS + 88
        for name in ("ids", "student_logprobs", "teacher_logprobs", "kl", "counted", "student_top", "teacher_top"):
            assert len(found.values[name]) == MAX_TOKENS


@pytest.mark.parametrize("k", [1, 2])
def test_a_support_of_fewer_tokens_is_recorded_whole(k: int) -> None:
    (found,) = records_of(make_scored(1, k=k), 1).values()
    assert {len(tokens) for tokens in found.values["student_top"]} == {k}


def test_a_recorder_starts_each_step_afresh() -> None:
    """The order of the samples' hashes does not matter across steps."""
    recorder = TokenRecorder(1)
    first, second = ([replace_sample(one, step) for one in make_scored(1, seed=step)] for step in (1, 2))
    for scored in (first, second, first):
        batch = build_micro_batch(scored, LossConfig())
        watch = recorder.watch(batch)
        assert watch is not None
        targets = torch.from_numpy(scored[0].trajectory.response_ids.astype(np.int64))
        head(4)(states(scored[0]), batch.ids, targets, loss=Objective(batch, LossConfig(), watch=watch))
        recorder.keep(watch)
        recorder.add_trajectories(scored)
        assert [one.sample_id for one in recorder.records(LossConfig())] == [scored[0].trajectory.sample_id]


def replace_sample(scored: ScoredTrajectory, step: int) -> ScoredTrajectory:
    return replace(scored, trajectory=replace(scored.trajectory, sample_id=f"{step}/sample"))


def test_nan_and_infinity_become_null() -> None:
    (one,) = make_scored(1, response_tokens=(2, 3))
    bad, ids = np.array([np.nan, -np.inf], np.float32), np.zeros((2, 1), np.int64)
    tops = np.array([[-1.0], [-10_000.0]], np.float32)
    record = record_tokens(one, np.ones(2, bool), bad, bad, ids, tops, ids, tops)
    assert record.values["kl"] == [None, None]
    assert record.values["student_top"] == [[(0, -1.0)], []]
    json.dumps(record.values, allow_nan=False)


# --- on disk ----------------------------------------------------------------------------------------------------------


def test_the_files_hold_text(tmp_path: Path, tiny_model: Path) -> None:
    tokenizer = make_tokenizer()

    def ids(text: str) -> np.ndarray:
        return as_ids(tokenizer(text)["input_ids"])

    contexts = {"c": Context("c", ids("the context"))}
    student = ids("Q: x")
    plain = Prompt("plain", student, student, None)
    with_context = Prompt("with", student, student, "c")
    merged = Prompt("merged", student, ids("the context Q: x"), None)
    response = ids("a\né").tolist()
    values = {
        "sample": "s",
        "ids": response,
        "student_top": [[(response[0], -0.5)]] * 4,
        "teacher_top": [[]] * 4,
        **{name: [-1.0] * 4 for name in ("student_logprobs", "teacher_logprobs", "kl")},
        "counted": [True] * 4,
    }
    with RunFiles(tmp_path) as files:
        written = TokenRecordFiles(files, str(tiny_model), contexts)
        written.add_questions([plain])
        written.add_records(3, [TokenRecord(prompt, values) for prompt in (plain, with_context, merged, with_context)])
    lines = [json.loads(line) for line in (tmp_path / "tokens.jsonl").read_text().splitlines()]
    assert [line["context"] for line in lines] == [None, "c", "prompt of merged", "c"]
    assert lines[0]["pieces"] == ["a", "\n", "", "é"]
    assert lines[0]["prompt"] == "Q: x"
    assert [line["student_start"] for line in lines] == ["", "", "", ""]
    assert (lines[0]["row"], lines[0]["step"]) == ("plain", 3)
    assert tokens_of(lines[0])[0].student_top == [("a", -0.5)]
    texts = [json.loads(line) for line in (tmp_path / "texts.jsonl").read_text().splitlines()]
    assert {line.get("context", line.get("row")): line["text"] for line in texts} == {
        "plain": "Q: x",
        "c": "the context",
        "prompt of merged": "the context Q: x",
    }
    assert len(texts) == 3  # each text once
    with RunFiles(tmp_path, resume_after=2) as files:  # the step is repeated, the texts stay
        pass
    assert (tmp_path / "tokens.jsonl").read_text() == ""
    assert len((tmp_path / "texts.jsonl").read_text().splitlines()) == 3


def test_a_prompt_shows_as_both_only_what_both_saw(tmp_path: Path, tiny_model: Path) -> None:
    tokenizer = make_tokenizer()

    def ids(text: str) -> np.ndarray:
        return as_ids(tokenizer(text)["input_ids"])

    contexts = {"c": Context("c", ids("system: the rules"))}
    row = Prompt("row", ids("system: default\nQ: x"), ids("\nQ: x"), "c")  # the student has a system turn, too
    values = {"student_top": [], "teacher_top": [], "ids": ids("a").tolist()}
    with RunFiles(tmp_path) as files:
        TokenRecordFiles(files, str(tiny_model), contexts).add_records(1, [TokenRecord(row, values)])
    (line,) = [json.loads(line) for line in (tmp_path / "tokens.jsonl").read_text().splitlines()]
    assert (line["student_start"], line["prompt"]) == ("system: default", "\nQ: x")
