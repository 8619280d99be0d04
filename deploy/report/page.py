"""One self-contained page: style and script inside, nothing fetched, nothing of a run ever run as code."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from importlib.resources import files

from deploy.report.answers import answers_section
from deploy.report.curves import curves_section
from deploy.report.html import Html, join, tag
from deploy.report.load_run import RunData
from deploy.report.result import result_section
from deploy.report.settings import settings_section, versions_section
from deploy.report.times import times_section
from deploy.report.token_view import tokens_section

SECTIONS = (
    ("result", "Result"),
    ("curves", "Curves"),
    ("times", "Time"),
    ("tokens", "Tokens"),
    ("answers", "Answers"),
    ("config", "Configuration"),
    ("versions", "Versions"),
)
"""Of a run's page, in the order of the table of contents."""


def run_page(run: RunData) -> Html:
    """The page of one run."""
    return page(
        run.name,
        _subtitle(run),
        SECTIONS,
        (
            result_section(run),
            curves_section(run),
            times_section(run),
            tokens_section(run),
            answers_section(run),
            settings_section(run),
            versions_section(run),
        ),
        outcome=run.outcome,
    )


def _subtitle(run: RunData) -> str:
    student, teacher = run.config.get("student"), run.config.get("teacher")
    words = []
    if isinstance(student, dict) and student.get("model"):
        words.append(f"Student {student['model']}")
    if isinstance(teacher, dict):
        where = teacher.get("model") or ("at a server" if teacher.get("url") else "the same model")
        words.append(f"{teacher.get('kind', 'frozen')} teacher, {where}")
    return " · ".join(words) or "On-policy context distillation"


def page(
    title: str, subtitle: str, sections: Sequence[tuple[str, str]], body: Sequence[Html], *, outcome: str | None = None
) -> Html:
    """A whole document: header, table of contents, `body`."""
    style, script = asset("report.css"), asset("report.js")
    policy = f"default-src 'none'; style-src '{digest(style)}'; script-src '{digest(script)}'; img-src data:"
    state = None if outcome is None else outcome.partition(":")[0].partition(" ")[0]
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=policy),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="color-scheme", content="light dark"),
        tag("meta", name="generator", content="opcd report"),
        tag("title", f"{title} · opcd"),
        tag("link", rel="icon", href="data:,"),
        tag("style", style),
    )
    contents = tag(
        "nav",
        tag("ul", [tag("li", tag("a", name, href=f"#{identity}")) for identity, name in sections]),
        aria_label="Contents",
    )
    header = tag(
        "header",
        tag("p", "opcd · on-policy context distillation", class_="eyebrow"),
        tag("h1", title, None if state is None else tag("span", state, class_=f"badge {_known(state)}")),
        tag("p", subtitle, class_="subtitle"),
    )
    whole = tag(
        "html",
        head,
        tag(
            "body",
            tag("a", "To the content", class_="skip", href="#content"),
            header,
            contents,
            tag("main", body, id="content", tabindex=-1),
            tag("script", script),
        ),
        lang="en",
    )
    return join(Html("<!doctype html>\n"), whole, Html("\n"))


def _known(state: str) -> str:
    return state if state in ("finished", "interrupted", "failed") else "unfinished"


def asset(name: str) -> Html:
    """A file of this package, as it stands."""
    return Html((files("deploy.report") / "assets" / name).read_text(encoding="utf-8"))


def digest(text: str) -> str:
    """What a content security policy calls a piece of inline style or script."""
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"
