"""Types of all values that cross a process boundary.

Arrays are numpy; token ids are ``uint32``, log-probs are natural logarithms. Shapes: ``T`` response tokens, ``k`` ids
of the support per response position. Row ``t`` of a ``[T, ...]`` array belongs to the prediction of
``response_ids[t]``.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

PROTOCOL_VERSION = 1
"""Version of the teacher's binary form. A client refuses a teacher with another version."""

LOGPROB_FLOOR = -10_000.0
"""Replaces ``-inf`` (an id that the teacher cannot emit) in every reply: finite in f16, and exp(floor) is 0 in f32."""

PAD_ID = 0xFFFFFF
"""Fills unused columns of a ``union`` support; its log-prob is `LOGPROB_FLOOR`."""

Ids = NDArray[np.uint32]
F16 = NDArray[np.float16]
F32 = NDArray[np.float32]
Mask = NDArray[np.bool_]

ScoreMode = Literal["at_ids", "teacher_topk", "union", "sampled"]
FinishReason = Literal["stop", "length"]


def as_ids(values: object) -> Ids:
    """Convert token ids to a contiguous ``uint32`` array."""
    return np.ascontiguousarray(np.asarray(values, dtype=np.uint32))


def context_hash(tokenizer_fingerprint: str, ids: Ids) -> str:
    """Return a context's name: hex sha256 of the tokenizer fingerprint (32 raw bytes) and the ids (u32 little-endian).

    `ids` is the whole prefix, parents included, so the name does not depend on the split into parents.
    """
    digest = hashlib.sha256(bytes.fromhex(tokenizer_fingerprint))
    digest.update(np.ascontiguousarray(ids, dtype="<u4").tobytes())
    return digest.hexdigest()


@dataclass(frozen=True, slots=True)
class Context:
    """An immutable token prefix of the teacher's sequence, BOS and template head included.

    `ids` is the whole prefix. `parent` names a context whose ids are a proper prefix of `ids`: only the difference is
    sent, and the parent's key-value cache is reused.
    """

    hash: str
    ids: Ids
    parent: str | None = None


@dataclass(frozen=True, slots=True)
class Game:
    """An episode to play: environment name, arguments of its constructor, seed of its start."""

    environment: str
    options: dict[str, Any]
    seed: int
    context: str | None = None
    """Text that the teacher sees with every turn: of the pool, or the row's own. Default: the run's context."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """One row as the token sequences of student and teacher; the response is appended to both.

    The student sees ``student_ids``. The teacher sees ``context + teacher_ids``, or ``teacher_ids`` if `context` is
    None.
    """

    row_id: str
    student_ids: Ids
    teacher_ids: Ids
    context: str | None
    answer: str | None = None
    teacher: str | None = None
    """Name of the teacher that scores the row. Default: the `teacher` section."""
    game: Game | None = None
    """Episode of a row with an environment. The prompt holds the first turn; later turns are rendered during play."""
    context_id: str | None = None
    """Id of the context sampled from ``context.pool``, or the digest of the row's own context."""
    own_context: Context | None = None
    """The context of this row alone, which travels with it; `context` is its hash."""
    row: dict[str, Any] | None = None
    """Columns of the row and of its source, for ``context.from_rollout``."""


@dataclass(frozen=True, slots=True)
class Trajectory:
    """One response of the student, sampled without the context.

    ``response_ids [T]`` ends with the stop token if ``finish_reason`` is ``stop``. ``sampled_logprobs [T]`` come from
    the engine, at the sampling temperature; with ``rollout.top_p`` below 1 at temperature 1, before the nucleus filter,
    as are the ids. ``topk_ids [T, k]`` are the student's most likely ids, best first; ``k`` is
    0 if the learner picks them (``rollout.topk_from: learner``). ``versions`` are (first response position, weight
    version) spans, several if the weights changed during sampling. ``loss_mask [T]`` is False for tokens of the
    environment (a conversation as one response); None means that the model sampled every token. `from_teacher` marks a
    stored response of the teacher's, whose ``sampled_logprobs`` are NaN.
    """

    sample_id: str
    step: int
    prompt: Prompt
    response_ids: Ids
    sampled_logprobs: F32
    topk_ids: Ids
    finish_reason: FinishReason
    versions: tuple[tuple[int, int], ...]
    loss_mask: Mask | None = None
    from_teacher: bool = False


