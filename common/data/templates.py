"""Texts with named places in braces. Pure.

Not ``str.format``: what goes in is somebody's text, full of braces and percent signs, and must come out as it is.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

_PLACE = re.compile(r"\{([A-Za-z_][A-Za-z0-9_.]*)\}")


def places(template: str) -> set[str]:
    """Names that stand in braces in `template`."""
    return set(_PLACE.findall(template))


def fill(template: str, values: Mapping[str, str]) -> str:
    """`template` with every ``{name}`` of `values` replaced, once: braces in a value, and unknown names, stay."""
    return _PLACE.sub(lambda match: values.get(match.group(1), match.group(0)), template)
