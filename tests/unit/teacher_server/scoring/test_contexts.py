"""The context store."""

from __future__ import annotations

import numpy as np
import pytest

from common.protocol.schema import Context, Ids, as_ids, context_hash
from teacher_server.scoring.contexts import (
    MAX_CHAIN,
    OVERHEAD_BYTES,
    ContextRefused,
    ContextStore,
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
