"""Renders pages with Jinja2. Autoescape keeps every text of a run from becoming markup."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from importlib.resources import files
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from deploy.report.answers import answers_view
from deploy.report.curves import curves_view
from deploy.report.load_run import RunData
from deploy.report.result import result_view
from deploy.report.settings import config_view, versions_view
from deploy.report.times import times_view
from deploy.report.token_view import tokens_view

SECTIONS = (
    ("result", "Result", result_view),
    ("curves", "Curves", curves_view),
    ("times", "Time", times_view),
    ("tokens", "Tokens", tokens_view),
    ("answers", "Answers", answers_view),
    ("config", "Configuration", config_view),
    ("versions", "Versions", versions_view),
)
"""(id, name, view) of each section of a run's page. ``templates/ID.html`` shows the view under the name ID."""


def run_page(run: RunData) -> str:
    """Render the page of one run."""
    views = {name: view(run) for name, _, view in SECTIONS}
    return page("run.html", run.name, _subtitle(run), [one[:2] for one in SECTIONS], outcome=run.outcome, **views)


def page(
    template: str, title: str, subtitle: str, sections: Sequence[tuple[str, str]], *, outcome: str = "", **views: Any
) -> str:
    """Render a whole document: header, table of contents of (id, name), and the `views` that `template` shows."""
    return render(
        template,
        title=title,
        subtitle=subtitle,
        sections=sections,
        state=outcome.partition(":")[0].partition(" ")[0],
        style=asset("report.css"),
        script=asset("report.js"),
        **views,
    )


def _subtitle(run: RunData) -> str:
    student, teacher = run.config.get("student"), run.config.get("teacher")
    words = []
    if isinstance(student, dict) and student.get("model"):
        words.append(f"Student {student['model']}")
    if isinstance(teacher, dict):
        model = teacher.get("model") or ("at a server" if teacher.get("url") else "the same model")
        refresh = teacher.get("refresh_every", 1)
        kind = teacher.get("kind", "frozen") + (f", refreshed every {refresh} steps" if refresh > 1 else "")
        words.append(f"{kind} teacher, {model}")
    return " · ".join(words) or "On-policy context distillation"


def asset(name: str) -> str:
    """Read the page's style or script."""
    return (files("deploy.report") / "assets" / name).read_text(encoding="utf-8")


def csp_hash(text: str) -> str:
    """Hash an inline style or script as a content security policy names it."""
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"


def _finalize(value: Any) -> Any:
    return "" if value is None else f"{value:.6g}" if isinstance(value, float) else value


_ENVIRONMENT = Environment(
    loader=PackageLoader("deploy.report"),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
    finalize=_finalize,
)
_ENVIRONMENT.filters["csp_hash"] = csp_hash


def render(template: str, **variables: Any) -> str:
    """Fill a template of this package. None becomes an empty text; floats are cut to six significant digits."""
    return _ENVIRONMENT.get_template(template).render(variables)
