"""Table and picture of a comparison."""

from __future__ import annotations

import json
from pathlib import Path
from xml.etree import ElementTree

import pytest

from deploy.compare.picture import picture
from deploy.compare.plan import plan
from deploy.compare.table import Failed, Outcome, compared, markdown, read_outcome
from tests.support.comparisons import ALL, write_result


@pytest.fixture
def outcomes(path: Path) -> list[Outcome]:
    """Two seeds: on-policy better than off-policy on both, sequence-level failed once, policy gradient not allowed."""
    runs = plan(path, [], ALL, [0, 1])
    right = {"opcd": ("1110", "1111"), "offpolicy": ("1100", "1110"), "sequence": ("1000", "")}
    found: list[Outcome] = []
    for run in runs:
        text = right.get(run.method, ("", ""))[run.seed]
        if text:
            write_result(run, text)
        found.append(read_outcome(run) if text else Failed(run, "failed: RunError: no"))
    return found


def test_means_are_over_seeds_and_rows(outcomes: list[Outcome]) -> None:
    result = compared(outcomes, ALL)
    methods = result["arms"]
    assert methods["opcd"]["accuracy"] == pytest.approx(7 / 8)
    assert methods["opcd"]["ci95"][0] < 7 / 8 < methods["opcd"]["ci95"][1]
    assert methods["opcd"]["gap_closed"] == pytest.approx(7 / 8)
    assert methods["offpolicy"]["against_reference"]["change"] == pytest.approx(-0.25)
    against = methods["sequence"]["against_reference"]
    assert (against["change"], against["seeds"]) == (pytest.approx(-0.5), 1)  # of the one seed that both have
    assert methods["opcd"]["against_reference"] is None
    assert methods["opcd"]["ood"]["other"]["change"] == pytest.approx(-0.25)
    prose = methods["opcd"]["perplexity"]["prose"]
    assert (prose["change"], prose["each"]) == (pytest.approx(0.15), pytest.approx([0.1, 0.2]))
    assert (methods["sequence"]["runs"], methods["sequence"]["planned"]) == (1, 2)
    assert (methods["pg"]["runs"], len(methods["pg"]["faults"])) == (0, 2)
    base, in_context = result["before"]
    assert (base["set"], base["accuracy"], base["seeds"]) == ("base", 0.0, 2)
    assert (in_context["set"], in_context["accuracy"]) == ("in_context", 1.0)
    assert [one["set"] for one in compared(outcomes, ["opcd"])["before"]] == ["base"]


def test_several_answers_a_row_give_pass_at_k(path: Path) -> None:
    runs = plan(path, [], ["opcd", "offpolicy"], [0])
    for run, shares in zip(runs, ((0.25, 0.5, 1.0, 0.0), (0.5, 0.5, 0.5, 0.5)), strict=True):
        write_result(run, "1100")
        assert run.config is not None
        folder = run.config.run.path
        summary = json.loads((folder / "summary.json").read_text())
        summary["final"]["samples"] = 4
        (folder / "summary.json").write_text(json.dumps(summary))
        rows = json.loads((folder / "accuracy.json").read_text())
        rows["final"] = {f"row{i}": share for i, share in enumerate(shares)}
        (folder / "accuracy.json").write_text(json.dumps(rows))
    result = compared([read_outcome(run) for run in runs], ["opcd", "offpolicy"])
    assert result["arms"]["opcd"]["pass_at"]["2"]["value"] == pytest.approx((1 / 2 + 5 / 6 + 1 + 0) / 4)
    assert result["arms"]["opcd"]["pass_at"]["4"]["value"] == pytest.approx(3 / 4)
    assert result["arms"]["offpolicy"]["pass_at"]["4"]["value"] == 1.0  # flatter at one answer, higher at four
    page = markdown(json.loads(json.dumps(result)), "opcd compare run.yaml")
    table = [line for line in page.splitlines() if line.startswith("| ")]
    assert "| accuracy | pass@2 | pass@4 | gap closed |" in table[0]
    assert len({line.count("|") for line in table[:4]}) == 1


