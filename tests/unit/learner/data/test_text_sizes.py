"""Texts too long for any tokens are refused before a tokenizer sees them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from common.config.model import Config
from common.data.rows import DataError
from learner.data import inputs
from learner.data.inputs import read_inputs
from tests.support.configs import config_of
from tests.support.tiny import make_tokenizer

LIMIT = 4096
"""Of the tiny model."""
LONGEST = len("<|im_start|>")
"""Characters of its longest token."""


class Deaf:
    """A tokenizer that fails the test if it gets a text."""

    def __init__(self) -> None:
        self._vocab = make_tokenizer().get_vocab()
        self.vocab_size = len(self._vocab)

    def get_vocab(self) -> dict[str, int]:
        return dict(self._vocab)

    def __call__(self, text: str, **_: Any) -> None:
        pytest.fail(f"tokenised {len(text)} characters")


def run_of(tmp_path: Path, model: Path, *, row: str, context: str = "c", **sections: Any) -> Config:
    (tmp_path / "train.jsonl").write_text(f'{{"id": "a", "prompt": "{row}"}}')
    return config_of(
        student={"model": str(model)},
        context={"text": context},
        data={"train": str(tmp_path / "train.jsonl")},
        **sections,
    )


def test_a_row_that_no_tokens_hold_is_refused_untokenised(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inputs, "load_tokenizer", lambda model: Deaf())
    long = "x" * (LIMIT * LONGEST + 1)
    with pytest.raises(
        DataError, match=r"^data\.train: row 'a': 49,153 characters, more than 4,096 tokens of the stud"
    ):
        read_inputs(run_of(tmp_path, tiny_model, row=long))
    with pytest.raises(DataError, match=r"^the context has 49,153 characters, more than 4,096 tokens of a teacher"):
        read_inputs(run_of(tmp_path, tiny_model, row="x", context=long))


def test_a_text_that_tokens_may_hold_is_tokenised(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the bound; and a context for a teacher elsewhere, whose limit is unknown here."""
    just = "x" * (LIMIT * LONGEST)
    with pytest.raises(DataError, match=r"49160 student tokens \(49152 of prompt"):
        read_inputs(run_of(tmp_path, tiny_model, row=just, rollout={"max_tokens": 8}))
    elsewhere = {"url": "http://teacher:8001"}
    assert read_inputs(run_of(tmp_path, tiny_model, row="x", context=just + "x", teacher=elsewhere)).contexts
