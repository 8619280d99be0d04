"""Micro-batches: the values of every response token, weights and refusals."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from common.config.model import LossConfig
from common.protocol.schema import LOGPROB_FLOOR, PAD_ID, Trajectory, as_ids
from learner.trainer.micro_batch import build_micro_batch, count_loss_tokens, token_weights
from tests.support.scored import make_scored


def answer(tokens: int, mask: list[bool] | None = None) -> Trajectory:
    """A response of `tokens` tokens; `mask` is True for the student's."""
    (scored,) = make_scored(1, response_tokens=(tokens, tokens + 1))
    return replace(scored.trajectory, loss_mask=None if mask is None else np.array(mask))


def test_each_row_holds_the_values_of_its_response_token() -> None:
    scored = make_scored(3, k=4)
    batch = build_micro_batch(scored, LossConfig())
    row = 0
    for index, item in enumerate(scored):
        for t in range(len(item.trajectory.response_ids)):
            assert batch.sample_index[row] == index
            assert batch.ids[row].tolist() == item.trajectory.topk_ids[t].tolist()
            np.testing.assert_array_equal(
                batch.teacher_logprobs[row].numpy(), item.score.logprobs[t].astype(np.float32)
            )
            assert batch.teacher_tail[row] == item.score.tail_logprob[t]
            assert batch.teacher_sampled[row] == item.score.sampled_logprob[t]
            assert batch.engine_sampled[row] == item.trajectory.sampled_logprobs[t]
            assert batch.sequences.response_ids[row] == item.trajectory.response_ids[t]
            row += 1
    assert row == len(batch.weights) == batch.weights.sum()


def test_the_teachers_ids_are_used_if_it_picked_the_support() -> None:
    (item,) = make_scored(1, k=4)
    picked = as_ids(item.trajectory.topk_ids[:, ::-1])
    batch = build_micro_batch([replace(item, score=replace(item.score, topk_ids=picked))], LossConfig())
    assert batch.ids.tolist() == picked.tolist()


def test_the_students_ids_are_marked_in_every_support() -> None:
    """Row by row: an id of another row's top k does not count."""
    (item,) = make_scored(1, k=2, response_tokens=(2, 3))
    mine = replace(item, trajectory=replace(item.trajectory, topk_ids=as_ids([[1, 2], [3, 4]])))
    assert build_micro_batch([mine], LossConfig()).in_student_topk.tolist() == [[True, True], [True, True]]
    score = replace(mine.score, topk_ids=as_ids([[2, 4], [3, PAD_ID]]))
    batch = build_micro_batch([replace(mine, score=score)], LossConfig(support="teacher", top_k=2))
    assert batch.in_student_topk.tolist() == [[True, False], [True, False]]
    assert batch.topk_overlap.tolist() == [0.5, 0.5]
    union = replace(
        mine.score,
        logprobs=np.full((2, 4), -2, np.float16),
        topk_ids=as_ids([[1, 2, 5, PAD_ID], [3, 4, PAD_ID, PAD_ID]]),
    )
    batch = build_micro_batch([replace(mine, score=union)], LossConfig(support="union", top_k=2))
    assert batch.topk_overlap.tolist() == [0.5, 1.0]


def test_narrow_supports_are_padded_to_the_widest() -> None:
    narrow, wide = make_scored(1, k=4) + make_scored(1, k=6, seed=1)
    batch = build_micro_batch([narrow, wide], LossConfig())
    rows = len(narrow.trajectory.response_ids)
    assert batch.ids.shape[1] == 6
    assert (batch.ids[:rows, 4:] == PAD_ID).all()
    assert (batch.teacher_logprobs[:rows, 4:] == LOGPROB_FLOOR).all()
    assert (batch.ids[rows:] != PAD_ID).all()


def test_weights_skip_the_first_tokens_and_average_over_the_others() -> None:
    by_token = LossConfig(skip_first_tokens=2)
    assert token_weights(answer(4), by_token).tolist() == [0, 0, 1, 1]
    by_sequence = LossConfig(skip_first_tokens=2, normalize="sequence")
    assert token_weights(answer(4), by_sequence).tolist() == [0, 0, 0.5, 0.5]
    assert token_weights(answer(2), by_sequence).tolist() == [0, 0]
    assert [count_loss_tokens(answer(n), by_token) for n in (1, 2, 3)] == [0, 0, 1]


def test_only_the_students_tokens_of_a_conversation_count() -> None:
    mask = [True, True, True, False, False, True, False, True, True]
    talk = answer(9, mask)
    assert token_weights(talk, LossConfig()).tolist() == [1, 1, 1, 0, 0, 1, 0, 1, 1]
    assert token_weights(talk, LossConfig(normalize="sequence")).sum() == pytest.approx(1)
    # `skip_first_tokens` applies to every turn.
    assert token_weights(talk, LossConfig(skip_first_tokens=1)).tolist() == [0, 1, 1, 0, 0, 0, 0, 0, 1]
    assert count_loss_tokens(talk, LossConfig(skip_first_tokens=1)) == 3
    assert token_weights(answer(2, [False, False]), LossConfig(normalize="sequence")).tolist() == [0, 0]
    (scored,) = make_scored(1, response_tokens=(9, 10))
    masked = replace(scored, trajectory=replace(scored.trajectory, loss_mask=np.array(mask)))
    assert build_micro_batch([masked], LossConfig()).weights.tolist() == [1, 1, 1, 0, 0, 1, 0, 1, 1]
    with pytest.raises(ValueError, match=r"sample 0/0: loss mask is \(2,\), expected \(9,\)"):
        token_weights(answer(9, [True, False]), LossConfig())


def test_scores_that_do_not_fit_are_refused_with_the_sample() -> None:
    (item,) = make_scored(1)
    short = replace(item, score=replace(item.score, logprobs=item.score.logprobs[1:]))
    with pytest.raises(ValueError, match=r"sample 0/0: teacher log-probs"):
        build_micro_batch([short], LossConfig())
    blank = item.trajectory.topk_ids.copy()
    blank[1] = PAD_ID
    with pytest.raises(ValueError, match=r"sample 0/0: a position has no support"):
        build_micro_batch([replace(item, trajectory=replace(item.trajectory, topk_ids=blank))], LossConfig())
    none = replace(item.trajectory, topk_ids=blank[:, :0])
    with pytest.raises(ValueError, match="k > 0"):
        build_micro_batch(
            [replace(item, trajectory=none, score=replace(item.score, logprobs=item.score.logprobs[:, :0]))],
            LossConfig(),
        )


def test_a_batch_moves_as_a_whole() -> None:
    batch = build_micro_batch(make_scored(2), LossConfig()).to(torch.device("meta"))
    assert batch.ids.device.type == batch.sequences.inputs["input_ids"].device.type == "meta"
    assert batch.sample_ids == ("0/0", "0/1")
