"""The prompts of the pipeline: templates, problems and attempts as text, and the items in a model's answer."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from common.config.model import ConfigError
from common.data.rows import Row
from common.data.templates import fill, placeholders
from common.evaluation.answers import strip_thinking
from rollout_workers.environments.episodes import Exchange

FOLDER = Path(__file__).parent / "templates"
"""The built-in templates. To change them, edit a copy and name its folder in `experience.templates`."""

PLACEHOLDERS = {
    "extract": frozenset({"problem", "trace"}),
    "extract_game": frozenset({"problem", "trace"}),
    "context": frozenset({"items"}),
}
"""Required placeholders by file (without ``.txt``)."""

_ITEM = re.compile(r"^[ \t]*[-*•][ \t]*\**EXPERIENCE ITEM\**[ \t]*:\**[ \t]*(\S.*?)\s*$", re.IGNORECASE | re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Templates:
    """The text of each template file."""

    extract: str
    extract_game: str
    context: str

    def extraction_prompt(self, problem: str, trace: str, *, game: bool) -> str:
        """Fill the prompt that asks the model for insights from its attempt at a problem or a game."""
        return fill(self.extract_game if game else self.extract, {"problem": problem, "trace": trace})

    def context_text(self, items: tuple[str, ...]) -> str:
        """Fill the text of a context, with `items` as a list."""
        return fill(self.context, {"items": "\n".join(f"- {item}" for item in items)})

    @property
    def digest(self) -> str:
        """Hex sha256 of the extraction templates."""
        return hashlib.sha256(f"{self.extract}\0{self.extract_game}".encode()).hexdigest()


def load_templates(folder: Path | None) -> Templates:
    """Load the built-in templates, each replaced by the file of the same name in `folder` if there is one.

    Raises ConfigError for a `folder` without any template, and for a file that lacks a placeholder.
    """
    if folder is not None and not any((folder / f"{name}.txt").is_file() for name in PLACEHOLDERS):
        names = ", ".join(f"{name}.txt" for name in PLACEHOLDERS)
        raise ConfigError(f"experience.templates: {folder} has none of {names}")
    texts = {}
    for name, required in PLACEHOLDERS.items():
        path = FOLDER / f"{name}.txt"
        if folder is not None and (folder / path.name).is_file():
            path = folder / path.name
        texts[name] = path.read_text(encoding="utf-8").strip()
        missing = required - placeholders(texts[name])
        if missing:
            names = ", ".join(f"{{{placeholder}}}" for placeholder in sorted(missing))
            raise ConfigError(f"experience.templates: {path} lacks {names}")
    return Templates(**texts)


def problem_text(row: Row) -> str:
    """Return a prompt as text: raw text, the only user turn, or the conversation with the speakers' roles."""
    if row.prompt is not None:
        return row.prompt
    messages = row.messages or ()
    if len(messages) == 1:
        return messages[0].content
    return "\n\n".join(f"{message.role}: {message.content}" for message in messages)


def answer_trace(answer: str) -> str:
    """Return an answer without its thinking; the whole answer if the thinking has no end."""
    return strip_thinking(answer).strip()


def game_trace(exchanges: Sequence[Exchange], outcome: str) -> str:
    """Return a game turn by turn, then the environment's `outcome`; the reward is left out."""
    turns = [
        f"[Turn {number}]\n{exchange.observation}\n\n[Move {number}]\n{answer_trace(exchange.answer)}"
        for number, exchange in enumerate(exchanges, start=1)
    ]
    return "\n\n".join([*turns, f"[End]\n{outcome or 'The turns ran out.'}"])


def parse_items(answer: str) -> tuple[str, ...]:
    """Return the text of every line ``- EXPERIENCE ITEM: …`` after the thinking, in order, without duplicates."""
    return tuple(dict.fromkeys(_ITEM.findall(strip_thinking(answer))))
