"""The context store and the cache of computed states, without a model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import pytest

from common.protocol.schema import Context, Ids, as_ids, context_hash
from teacher_server.backends.base import Backend
from teacher_server.scoring.contexts import (
    MAX_CHAIN,
    OVERHEAD_BYTES,
    CacheFull,
    ContextRef,
    ContextRefused,
    ContextStore,
    PrefixCache,
)

TOKENIZER = "ab" * 32


def named(ids: Ids) -> str:
    return context_hash(TOKENIZER, ids)


def make(length: int, parent: Context | None = None) -> Context:
    ids = as_ids(np.arange(length))
    return Context(named(ids), ids, None if parent is None else parent.hash)


@pytest.fixture
def store() -> ContextStore:
    return ContextStore(TOKENIZER, max_tokens=100, max_bytes=5 * (OVERHEAD_BYTES + 200))


def test_put_and_get_with_parent(store: ContextStore) -> None:
    whole = as_ids(np.arange(10))
    store.put("t", named(whole[:6]), whole[:6], None)
    child = store.put("t", named(whole), whole[6:], named(whole[:6]))
    assert (child.ids == whole).all()
    got = store.get("t", named(whole))
    assert got is child
    assert [parent.ids.size for parent in store.parents("t", child)] == [6]


@pytest.mark.parametrize(
    ("ids", "name", "parent", "code"),
    [
        (as_ids([1, 2]), "0" * 64, None, "hash_mismatch"),
        (as_ids([1, 2]), named(as_ids([1, 2])), "0" * 64, "unknown_parent"),
        (as_ids([]), named(as_ids([])), None, "empty"),
        (as_ids(np.arange(100)), named(as_ids(np.arange(100))), None, "too_long"),
    ],
)
def test_refusals(store: ContextStore, ids: Ids, name: str, parent: str | None, code: str) -> None:
    with pytest.raises(ContextRefused) as caught:
        store.put("t", name, ids, parent)
    assert caught.value.code == code
    assert len(store) == 0


def test_another_tokenizer_is_another_hash(store: ContextStore) -> None:
    ids = as_ids([1, 2])
    with pytest.raises(ContextRefused, match="another tokenizer"):
        store.put("t", context_hash("cd" * 32, ids), ids, None)


def test_tenants_do_not_see_each_other(store: ContextStore) -> None:
    ids = as_ids([1, 2, 3])
    store.put("a", named(ids), ids, None)
    assert store.get("b", named(ids)) is None
    more = as_ids([1, 2, 3, 4])
    with pytest.raises(ContextRefused, match="put the parent first"):
        store.put("b", named(more), more[3:], named(ids))


def test_least_recently_used_leaves_first(store: ContextStore) -> None:
    contexts = [as_ids(np.arange(start, start + 50)) for start in range(6)]
    for ids in contexts[:5]:
        store.put("t", named(ids), ids, None)
    assert store.get("t", named(contexts[0])) is not None
    store.put("t", named(contexts[5]), contexts[5], None)
    assert store.get("t", named(contexts[0])) is not None
    assert store.get("t", named(contexts[1])) is None
    assert len(store) == 5


def test_putting_again_changes_nothing(store: ContextStore) -> None:
    ids = as_ids([1, 2, 3])
    first = store.put("t", named(ids), ids, None)
    assert store.put("t", named(ids), ids, None) is first
    assert store.nbytes == ids.nbytes + OVERHEAD_BYTES


# --- computed states --------------------------------------------------------------------------------------------------


@dataclass(eq=False)
class State:
    parent: Any
    total_tokens: int
    nbytes: int


class CountingBackend:
    """A backend whose states take ten bytes a token. Records each computation."""

    def __init__(self) -> None:
        self.weight_version = 0
        self.computed: list[tuple[int, int]] = []

    def prefix_bytes(self, tokens: int) -> int:
        return 10 * tokens

    def prefill(self, parts: Sequence[Ids], parent: State | None) -> list[State]:
        begin = 0 if parent is None else parent.total_tokens
        self.computed.append((begin, begin + sum(part.size for part in parts)))
        states: list[State] = []
        for part in parts:
            begin += int(part.size)
            parent = State(parent, begin, 10 * int(part.size))
            states.append(parent)
        return states


@pytest.fixture
def backend() -> CountingBackend:
    return CountingBackend()


@pytest.fixture
def cache(backend: CountingBackend) -> PrefixCache:
    return PrefixCache(cast(Backend, backend), max_bytes=1000)


def use(cache: PrefixCache, *located: ContextRef) -> None:
    with cache.pinned() as pins:
        for one in located:
            pins.state(one)


def test_computed_once(cache: PrefixCache, backend: CountingBackend) -> None:
    one = ContextRef("t", make(50))
    use(cache, one, one)
    use(cache, one)
    assert backend.computed == [(0, 50)]
    assert (cache.counts.hits, cache.counts.misses) == (1, 1)
    assert (cache.counts.hit_tokens, cache.counts.computed_tokens) == (50, 50)


def test_parents_are_computed_first_and_reused(cache: PrefixCache, backend: CountingBackend) -> None:
    grand = make(10)
    parent = make(30, grand)
    child, sibling = make(50, parent), make(40, parent)
    use(cache, ContextRef("t", child, (parent, grand)))
    use(cache, ContextRef("t", sibling, (parent, grand)))
    assert backend.computed == [(0, 50), (30, 40)]
    assert cache.nbytes == 600


def test_a_lost_parent_is_not_needed(cache: PrefixCache, backend: CountingBackend) -> None:
    use(cache, ContextRef("t", make(50, make(30))))
    assert backend.computed == [(0, 50)]


def test_another_tenant_computes_for_itself(cache: PrefixCache, backend: CountingBackend) -> None:
    """A shared state would answer faster, and so tell that someone else has this context."""
    use(cache, ContextRef("a", make(50)))
    use(cache, ContextRef("b", make(50)))
    assert backend.computed == [(0, 50), (0, 50)]


def test_another_weight_version_computes_again(cache: PrefixCache, backend: CountingBackend) -> None:
    use(cache, ContextRef("t", make(50)))
    backend.weight_version = 1
    use(cache, ContextRef("t", make(50)))
    assert len(backend.computed) == 2


def test_bounded_and_least_recently_used_first(cache: PrefixCache, backend: CountingBackend) -> None:
    a, b, c = (ContextRef("t", make(length)) for length in (40, 41, 42))
    use(cache, a)
    use(cache, b)
    use(cache, a)
    use(cache, c)
    assert cache.nbytes <= 1000
    backend.computed.clear()
    use(cache, a)
    assert backend.computed == []
    use(cache, b)
    assert backend.computed == [(0, 41)]


def test_pinned_states_stay(cache: PrefixCache) -> None:
    with cache.pinned() as pins:
        pins.state(ContextRef("t", make(60)))
        with pytest.raises(CacheFull):
            pins.state(ContextRef("t", make(61)))
        assert len(cache) == 1
    use(cache, ContextRef("t", make(61)))
    assert cache.nbytes == 610


def test_a_parent_outlives_its_children(cache: PrefixCache) -> None:
    """Its memory is in use as long as a child's state refers to it: evicting it would only hide that."""
    parent = make(50)
    child = make(60, parent)
    use(cache, ContextRef("t", child, (parent,)))
    use(cache, ContextRef("t", make(45)))
    assert cache.nbytes == 10 * 45 + 10 * 50
    use(cache, ContextRef("t", make(70)))
    assert cache.nbytes == 700


