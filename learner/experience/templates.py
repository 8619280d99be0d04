"""The prompts of the pipeline: files beside this module, or a user's own under the same names."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from common.config.model import ConfigError
from common.data.templates import fill, places

FOLDER = Path(__file__).parent / "templates"
"""What ships; copy it, edit it, and name the copy in `experience.templates`."""

PLACES = {
    "extract": frozenset({"problem", "trace"}),
    "extract_game": frozenset({"problem", "trace"}),
    "context": frozenset({"items"}),
}
"""File (without ``.txt``) -> what must stand in it in braces."""


@dataclass(frozen=True, slots=True)
class Templates:
    """The text of each file."""

    extract: str
    extract_game: str
    context: str

    def extraction(self, problem: str, trace: str, *, game: bool) -> str:
        """What the model is asked after it solved a problem, or played a game."""
        return fill(self.extract_game if game else self.extract, {"problem": problem, "trace": trace})

    def experience(self, items: tuple[str, ...]) -> str:
        """A context: the items as a list."""
        return fill(self.context, {"items": "\n".join(f"- {item}" for item in items)})

    @property
    def digest(self) -> str:
        """Hex sha256 of what extraction is asked with."""
        return hashlib.sha256(f"{self.extract}\0{self.extract_game}".encode()).hexdigest()


def load_templates(folder: Path | None) -> Templates:
    """The shipped templates, those that `folder` has in their stead.

    Raises ConfigError for a folder that is not there or has none of them, and for a file that lacks a place.
    """
    if folder is not None and not any((folder / f"{name}.txt").is_file() for name in PLACES):
        names = ", ".join(f"{name}.txt" for name in PLACES)
        raise ConfigError(f"experience.templates: {folder} has none of {names}")
    texts = {}
    for name, needed in PLACES.items():
        path = FOLDER / f"{name}.txt"
        if folder is not None and (folder / path.name).is_file():
            path = folder / path.name
        texts[name] = path.read_text(encoding="utf-8").strip()
        missing = needed - places(texts[name])
        if missing:
            raise ConfigError(
                f"experience.templates: {path} lacks {', '.join(f'{{{place}}}' for place in sorted(missing))}"
            )
    return Templates(**texts)
