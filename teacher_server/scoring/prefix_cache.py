"""States that the backend computes from contexts, kept in the memory of its device and, if given, in the host's.

Both memories are bounded in bytes. If the device is full, a state moves to the host, and comes back when an item needs
it; if the host is full too, a state is dropped and computed again. Names are always (tenant, hash): a tenant cannot
detect the contexts of another tenant by timing.

Which state leaves: one of the tenant that holds most, counting what it asks for, so a tenant with endless contexts
evicts its own. Its recently used states stay, a quarter of its bytes: a prompt's other responses follow soon. Of the
others the one that was used least often leaves, and of equals the one used last. Thus a run that goes through more
contexts than fit, over and over, finds most of those that fit; with the least recently used first it would find none.
Uses are counted for evicted states, too, and all counts are halved from time to time, so past contexts make room.
(After W-TinyLFU, arXiv:1512.00727.)
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from common.protocol.schema import Context
from teacher_server.backends.base import Backend
from teacher_server.scoring.contexts import ContextRef, Name

USES_PER_STATE = 10
"""Counts are halved after so many uses for every cached state."""

RECENT_SHARE = 0.25
"""Share of a tenant's bytes that its most recently used states keep, however often they were used."""

Key = tuple[str, str, int]
"""(tenant, context hash, weight version)."""


@dataclass(slots=True, eq=False)
class _Entry:
    state: Any
    key: Key
    parent: _Entry | None
    pins: int = 0
    on_host: bool = False
    children: int = 0
    device_children: int = 0
    """Number of children on the device, which read this state's keys and values."""


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
    restored: int = 0
    """States that came back from the host."""


