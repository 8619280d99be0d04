"""Micro-batches: full before they are dealt out, nothing lost, nothing twice, every rank in every group."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from learner.loop.micro_batcher import MicroBatcher


@given(
    lengths=st.lists(st.integers(1, 50), max_size=60),
    ranks=st.integers(1, 4),
    budget=st.integers(1, 120),
    packed=st.booleans(),
)
def test_every_answer_is_dealt_out_once_within_the_budget(
    lengths: list[int], ranks: int, budget: int, packed: bool
) -> None:
    filler: MicroBatcher[int] = MicroBatcher(ranks, budget, packed=packed)
    groups = [group for index, tokens in enumerate(lengths) for group in filler.add(tokens, index)]
    streamed = len(groups)
    groups += filler.flush()
    batches = [batch for group in groups for batch in group]
    assert sorted(index for batch in batches for index in batch) == list(range(len(lengths)))
    assert all(len(group) == ranks for group in groups)
    for batch in batches:
        tokens = [lengths[i] for i in batch]
        filled = sum(tokens) if packed else max(tokens, default=0) * len(tokens)
        assert filled <= budget or len(batch) == 1
    assert all(batch for group in groups[:streamed] for batch in group)  # only the end may leave a rank idle
    assert filler.flush() == []


def test_a_group_leaves_as_soon_as_every_rank_is_full() -> None:
    filler: MicroBatcher[str] = MicroBatcher(2, 20)
    assert [filler.add(10, name) for name in "abc"] == [[], [], []]
    assert filler.add(10, "d") == [[["a", "b"], ["c", "d"]]]  # nothing more would fit
    assert filler.add(10, "e") == []
    assert filler.flush() == [[["e"], []]]


def test_answers_of_like_length_share_a_micro_batch() -> None:
    filler: MicroBatcher[int] = MicroBatcher(2, 40)
    assert [filler.add(tokens, tokens) for tokens in (3, 20, 4, 19)] == [[], [], [], []]
    assert filler.flush() == [[[20, 19], [4, 3]]]


def test_packed_rows_count_no_padding() -> None:
    """A micro-batch of 20 tokens holds two answers of 9 tokens, and packed also two of 1 token."""
    lengths = [9, 1] * 16

    def groups(*, packed: bool) -> list[list[list[int]]]:
        filler: MicroBatcher[int] = MicroBatcher(2, 20, packed=packed)
        streamed = [group for index, tokens in enumerate(lengths) for group in filler.add(tokens, index)]
        assert all(sum(lengths[i] for i in batch) > 20 - 9 for group in streamed for batch in group) or not packed
        return streamed + filler.flush()

    assert (len(groups(packed=True)), len(groups(packed=False))) == (5, 6)
