"""Contexts by content hash: the tokens that clients put.

The store is bounded in bytes. It evicts the least recently used context of the tenant that holds most, so a tenant with
endless contexts evicts its own. Names are always (tenant, hash): a tenant cannot see the contexts of another tenant.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from common.protocol.schema import Context, Ids, context_hash

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
