"""Pools of contexts: reading, digest and choice of a context."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from common.config.model import ConfigError, ContextConfig
from common.data.contexts import PoolContext, context_index, pool_digest, read_pool

TEXTS = {"short": "Be brief.\n", "long": "Be brief, be kind, be right.\n", "other": "Guess.\n"}
POOL = tuple(PoolContext(id=name, text=text) for name, text in TEXTS.items())


def write_pool(path: Path, *lines: Any) -> Path:
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
    return path


def test_a_pool_keeps_the_order_of_its_lines_and_ignores_other_keys(tmp_path: Path) -> None:
    path = write_pool(tmp_path / "p.jsonl", {"id": "a", "text": "A", "tokens": 3}, "", {"id": "b", "text": "A"})
    assert [(entry.id, entry.text) for entry in read_pool(path)] == [("a", "A"), ("b", "A")]


@pytest.mark.parametrize(
    ("lines", "part"),
    [
        ([{"id": "a", "text": "A"}, {"id": "a", "text": "B"}], r":2: id 'a' is used twice"),
        ([{"id": "a"}], r":1: text: Field required"),
        ([{"id": "a", "text": ""}], r":1: text: "),
        (["{nope"], r":1: not JSON"),
        ([""], "holds no context"),
    ],
)
def test_a_bad_pool_is_named_by_file_and_line(tmp_path: Path, lines: list[Any], part: str) -> None:
    with pytest.raises(ConfigError, match=r"context\.pool: .*" + part):
        read_pool(write_pool(tmp_path / "p.jsonl", *lines))


def test_a_pool_has_no_single_text(tmp_path: Path) -> None:
    context = ContextConfig(pool=write_pool(tmp_path / "pool.jsonl", *(entry.model_dump() for entry in POOL)))
    with pytest.raises(ConfigError, match="holds many contexts"):
        context.read()
    assert context.inline() == context
    with pytest.raises(ConfigError, match="cannot read"):
        read_pool(tmp_path / "none")


def test_a_digest_depends_on_texts_ids_and_order() -> None:
    others = [POOL[::-1], POOL[:2], (POOL[0].model_copy(update={"id": "x"}), *POOL[1:])]
    assert len({pool_digest(pool) for pool in (POOL, *others)}) == 4
    assert pool_digest(list(POOL)) == pool_digest(POOL)


def test_the_choice_is_uniform_and_a_function_of_seed_and_key() -> None:
    keys = [f"{step}/{place}/row/{repeat}" for step in range(50) for place in range(16) for repeat in range(2)]
    picks = [context_index(7, key, 4) for key in keys]
    assert picks == [context_index(7, key, 4) for key in keys]
    assert picks != [context_index(8, key, 4) for key in keys]
    # 1,600 choices over 4: 400 each, standard deviation 17.
    assert all(abs(count - 400) < 70 for count in Counter(picks).values())
    assert len(set(picks)) == 4
