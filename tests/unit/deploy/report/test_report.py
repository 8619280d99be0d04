"""Pages of finished, unfinished and damaged runs; no text of a run becomes markup."""

from __future__ import annotations

import json
import math
import re
import tracemalloc
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from common.telemetry.trace import TraceFile, TraceLayout, TraceSpan
from deploy.cli.main import app
from deploy.report.answers import held_out
from deploy.report.load_run import ReportError, read_run
from deploy.report.page import asset, csp_hash, run_page
from deploy.report.settings import changed, differences
from deploy.report.times import parts_of, step_lanes
from deploy.report.token_view import level, tokens_of
from deploy.report.writing import write_comparison, write_report
from tests.support.report_run import CONTEXT, write_run


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return write_run(tmp_path / "plurals")


def words(markup: str) -> str:
    """The visible text, without tags, style and script, with single spaces."""
    text = re.sub(r"<(style|script)>.*?</\1>", " ", markup, flags=re.DOTALL)
    return re.sub(r"\s+", " ", re.sub(r"<[^>]*>", " ", text))


class Outline(HTMLParser):
    """Elements of a page; fails on an end tag without its start tag."""

    VOID = ("meta", "link", "br", "line", "rect", "circle", "polyline", "path", "col", "hr")

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.found: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))


def outline(markup: str) -> Outline:
    parsed = Outline()
    parsed.feed(markup)
    parsed.close()
    assert parsed.open == []
    return parsed


def test_the_page_states_the_result(run: Path) -> None:
    text = words(run_page(read_run(run)))
    assert "83.3 %" in text
    assert "95 % interval 50.0 % to 100.0 %" in text
    assert "12 of 12" in text
    assert "Right before, wrong after: 0" in text
    assert "Wrong before, right after: 5" in text
    assert "0123abc" in text
    assert "2.13.0" in text
    assert "learner.lr" in text
    assert "could not be read" not in text


def test_the_page_states_forgetting(run: Path) -> None:
    text = words(run_page(read_run(run)))
    assert "sums, accuracy 0.750 0.625 -0.125 -0.250 to 0.010" in text
    assert "prose, nats per token 3.000 3.250 0.250 –" in text


def test_the_page_loads_nothing_external(run: Path) -> None:
    page = run_page(read_run(run))
    for name, attributes in outline(page).found:
        for key in ("src", "href", "xlink:href", "action"):
            assert (attributes.get(key) or "#").startswith(("#", "data:")), (name, attributes)
    assert "url(" not in asset("report.css")
    assert "@import" not in asset("report.css")
    assert "fetch(" not in asset("report.js")


def test_only_the_pages_own_style_and_script_may_run(run: Path) -> None:
    found = outline(run_page(read_run(run))).found
    (policy,) = [a["content"] for _, a in found if a.get("http-equiv") == "Content-Security-Policy"]
    assert policy is not None
    assert policy.startswith("default-src 'none'")
    assert f"script-src '{csp_hash(asset('report.js'))}'" in policy
    assert [name for name, _ in found].count("script") == 1
    assert not [
        attributes for _, attributes in found if any(key == "style" or key.startswith("on") for key in attributes)
    ]


ATTACK = '"><script>alert(1)</script><img src=x onerror=alert(2)>'


def test_nothing_of_a_run_becomes_markup(tmp_path: Path) -> None:
    """Hostile text in every field gives the same elements as harmless text."""

    def elements(text: str, folder: Path) -> list[tuple[str, set[str]]]:
        write_run(folder)
        for name in ("config.yaml", "samples.jsonl", "tokens.jsonl", "texts.jsonl", "summary.json", "environment.json"):
            path = folder / name
            content = path.read_text()
            for marker in (
                "eval-leaf",
                " The leaf is",
                "train-leaf",
                "apple",
                "Q: leaf",
                " leaf",
                "0123abc",
                "finished",
                "smollm2",
            ):
                content = content.replace(marker, marker + json.dumps(text)[1:-1])
            path.write_text(content)
        markup = run_page(read_run(folder))
        assert markup.count("Q: leaf") >= 2
        comparison = write_comparison([folder, folder], folder / "both.html").read_text()
        return [(name, set(attributes)) for page in (markup, comparison) for name, attributes in outline(page).found]

    assert elements(ATTACK, tmp_path / "hostile") == elements("harmless", tmp_path / "harmless")


