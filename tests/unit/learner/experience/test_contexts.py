"""Nested contexts under a cap, and the choice of contexts."""

from __future__ import annotations

from collections.abc import Sequence

from learner.experience.accumulate import NestedContext, nest_contexts
from learner.experience.select import choose_best, choose_random


def nested(lists: Sequence[Sequence[str]], cap: int) -> list[NestedContext]:
    """Items joined by commas; a character is a token."""
    return list(nest_contexts(lists, max_tokens=cap, render=",".join, count_tokens=len))


def test_contexts_nest_in_the_order_of_the_problems() -> None:
    found = nested([["aa"], ["bb", "cc"], ["dd"]], cap=100)
    assert [(one.problems, one.text, one.tokens, one.dropped) for one in found] == [
        (1, "aa", 2, 0),
        (2, "aa,bb,cc", 8, 0),
        (3, "aa,bb,cc,dd", 11, 0),
    ]


def test_above_the_cap_whole_items_are_dropped_oldest_first_and_stay_dropped() -> None:
    # Three items of two characters fit; then "dddd" pushes out aa and bb, and the short "e" does not bring bb back.
    found = nested([["aa", "bb", "cc"], ["dddd"], ["e"]], cap=9)
    assert [(one.items, one.dropped, one.tokens) for one in found] == [
        (("aa", "bb", "cc"), 0, 8),
        (("cc", "dddd"), 2, 7),
        (("cc", "dddd", "e"), 2, 9),
    ]
    assert [one.items for one in nested([["aa", "bb", "cc"], ["dddd"], ["e"]], cap=8)][-1] == ("dddd", "e")


def test_an_item_above_the_cap_is_dropped_with_all_before_it() -> None:
    found = nested([["aa"], ["much too long"], ["bb"]], cap=6)
    assert [(one.problems, one.items, one.dropped) for one in found] == [(1, ("aa",), 0), (3, ("bb",), 2)]


def test_problems_without_items_repeat_the_context_and_no_item_gives_no_context() -> None:
    found = nested([[], ["aa"], []], cap=6)
    assert [(one.problems, one.text) for one in found] == [(2, "aa"), (3, "aa")]
    assert nested([[], []], cap=6) == []


def test_a_random_choice_is_seeded_ordered_and_without_repeats() -> None:
    ids = [f"c{i}" for i in range(50)]
    chosen = choose_random(ids, 10, seed=1)
    assert chosen == choose_random(ids, 10, seed=1)
    assert chosen != choose_random(ids, 10, seed=2)
    assert len(set(chosen)) == 10
    assert chosen == sorted(chosen, key=ids.index)
    assert chosen != ids[:10]
    assert choose_random(ids, None, seed=1) == choose_random(ids, 99, seed=1) == ids


def test_the_best_have_the_highest_accuracy_and_the_first_wins_a_tie() -> None:
    scores = {"a": 0.5, "b": 0.9, "c": 0.5, "d": 0.1}
    assert choose_best(scores, 1) == ["b"]
    assert choose_best(scores, 3) == ["b", "a", "c"]
    assert choose_best(scores, 9) == ["b", "a", "c", "d"]
