"""Markup that is safe by construction: text becomes part of a page only through `tag`, which escapes it."""

from __future__ import annotations

import html
from collections.abc import Iterable

VOID = frozenset({"link", "meta", "br", "hr", "line", "rect", "circle", "path", "polyline", "col"})
"""Elements that have no content: HTML's own, and the shapes of SVG."""


class Html(str):
    """Markup as it stands. Only this package makes it, and never out of a run's own text."""

    __slots__ = ()


Child = Html | str | float | None | Iterable["Child"]
"""What an element may hold: markup, text (which is escaped), numbers, nothing, or several of these."""
Attribute = str | float | bool | None


def join(*children: Child) -> Html:
    """`children` one behind the other; all but `Html` escaped."""
    return Html("".join(_text(child) for child in children))


def tag(name: str, /, *children: Child, **attributes: Attribute) -> Html:
    """The element ``<name …>children</name>``.

    ``class_`` and ``for_`` are ``class`` and ``for``, ``aria_label`` is ``aria-label``. An attribute that is None or
    False is left out, one that is True has no value.
    """
    words = "".join(_attribute(key.rstrip("_").replace("_", "-"), value) for key, value in attributes.items())
    if name in VOID:
        return Html(f"<{name}{words}/>")
    return Html(f"<{name}{words}>{join(*children)}</{name}>")


def _text(child: Child) -> str:
    if child is None:
        return ""
    if isinstance(child, Html):
        return child
    if isinstance(child, str | int | float):
        return html.escape(str(child))
    return "".join(_text(one) for one in child)


def _attribute(name: str, value: Attribute) -> str:
    if value is None or value is False:
        return ""
    if value is True:
        return f" {name}"
    return f' {name}="{html.escape(f"{value:.6g}" if isinstance(value, float) else str(value))}"'
