"""Text templates with ``{name}`` placeholders. Pure.

``str.format`` does not fit: templates and values hold arbitrary braces and percent signs, which must stay unchanged.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

_PLACEHOLDER = re.compile(r"\{([A-Za-z_][A-Za-z0-9_.]*)\}")


def placeholders(template: str) -> set[str]:
    """Return the names in braces."""
    return set(_PLACEHOLDER.findall(template))


def fill(template: str, values: Mapping[str, str]) -> str:
    """Replace every ``{name}`` of `values` in one pass: unknown names, and braces inside values, stay unchanged."""
    return _PLACEHOLDER.sub(lambda match: values.get(match.group(1), match.group(0)), template)
