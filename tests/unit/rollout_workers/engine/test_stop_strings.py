"""String stops as tokens, and where an answer is cut."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from rollout_workers.engine.stop_strings import cut_text, first_stop, resolve_stop_strings

TEXTS = ["a", "b", "\n", "\n\n", " x\n", "</", "answer", ">", ">\n", ""]


def spell(ids: Sequence[int]) -> str:
    return "".join(TEXTS[i] for i in ids)


def test_a_single_character_is_every_token_that_holds_it_and_nothing_to_look_for() -> None:
    stops = resolve_stop_strings(["\n"], TEXTS, {})
    assert stops.token_ids == (2, 3, 4, 8)
    assert stops.spanning == ()


def test_a_longer_stop_is_looked_for_in_the_text_too() -> None:
    stops = resolve_stop_strings(["</answer>", "\n\n"], TEXTS, {})
    assert stops.token_ids == (3,)
    assert stops.spanning == ("</answer>", "\n\n")


def test_a_special_token_is_its_id_alone() -> None:
    assert resolve_stop_strings(["<|end|>"], TEXTS, {"<|end|>": 9}).token_ids == (9,)
    assert resolve_stop_strings(["<|end|>"], TEXTS, {"<|end|>": 9}).spanning == ()


def test_an_empty_stop_is_refused() -> None:
    with pytest.raises(ValueError, match="empty string"):
        resolve_stop_strings([""], TEXTS, {})


def test_the_cut_is_after_the_token_that_completes_the_stop() -> None:
    ids = [0, 5, 6, 8, 1, 5, 6, 7]
    assert first_stop(ids, ("</answer>",), spell) == 4
    assert first_stop(ids[:3], ("</answer>",), spell) is None
    assert first_stop([2, 2], ("\n\n",), spell) == 2


def test_text_is_cut_before_the_first_stop() -> None:
    assert cut_text("one\ntwo. three", [".", "\n"]) == "one"
    assert cut_text("one", ["\n"]) == "one"
