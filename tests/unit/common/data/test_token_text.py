"""Texts of single tokens."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from common.data.token_text import decode_ids, token_texts
from tests.support.tiny import make_tokenizer

TOKENIZER = make_tokenizer()  # every byte is a token


def ids_of(text: str) -> list[int]:
    return list(TOKENIZER(text, add_special_tokens=False)["input_ids"])


@given(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\ufffd"), max_size=30))
def test_there_is_one_text_per_token_and_they_join_to_the_whole(text: str) -> None:
    ids = ids_of(text)
    found = token_texts(TOKENIZER, ids)
    assert len(found) == len(ids)
    assert "".join(found) == decode_ids(TOKENIZER, ids) == text


def test_a_character_belongs_to_the_token_that_completes_it() -> None:
    assert token_texts(TOKENIZER, ids_of("aé€b")) == ["a", "", "é", "", "", "€", "b"]


def test_an_incomplete_character_at_the_end_is_shown() -> None:
    assert token_texts(TOKENIZER, ids_of("aé")[:2]) == ["a", "\ufffd"]


def test_special_tokens_are_text() -> None:
    assert token_texts(TOKENIZER, [TOKENIZER.eos_token_id, *ids_of(" x")]) == ["<|im_end|>", " ", "x"]