def test_failed_computation_leaves_no_pins(cache: PrefixCache, backend: CountingBackend) -> None:
    parent = make(50)
    use(cache, ContextRef("t", parent))

    def fail(parts: Sequence[Ids], parent: State | None) -> list[State]:
        raise RuntimeError("out of memory")

    backend.prefill = fail
    with pytest.raises(RuntimeError, match="out of memory"):
        use(cache, ContextRef("t", make(60, parent), (parent,)))
    del backend.prefill
    use(cache, ContextRef("t", make(95)))
    assert cache.nbytes == 950


def test_a_context_that_never_fits(cache: PrefixCache) -> None:
    assert cache.fits(ContextRef("t", make(100)))
    assert not cache.fits(ContextRef("t", make(101)))


@pytest.mark.parametrize("tokens", range(60, 101))
def test_what_is_said_to_fit_does(tokens: int) -> None:
    """A state takes more memory than its tokens, and so does each parent's state: `fits` counts it."""

    class Padded(CountingBackend):
        def prefix_bytes(self, tokens: int) -> int:
            return super().prefix_bytes(tokens) + 75

        def prefill(self, parts: Sequence[Ids], parent: State | None) -> list[State]:
            states = super().prefill(parts, parent)
            for state in states:
                state.nbytes += 75
            return states

    cache = PrefixCache(cast(Backend, Padded()), max_bytes=1000)
    grand = make(10)
    parent = make(30, grand)
    located = ContextRef("t", make(tokens, parent), (parent, grand))
    use(cache, ContextRef("t", make(50)))  # makes room
    if cache.fits(located):
        use(cache, located)
        assert cache.nbytes == 10 * tokens + 3 * 75 <= 1000
    else:
        assert 10 * tokens + 3 * 75 > 1000


