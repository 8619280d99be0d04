"""A context whose keys and values lie in a vLLM engine's prefix cache."""

from __future__ import annotations

from dataclasses import dataclass

from common.protocol.schema import Ids


@dataclass(frozen=True, slots=True, eq=False)
class SaltedPrefix:
    """A context: its ids, and the `salt` that names its keys and values in the engine's prefix cache.

    Each chain of contexts has a random salt, so no other tenant, and no other user of the engine, hits or finds it
    there. The engine recomputes evicted contexts.
    """

    ids: Ids
    salt: str
    nbytes: int

    @property
    def total_tokens(self) -> int:
        """Tokens of the whole prefix."""
        return int(self.ids.size)

    def to_host(self) -> None:
        """Nothing to do: the engine decides where its keys and values lie."""

    def to_device(self) -> None:
        """Nothing to do."""
