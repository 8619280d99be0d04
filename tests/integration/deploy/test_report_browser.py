"""The report in a real browser: it loads without errors, fits the window, and the keyboard reaches every part.

``OPCD_SCREENSHOTS=FOLDER`` keeps the screenshots.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from deploy.report.writing import write_comparison, write_report
from tests.support.browser import NAMES, Tab, browser_tab, find_browser
from tests.support.report_run import write_run

BROWSER = find_browser()
pytestmark = pytest.mark.skipif(BROWSER is None, reason=f"no browser on PATH (looked for {', '.join(NAMES)})")

TAB, RIGHT, END, LEFT = ("Tab", 9), ("ArrowRight", 39), ("End", 35), ("ArrowLeft", 37)


@pytest.fixture(scope="module")
def tab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tab]:
    assert BROWSER is not None
    with browser_tab(BROWSER, tmp_path_factory.mktemp("profile")) as opened:
        yield opened


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Pages of a finished run with hostile text, an unfinished run, their comparison, a very long run, and a failed run
    with a long reason without spaces.
    """
    folder = tmp_path_factory.mktemp("pages")
    finished, unfinished = write_run(folder / "plurals"), write_run(folder / "going", finished=False, steps=5)
    for name in ("samples.jsonl", "tokens.jsonl", "texts.jsonl"):
        text = (finished / name).read_text().replace("leaf", "<script>window.attacked = 1</script><img src=x>")
        (finished / name).write_text(text)
    failed = folder / "failed"
    failed.mkdir()
    (failed / "config.yaml").write_text((finished / "config.yaml").read_text())
    (failed / "summary.json").write_text(json.dumps({"outcome": "failed: OSError: /" + "x" * 600, "steps": 0}))
    return {
        "long": write_report(write_run(folder / "long", steps=20_000)),
        "failed": write_report(failed),
        "run": write_report(finished),
        "unfinished": write_report(unfinished),
        "comparison": write_comparison([finished, unfinished], folder / "comparison.html"),
    }


def screenshot(tab: Tab, folder: Path, name: str) -> Path:
    kept = os.environ.get("OPCD_SCREENSHOTS")
    return tab.screenshot((Path(kept) if kept else folder) / f"{name}.png", whole=True)


@pytest.mark.parametrize("name", ["run", "unfinished", "comparison", "long", "failed"])
@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("dark", [False, True])
def test_a_page_loads_without_errors_and_fits_the_window(
    tab: Tab, pages: dict[str, Path], tmp_path: Path, name: str, width: int, dark: bool
) -> None:
    tab.errors.clear()
    tab.requests.clear()
    tab.open(pages[name], width=width, dark=dark)
    assert tab.errors == []
    assert {url.partition(":")[0] for url in tab.requests} <= {"file", "data"}
    assert len([url for url in tab.requests if url.startswith("file:")]) == 1
    assert tab.value("window.attacked === undefined")
    assert tab.value("document.documentElement.scrollWidth") <= width
    background = tab.value("getComputedStyle(document.body).backgroundColor")
    assert (background == "rgb(19, 21, 25)") is dark
    shot = screenshot(tab, tmp_path, f"{name}-{width}-{'dark' if dark else 'light'}")
    assert shot.read_bytes().startswith(b"\x89PNG")


def test_a_page_of_twenty_thousand_steps_stays_small(pages: dict[str, Path]) -> None:
    assert pages["long"].stat().st_size < 500_000


def test_nothing_overflows_when_everything_is_open(tab: Tab, pages: dict[str, Path]) -> None:
    tab.open(pages["run"], width=390)
    tab.value("document.querySelectorAll('details').forEach((one) => { one.open = true; })")
    assert tab.value("document.documentElement.scrollWidth") <= 390


def test_charts_are_drawn_in_their_colours(tab: Tab, pages: dict[str, Path]) -> None:
    tab.open(pages["run"], width=1280)
    strokes = tab.value(
        "[...document.querySelectorAll('#tokens svg .line')].map((one) => getComputedStyle(one).stroke).slice(0, 2)"
    )
    assert strokes == ["rgb(10, 95, 180)", "rgb(168, 72, 10)"]
    assert tab.value("[...document.querySelectorAll('svg')].every((one) => one.getBoundingClientRect().height > 50)")


def focused(tab: Tab) -> str:
    """Tag, classes and text of the focused element."""
    return str(
        tab.value(
            "(({tagName, classList, textContent}) => [tagName, ...classList, textContent.slice(0, 30)].join(' '))"
            "(document.activeElement)"
        )
    )


def test_the_keyboard_reaches_every_section(tab: Tab, pages: dict[str, Path]) -> None:
    tab.open(pages["run"], width=1280)
    tab.press(*TAB)
    assert "skip" in focused(tab)
    for name in ("Result", "Curves", "Time", "Tokens", "Answers", "Configuration", "Versions"):
        tab.press(*TAB)
        assert name in focused(tab)
    seen: list[str] = []
    for _ in range(200):
        tab.press(*TAB)
        inside = tab.value("document.activeElement.closest('section')?.id")
        if inside is None:
            break
        if not seen or seen[-1] != inside:
            seen.append(inside)
    assert seen == ["result", "curves", "times", "tokens", "answers", "config", "versions"]


def test_the_focused_element_is_outlined(tab: Tab, pages: dict[str, Path]) -> None:
    tab.open(pages["run"], width=1280)
    for _ in range(2):
        tab.press(*TAB)
    assert tab.value("getComputedStyle(document.activeElement).outlineStyle") == "solid"


def test_the_arrow_keys_read_a_chart(tab: Tab, pages: dict[str, Path]) -> None:
    tab.open(pages["run"], width=1280)
    tab.value("document.querySelector('#curves svg.lines').focus()")
    readout = "document.querySelector('#curves .readout').textContent"
    assert tab.value(readout) == "step 12: KL 0.1946"
    tab.press(*LEFT)
    assert tab.value(readout).startswith("step 11: KL ")
    assert tab.value("document.querySelector('#curves .cursor').getAttribute('visibility')") == "visible"


def test_the_arrow_keys_walk_through_tokens(tab: Tab, pages: dict[str, Path]) -> None:
    tab.open(pages["run"], width=1280)
    tab.value("document.querySelector('#tokens .tok[tabindex]').focus()")
    readout = "document.querySelector('#tokens article .readout').textContent"
    assert tab.value(readout).startswith("1: ")
    tab.press(*RIGHT)
    assert tab.value(readout).startswith("2: ")
    tab.press(*END)
    assert tab.value(readout).startswith("4: ")
    assert "not in the loss" in tab.value(readout)
    tab.press(*RIGHT)  # the answer has four tokens
    assert tab.value(readout).startswith("4: ")
    assert tab.value("document.querySelectorAll('#tokens article:first-of-type .tok[tabindex=\"0\"]').length") == 1


def test_the_accessibility_tree_names_every_element(tab: Tab, pages: dict[str, Path]) -> None:
    tab.open(pages["run"], width=1280)
    nodes = tab.send("Accessibility.getFullAXTree")["nodes"]
    named: dict[str, list[str]] = {}
    for node in nodes:
        if not node.get("ignored"):
            named.setdefault(node["role"]["value"], []).append(node.get("name", {}).get("value", ""))
    for role in ("region", "image", "img", "table", "navigation", "link", "article"):
        assert all(named.get(role, [])), (role, named.get(role))
    assert named.get("image", []) + named.get("img", [])
    assert named["main"]
    assert len(named["table"]) > 5
