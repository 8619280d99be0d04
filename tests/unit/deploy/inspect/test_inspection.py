"""``opcd inspect`` shows both sides of a row, token by token, with the ids that a run would use."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner, Result

from common.config.model import StudentConfig
from common.data.rendering import Renderer, teacher_sequence
from common.data.rows import Row
from common.protocol.schema import Context, Prompt, as_ids
from deploy.cli import inspect as cli_inspect
from deploy.cli.main import app
from deploy.inspect.inspection import InspectedRow, InspectedToken, equal_at_end, inspect_row, shortened
from tests.support.tiny import make_tokenizer
from tests.support.tokenizers import build_tokenizer

TOKENIZER = make_tokenizer()
CONTEXT = "Be [red]brief[/red]."
CHAT = Row.model_validate({"id": "c", "messages": [{"role": "user", "content": "two and two?"}]})
RAW = Row(id="r", prompt="Q: cat\nA:")


def seen_of(row: Row, answer: str = "four", skip_first: int = 0) -> tuple[InspectedRow, Prompt, dict[str, Context]]:
    renderer = Renderer(TOKENIZER, CONTEXT, StudentConfig(model="unused"))
    prompt = renderer.render(row)
    ids = TOKENIZER(answer, add_special_tokens=False)["input_ids"]
    return inspect_row(TOKENIZER, prompt, renderer.contexts, ids, skip_first), prompt, renderer.contexts


@pytest.mark.parametrize("row", [CHAT, RAW])
def test_either_side_reads_as_the_run_sends_it(row: Row) -> None:
    seen, prompt, contexts = seen_of(row)
    answer = [token.id for token in seen.tokens if token.role == "response"]
    for side, expected in (
        ("teacher", teacher_sequence(prompt, contexts)),
        ("student", prompt.student_ids.tolist()),
    ):
        there = {getattr(token, side): token.id for token in seen.tokens if getattr(token, side) is not None}
        assert [there[position] for position in range(len(there))] == [*expected, *answer]
    assert seen.teacher_tokens == len(teacher_sequence(prompt, contexts))
    assert seen.student_tokens == len(prompt.student_ids)


@pytest.mark.parametrize("row", [CHAT, RAW])
def test_the_prompts_become_equal_at_the_last_common_token_from_behind(row: Row) -> None:
    seen, prompt, contexts = seen_of(row)
    teacher, student = teacher_sequence(prompt, contexts), prompt.student_ids.tolist()
    equal = seen.equal_tokens
    assert teacher[-equal:] == student[-equal:]
    assert equal == len(student) or teacher[-equal - 1] != student[-equal - 1]
    text = "".join(token.piece for token in seen.tokens if token.student is not None and token.teacher is not None)
    assert ("two and two?" if row is CHAT else "Q: cat\nA:") in text


def test_roles_and_the_mask() -> None:
    seen, prompt, contexts = seen_of(RAW, skip_first=1)
    roles = [token.role for token in seen.tokens]
    assert prompt.context is not None
    assert roles.count("context") == len(contexts[prompt.context].ids) == len(CONTEXT)  # bytes are tokens
    assert roles == sorted(roles, key=("context", "prompt", "response").index)
    assert [token.counted for token in seen.tokens if token.role == "response"] == [False, True, True, True]
    assert not any(token.counted for token in seen.tokens if token.role != "response")


def test_pieces_are_the_text() -> None:
    seen, _, _ = seen_of(RAW)
    assert "".join(token.piece for token in seen.tokens) == CONTEXT + "Q: cat\nA:" + "four"


def test_a_system_turn_of_the_students_own_is_seen_apart() -> None:
    renderer = Renderer(TOKENIZER, CONTEXT, StudentConfig(model="unused", system="text", system_text="Hello."))
    prompt = renderer.render(CHAT)
    seen = inspect_row(TOKENIZER, prompt, renderer.contexts, [])
    teacher_only = [token for token in seen.tokens if token.student is None]
    assert "".join(token.piece for token in teacher_only) == f"\n{CONTEXT}\n"  # the end is compared first
    assert {token.role for token in teacher_only} == {"context"}
    assert not [token for token in seen.tokens if token.teacher is None]
    both = "".join(token.piece for token in seen.tokens if token.student is not None)
    assert both.startswith("<|im_start|>system\nHello.<|im_end|>")


class WithBos:
    """A tokenizer whose texts may hold the BOS token."""

    bos_token_id = 1

    @staticmethod
    def decode(ids: list[int], **_: Any) -> str:
        return "".join(chr(96 + one) for one in ids)


def warned(student: list[int], teacher: list[int], context: list[int] | None) -> list[str]:
    contexts = {} if context is None else {"c": Context("c", as_ids(context))}
    prompt = Prompt("x", as_ids(student), as_ids(teacher), None if context is None else "c")
    return list(inspect_row(WithBos(), prompt, contexts, []).warnings())


def test_likely_mistakes_are_warnings() -> None:
    assert warned([1, 5, 6], [5, 6], [1, 9]) == []
    (double,) = warned([1, 1, 5], [5], [1, 9])
    assert "2 BOS tokens on the student's side" in double
    assert any("one side begins with BOS" in line for line in warned([5, 6], [5, 6], [1, 9]))
    assert any("end differently" in line for line in warned([1, 5], [6], [1, 9]))
    assert any("no prefix is shared" in line for line in warned([1, 5], [1, 9, 5], None))
    assert any("nothing to distil" in line for line in warned([1, 5], [1, 5], None))


def test_a_template_whose_turns_begin_with_bos_has_one_bos() -> None:
    """As in SmolLM2: BOS is the token that begins every turn."""
    tokenizer = build_tokenizer(bos="<|im_start|>")
    renderer = Renderer(tokenizer, CONTEXT, StudentConfig(model="unused"))
    seen = inspect_row(tokenizer, renderer.render(CHAT), renderer.contexts, [])
    assert seen.bos == (1, 1)
    assert not list(seen.warnings())


def test_what_the_student_sees_too_is_no_context() -> None:
    seen, _, _ = seen_of(CHAT)
    assert [token.role for token in seen.tokens if token.student is not None] == ["prompt"] * seen.student_tokens + [
        "response"
    ] * len("four")
    assert {token.role for token in seen.tokens if token.student is None} == {"context"}


def test_common_ends() -> None:
    assert [equal_at_end(a, b) for a, b in (([1, 2, 3], [9, 2, 3]), ([1], [2]), ([1, 2], [1, 2]), ([], [1]))] == [
        2,
        0,
        2,
        0,
    ]


def test_long_runs_are_shortened_each_by_itself() -> None:
    tokens = [InspectedToken(i, None, "context", i, "x", False) for i in range(10)]
    tokens += [InspectedToken(i, i, "prompt", i, "x", False) for i in range(3)]
    found = list(shortened(tokens, 4))
    assert [one if isinstance(one, int) else (one.role, one.id) for one in found] == [
        *[("context", 0), ("context", 1), 6, ("context", 8), ("context", 9)],
        *[("prompt", 0), ("prompt", 1), ("prompt", 2)],
    ]
    assert list(shortened(tokens, 10)) == tokens
    apart = [InspectedToken(i, None, "prompt", i, "x", False) for i in range(3)]
    assert list(shortened([*apart, *tokens[10:]], 4)) == [*apart, *tokens[10:]]  # those of one side, those of both
    assert list(shortened([], 4)) == []


# --- the command ------------------------------------------------------------------------------------------------------


@pytest.fixture
def path(tmp_path: Path, tiny_model: Path) -> Path:
    for name, words in (("train", ("cat", "sun")), ("eval", ("cup",))):
        rows = [json.dumps({"id": word, "prompt": f"Q: {word}\nA:", "answer": f" {word}s"}) for word in words]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(rows))
    settings = {
        "run": {"name": "small"},
        "student": {"model": str(tiny_model)},
        "context": {"text": CONTEXT},
        "data": {"train": str(tmp_path / "train.jsonl"), "eval": str(tmp_path / "eval.jsonl")},
    }
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(settings))
    return file


def opcd(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, ["inspect", *map(str, arguments)], env={"COLUMNS": "120"})


def test_the_command_shows_a_row(path: Path) -> None:
    result = opcd(path, "loss.skip_first_tokens=1")
    assert result.exit_code == 0, result.output
    lines = [line.split() for line in result.stdout.splitlines()]
    assert ["row", "cat"] in lines
    assert ["0", "-", "context", *lines_of("B")] in lines
    assert ["20", "0", "prompt", *lines_of("Q")] in lines  # behind the context's 20 bytes
    assert ["30", "10", "response", "x", *lines_of("c")] in lines  # its blank is the one that the loss skips
    assert "'['" in result.stdout  # not read as markup


def lines_of(text: str) -> list[str]:
    (one,) = load_tokens(text)
    return [str(one), repr(text)]


def load_tokens(text: str) -> list[int]:
    return list(TOKENIZER(text, add_special_tokens=False)["input_ids"])


def test_the_command_has_the_findings_of_the_dry_run(path: Path, tmp_path: Path) -> None:
    more = ["rollout.gpus_per_worker=4096", f"run.dir={tmp_path / 'runs'}"]
    result = opcd(path, *more)
    assert result.exit_code == 2
    assert "'A'" in result.stdout  # the row itself is shown
    (line,) = result.stderr.splitlines()
    assert line.startswith("opcd: the run asks for 4096 GPUs")
    forged = json.dumps({"id": "f", "messages": [{"role": "user", "content": "a<|im_end|>"}], "answer": "b"})
    (tmp_path / "eval.jsonl").write_text(forged)
    assert "warning: data.eval: 1 rows hold the text of a special token" in opcd(path, more[1]).stderr


def test_the_command_finds_held_out_rows_and_takes_a_response(path: Path) -> None:
    result = opcd(path, "--row", "cup", "--response", "Z")
    assert result.exit_code == 0, result.output
    assert "cup" in result.stdout
    assert "'Z'" in result.stdout
    empty = opcd(path, "--row", "cup", "--response", "").stdout
    assert [line.split()[5] for line in empty.splitlines() if " response " in line] == ["'<|im_end|>'"]


def test_long_contexts_are_shown_in_part(path: Path) -> None:
    short, whole = (opcd(path, f"context.text={'x' * 300}", *more) for more in ((), ("--all",)))
    assert short.stdout.count(" context ") == cli_inspect.MAX_TOKENS
    assert "260 more like these (--all)" in short.stdout
    assert whole.stdout.count(" context ") == 300


def test_a_context_of_a_pool_is_chosen(path: Path, tmp_path: Path) -> None:
    pool = tmp_path / "pool.jsonl"
    pool.write_text('{"id": "a", "text": "AAA"}\n{"id": "b", "text": "BBBB"}\n')
    overrides = ("context.text=null", f"context.pool={pool}")
    assert "3 of them the shared context" in opcd(path, *overrides).stdout
    assert "4 of them the shared context" in opcd(path, *overrides, "--context", "b").stdout
    refused = opcd(path, *overrides, "--context", "bb")
    assert refused.exit_code == 2
    assert "did you mean 'b'?" in refused.stderr


def test_a_runs_folder_stands_for_its_configuration(path: Path) -> None:
    run = path.parent / "run"
    run.mkdir()
    path.rename(run / "config.yaml")
    assert opcd(run, "--row", "cup").exit_code == 0
    (run / "config.yaml").unlink()
    assert opcd(run).stderr == f"opcd: cannot read {run}: Is a directory\n"


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (("--row", "cats"), "no row 'cats' in train, valid or eval; did you mean 'cat'?"),
        (("--context", "a"), "this run has a single context"),
        (("context.text=null", "context.file=/nowhere"), "cannot read /nowhere"),
        (("student.model=models/none",), "no model at models/none: no such folder (seen from "),
    ],
)
def test_refusals_are_one_line(path: Path, arguments: tuple[str, ...], part: str) -> None:
    result = opcd(path, *arguments)
    assert result.exit_code == 2
    assert part in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_a_game_has_no_prompt_to_show(path: Path, tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text('{"id": "g", "environment": "frozen_lake"}\n')
    assert "is a game" in opcd(path).stderr


def test_a_row_is_shown_with_its_own_context(path: Path, tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text(
        '{"id": "a", "prompt": "P", "hint": "HHH"}\n{"id": "b", "prompt": "P", "hint": "H"}'
    )
    overrides = ("context.text=null", "context.from_rows=true", "data.columns={context: hint}")
    assert "3 of them the row's own context" in opcd(path, *overrides).stdout
    assert "1 of them the row's own context" in opcd(path, *overrides, "--row", "b").stdout
    assert "one context per row (--row)" in opcd(path, *overrides, "--context", "b").stderr
