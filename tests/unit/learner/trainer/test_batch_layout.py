"""Layouts and plans: nothing lost, budget kept, every response token predicted from the position before it."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.protocol.schema import TokenSequence, as_ids
from learner.trainer.batch_layout import (
    PACKED,
    PADDED,
    Layout,
    pack_sequences,
    pad_sequences,
    plan_packed,
    plan_padded,
    response_positions,
)

BOTH = pytest.mark.parametrize("layout", [PADDED, PACKED], ids=["padded", "packed"])


def sequence(prompt: list[int], response: list[int]) -> TokenSequence:
    return TokenSequence(as_ids(prompt), as_ids(response))


@BOTH
def test_a_response_token_is_predicted_by_the_position_before_it(layout: Layout) -> None:
    """Not the token's position (it would see itself), not two before."""
    assert response_positions(3, 4).tolist() == [2, 3, 4, 5]
    batch = layout.lay_out([sequence([1, 2, 3], [4, 5]), sequence([6], [7, 8, 9])])
    flat = batch.inputs["input_ids"].flatten()
    assert flat[batch.positions].tolist() == [3, 4, 6, 7, 8]
    assert flat[batch.positions + 1].tolist() == batch.response_ids.tolist() == [4, 5, 7, 8, 9]
    assert batch.lengths == (2, 3)


def test_padding_is_on_the_right_and_masked_by_length() -> None:
    """Real tokens with the padding id (0 here) stay visible: masks come from lengths."""
    batch = pad_sequences([sequence([0, 0], [0]), sequence([5], [6])])
    assert batch.inputs["input_ids"].tolist() == [[0, 0, 0], [5, 6, 0]]
    assert batch.inputs["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]
    assert batch.lengths == (1, 1)
    assert batch.computed_tokens == 6


def test_packed_sequences_lie_end_to_end_and_each_counts_from_zero() -> None:
    batch = pack_sequences([sequence([0, 0], [0]), sequence([5], [6])])
    assert batch.inputs["input_ids"].tolist() == [[0, 0, 0, 5, 6]]
    assert batch.inputs["position_ids"].tolist() == [[0, 1, 2, 0, 1]]
    assert batch.inputs["cu_seq_lens_q"].tolist() == batch.inputs["cu_seq_lens_k"].tolist() == [0, 3, 5]
    assert batch.inputs["max_length_q"] == batch.inputs["max_length_k"] == 3
    assert batch.computed_tokens == 5


@BOTH
@pytest.mark.parametrize(("prompt", "response"), [([], [1]), ([1], [])])
def test_an_empty_side_is_refused(layout: Layout, prompt: list[int], response: list[int]) -> None:
    with pytest.raises(ValueError, match="both need one or more"):
        layout.lay_out([sequence(prompt, response)])


LENGTHS = st.lists(st.integers(1, 50), max_size=40)


@given(lengths=LENGTHS, budget=st.integers(1, 120))
def test_a_padded_plan_holds_everything_once_within_the_budget(lengths: list[int], budget: int) -> None:
    plan = plan_padded(lengths, budget)
    assert sorted(index for batch in plan for index in batch) == list(range(len(lengths)))
    for batch in plan:
        assert len(batch) == 1 or max(lengths[i] for i in batch) * len(batch) <= budget
    ordered = [lengths[index] for batch in plan for index in batch]
    assert ordered == sorted(lengths, reverse=True)


@given(lengths=LENGTHS, budget=st.integers(1, 120))
def test_a_packed_plan_holds_everything_once_within_the_budget_in_few_batches(lengths: list[int], budget: int) -> None:
    plan = plan_packed(lengths, budget)
    assert sorted(index for batch in plan for index in batch) == list(range(len(lengths)))
    sizes = [sum(lengths[i] for i in batch) for batch in plan]
    for batch, size in zip(plan, sizes, strict=True):
        assert len(batch) == 1 or size <= budget
    # No two micro-batches would fit into one.
    assert all(a + b > budget for i, a in enumerate(sizes) for b in sizes[:i])


def test_a_plan_wastes_no_room() -> None:
    assert plan_padded([4, 4, 4, 4], 8) == [[0, 1], [2, 3]]
    assert plan_padded([1, 10, 1, 10], 20) == [[1, 3], [0, 2]]
    assert plan_padded([], 8) == []
    assert plan_packed([5, 1, 7, 3], 8) == [[2, 1], [0, 3]]
    assert plan_packed([9, 1], 8) == [[0], [1]]
    assert plan_packed([], 8) == []


def test_ids_keep_their_values_under_both_layouts() -> None:
    ids = np.array([0, 49_151, 151_935])
    batch = PACKED.lay_out([sequence(ids.tolist(), [3])])
    assert batch.inputs["input_ids"][0].tolist() == [*ids.tolist(), 3]