def test_a_short_context_counts_with_its_overhead() -> None:
    store = ContextStore(TOKENIZER, max_tokens=100, max_bytes=3 * (OVERHEAD_BYTES + 4))
    shorts = [as_ids([n]) for n in range(4)]
    for ids in shorts:
        store.put("t", named(ids), ids, None)
    assert [store.get("t", named(ids)) is not None for ids in shorts] == [False, True, True, True]
    assert len(store) == 3


def test_a_tenant_with_endless_contexts_evicts_its_own() -> None:
    store = ContextStore(TOKENIZER, max_tokens=100, max_bytes=4 * (OVERHEAD_BYTES + 4))
    honest = as_ids([7])
    store.put("honest", named(honest), honest, None)
    for n in range(50):
        store.put("hostile", named(as_ids([n])), as_ids([n]), None)
    assert store.get("honest", named(honest)) is not None
    assert len(store) == 4


def test_a_tenant_with_endless_states_evicts_its_own(cache: PrefixCache, backend: CountingBackend) -> None:
    use(cache, ContextRef("honest", make(30)))
    for length in range(20, 50):
        use(cache, ContextRef("hostile", make(length)))
    backend.computed.clear()
    use(cache, ContextRef("honest", make(30)))
    assert backend.computed == []


def test_a_new_chain_is_computed_at_once(cache: PrefixCache, backend: CountingBackend) -> None:
    """A forward pass for each context made a chain of 250 tokens cost as much as thousands of tokens."""
    chain = [make(10)]
    for length in range(11, 11 + MAX_CHAIN - 1):
        chain.insert(0, make(length, chain[0]))
    use(cache, ContextRef("t", chain[0], tuple(chain[1:])))
    assert backend.computed == [(0, 10 + MAX_CHAIN - 1)]
    use(cache, *(ContextRef("t", one, tuple(chain[i + 1 :])) for i, one in enumerate(chain)))
    assert len(backend.computed) == 1


def test_a_chain_has_a_longest_length() -> None:
    store = ContextStore(TOKENIZER, max_tokens=100, max_bytes=1 << 20)
    ids = as_ids(np.arange(MAX_CHAIN + 1))
    for n in range(1, MAX_CHAIN + 1):
        store.put("t", named(ids[:n]), ids[n - 1 : n], named(ids[: n - 1]) if n > 1 else None)
    with pytest.raises(ContextRefused) as caught:
        store.put("t", named(ids), ids[MAX_CHAIN:], named(ids[:MAX_CHAIN]))
    assert caught.value.code == "too_deep"


def test_a_context_that_adds_nothing_is_refused(store: ContextStore) -> None:
    ids = as_ids([1, 2])
    store.put("t", named(ids), ids, None)
    with pytest.raises(ContextRefused) as caught:
        store.put("t", named(ids), as_ids([]), named(ids))
    assert caught.value.code == "empty"
