"""The pure pieces of experience: insights found, contexts nested under a cap, contexts chosen, files gone on with."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from common.config.model import ConfigError
from common.data.rows import Row
from common.data.templates import fill, places
from learner.experience.accumulate import Accumulated, accumulate
from learner.experience.choose import at_random, best
from learner.experience.parse import items_of
from learner.experience.stage_file import StageFile, read_stage, write_lines
from learner.experience.templates import FOLDER, PLACES, load_templates
from learner.experience.traces import answer_trace, game_trace, problem_of
from rollout_workers.environments.episodes import Exchange

# --- insights ---------------------------------------------------------------------------------------------------------


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
def test_items_are_lines_behind_the_thinking(answer: str, items: tuple[str, ...]) -> None:
    assert items_of(answer) == items


# --- nesting ----------------------------------------------------------------------------------------------------------


def nested(lists: Sequence[Sequence[str]], cap: int) -> list[Accumulated]:
    """Items joined by commas, a token a character: lengths are seen at a glance."""
    return list(accumulate(lists, max_tokens=cap, render=",".join, count_tokens=len))


def test_contexts_nest_in_the_order_of_the_problems() -> None:
    found = nested([["aa"], ["bb", "cc"], ["dd"]], cap=100)
    assert [(one.problems, one.text, one.tokens, one.dropped) for one in found] == [
        (1, "aa", 2, 0),
        (2, "aa,bb,cc", 8, 0),
        (3, "aa,bb,cc,dd", 11, 0),
    ]


def test_above_the_cap_whole_items_leave_oldest_first_and_stay_away() -> None:
    # 8 characters hold three items of two; then "dddd" pushes out aa and bb, and the short "e" does not bring bb back.
    found = nested([["aa", "bb", "cc"], ["dddd"], ["e"]], cap=9)
    assert [(one.items, one.dropped, one.tokens) for one in found] == [
        (("aa", "bb", "cc"), 0, 8),
        (("cc", "dddd"), 2, 7),
        (("cc", "dddd", "e"), 2, 9),
    ]
    assert [one.items for one in nested([["aa", "bb", "cc"], ["dddd"], ["e"]], cap=8)][-1] == ("dddd", "e")


def test_an_item_above_the_cap_leaves_with_all_before_it() -> None:
    found = nested([["aa"], ["much too long"], ["bb"]], cap=6)
    assert [(one.problems, one.items, one.dropped) for one in found] == [(1, ("aa",), 0), (3, ("bb",), 2)]


def test_problems_without_items_change_nothing_and_nothing_is_no_context() -> None:
    found = nested([[], ["aa"], []], cap=6)
    assert [(one.problems, one.text) for one in found] == [(2, "aa"), (3, "aa")]
    assert nested([[], []], cap=6) == []


# --- choice -----------------------------------------------------------------------------------------------------------


def test_a_random_choice_is_seeded_without_repeats_and_in_order() -> None:
    ids = [f"c{i}" for i in range(50)]
    chosen = at_random(ids, 10, seed=1)
    assert chosen == at_random(ids, 10, seed=1)
    assert chosen != at_random(ids, 10, seed=2)
    assert len(set(chosen)) == 10
    assert chosen == sorted(chosen, key=ids.index)
    assert chosen != ids[:10]
    assert at_random(ids, None, seed=1) == at_random(ids, 99, seed=1) == ids


def test_the_best_are_of_highest_accuracy_and_of_equals_the_first() -> None:
    scores = {"a": 0.5, "b": 0.9, "c": 0.5, "d": 0.1}
    assert best(scores, 1) == ["b"]
    assert best(scores, 3) == ["b", "a", "c"]
    assert best(scores, 9) == ["b", "a", "c", "d"]


# --- templates --------------------------------------------------------------------------------------------------------


def test_a_template_is_filled_once() -> None:
    assert fill("{a} and {b}", {"a": "{b}", "b": r"\frac{1}{2}"}) == r"{b} and \frac{1}{2}"
    assert fill("{a} {unknown}", {"a": "1"}) == "1 {unknown}"
    assert places("{a} {b.c} { d } {1}") == {"a", "b.c"}


def test_the_shipped_templates_have_their_places() -> None:
    templates = load_templates(None)
    asked = templates.extraction("PROBLEM {trace}", "TRACE", game=False)
    assert "PROBLEM {trace}" in asked
    assert asked.count("TRACE") == 1
    assert "- EXPERIENCE ITEM:" in asked
    assert "Game" in templates.extraction("P", "T", game=True)
    assert templates.experience(("one", "two")).endswith("- one\n- two")
    assert {path.stem for path in FOLDER.glob("*.txt")} == set(PLACES)


def test_own_templates_stand_in_for_the_shipped_ones(tmp_path: Path) -> None:
    (tmp_path / "context.txt").write_text("Known:\n{items}\n")
    own, shipped = load_templates(tmp_path), load_templates(None)
    assert own.experience(("one",)) == "Known:\n- one"
    assert own.digest == shipped.digest  # extraction is as it was
    (tmp_path / "extract.txt").write_text("{problem} {trace}")
    assert load_templates(tmp_path).digest != shipped.digest
    (tmp_path / "extract.txt").write_text("{problem} {tracé} {traec}")
    with pytest.raises(ConfigError, match=r"extract\.txt lacks \{trace\}"):
        load_templates(tmp_path)
    with pytest.raises(ConfigError, match=r"has none of extract\.txt"):
        load_templates(tmp_path / "none")


# --- traces -----------------------------------------------------------------------------------------------------------


def test_a_problem_is_what_was_asked() -> None:
    assert problem_of(Row(id="a", prompt="2 + 2?")) == "2 + 2?"
    chat = Row.model_validate({"id": "a", "messages": [{"role": "user", "content": "2 + 2?"}]})
    assert problem_of(chat) == "2 + 2?"
    long = Row.model_validate(
        {"id": "a", "messages": [{"role": "system", "content": "Be a bot."}, {"role": "user", "content": "2 + 2?"}]}
    )
    assert problem_of(long) == "system: Be a bot.\n\nuser: 2 + 2?"


def test_a_trace_leaves_out_thinking_and_reward() -> None:
    assert answer_trace("hm</think>\n4") == "4"
    assert answer_trace("hm, never ending") == "hm, never ending"
    trace = game_trace([Exchange("board 1", "hm</think>[up]"), Exchange("board 2", "[down]")], "You fell.")
    assert "hm" not in trace
    words = "[Turn 1] board 1 [Move 1] [up] [Turn 2] board 2 [Move 2] [down] [End] You fell."
    assert " ".join(trace.split()) == words
    assert "turns ran out" in game_trace([Exchange("board", "[up]")], "")


# --- files ------------------------------------------------------------------------------------------------------------


def test_a_stage_goes_on_where_it_was_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "experience" / "solved.jsonl"
    file = StageFile(path, {"model": "m", "stop": ("a",)})
    file.add([{"n": 1}, {"n": 2}])
    file.close()
    path.write_text(path.read_text() + '{"n": 3, "text": "cut sh')
    again = StageFile(path, {"stop": ("a",), "model": "m"})
    assert again.rows == [{"n": 1}, {"n": 2}]
    again.add([{"n": 3}])
    again.close()
    assert read_stage(path, "extract") == [{"n": 1}, {"n": 2}, {"n": 3}]
    assert len(path.read_text().splitlines()) == 4


def test_a_stage_that_was_made_otherwise_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "solved.jsonl"
    StageFile(path, {"model": "m", "seed": 1}).close()
    before = path.read_text()
    with pytest.raises(ConfigError) as caught:
        StageFile(path, {"model": "n", "seed": 1, "new": True})
    assert "model was 'm' and is 'n'" in str(caught.value)
    assert "new was None and is True" in str(caught.value)
    assert "seed" not in str(caught.value)
    assert path.read_text() == before


def test_a_stage_that_was_not_run_names_its_command(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="run `opcd experience extract` first"):
        read_stage(tmp_path / "extracted.jsonl", "extract")
    StageFile(tmp_path / "extracted.jsonl", {"model": "m"}).close()
    with pytest.raises(ConfigError, match="run `opcd experience extract` first"):
        read_stage(tmp_path / "extracted.jsonl", "extract")


def test_lines_are_written_whole(tmp_path: Path) -> None:
    path = tmp_path / "pool" / "pool.jsonl"
    write_lines(path, [{"id": "a", "text": "é"}])
    write_lines(path, [{"id": "b", "text": "x"}])
    assert [json.loads(line) for line in path.read_text().splitlines()] == [{"id": "b", "text": "x"}]
    assert [one.name for one in path.parent.iterdir()] == ["pool.jsonl"]