def test_headings_and_regions_are_named(run: Path) -> None:
    found = outline(run_page(read_run(run))).found
    names = [name for name, _ in found]
    assert names.count("h1") == names.count("main") == names.count("nav") == 1
    identities = {attributes["id"] for _, attributes in found if "id" in attributes}
    links = [(a["href"] or "")[1:] for name, a in found if name == "a"]
    assert set(links) <= identities
    assert all(a.get("aria-labelledby") in identities for name, a in found if name in ("section", "article"))
    assert all(a.get("aria-label") for name, a in found if name == "svg" or a.get("role") == "region")
    assert names.count("caption") == names.count("table") > 10


def test_numbers_behind_every_curve(run: Path) -> None:
    page = run_page(read_run(run))
    for figure in re.findall(r"<figure>.*?</figure>", page, flags=re.DOTALL):
        assert "<table>" in figure, words(figure)[:60]


# --- missing and damaged files ----------------------------------------------------------------------------------------


def test_an_unfinished_run_has_a_page(tmp_path: Path) -> None:
    run = write_run(tmp_path / "going", finished=False)
    with (run / "metrics.jsonl").open("a") as stream:
        stream.write('{"step": 13, "kl/full_bo')
    data = read_run(run)
    assert len(data.steps) == 12
    text = words(run_page(data))
    assert "unfinished" in text
    assert "No summary yet" in text
    assert "metrics.jsonl: 1 damaged line left out" in text
    assert "summary.json is missing" in text
    assert "There is no final evaluation." in text
    assert "KL, first to last step – Best" in text


@pytest.mark.parametrize("outcome", ["failed: TeacherError: no answer", "interrupted"])
def test_a_failed_or_interrupted_run_has_a_page(run: Path, outcome: str) -> None:
    summary = json.loads((run / "summary.json").read_text())
    summary |= {"outcome": outcome, "final": None, "gap_closed": None, "gap_closed_ci95": None}
    (run / "summary.json").write_text(json.dumps(summary))
    text = words(run_page(read_run(run)))
    state, _, reason = outcome.partition(": ")
    assert f"Outcome {state} Steps" in text
    assert text.index(reason) < text.index("not measured: student after, without context")


def test_a_repeated_step_counts_once(run: Path) -> None:
    """A killed run may leave a step's line, and the resumed one writes its own."""
    with (run / "metrics.jsonl").open("a") as stream:
        stream.write('{"step": 12, "kl/lower_bound": 0.5}\n')
    steps = read_run(run).steps
    assert [line["step"] for line in steps] == list(range(1, 13))
    assert steps[-1]["kl/lower_bound"] == 0.5


def test_a_folder_with_only_a_configuration_has_a_page(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("run: {name: bare}\nlearner: 3\nteacher: [x]\n")
    outline(run_page(read_run(tmp_path)))


def test_damaged_files_are_named_not_fatal(run: Path) -> None:
    (run / "summary.json").write_text("[1, 2")
    (run / "config.yaml").write_text("a: [")
    (run / "samples.jsonl").write_bytes(b'\xff\xfe{"set": "base"}\n[]\n')
    (run / "tokens.jsonl").write_text('{"pieces": 3, "kl": null}\n')
    text = words(run_page(read_run(run)))
    for name in ("summary.json is damaged", "config.yaml is damaged", "samples.jsonl: 2 damaged lines"):
        assert name in text


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ReportError, match="no run's folder"):
        read_run(tmp_path)
    with pytest.raises(ReportError, match="no such folder"):
        read_run(tmp_path / "nowhere")


WRONG: list[Any] = [None, "x", [], {}, [1], {"a": 1}, 3, math.nan, True]


def wrong_values(keys: list[str]) -> Iterator[dict[str, Any]]:
    """Every value of `WRONG` at every key, a third of the keys at a time."""
    for shift in range(len(WRONG)):
        for part in range(3):
            chosen = keys[part::3]
            yield {key: WRONG[(shift + index) % len(WRONG)] for index, key in enumerate(chosen)}


