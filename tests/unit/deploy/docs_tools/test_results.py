"""Tables of the results page: written from the comparisons that were run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from deploy.docs_tools import results


def test_the_page_has_the_tables_of_the_stored_comparisons() -> None:
    assert list((results.DOCS / "results").glob("*.json"))
    assert results.page() == results.PAGE.read_text()


def test_another_figure_changes_the_page_and_a_missing_place_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "results").mkdir()
    arm = {
        "title": "on-policy",
        "runs": 1,
        "planned": 1,
        "faults": [],
        "accuracy": 0.5,
        "ci95": [0.25, 0.75],
        "gap_closed": None,
        "against_reference": None,
        "seconds": 7.0,
    }
    compared = {"reference": "opcd", "before": [], "arms": {"opcd": arm}, "runs": []}
    page = tmp_path / "page.md"
    page.write_text("# R\n\n<!-- results of one -->\n<!-- end of one -->\n\nmore\n")
    monkeypatch.setattr(results, "DOCS", tmp_path)
    monkeypatch.setattr(results, "PAGE", page)
    for accuracy in (0.5, 0.625):
        arm["accuracy"] = accuracy
        (tmp_path / "results/one.json").write_text(json.dumps(compared))
        text = results.page()
        assert f"| on-policy | 1/1 | {accuracy:.3f} [0.250, 0.750] |" in text
        assert text.startswith("# R\n\n<!-- results of one -->\n")
        assert text.endswith("<!-- end of one -->\n\nmore\n")
        page.write_text(text)
    (tmp_path / "results/two.json").write_text(json.dumps(compared))
    with pytest.raises(ValueError, match="results of two"):
        results.page()
