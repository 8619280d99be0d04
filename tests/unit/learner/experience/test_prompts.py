"""Prompts of the pipeline: items found in answers, templates, problems and attempts as text."""

from __future__ import annotations

from pathlib import Path

import pytest

from common.config.model import ConfigError
from common.data.rows import Row
from common.data.templates import fill, placeholders
from learner.experience.prompts import (
    FOLDER,
    PLACEHOLDERS,
    answer_trace,
    game_trace,
    load_templates,
    parse_items,
    problem_text,
)
from rollout_workers.environments.episodes import Exchange


@pytest.mark.parametrize(
    ("answer", "items"),
    [
        ("- EXPERIENCE ITEM: Check parity.\n- EXPERIENCE ITEM: Draw it.", ("Check parity.", "Draw it.")),
        ("Sure:\n\n- EXPERIENCE ITEM: Draw it.  \n\nThat is all.", ("Draw it.",)),
        ("  - **EXPERIENCE ITEM:** Draw it.", ("Draw it.",)),
        ("* Experience item: Draw it.", ("Draw it.",)),
        ("- EXPERIENCE ITEM: Draw it.\n- EXPERIENCE ITEM: Draw it.", ("Draw it.",)),
        ("- EXPERIENCE ITEM: Use a: b.", ("Use a: b.",)),
        ("- EXPERIENCE ITEM:\n- EXPERIENCE ITEM: Draw it.", ("Draw it.",)),
        ("- EXPERIENCE ITEM: not yet\n</think>\n- EXPERIENCE ITEM: Draw it.", ("Draw it.",)),
        ("- EXPERIENCE ITEM: not yet </think>", ()),
        ("- Draw it.\nEXPERIENCE ITEM: no dash", ()),
        ("I write - EXPERIENCE ITEM: inside a line", ()),
        ("", ()),
    ],
)
def test_items_are_lines_after_the_thinking(answer: str, items: tuple[str, ...]) -> None:
    assert parse_items(answer) == items


def test_a_template_is_filled_once() -> None:
    assert fill("{a} and {b}", {"a": "{b}", "b": r"\frac{1}{2}"}) == r"{b} and \frac{1}{2}"
    assert fill("{a} {unknown}", {"a": "1"}) == "1 {unknown}"
    assert placeholders("{a} {b.c} { d } {1}") == {"a", "b.c"}


def test_the_built_in_templates_have_their_placeholders() -> None:
    templates = load_templates(None)
    prompt = templates.extraction_prompt("PROBLEM {trace}", "TRACE", game=False)
    assert "PROBLEM {trace}" in prompt
    assert prompt.count("TRACE") == 1
    assert "- EXPERIENCE ITEM:" in prompt
    assert "Game" in templates.extraction_prompt("P", "T", game=True)
    assert templates.context_text(("one", "two")).endswith("- one\n- two")
    assert {path.stem for path in FOLDER.glob("*.txt")} == set(PLACEHOLDERS)


def test_a_users_templates_replace_the_built_in_ones(tmp_path: Path) -> None:
    (tmp_path / "context.txt").write_text("Known:\n{items}\n")
    own, built_in = load_templates(tmp_path), load_templates(None)
    assert own.context_text(("one",)) == "Known:\n- one"
    assert own.digest == built_in.digest  # the extraction templates are the same
    (tmp_path / "extract.txt").write_text("{problem} {trace}")
    assert load_templates(tmp_path).digest != built_in.digest
    (tmp_path / "extract.txt").write_text("{problem} {tracé} {traec}")
    with pytest.raises(ConfigError, match=r"extract\.txt lacks \{trace\}"):
        load_templates(tmp_path)
    with pytest.raises(ConfigError, match=r"has none of extract\.txt"):
        load_templates(tmp_path / "none")


def test_a_problem_is_the_prompt_as_text() -> None:
    assert problem_text(Row(id="a", prompt="2 + 2?")) == "2 + 2?"
    chat = Row.model_validate({"id": "a", "messages": [{"role": "user", "content": "2 + 2?"}]})
    assert problem_text(chat) == "2 + 2?"
    long = Row.model_validate(
        {"id": "a", "messages": [{"role": "system", "content": "Be a bot."}, {"role": "user", "content": "2 + 2?"}]}
    )
    assert problem_text(long) == "system: Be a bot.\n\nuser: 2 + 2?"


def test_a_trace_has_no_thinking_and_no_reward() -> None:
    assert answer_trace("hm</think>\n4") == "4"
    assert answer_trace("hm, never ending") == "hm, never ending"
    trace = game_trace([Exchange("board 1", "hm</think>[up]"), Exchange("board 2", "[down]")], "You fell.")
    assert "hm" not in trace
    words = "[Turn 1] board 1 [Move 1] [up] [Turn 2] board 2 [Move 2] [down] [End] You fell."
    assert " ".join(trace.split()) == words
    assert "turns ran out" in game_trace([Exchange("board", "[up]")], "")