class PrefixCache:
    """Computed states by (tenant, hash, weight version). Only `holds` may be called outside the worker thread."""

    def __init__(self, backend: Backend, max_bytes: int, max_host_bytes: int = 0) -> None:
        """`max_bytes` bounds the states on the device, `max_host_bytes` those that moved to the host."""
        self._backend = backend
        self._max_bytes = max_bytes
        self._max_host_bytes = max_host_bytes
        self._entries: OrderedDict[Key, _Entry] = OrderedDict()
        self._device: Counter[str] = Counter()
        self._host: Counter[str] = Counter()
        self._uses: Counter[Key] = Counter()
        self._uses_until_halving = USES_PER_STATE
        self.counts = CacheCounts()

    @property
    def nbytes(self) -> int:
        """Bytes of all states on the device."""
        return self._device.total()

    @property
    def host_nbytes(self) -> int:
        """Bytes of all states on the host."""
        return self._host.total()

    def fits(self, ref: ContextRef) -> bool:
        """Check that the states of a context and its parents fit into an empty cache together."""
        return sum(map(self._backend.prefix_bytes, ref.own_tokens())) <= self._max_bytes

    def holds(self, ref: ContextRef) -> bool:
        """Tell if the state is cached at the moment, on device or host. Thread-safe."""
        return self._key(ref.tenant, ref.context) in self._entries

    @contextmanager
    def pinned(self) -> Iterator[Pins]:
        """Scope that keeps its acquired states on the device and releases all of them at the end."""
        pins = Pins(self)
        try:
            yield pins
        finally:
            pins.release()

    def acquire(self, ref: ContextRef) -> _Entry:
        """Pin and return the entry of a context; fetch it from the host or compute it if needed. Raises CacheFull."""
        self._count_use(ref)
        entry = self._entries.get(self._key(ref.tenant, ref.context))
        if entry is not None:
            self._restore(entry)
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
                self._forget(entry)

    def clear(self) -> None:
        """Drop all states. Call it between batches."""
        self._entries.clear()
        self._device.clear()
        self._host.clear()

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
            self._restore(parent)
        with _pins([] if parent is None else [parent]):
            self._make_room(ref.tenant, sum(self._backend.prefix_bytes(int(part.size)) for part in parts))
            states = self._backend.prefill(parts, None if parent is None else parent.state)
        self.counts.computed_tokens += ends[-1] - begin
        self.counts.hit_tokens += begin
        for context, state in zip(missing, states, strict=True):
            entry = _Entry(state, self._key(ref.tenant, context), parent)
            if parent is not None:
                parent.children += 1
                parent.device_children += 1
            self._entries[entry.key] = entry
            self._device[ref.tenant] += state.nbytes
            parent = entry
        assert parent is not None
        return parent

    def _restore(self, entry: _Entry) -> None:
        """Bring a state and its parents back to the device. Raises CacheFull, and has moved nothing back then."""
        chain = list(_chain(entry))[::-1]
        away = [one for one in chain if one.on_host]
        for one in away:  # counted first, so that what makes room for them can take their place on the host
            self._move(one, on_host=False)
        try:
            with _pins(chain):
                self._make_room(entry.key[0], 0)
        except CacheFull:
            for one in away:
                self._move(one, on_host=True)
            raise
        try:
            for one in away:
                one.state.to_device()
        except BaseException:  # out of memory: a state that lies in two memories would fail every later batch
            self._drop(away[0])
            raise
        self.counts.restored += len(away)

    def _make_room(self, tenant: str, needed: int) -> None:
        """Free `needed` bytes for `tenant` on the device. Raises CacheFull, and has moved nothing then."""
        if self.nbytes + needed <= self._max_bytes:
            return
        stay = {one for entry in self._entries.values() if entry.pins for one in _chain(entry)}
        used = sum(entry.state.nbytes for entry in stay)
        if used + needed > self._max_bytes:
            raise CacheFull(f"{used} bytes of context states are in use, {needed} more are needed")
        held = self._device + Counter({tenant: needed})
        while self.nbytes + needed > self._max_bytes:
            victim = self._victim(held, lambda entry: not entry.on_host and not entry.device_children)
            assert victim is not None
            held[victim.key[0]] -= victim.state.nbytes
            if self._make_host_room(victim.key[0], victim.state.nbytes):
                try:
                    victim.state.to_host()
                except BaseException:
                    self._drop(victim)
                    raise
                self._move(victim, on_host=True)
            else:
                self._drop(victim)

    def _make_host_room(self, tenant: str, needed: int) -> bool:
        """Drop states until `needed` bytes are free on the host; false if that many cannot be."""
        while needed <= self._max_host_bytes and self.host_nbytes + needed > self._max_host_bytes:
            held = self._host + Counter({tenant: needed})
            victim = self._victim(held, lambda entry: entry.on_host and not entry.children)
            if victim is None:
                return False
            self._drop(victim)
        return needed <= self._max_host_bytes

    def _victim(self, held: Counter[str], may_leave: Callable[[_Entry], bool]) -> _Entry | None:
        """The state to leave a memory of which tenants hold `held` bytes."""
        idle = [entry for entry in self._entries.values() if not entry.pins and may_leave(entry)]
        if not idle:
            return None
        tenant = max((entry.key[0] for entry in idle), key=held.__getitem__)
        newest_first = [entry for entry in reversed(idle) if entry.key[0] == tenant]
        recent = RECENT_SHARE * held[tenant]
        settled = []
        for entry in newest_first:
            recent -= entry.state.nbytes
            if recent < 0:
                settled.append(entry)
        # Of equals `min` returns the first one: the most recently used.
        return min(settled, key=lambda entry: self._uses[entry.key], default=newest_first[-1])

    def _move(self, entry: _Entry, *, on_host: bool) -> None:
        """Count a state whose tensors have moved."""
        entry.on_host = on_host
        taker, giver = (self._host, self._device) if on_host else (self._device, self._host)
        taker[entry.key[0]] += entry.state.nbytes
        giver[entry.key[0]] -= entry.state.nbytes
        if entry.parent is not None:
            entry.parent.device_children += -1 if on_host else 1

    def _drop(self, entry: _Entry) -> None:
        """Drop a state and its children, which are on the host: they cannot be used without it."""
        for child in [one for one in self._entries.values() if one.parent is entry] if entry.children else []:
            self._drop(child)
        self._forget(entry)
        self.counts.evictions += 1

    def _forget(self, entry: _Entry) -> None:
        del self._entries[entry.key]
        (self._host if entry.on_host else self._device)[entry.key[0]] -= entry.state.nbytes
        if entry.parent is not None:
            entry.parent.children -= 1
            entry.parent.device_children -= not entry.on_host

    def _count_use(self, ref: ContextRef) -> None:
        for context in (ref.context, *ref.parents):
            self._uses[self._key(ref.tenant, context)] += 1
        self._uses_until_halving -= 1
        if self._uses_until_halving < 0:
            self._uses = Counter({key: uses // 2 for key, uses in self._uses.items() if uses > 1})
            self._uses_until_halving = USES_PER_STATE * max(len(self._entries), 1)

    def _key(self, tenant: str, context: Context) -> Key:
        return tenant, context.hash, self._backend.weight_version

    def __len__(self) -> int:
        return len(self._entries)


def _chain(entry: _Entry) -> Iterator[_Entry]:
    """The entry and its parents."""
    current: _Entry | None = entry
    while current is not None:
        yield current
        current = current.parent


@contextmanager
def _pins(entries: Iterable[_Entry]) -> Iterator[None]:
    """Pin entries for the length of the block."""
    kept = list(entries)
    for entry in kept:
        entry.pins += 1
    try:
        yield
    finally:
        for entry in kept:
            entry.pins -= 1


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
