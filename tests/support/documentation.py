"""Commands and quoted messages of the documentation, and what the code says."""

from __future__ import annotations

import ast
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.support.paths import ROOT

PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
PACKAGES = ("common", "rollout_workers", "teacher_server", "learner", "deploy")
SHELLS = ("console", "bash", "sh")
FENCE = re.compile(r"^```(?P<language>\w*)(?P<attributes>[^\n]*)\n(?P<body>.*?)^```", re.DOTALL | re.MULTILINE)
NEEDS = re.compile(r'title="needs [^"]+"')
"""The marker of a block that not every machine can run: ```` ```console title="needs a Ray cluster" ````."""
ASSIGNMENT = re.compile(r"[A-Z_][A-Z0-9_]*=.*")
ENDS = ("<", ">", ">>", "|", "&&", ";")


@dataclass(frozen=True)
class Command:
    """One simple command of a page: its words, environment assignments in front left out."""

    page: str
    words: tuple[str, ...]
    marked: bool

    def __str__(self) -> str:
        return f"{self.page}: {shlex.join(self.words)}"


def commands(page: Path) -> Iterator[Command]:
    """Every command of a page's shell blocks, in order."""
    for block in FENCE.finditer(page.read_text(encoding="utf-8")):
        if block["language"] in SHELLS:
            marked = bool(NEEDS.search(block["attributes"]))
            for line in lines_of(block["body"], prompt=block["language"] == "console"):
                for words in simple_commands(line):
                    yield Command(page.name, words, marked)


def lines_of(body: str, *, prompt: bool) -> list[str]:
    """Command lines of a block, continuations joined; with `prompt` those behind a ``$``, the others are output."""
    joined = body.replace("\\\n", " ").splitlines()
    if prompt:
        return [line[2:] for line in joined if line.startswith("$ ")]
    return [line for line in joined if line.strip() and not line.startswith("#")]


def simple_commands(line: str) -> Iterator[tuple[str, ...]]:
    """The commands of one line; files they are redirected to are no words of theirs."""
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
    """Every `opcd …` of the running text; what stands in brackets there is optional, ``…`` is left out."""
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    for span in re.findall(r"`(opcd [a-z-][^`]*)`", text):
        for words in simple_commands(re.sub(r"[\[\]…]", "", span)):
            yield Command(page.name, words, marked=False)


def texts_of_the_code() -> list[str]:
    """Every string of the packages, pieces that are written one after another joined, ``…`` for what is filled in."""
    found: list[str] = []
    for package in PACKAGES:
        for path in (ROOT / package).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.JoinedStr):
                    found.append(
                        "".join(str(part.value) if isinstance(part, ast.Constant) else "…" for part in node.values)
                    )
                elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                    found.append(node.value)
    return found


def quoted_messages(page: Path, *, until: str) -> list[str]:
    """Code spans in the first column of the tables that stand before the heading `until`."""
    text = page.read_text(encoding="utf-8").partition(f"\n## {until}")[0]
    cells = [line.split("|")[1] for line in text.splitlines() if line.startswith("| `")]
    return [message for cell in cells for message in re.findall(r"`([^`]+)`", cell)]


def as_pattern(message: str) -> re.Pattern[str]:
    """The message with anything where it says ``…``."""
    return re.compile(".*".join(re.escape(part.strip()) for part in message.split("…")), re.DOTALL)
