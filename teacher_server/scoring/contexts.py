"""Contexts by content hash: the tokens that clients put, and the states that the backend computes from them.

Both stores are bounded in bytes and evict the least recently used entry. Names are always (tenant, hash): a tenant
cannot see the contexts of another tenant, nor detect them by timing.
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
"""Maximum length of a chain of parents: each parent costs a merge in every layer of every forward pass."""

MAX_CONTEXTS = 65_536
"""Maximum number of stored contexts, over all tenants: a short context takes far more memory than its ids."""

Name = tuple[str, str]
"""(tenant, context hash)."""


class ContextRefused(ValueError):
    """The context cannot be stored. `code` is machine-readable (``unknown_parent``, ``hash_mismatch``, ...)."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


class ContextStore:
    """Token prefixes of all tenants. A hash always names the same tokens."""

    def __init__(self, tokenizer_fingerprint: str, *, max_tokens: int, max_bytes: int) -> None:
        """`max_tokens` bounds one context (the model's limit), `max_bytes` all contexts together."""
        self._fingerprint = tokenizer_fingerprint
        self._max_tokens = max_tokens
        self._max_bytes = max_bytes
        self._contexts: OrderedDict[Name, Context] = OrderedDict()
        self.nbytes = 0

    def put(self, tenant: str, name: str, ids: Ids, parent: str | None) -> Context:
        """Store ``parent + ids`` under `name`. Putting a context again changes nothing. Raises ContextRefused."""
        stored = self.get(tenant, name)
        if parent is not None:
            head = self.get(tenant, parent)
            if head is None:
                raise ContextRefused("unknown_parent", f"parent {parent} is not stored: put the parent first")
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
                "the tokens are damaged, or the client uses another tokenizer",
            )
        if stored is not None:
            return stored
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
        """Return the context and mark it as used; None if the tenant has not put it or it was evicted."""
        context = self._contexts.get((tenant, name))
        if context is not None:
            self._contexts.move_to_end((tenant, name))
        return context

    def parents(self, tenant: str, context: Context) -> tuple[Context, ...]:
        """Stored ancestors, the nearest first, up to the first missing one."""
        found: list[Context] = []
        while context.parent is not None and (parent := self.get(tenant, context.parent)) is not None:
            found.append(parent)
            context = parent
        return tuple(found)

    def __len__(self) -> int:
        return len(self._contexts)


@dataclass(frozen=True, slots=True)
class ContextRef:
    """A context with its tenant and its ancestors (nearest first): the input for computing its state."""

    tenant: str
    context: Context
    parents: tuple[Context, ...] = ()

    @property
    def name(self) -> Name:
        """Key of the context in the store."""
        return self.tenant, self.context.hash

    def own_tokens(self) -> list[int]:
        """Number of own tokens of each context in the chain, without its parent's, the root first."""
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
    """Every cached state is pinned. Score the pinned items first, then acquire again."""


@dataclass(slots=True)
class CacheCounts:
    """Totals since the start. `hit_tokens`: context tokens served from the cache; `computed_tokens`: computed."""

    hits: int = 0
    misses: int = 0
    hit_tokens: int = 0
    computed_tokens: int = 0
    evictions: int = 0


class PrefixCache:
    """Computed states by (tenant, hash, weight version). Only `holds` may be called outside the worker thread."""

    def __init__(self, backend: Backend, max_bytes: int) -> None:
        self._backend = backend
        self._max_bytes = max_bytes
        self._entries: OrderedDict[tuple[str, str, int], _Entry] = OrderedDict()
        self.nbytes = 0
        self.counts = CacheCounts()

    def fits(self, ref: ContextRef) -> bool:
        """Check that the states of a context and its parents fit into an empty cache together."""
        return sum(map(self._backend.prefix_bytes, ref.own_tokens())) <= self._max_bytes

    def holds(self, ref: ContextRef) -> bool:
        """Tell if the state is cached at the moment. Thread-safe."""
        return self._key(ref.tenant, ref.context) in self._entries

    @contextmanager
    def pinned(self) -> Iterator[Pins]:
        """Scope that keeps its acquired states in the cache and releases all of them at the end."""
        pins = Pins(self)
        try:
            yield pins
        finally:
            pins.release()

    def acquire(self, ref: ContextRef) -> _Entry:
        """Pin and return the entry of a context; compute it if missing. Raises CacheFull."""
        entry = self._entries.get(self._key(ref.tenant, ref.context))
        if entry is not None:
            self.counts.hits += 1
            self.counts.hit_tokens += int(ref.context.ids.size)
        else:
            self.counts.misses += 1
            entry = self._compute(ref)
        entry.pins += 1
        self._entries.move_to_end(entry.key)
        return entry

    def drop_other_versions(self) -> None:
        """Drop the states of other weight versions than the backend's. Call it between batches."""
        for entry in reversed(list(self._entries.values())):
            if entry.key[2] != self._backend.weight_version:
                del self._entries[entry.key]
                self.nbytes -= entry.state.nbytes

    def _compute(self, ref: ContextRef) -> _Entry:
        parent: _Entry | None = None
        chain = (*reversed(ref.parents), ref.context)
        for context in chain:
            entry = self._entries.get(self._key(ref.tenant, context))
            if entry is None:
                entry = self._compute_one(ref.tenant, context, parent)
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
                raise CacheFull(f"{self.nbytes} bytes of context states are in use, {needed} more are needed")
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
    """The pinned states of one batch."""

    def __init__(self, cache: PrefixCache) -> None:
        self._cache = cache
        self._entries: dict[Name, _Entry] = {}

    def state(self, ref: ContextRef) -> Any:
        """The state of a context, pinned until the scope ends. Raises CacheFull."""
        if ref.name not in self._entries:
            self._entries[ref.name] = self._cache.acquire(ref)
        return self._entries[ref.name].state

    def release(self) -> None:
        """Unpin all states."""
        for entry in self._entries.values():
            entry.pins -= 1
        self._entries.clear()