@pytest.mark.parametrize("name", ["summary.json", "config.yaml", "environment.json"])
def test_values_of_any_kind_make_a_page(run: Path, name: str) -> None:
    """A file of another version, or an edited one."""
    path, whole = run / name, read_run(run)
    values = {"summary.json": whole.summary, "config.yaml": whole.config, "environment.json": whole.environment}[name]
    for wrong in wrong_values(list(values)):
        path.write_text(json.dumps({**values, **wrong}))
        assert f"{name} is damaged" not in run_page(read_run(run))


@pytest.mark.parametrize("name", ["metrics.jsonl", "samples.jsonl", "tokens.jsonl", "texts.jsonl"])
def test_lines_of_any_kind_make_a_page(run: Path, name: str) -> None:
    lines = [json.loads(line) for line in (run / name).read_text().splitlines()]
    for wrong in wrong_values(list({key: None for line in lines for key in line})):
        (run / name).write_text("".join(json.dumps({**line, **wrong}) + "\n" for line in lines))
        run_page(read_run(run))


# --- computed values --------------------------------------------------------------------------------------------------


def test_the_parts_of_a_step_sum_to_it(run: Path) -> None:
    for line in read_run(run).steps:
        parts = parts_of(line)
        assert sum(parts.values()) == pytest.approx(line["time/total_s"])
        assert parts["computing"] == pytest.approx(1.5)


def test_the_timeline_shows_the_step_of_median_length() -> None:
    lengths, at, spans = [5.0, 1.0, 2.0, 9.0], 0.0, []
    for version, seconds in enumerate(lengths):
        spans += [
            TraceSpan("rollout", "worker 0", at, at + seconds / 2),
            TraceSpan("queue", "controller", at, at + seconds),
            TraceSpan("step", "rank 0", at + seconds / 2, at + seconds * 0.75, {"version": version}),
            TraceSpan("parity", "controller", at + seconds * 0.75, at + seconds, {"version": version}),
        ]
        at += seconds
    assert step_lanes(TraceLayout().events(spans), {}) is None
    found = step_lanes(TraceLayout().events(spans), {1: 1.0, 2: 2.0, 3: 9.0})
    assert found is not None
    version, seconds, lanes = found
    assert (version, seconds) == (2, pytest.approx(2.0))
    assert [(lane.track, lane.stage) for lane in lanes] == [
        ("worker 0", "rollout"),
        ("rank 0", "step"),
        ("controller", "parity"),
    ]
    assert lanes[0].spans == [(pytest.approx(0.0, abs=1e-5), pytest.approx(1.0))]
    assert step_lanes([], {1: 1.0}) is None


def test_a_long_timeline_does_not_lie_in_memory(run: Path) -> None:
    with TraceFile(run / "trace.json") as trace:
        for step in range(1, 1001):
            args = {"version": step}
            trace.write([TraceSpan("rollout", "worker 0", step + n / 99, step + n / 98, {}) for n in range(10)])
            trace.write([TraceSpan("step", "rank 0", step + 0.5, step + 1, args)])
    tracemalloc.start()
    found = step_lanes(read_run(run).events, dict.fromkeys(range(1, 1001), 1.0))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert found is not None
    assert peak < 1_000_000  # as a list: 8 MB


def test_answers_are_grouped_by_their_change() -> None:
    verdicts = {"a": (False, True), "b": (True, False), "c": (False, False), "d": (True, True)}
    samples = [
        {"set": name, "id": row, "right": right}
        for row, pair in verdicts.items()
        for name, right in zip(("base", "final"), pair, strict=True)
    ]
    assert {row.identity: row.group for row in held_out(samples)} == {
        "a": "learnt",
        "b": "forgotten",
        "c": "wrong",
        "d": "right",
    }


def test_tokens_are_marked_by_their_divergence(run: Path) -> None:
    first = tokens_of(read_run(run).tokens[0])
    assert [level(token.kl) for token in first] == [4, 2, 1, 0]
    page = run_page(read_run(run))
    shown = re.findall(r'class="tok (k\d|skipped)" tabindex', page)
    assert shown == ["k2", "k2", "k1", "skipped", "k4", "k2", "k1", "skipped"]  # the last step's answer first


