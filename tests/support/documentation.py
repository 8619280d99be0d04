"""Reads commands and quoted messages from the documentation, and strings from the code."""

from __future__ import annotations

import ast
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from tests.support.imports import PACKAGES
from tests.support.paths import ROOT

PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
SHELLS = ("bash", "sh")
FENCE = re.compile(r"^```(?P<language>\w*)(?P<attributes>[^\n]*)\n(?P<body>.*?)^```", re.DOTALL | re.MULTILINE)
NEEDS = re.compile(r'title="needs [^"]+"')
"""Marks a block that needs more than the environment: ```` ```bash title="needs a Ray cluster" ````."""
ASSIGNMENT = re.compile(r"[A-Z_][A-Z0-9_]*=.*")
ENDS = ("<", ">", ">>", "|", "&&", ";")


@dataclass(frozen=True)
class Command:
    """One simple command of a page: its words, without leading environment assignments."""

    page: str
    words: tuple[str, ...]
    marked: bool

    def __str__(self) -> str:
        return f"{self.page}: {shlex.join(self.words)}"


def commands(page: Path) -> Iterator[Command]:
    """Yield every command of a page's shell blocks, in order."""
    for block in FENCE.finditer(page.read_text(encoding="utf-8")):
        if block["language"] in SHELLS:
            marked = bool(NEEDS.search(block["attributes"]))
            for line in lines_of(block["body"]):
                for words in simple_commands(line):
                    yield Command(page.name, words, marked)


def lines_of(body: str) -> list[str]:
    """Return the command lines of a block, continuations joined."""
    joined = body.replace("\\\n", " ").splitlines()
    return [line for line in joined if line.strip() and not line.startswith("#")]


def simple_commands(line: str) -> Iterator[tuple[str, ...]]:
    """Yield the commands of one line, without redirections."""
    lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
    lexer.whitespace_split = True
    lexer.commenters = "#"
    words: list[str] = []
    redirected = False
    for token in [*lexer, ";"]:
        if token in ENDS:
            redirected = token in ("<", ">", ">>")
            if not redirected:
                if words:
                    yield tuple(words)
                words = []
        elif redirected:
            redirected = False
        elif words or not ASSIGNMENT.fullmatch(token):
            words.append(token)


def inline_commands(page: Path) -> Iterator[Command]:
    """Yield every `opcd …` of the running text, without brackets and ``…``."""
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    for span in re.findall(r"`(opcd [a-z-][^`]*)`", text):
        for words in simple_commands(re.sub(r"[\[\]…]", "", span)):
            yield Command(page.name, words, marked=False)


def texts_of_the_code() -> list[str]:
    """Return every string of the packages; adjacent literals are joined, and ``…`` replaces interpolated values."""
    found: list[str] = []
    for path in chain([ROOT / "opcd_start.py"], *((ROOT / package).rglob("*.py") for package in PACKAGES)):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                found.append(
                    "".join(str(part.value) if isinstance(part, ast.Constant) else "…" for part in node.values)
                )
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return found


def quoted_messages(page: Path, *, until: str) -> list[str]:
    """Return the code spans in the first column of the tables before the heading `until`."""
    text = page.read_text(encoding="utf-8").partition(f"\n## {until}")[0]
    cells = [line.split("|")[1] for line in text.splitlines() if line.startswith("| `")]
    return [message for cell in cells for message in re.findall(r"`([^`]+)`", cell)]


def as_pattern(message: str) -> re.Pattern[str]:
    """Return a pattern of the message, in which ``…`` matches anything."""
    return re.compile(".*".join(re.escape(part.strip()) for part in message.split("…")), re.DOTALL)
