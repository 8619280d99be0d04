"""The interface between the server (which knows tenants, queues and bytes) and what runs a model (which knows none)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from common.protocol.schema import Ids, ItemError, ItemScore, ScoreItem, ScoreMode
from teacher_server.backends.wire_size import own_tokens


class BackendError(RuntimeError):
    """The backend cannot run this model as asked; the text says why and what would work."""


class BackendLost(RuntimeError):
    """What runs the model is gone; only another process can help."""


class Prefix(Protocol):
    """A context as a backend keeps it: computed once, shared by every sequence that starts with it."""

    @property
    def total_tokens(self) -> int:
        """Tokens of the whole prefix, parents included: where the positions of a prompt begin."""
        ...

    @property
    def nbytes(self) -> int:
        """Memory held by this state alone, parents not included."""
        ...


@dataclass(frozen=True, slots=True, eq=False)
class Work:
    """One item of a batch with everything a backend needs; ids, shapes and lengths are already checked."""

    item: ScoreItem
    prefix: Any | None
    mode: ScoreMode
    temperature: float
    k: int

    @property
    def own_tokens(self) -> int:
        """Tokens that a forward pass pays for: prompt and response, the context not."""
        return own_tokens(self.item)


class Backend(Protocol):
    """Runs a model. Calls come from one thread at a time; nothing here touches an event loop."""

    name: str
    dtype: str
    model_name: str
    model_fingerprint: str
    vocab_size: int
    max_sequence_tokens: int
    weight_version: int
    modes: Mapping[ScoreMode, tuple[float, ...] | None]
    """As in `TeacherInfo.modes`."""

    def prefix_bytes(self, tokens: int) -> int:
        """Memory that the state of `tokens` context tokens takes: its `nbytes`, or a little more."""
        ...

    def embeds(self, ids: Ids) -> bool:
        """Whether the model has an input embedding for every id."""
        ...

    def prefill(self, ids: Ids, parent: Any | None) -> Any:
        """State of the prefix ``parent + ids``; `ids` are the tokens after the parent's."""
        ...

    def score(self, batch: Sequence[Work]) -> list[ItemScore | ItemError]:
        """Results in the order of `batch`, which may mix prefixes, modes, temperatures and lengths."""
        ...


class LiveBackend(Backend, Protocol):
    """A backend whose weights can be replaced between batches."""

    device: Any
    """Where they lie."""

    def load_weights(self, tensors: Iterable[tuple[str, Any]], version: int) -> None:
        """Take the weights of `version`; raises SyncError, and must not be used any more then."""
        ...

    def save_state(self, path: Path) -> None:
        """What going on needs beside the weights of the version, as one file."""
        ...

    def load_state(self, path: Path) -> None:
        """Go on from `save_state`."""
        ...
