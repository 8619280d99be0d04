"""The cache of computed states, without a model."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import pytest

from common.protocol.schema import Context, Ids, as_ids, context_hash
from teacher_server.backends.base import Backend
from teacher_server.scoring.contexts import MAX_CHAIN, ContextRef
from teacher_server.scoring.prefix_cache import CacheFull, PrefixCache

TOKENIZER = "ab" * 32


def make(length: int, parent: Context | None = None) -> Context:
    ids = as_ids(np.arange(length))
    return Context(context_hash(TOKENIZER, ids), ids, None if parent is None else parent.hash)


def single(first: int, length: int = 10) -> ContextRef:
    """A context of `length` tokens that begins with `first`: 100 bytes."""
    ids = as_ids(np.arange(first, first + length))
    return ContextRef("t", Context(context_hash(TOKENIZER, ids), ids, None))


@dataclass(eq=False)
class State:
    parent: Any
    total_tokens: int
    nbytes: int
    on_host: bool = False

    def to_host(self) -> None:
        assert not self.on_host
        self.on_host = True

    def to_device(self) -> None:
        assert self.on_host
        assert self.parent is None or not self.parent.on_host
        self.on_host = False


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


# --- which states leave, and where they go --------------------------------------------------------------------------


def computed_in(cache: PrefixCache, backend: CountingBackend, uses: list[int]) -> int:
    backend.computed.clear()
    for first in uses:
        use(cache, single(first))
    return len(backend.computed)


def test_more_contexts_than_fit_find_most_of_those_that_do(cache: PrefixCache, backend: CountingBackend) -> None:
    """The least recently used first would find none: it is always the next one that is needed."""
    passes = [list(range(20)) for _ in range(10)]
    found = [20 - computed_in(cache, backend, one) for one in passes]
    assert sum(found[5:]) >= 0.7 * 5 * 10, "10 of 20 fit, a quarter of them are the last ones used"


def test_shuffled_passes_find_more_than_by_recency(cache: PrefixCache, backend: CountingBackend) -> None:
    rng = random.Random(0)
    passes = [rng.sample(range(20), 20) for _ in range(20)]
    recent: list[int] = []
    by_recency = 0
    for one in (first for each in passes for first in each):
        by_recency += one in recent
        recent = [*[other for other in recent if other != one][-9:], one]
    found = 20 * 20 - sum(computed_in(cache, backend, one) for one in passes)
    assert found > 1.2 * by_recency


def test_a_prompts_other_responses_find_its_context_although_others_were_used_more(
    cache: PrefixCache, backend: CountingBackend
) -> None:
    for _ in range(9):
        computed_in(cache, backend, list(range(10)))
    assert computed_in(cache, backend, [50, 51, 50, 51, 50, 51]) == 2


def test_contexts_of_the_past_make_room(cache: PrefixCache, backend: CountingBackend) -> None:
    for _ in range(50):
        computed_in(cache, backend, list(range(10)))
    later = [computed_in(cache, backend, list(range(100, 110))) for _ in range(40)]
    assert later[0] == 10
    assert later[-1] == 0


@pytest.fixture
def tiered(backend: CountingBackend) -> PrefixCache:
    """Room for ten states on the device and for twenty on the host."""
    return PrefixCache(cast(Backend, backend), max_bytes=1000, max_host_bytes=2000)


def test_states_that_leave_the_device_come_back(tiered: PrefixCache, backend: CountingBackend) -> None:
    assert computed_in(tiered, backend, list(range(30))) == 30
    assert (tiered.nbytes, tiered.host_nbytes) == (1000, 2000)
    for _ in range(5):
        assert computed_in(tiered, backend, list(range(30))) == 0
        assert (tiered.nbytes, tiered.host_nbytes) == (1000, 2000)
    assert tiered.counts.restored >= 5 * 20
    assert tiered.counts.evictions == 0


def test_a_full_host_drops_states(tiered: PrefixCache, backend: CountingBackend) -> None:
    computed_in(tiered, backend, list(range(40)))
    assert len(tiered) == 30
    assert (tiered.nbytes, tiered.host_nbytes, tiered.counts.evictions) == (1000, 2000, 10)


def test_a_state_larger_than_the_host_is_dropped(backend: CountingBackend) -> None:
    cache = PrefixCache(cast(Backend, backend), max_bytes=1000, max_host_bytes=300)
    use(cache, ContextRef("t", make(50)))
    use(cache, ContextRef("t", make(60)))
    assert (len(cache), cache.nbytes, cache.host_nbytes) == (1, 600, 0)


def test_a_chain_comes_back_root_first(tiered: PrefixCache, backend: CountingBackend) -> None:
    parent = make(30)
    child = ContextRef("t", make(50, parent), (parent,))
    use(tiered, child)
    use(tiered, ContextRef("t", make(95)))  # moves both
    assert tiered.host_nbytes == 500
    backend.computed.clear()
    with tiered.pinned() as pins:
        state = pins.state(child)
        assert not state.on_host
        assert not state.parent.on_host
    assert backend.computed == []
    assert (tiered.nbytes, tiered.host_nbytes) == (500, 950)


def test_a_new_child_brings_its_parent_back(tiered: PrefixCache, backend: CountingBackend) -> None:
    parent = make(30)
    use(tiered, ContextRef("t", parent))
    use(tiered, ContextRef("t", make(95)))
    backend.computed.clear()
    with tiered.pinned() as pins:
        assert not pins.state(ContextRef("t", make(50, parent), (parent,))).parent.on_host
    assert backend.computed == [(30, 50)]


def test_a_dropped_parent_takes_its_children_on_the_host_with_it(backend: CountingBackend) -> None:
    cache = PrefixCache(cast(Backend, backend), max_bytes=1000, max_host_bytes=200)
    parent = make(40)
    use(cache, ContextRef("t", make(60, parent), (parent,)))
    use(cache, ContextRef("t", make(70)))  # the child's 200 bytes move, the parent's 400 do not fit
    assert (len(cache), cache.nbytes, cache.host_nbytes) == (1, 700, 0)


def test_pinned_states_do_not_move(tiered: PrefixCache) -> None:
    with tiered.pinned() as pins:
        state = pins.state(ContextRef("t", make(60)))
        with pytest.raises(CacheFull):
            pins.state(ContextRef("t", make(61)))
        assert not state.on_host
    use(tiered, ContextRef("t", make(61)))
    with tiered.pinned() as pins:
        pins.state(ContextRef("t", make(61)))
        with pytest.raises(CacheFull):
            pins.state(ContextRef("t", make(60)))
    assert (tiered.nbytes, tiered.host_nbytes) == (610, 600)


def test_a_new_version_drops_both_memories(tiered: PrefixCache, backend: CountingBackend) -> None:
    computed_in(tiered, backend, list(range(30)))
    backend.weight_version = 1
    tiered.drop_other_versions()
    assert (len(tiered), tiered.nbytes, tiered.host_nbytes) == (0, 0, 0)


def test_random_uses_keep_every_bound(backend: CountingBackend) -> None:
    """Chains, tenants and versions at random: bounds hold, and no state is used while its parent is away."""
    rng = random.Random(0)
    cache = PrefixCache(cast(Backend, backend), max_bytes=1000, max_host_bytes=700)
    roots = [make(length) for length in (5, 10, 20)]
    chains = [(root,) for root in roots]
    chains += [(make(root.ids.size + more, root), root) for root in roots for more in (3, 17, 40)]
    for step in range(3000):
        with cache.pinned() as pins:
            for _ in range(rng.randint(1, 4)):
                first, *parents = rng.choice(chains)
                try:
                    state = pins.state(ContextRef(rng.choice("ab"), first, tuple(parents)))
                except CacheFull:
                    continue
                while state is not None:
                    assert not state.on_host
                    state = state.parent
        assert cache.nbytes <= 1000
        assert cache.host_nbytes <= 700
        if step % 500 == 499:
            backend.weight_version += 1
            cache.drop_other_versions()
            assert cache.nbytes == cache.host_nbytes == 0


@pytest.mark.parametrize("move", ["to_device", "to_host"])
def test_a_state_whose_move_fails_is_dropped(
    move: str, tiered: PrefixCache, backend: CountingBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half of its tensors may have moved; the next use computes it again."""
    parent = make(30)
    child = ContextRef("t", make(50, parent), (parent,))
    use(tiered, child)
    other = ContextRef("t", make(95))
    if move == "to_device":
        use(tiered, other)

    def fail(self: State) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(State, move, fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        use(tiered, child if move == "to_device" else other)
    monkeypatch.undo()
    backend.computed.clear()
    use(tiered, child)
    assert backend.computed == [(0, 50) if move == "to_device" else (30, 50)]
    use(tiered, other)
    assert tiered.nbytes == 950
