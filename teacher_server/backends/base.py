"""Interface of the backends that run a model. Tenants, queues and HTTP are the server's."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from common.protocol.schema import ForwardPathName, Ids, ItemError, ItemScore, ScoreItem, ScoreMode, as_ids
from teacher_server.backends.wire_size import own_tokens, queue_tokens


class BackendError(RuntimeError):
    """The backend cannot run this model with these settings; the message gives cause and remedy."""


class BackendLost(RuntimeError):
    """The process that runs the model died, it seems of a request. `Backend.restart` makes it usable again."""


class Prefix(Protocol):
    """A backend's state of a context: computed once, shared by every sequence that starts with the context."""

    @property
    def total_tokens(self) -> int:
        """Tokens of the whole prefix, parents included: the first position of a prompt."""
        ...

    @property
    def nbytes(self) -> int:
        """Bytes that this state holds, parents excluded."""
        ...

    def to_host(self) -> None:
        """Move its tensors from their devices into the host's memory. It cannot be scored under until `to_device`."""
        ...

    def to_device(self) -> None:
        """Move its tensors back to their devices."""
        ...


@dataclass(frozen=True, slots=True, eq=False)
class Work:
    """One item of a batch with all that a backend needs; its ids, shapes and lengths are validated."""

    item: ScoreItem
    prefix: Any | None
    mode: ScoreMode
    temperature: float
    k: int

    @property
    def own_tokens(self) -> int:
        """Tokens of prompt and response; the context costs no forward pass."""
        return own_tokens(self.item)

    @property
    def queue_tokens(self) -> int:
        """Tokens that the item counts in the queue and in a batch."""
        return queue_tokens(self.item)

    @property
    def teacher_ids(self) -> int:
        """Ids per position that the teacher picks: `k`, or 0 if the mode has none."""
        return self.k if self.mode in ("teacher_topk", "union") else 0

    def empty_score(self) -> ItemScore:
        """Score of an empty response, which has no positions."""
        width = self.teacher_ids + (0 if self.item.topk_ids is None else self.item.topk_ids.shape[1])
        none = np.empty(0, dtype=np.float32)
        ids = as_ids(np.empty((0, width))) if self.teacher_ids else None
        return ItemScore(np.empty((0, width), dtype=np.float16), none, none, ids)


class Backend(Protocol):
    """Runs a model. Only one thread calls at a time; methods block and use no event loop."""

    name: str
    path: ForwardPathName
    path_cost: str
    dtype: str
    model_name: str
    model_fingerprint: str
    vocab_size: int
    max_sequence_tokens: int
    weight_version: int
    modes: Mapping[ScoreMode, tuple[float, ...] | None]
    """Temperatures by mode, see `TeacherInfo.modes`."""

    def prefix_bytes(self, tokens: int) -> int:
        """Upper bound of `Prefix.nbytes` for `tokens` context tokens, a little above it at most."""
        ...

    def embeds(self, ids: Ids) -> bool:
        """Return True if the model has an input embedding for every id."""
        ...

    def prefill(self, parts: Sequence[Ids], parent: Any | None) -> list[Any]:
        """States of the prefixes ``parent + parts[0]``, ``parent + parts[0] + parts[1]``, ..., computed together.

        No part is empty.
        """
        ...

    def score(self, batch: Sequence[Work]) -> list[ItemScore | ItemError]:
        """Results in the order of `batch`. A batch may mix prefixes, modes, temperatures and lengths.

        Raises BackendLost.
        """
        ...

    def restart(self) -> None:
        """Start the model's process again after BackendLost, if it is this backend's; prefixes stay valid.

        Raises BackendError.
        """
        ...


class LiveBackend(Backend, Protocol):
    """A backend whose weights can be replaced between batches."""

    device: Any
    """Device of the weights."""

    def load_weights(self, tensors: Iterable[tuple[str, Any]], version: int) -> None:
        """Load the weights of `version`. Raises SyncError; the backend is then unusable."""
        ...

    def save_state(self, path: Path) -> None:
        """Write the state that a resumed run needs in addition to the weights, as one file."""
        ...

    def load_state(self, path: Path) -> None:
        """Restore the file of `save_state`."""
        ...
