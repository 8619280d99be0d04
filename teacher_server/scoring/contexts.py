"""Contexts by content hash: their tokens, as clients put them, and their computed state, as the backend keeps it.

Both are bounded in bytes and let the least recently used leave first. Names are always (tenant, hash): a tenant can
neither see, nor by timing tell, what another one has put.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from common.protocol.schema import Context, Ids, context_hash
from teacher_server.backends.base import Backend

MAX_PARENTS = 256
"""Longest chain of parents: each one costs a merge in every layer of every forward pass."""

MAX_CONTEXTS = 65_536
"""Stored at a time, of all tenants: short ones take far more memory than their ids."""

Name = tuple[str, str]
"""(tenant, context hash)."""


class ContextRefused(ValueError):
    """The context cannot be stored; `code` is machine-readable (``unknown_parent``, ``hash_mismatch``, ...)."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


class ContextStore:
    """Token prefixes of all tenants. Immutable: a hash names the same tokens for ever."""

    def __init__(self, tokenizer_fingerprint: str, *, max_tokens: int, max_bytes: int) -> None:
        """`max_tokens` bounds one context (what the model can take), `max_bytes` all of them together."""
        self._fingerprint = tokenizer_fingerprint
        self._max_tokens = max_tokens
        self._max_bytes = max_bytes
        self._contexts: OrderedDict[Name, Context] = OrderedDict()
        self.nbytes = 0

    def put(self, tenant: str, name: str, ids: Ids, parent: str | None) -> Context:
        """Store ``parent + ids`` under `name`; raises ContextRefused. Putting it again changes nothing."""
        known = self.get(tenant, name)
        if parent is not None:
            head = self.get(tenant, parent)
            if head is None:
                raise ContextRefused("unknown_parent", f"parent {parent} is not here: put it first")
            ids = np.concatenate([head.ids, ids])
            if len(self.parents(tenant, head)) + 1 >= MAX_PARENTS:
                raise ContextRefused("too_deep", f"more than {MAX_PARENTS} contexts in a chain: drop `parent`")
        if not 0 < ids.size < self._max_tokens:
            raise ContextRefused(
                "too_long", f"a context has 1 to {self._max_tokens - 1} tokens with this model, this one has {ids.size}"
            )
        actual = context_hash(self._fingerprint, ids)
        if actual != name:
            raise ContextRefused(
                "hash_mismatch",
                f"these {ids.size} tokens hash to {actual} under this teacher's tokenizer, not to {name}: "
                "tokens damaged, or another tokenizer",
            )
        if known is not None:
            return known
        if ids.nbytes > self._max_bytes:
            raise ContextRefused("too_long", f"{ids.nbytes} bytes of ids, at most {self._max_bytes}")
        context = Context(hash=name, ids=ids, parent=parent)
        self._contexts[tenant, name] = context
        self.nbytes += ids.nbytes
        while self.nbytes > self._max_bytes or len(self._contexts) > MAX_CONTEXTS:
            _, oldest = self._contexts.popitem(last=False)
            self.nbytes -= oldest.ids.nbytes
        return context

    def get(self, tenant: str, name: str) -> Context | None:
        """The context, now the most recently used one; None where the tenant has not put it or it was evicted."""
        context = self._contexts.get((tenant, name))
        if context is not None:
            self._contexts.move_to_end((tenant, name))
        return context

    def parents(self, tenant: str, context: Context) -> tuple[Context, ...]:
        """Ancestors that are still here, the nearest first."""
        found: list[Context] = []
        while context.parent is not None and (parent := self.get(tenant, context.parent)) is not None:
            found.append(parent)
            context = parent
        return tuple(found)

    def __len__(self) -> int:
        return len(self._contexts)


@dataclass(frozen=True, slots=True)
class ContextRef:
    """A context with its ancestors (nearest first) and its tenant: all that computing its state takes."""

    tenant: str
    context: Context
    parents: tuple[Context, ...] = ()

    @property
    def name(self) -> Name:
        """What the context is stored under."""
        return self.tenant, self.context.hash

    def own_tokens(self) -> list[int]:
        """Tokens of each state that computing this one leaves in the cache, the root's first."""
        ends = [0, *(int(context.ids.size) for context in (*reversed(self.parents), self.context))]
        return [end - begin for begin, end in pairwise(ends)]


@dataclass(slots=True, eq=False)
class _Entry:
    state: Any
    key: tuple[str, str, int]
    parent: _Entry | None
    pins: int = 0
    children: int = 0


class CacheFull(RuntimeError):
    """Everything in the cache is in use: score what is pinned first, then ask again."""