def test_the_table_has_a_line_for_every_method_and_names_failures(outcomes: list[Outcome]) -> None:
    page = markdown(json.loads(json.dumps(compared(outcomes, ALL))), "opcd compare run.yaml")
    lines = page.splitlines()
    table = [line for line in lines if line.startswith("| ")]
    assert len({line.count("|") for line in table[:8]}) == 1
    (opcd,) = [line for line in table if line.startswith("| on-policy")]
    assert "2/2 | 0.875 [" in opcd
    assert "-0.250 [" in opcd  # on the other task
    assert "+0.150" in opcd
    (failed,) = [line for line in table if "policy gradient" in line]
    assert "| 0/2 | failed |" in failed
    assert "- sampled-token policy gradient, seed 1: failed: RunError: no" in lines
    assert sum(line.startswith(("| opcd |", "| offpolicy |", "| sequence |")) for line in table) == 5
    assert "`opcd compare run.yaml`" in lines


def test_the_picture_shows_the_rows_of_the_table(outcomes: list[Outcome]) -> None:
    result = compared(outcomes, ALL)
    text = picture(result)
    assert text is not None
    svg = ElementTree.fromstring(text)  # well-formed, including the style
    space = {"": "http://www.w3.org/2000/svg"}
    rows = svg.findall("g", space)
    titles = [row.findtext("text", namespaces=space) for row in rows]
    finished = [one["title"] for one in result["arms"].values() if one["runs"]]
    assert titles == [*(one["title"] for one in result["before"]), *finished]
    ticks = {text.text: float(text.get("x", "")) for text in svg.findall("text", space)}
    opcd = rows[len(result["before"])]
    dot, whisker = opcd.find("circle", space), opcd.find("line", space)
    assert dot is not None
    assert whisker is not None

    def position(share: float) -> float:
        return ticks["0 %"] + share * (ticks["100 %"] - ticks["0 %"])

    assert float(dot.get("cx", "")) == pytest.approx(position(7 / 8), abs=0.01)
    assert float(whisker.get("x1", "")) == pytest.approx(position(result["arms"]["opcd"]["ci95"][0]), abs=0.01)


def test_a_result_without_accuracies_has_no_picture(path: Path) -> None:
    assert picture(compared([Failed(run, "no") for run in plan(path, [], ["opcd"], [0])], ["opcd"])) is None


def test_settings_are_rows_compared_with_the_first(path: Path) -> None:
    runs = plan(path, [], ["opcd"], [0, 1], ["loss.top_k=1,16"])
    for run, right in zip(runs, ("1000", "1110", "1100", "1111"), strict=True):
        write_result(run, right)
    result = compared([read_outcome(run) for run in runs], ALL)
    first, second = result["arms"].values()
    assert result["reference"] == "opcd loss.top_k=1"
    assert (first["accuracy"], second["accuracy"]) == (pytest.approx(3 / 8), pytest.approx(7 / 8))
    assert first["against_reference"] is None
    assert second["against_reference"]["change"] == pytest.approx(0.5)
    assert [one["title"] for one in result["before"]] == ["without context, before", "in context, not trained"]
    page = markdown(json.loads(json.dumps(result)), "x")
    assert "| against opcd loss.top_k=1 |" in page
    assert "| on-policy context distillation, loss.top_k=16 | 2/2 | 0.875 [" in page


def test_settings_that_change_the_accuracy_before_training_have_separate_rows(path: Path) -> None:
    runs = plan(path, [], ["opcd"], [0], ["context.text=c,d"])
    for run in runs:
        write_result(run, "1000")
    assert runs[1].config is not None
    rows = runs[1].config.run.path / "accuracy.json"
    rows.write_text(rows.read_text().replace('"in_context": {"row0": 1.0', '"in_context": {"row0": 0.0'))
    before = compared([read_outcome(run) for run in runs], ALL)["before"]
    assert {one["title"]: one["accuracy"] for one in before if one["set"] == "in_context"} == {
        "in context, not trained, context.text=c": 1.0,
        "in context, not trained, context.text=d": 0.75,
    }


def test_a_result_of_only_failures_is_a_table(path: Path) -> None:
    result = compared([Failed(run, "no") for run in plan(path, [], ALL, [0])], ALL)
    assert result["before"] == []
    assert markdown(result, "x").count("| failed |") == 4


@pytest.mark.parametrize("name", ["summary.json", "accuracy.json"])
def test_a_run_without_a_complete_result_has_failed(path: Path, name: str) -> None:
    (run,) = plan(path, [], ["opcd"], [0])
    write_result(run, "1111")
    assert run.config is not None
    (run.config.run.path / name).unlink()
    found = read_outcome(run)
    assert isinstance(found, Failed)
    assert name in found.reason