def test_the_hardest_tokens_are_listed_first(run: Path) -> None:
    page = run_page(read_run(run))
    (found,) = re.findall(
        r"(?s)<caption>Tokens of Step 1, row train-leaf with the most KL</caption>(.*?)</table>", page
    )
    rows = [words(row) for row in re.findall(r"(?s)<tr>(.*?)</tr>", found)[1:]]
    assert [row.split()[0] for row in rows] == ["1", "2", "3"]  # the fourth is not in the loss
    assert "leaves" in rows[0]
    assert "90 %" in rows[0]  # e ** -0.1


def test_the_page_shows_the_context_of_an_answer(run: Path) -> None:
    assert words(CONTEXT).strip() in words(run_page(read_run(run)))


def test_only_changed_keys_are_listed() -> None:
    found = changed({"learner": {"steps": 50, "lr": 3e-4}, "run": {"name": "x", "seed": 0}, "new": {"key": True}})
    assert [key for key, _, _ in found] == ["learner.lr", "run.name", "new.key"]
    assert found[0] == ("learner.lr", "0.0003", "1e-06")


def test_credentials_in_an_address_are_not_shown(run: Path) -> None:
    config = (run / "config.yaml").read_text().replace("url: null", "url: https://me:hidden-word@host:1/x")
    (run / "config.yaml").write_text(config)
    page = run_page(read_run(run))
    assert "host:1/x" in page
    assert "hidden-word" not in page


# --- several runs, the command line -----------------------------------------------------------------------------------


def test_runs_are_compared(tmp_path: Path) -> None:
    first, second = write_run(tmp_path / "a/one"), write_run(tmp_path / "b/one", steps=4, finished=False, lr=1e-4)
    page = write_comparison([first, second], tmp_path / "both.html").read_text()
    outline(page)
    text = words(page)
    assert "unfinished" in text
    assert "learner.lr 2e-05 0.0001" in text
    assert f"one ({first})" in text  # the same name twice
    assert page.count('class="s1"') >= 4
    assert differences([{"a": {"b": 1}}, {"a": {"b": 1}}]) == []


def opcd(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_the_command_writes_one_page_or_compares(run: Path, tmp_path: Path) -> None:
    result = opcd("report", run)
    assert (result.exit_code, result.stdout.strip()) == (0, str(run / "report.html"))
    assert (run / "report.html").read_text() == run_page(read_run(run))
    other = write_run(tmp_path / "other")
    result = opcd("report", run, other, "--out", tmp_path / "both.html")
    assert result.exit_code == 0, result.output
    assert "2 runs" in (tmp_path / "both.html").read_text()


def test_the_command_refuses_in_one_line(tmp_path: Path) -> None:
    result = opcd("report", tmp_path / "nowhere")
    assert result.exit_code == 2
    assert result.stderr == f"opcd: {tmp_path / 'nowhere'}: no such folder\n"


def test_writing_again_leaves_no_partial_page(run: Path) -> None:
    write_report(run)
    write_report(run)
    assert [path.name for path in run.iterdir() if "report" in path.name] == ["report.html"]


# --- colours ----------------------------------------------------------------------------------------------------------


def luminance(colour: str) -> float:
    """WCAG 2.2's relative luminance of ``#rrggbb``."""
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    r, g, b = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels)
    return 0.2126 * r + 0.7152 * g + 0.0722 * b


def contrast(first: str, second: str) -> float:
    low, high = sorted((luminance(first), luminance(second)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("theme", [0, 1])
def test_text_is_readable_in_both_themes(theme: int) -> None:
    css = asset("report.css")
    colours = dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})", re.findall(r":root \{(.*?)\}", css, re.DOTALL)[theme]))
    text = ("ink", "muted", "student", "teacher", "base", "valid", "good", "bad", *(f"s{i}" for i in range(8)))
    for name in text:
        for ground in ("bg", "panel"):
            assert contrast(colours[name], colours[ground]) >= 4.5, (name, ground)
    for ground in ("soft", "k1", "k2", "k3", "k4"):
        assert contrast(colours["ink"], colours[ground]) >= 4.5, ground
    for name in ("computing", "rollout", "score", "sync", "other"):
        assert contrast(colours[name], colours["bg"]) >= 3, name