@dataclass(slots=True)
class CacheCounts:
    """Since the start: `hit_tokens` context tokens that were not computed again, `computed_tokens` that were."""

    hits: int = 0
    misses: int = 0
    hit_tokens: int = 0
    computed_tokens: int = 0
    evictions: int = 0


class PrefixCache:
    """Computed states by (tenant, hash, weight version). Used from the backend's thread only."""

    def __init__(self, backend: Backend, max_bytes: int) -> None:
        self._backend = backend
        self._max_bytes = max_bytes
        self._entries: OrderedDict[tuple[str, str, int], _Entry] = OrderedDict()
        self.nbytes = 0
        self.counts = CacheCounts()

    def fits(self, located: ContextRef) -> bool:
        """Whether the state of a context can be held at all, with those of its parents, which it refers to."""
        return sum(map(self._backend.prefix_bytes, located.own_tokens())) <= self._max_bytes

    def holds(self, located: ContextRef) -> bool:
        """Whether the state is here (may be asked from any thread; true only for the moment)."""
        return self._key(located.tenant, located.context) in self._entries

    @contextmanager
    def pinned(self) -> Iterator[Pins]:
        """A scope in which acquired states stay; all of them are let go at its end."""
        pins = Pins(self)
        try:
            yield pins
        finally:
            pins.release()

    def acquire(self, located: ContextRef) -> _Entry:
        """The entry of a context, computed if it is not here, pinned once. Raises CacheFull."""
        entry = self._entries.get(self._key(located.tenant, located.context))
        if entry is not None:
            self.counts.hits += 1
            self.counts.hit_tokens += int(located.context.ids.size)
        else:
            self.counts.misses += 1
            entry = self._compute(located)
        entry.pins += 1
        self._entries.move_to_end(entry.key)
        return entry

    def drop_other_versions(self) -> None:
        """Forget states of other weights than the backend's: nobody asks for them again. Call it between batches."""
        for entry in reversed(list(self._entries.values())):
            if entry.key[2] != self._backend.weight_version:
                del self._entries[entry.key]
                self.nbytes -= entry.state.nbytes

    def _compute(self, located: ContextRef) -> _Entry:
        parent: _Entry | None = None
        lineage = (*reversed(located.parents), located.context)
        for context in lineage:
            entry = self._entries.get(self._key(located.tenant, context))
            if entry is None:
                entry = self._compute_one(located.tenant, context, parent)
            parent = entry
        assert parent is not None
        return parent

    def _compute_one(self, tenant: str, context: Context, parent: _Entry | None) -> _Entry:
        begin = 0 if parent is None else parent.state.total_tokens
        ids = context.ids[begin:]
        if parent is not None:
            parent.pins += 1
        try:
            self._make_room(self._backend.prefix_bytes(int(ids.size)))
            state = self._backend.prefill(ids, None if parent is None else parent.state)
        finally:
            if parent is not None:
                parent.pins -= 1
        self.counts.computed_tokens += int(ids.size)
        self.counts.hit_tokens += begin
        entry = _Entry(state, self._key(tenant, context), parent)
        if parent is not None:
            parent.children += 1
        self._entries[entry.key] = entry
        self.nbytes += state.nbytes
        return entry

    def _make_room(self, needed: int) -> None:
        while self._entries and self.nbytes + needed > self._max_bytes:
            victim = next((e for e in self._entries.values() if not e.pins and not e.children), None)
            if victim is None:
                raise CacheFull(f"{self.nbytes} bytes of context caches are in use, {needed} more are needed")
            self._drop(victim)
            self.counts.evictions += 1

    def _drop(self, entry: _Entry) -> None:
        del self._entries[entry.key]
        self.nbytes -= entry.state.nbytes
        if entry.parent is not None:
            entry.parent.children -= 1

    def _key(self, tenant: str, context: Context) -> tuple[str, str, int]:
        return tenant, context.hash, self._backend.weight_version

    def __len__(self) -> int:
        return len(self._entries)


class Pins:
    """States in use by one batch."""

    def __init__(self, cache: PrefixCache) -> None:
        self._cache = cache
        self._entries: dict[Name, _Entry] = {}

    def state(self, located: ContextRef) -> Any:
        """The state of `located`, pinned until the scope ends. Raises CacheFull."""
        if located.name not in self._entries:
            self._entries[located.name] = self._cache.acquire(located)
        return self._entries[located.name].state

    def release(self) -> None:
        """Let all of them go."""
        for entry in self._entries.values():
            entry.pins -= 1
        self._entries.clear()