@dataclass(frozen=True, slots=True)
class Sampling:
    """Sampling parameters of one response. `temperature` 0 is greedy, `top_k` 0 samples from all ids.

    `top_logprobs` is the number of most likely ids to return per position. `stop` holds strings; the engine resolves
    them to tokens. `seed` makes the response repeatable.
    """

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    top_logprobs: int = 0
    stop: tuple[str, ...] = ()
    seed: int | None = None


@dataclass(frozen=True, slots=True)
class Sample:
    """A request for one response: sample `number` of the run (from 0), intended for optimiser step `step`."""

    number: int
    step: int
    sample_id: str
    prompt: Prompt
    sampling: Sampling
    from_teacher: bool = False
    """True if the response is a stored one of the teacher's."""
    data_set: str = "train"
    """Name of the row's set: ``train``, or a key of ``data.mix``."""

    @property
    def max_tokens(self) -> int:
        """Upper bound for prompt plus response tokens."""
        return len(self.prompt.student_ids) + self.sampling.max_tokens


@dataclass(frozen=True, slots=True)
class TokenSequence:
    """A fixed prompt and response, for example of the parity probe, which engine and learner score after every sync."""

    prompt_ids: Ids
    response_ids: Ids


@dataclass(frozen=True, slots=True)
class ScoreItem:
    """One sequence to score: ``context + prompt_ids + response_ids``. Modes `at_ids` and `union` need
    ``topk_ids [T, k]``."""

    context: str | None
    prompt_ids: Ids
    response_ids: Ids
    topk_ids: Ids | None = None


@dataclass(frozen=True, slots=True)
class ScoreRequest:
    """A batch of items with one mode and temperature. `k` is the number of ids that the teacher picks, if it does."""

    request_id: str
    run: str
    mode: ScoreMode
    temperature: float
    k: int
    items: tuple[ScoreItem, ...]


@dataclass(frozen=True, slots=True)
class ItemScore:
    """The teacher's log-probs for one item, normalised over the full vocabulary at the requested temperature.

    ``logprobs [T, k]`` (f16) are at ``topk_ids``: the request's ids in mode `at_ids`, else the returned ones.
    ``sampled_logprob [T]`` (f32) belongs to the response tokens. ``tail_logprob [T]`` (f32) is the log of the mass
    outside the k ids. ``floored`` counts values clamped to `LOGPROB_FLOOR`.
    """

    logprobs: F16
    sampled_logprob: F32
    tail_logprob: F32
    topk_ids: Ids | None = None
    floored: int = 0


@dataclass(frozen=True, slots=True)
class ItemError:
    """Reason why one item has no score; other items of the batch are not affected."""

    code: Literal["unknown_context", "too_long", "bad_ids", "bad_shape", "internal"]
    message: str


@dataclass(frozen=True, slots=True)
class ScoreResponse:
    """Results in the order of the request's items, with the fingerprint and version of the model that scored them."""

    request_id: str
    model_fingerprint: str
    weight_version: int
    results: tuple[ItemScore | ItemError, ...]


@dataclass(frozen=True, slots=True)
class ScoredTrajectory:
    """A response and its complete score by the teacher, ready for training.

    `advantage` is that of the response's reward (``loss.reward_weight``), `data_set` the row's set (`Sample.data_set`).
    """

    trajectory: Trajectory
    score: ItemScore
    model_fingerprint: str
    teacher_version: int
    advantage: float = 0.0
    data_set: str = "train"


ForwardPathName = Literal["shared_prefix", "cache", "full", "engine"]


class TeacherInfo(BaseModel):
    """The teacher's reply to ``GET /v1/info``. A client refuses a teacher that does not fit its run."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    protocol: int
    model: str
    model_fingerprint: str
    tokenizer_fingerprint: str
    """Of the base vocabulary (`common.data.fingerprint`)."""
    added_tokens: dict[int, str]
    """Tokens above the base vocabulary; a student's must be among them."""
    chat_template_fingerprint: str
    backend: str
    path: ForwardPathName
    """How contexts are shared: read in place, copied from a cache for every answer, or computed again for every answer
    (`full`); `engine` for vLLM's prefix cache."""
    path_cost: str
    """The cost of `path`, as a sentence."""
    dtype: str
    vocab_size: int
    max_k: int
    max_sequence_tokens: int
    max_items: int
    max_request_tokens: int
    """Upper bound for prompt plus response tokens of a request; a request with a single item may have more."""
    max_body_bytes: int
    modes: dict[ScoreMode, tuple[float, ...] | None]
    """Supported modes, each with its temperatures; None means any positive temperature."""
    kind: Literal["frozen", "live", "ema"]
    weight_version: int
