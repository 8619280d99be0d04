"""Contexts by content hash: the tokens that clients put, and the states that the backend computes from them.

Both stores are bounded in bytes. They evict the least recently used entry of the tenant that holds most, so a tenant
with endless contexts evicts its own. Names are always (tenant, hash): a tenant cannot see the contexts of another
tenant, nor detect them by timing.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from common.protocol.schema import Context, Ids, context_hash
from teacher_server.backends.base import Backend

MAX_CHAIN = 16
"""Maximum number of contexts in a chain of parents: each costs a merge in every layer of every forward pass."""

OVERHEAD_BYTES = 4096
"""Counted for each stored context: a short context takes far more memory than its ids."""

Name = tuple[str, str]
"""(tenant, context hash)."""


class ContextRefused(ValueError):
    """The context cannot be stored. `code` is machine-readable (``unknown_parent``, ``hash_mismatch``, ...)."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


class ContextStore:
    """Token prefixes of all tenants. A hash always names the same tokens."""

    def __init__(
        self,
        tokenizer_fingerprint: str,
        *,
        max_tokens: int,
        max_bytes: int,
        embeds: Callable[[Ids], bool] = lambda _: True,
    ) -> None:
        """`max_tokens` bounds one context (the model's limit), `max_bytes` all contexts together.

        `embeds` tells if the model has an embedding for every id.
        """
        self._fingerprint = tokenizer_fingerprint
        self._embeds = embeds
        self._max_tokens = max_tokens
        self._max_bytes = max_bytes
        self._contexts: dict[str, OrderedDict[str, Context]] = {}
        self._bytes: Counter[str] = Counter()

    @property
    def nbytes(self) -> int:
        """Bytes of all contexts."""
        return self._bytes.total()

    def put(self, tenant: str, name: str, ids: Ids, parent: str | None) -> Context:
        """Store ``parent + ids`` under `name`. Putting a context again changes nothing. Raises ContextRefused."""
        if not ids.size:
            raise ContextRefused("empty", "a context has at least one token, and at least one after its parent's")
        head = None if parent is None else self.get(tenant, parent)
        if parent is not None and head is None:
            raise ContextRefused("unknown_parent", f"parent {parent} is not stored: put the parent first")
        total = int(ids.size) + (0 if head is None else int(head.ids.size))
        if total >= self._max_tokens:
            raise ContextRefused(
                "too_long", f"a context has at most {self._max_tokens - 1} tokens with this model, not {total}"
            )
        if not self._embeds(ids):
            raise ContextRefused("bad_ids", f"token id {int(ids.max())} is not in this model's vocabulary")
        if head is not None:
            ids = np.concatenate([head.ids, ids])
            if len(self.parents(tenant, head)) + 2 > MAX_CHAIN:
                raise ContextRefused("too_deep", f"more than {MAX_CHAIN} contexts in a chain: drop `parent`")
        actual = context_hash(self._fingerprint, ids)
        if actual != name:
            raise ContextRefused(
                "hash_mismatch",
                f"these {ids.size} tokens hash to {actual} under this teacher's tokenizer, not to {name}: "
                "the tokens are damaged, or the client uses another tokenizer",
            )
        if (stored := self.get(tenant, name)) is not None:
            return stored
        size = ids.nbytes + OVERHEAD_BYTES
        if size > self._max_bytes:
            raise ContextRefused("too_long", f"{size} bytes of ids, at most {self._max_bytes}")
        context = Context(hash=name, ids=ids, parent=parent)
        self._contexts.setdefault(tenant, OrderedDict())[name] = context
        self._bytes[tenant] += size
        while self.nbytes > self._max_bytes:
            self._evict()
        return context

    def _evict(self) -> None:
        ((tenant, _),) = self._bytes.most_common(1)
        _, oldest = self._contexts[tenant].popitem(last=False)
        self._bytes[tenant] -= oldest.ids.nbytes + OVERHEAD_BYTES
        if not self._contexts[tenant]:
            del self._contexts[tenant], self._bytes[tenant]

    def get(self, tenant: str, name: str) -> Context | None:
        """Return the context and mark it as used; None if the tenant has not put it or it was evicted."""
        contexts = self._contexts.get(tenant)
        if contexts is None or name not in contexts:
            return None
        contexts.move_to_end(name)
        return contexts[name]

    def parents(self, tenant: str, context: Context) -> tuple[Context, ...]:
        """Stored ancestors, the nearest first, up to the first missing one."""
        found: list[Context] = []
        while context.parent is not None and (parent := self.get(tenant, context.parent)) is not None:
            found.append(parent)
            context = parent
        return tuple(found)

    def __len__(self) -> int:
        return sum(map(len, self._contexts.values()))


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
        self._bytes: Counter[str] = Counter()
        self.counts = CacheCounts()

    @property
    def nbytes(self) -> int:
        """Bytes of all states."""
        return self._bytes.total()

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
                self._bytes[entry.key[0]] -= entry.state.nbytes

    def clear(self) -> None:
        """Drop all states. Call it between batches."""
        self._entries.clear()
        self._bytes.clear()

    def _compute(self, ref: ContextRef) -> _Entry:
        """Compute all missing states of a chain together: a forward pass for each would cost as many times more."""
        parent: _Entry | None = None
        missing: list[Context] = []
        for context in (*reversed(ref.parents), ref.context):
            entry = self._entries.get(self._key(ref.tenant, context))
            if entry is not None:
                parent, missing = entry, []
            else:
                missing.append(context)
        begin = 0 if parent is None else parent.state.total_tokens
        ends = [begin, *(int(context.ids.size) for context in missing)]
        parts = [ref.context.ids[start:end] for start, end in pairwise(ends)]
        if parent is not None:
            parent.pins += 1
        try:
            self._make_room(sum(self._backend.prefix_bytes(int(part.size)) for part in parts))
            states = self._backend.prefill(parts, None if parent is None else parent.state)
        finally:
            if parent is not None:
                parent.pins -= 1
        self.counts.computed_tokens += ends[-1] - begin
        self.counts.hit_tokens += begin
        for context, state in zip(missing, states, strict=True):
            entry = _Entry(state, self._key(ref.tenant, context), parent)
            if parent is not None:
                parent.children += 1
            self._entries[entry.key] = entry
            self._bytes[ref.tenant] += state.nbytes
            parent = entry
        assert parent is not None
        return parent

    def _make_room(self, needed: int) -> None:
        while self._entries and self.nbytes + needed > self._max_bytes:
            idle = (entry for entry in self._entries.values() if not entry.pins and not entry.children)
            # `max` returns the first of equals: the least recently used of the tenant that holds most.
            victim = max(idle, key=lambda entry: self._bytes[entry.key[0]], default=None)
            if victim is None:
                raise CacheFull(f"{self.nbytes} bytes of context states are in use, {needed} more are needed")
            self._drop(victim)
            self.counts.evictions += 1

    def _drop(self, entry: _Entry) -> None:
        del self._entries[entry.key]
        self._bytes[entry.key[0]] -= entry.state.nbytes
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
