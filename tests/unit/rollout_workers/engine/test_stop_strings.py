"""String stops as tokens, and where an answer is cut."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from common.config.model import SyncConfig
from common.data.token_text import decode_ids
from rollout_workers.engine.engine import RolloutEngine
from rollout_workers.engine.stop_strings import StopTokens, first_stop, resolve_stop_strings
from tests.support.tokenizers import build_tokenizer, ids_of

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


def test_a_stop_that_holds_a_special_token_is_looked_for_in_the_text() -> None:
    assert resolve_stop_strings(["</s>\n"], [*TEXTS, "</s>"], {"</s>": 10}).spanning == ("</s>\n",)


def test_a_stop_that_only_the_vocabulary_flags_as_special_is_its_token() -> None:
    """The end of turn of many base models: in no map of special tokens, and invisible to a decoder that skips them."""
    tokenizer = build_tokenizer(None, eos="<|text_end|>", named=(), silent=("<|eot|>",), plain=("cats",))
    engine = RolloutEngine(None, tokenizer, 64, SyncConfig())
    eot = tokenizer.convert_tokens_to_ids("<|eot|>")
    assert engine._resolve_stops(("<|eot|>",)) == StopTokens((eot,), ())
    spanning = engine._resolve_stops(("cats<|eot|>",))
    assert spanning == StopTokens((), ("cats<|eot|>",))
    said = ids_of(tokenizer, "cats<|eot|>more")
    assert first_stop(said, spanning.spanning, lambda ids: decode_ids(tokenizer, ids)) == 2
