"""Pools of contexts (``context.pool``): reading, digest, and the choice of a context for a sample. Pure."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import xxhash
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from common.config.model import ConfigError
from common.data.sources import DataError, InvalidJson, json_lines


class PoolContext(BaseModel):
    """One line of a pool; further keys are ignored."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    id: Annotated[str, Field(min_length=1)]
    text: Annotated[str, Field(pattern=r"\S")]


Pool = Sequence[PoolContext]


def read_pool(path: Path) -> tuple[PoolContext, ...]:
    """Read the contexts of a JSON-lines file, in order. Raises ConfigError with file and line."""
    try:
        records = list(json_lines(path))
    except DataError as error:
        raise ConfigError(f"context.pool: {error} (`opcd experience select` writes one)") from error
    pool: dict[str, PoolContext] = {}
    for location, record in records:
        if isinstance(record, InvalidJson):
            raise ConfigError(f"context.pool: {location}: {record}")
        try:
            context = PoolContext.model_validate(record)
        except ValidationError as error:
            detail = error.errors()[0]
            column = ".".join(str(part) for part in detail["loc"])
            raise ConfigError(f"context.pool: {location}: {column}: {detail['msg']}") from error
        if context.id in pool:
            raise ConfigError(f"context.pool: {location}: id {context.id!r} is used twice")
        pool[context.id] = context
    if not pool:
        raise ConfigError(f"context.pool: {path} holds no contexts")
    return tuple(pool.values())


def pool_digest(pool: Pool) -> str:
    """Hex sha256 of ids and texts in order, which together decide the context of every sample."""
    content = json.dumps([[context.id, context.text] for context in pool], ensure_ascii=False)
    return hashlib.sha256(content.encode()).hexdigest()


def context_index(seed: int, key: str, count: int) -> int:
    """Return the index, among `count` contexts, of the one for `key` (a sample's id: step, row, repeat).

    A function of its arguments alone, so a resumed run chooses the same contexts.
    """
    return xxhash.xxh64_intdigest(f"{seed}/context/{key}".encode()) % count
