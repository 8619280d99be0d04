"""Everything that crosses a process boundary, defined here and nowhere else.

Arrays are numpy: token ids ``uint32``, log-probabilities natural logs. ``P`` prompt tokens, ``T`` response tokens,
``k`` ids of the support at one response position. Row ``t`` of a ``[T, ...]`` array is always about predicting
``response_ids[t]`` from everything before it.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

PROTOCOL_VERSION = 1
"""Of the teacher's wire form. A client refuses a teacher that speaks another."""

LOGPROB_FLOOR = -10_000.0
"""What ``-inf`` (an id the teacher cannot emit) becomes in every reply: finite in f16, e**floor is 0 in f32."""

PAD_ID = 0xFFFFFF
"""Fills unused places of a ``union`` support; its log-probability is `LOGPROB_FLOOR`."""

Ids = NDArray[np.uint32]
F16 = NDArray[np.float16]
F32 = NDArray[np.float32]
Mask = NDArray[np.bool_]

ScoreMode = Literal["at_ids", "teacher_topk", "union", "sampled"]
FinishReason = Literal["stop", "length"]


def as_ids(values: object) -> Ids:
    """Token ids as a contiguous ``uint32`` array."""
    return np.ascontiguousarray(np.asarray(values, dtype=np.uint32))


def context_hash(tokenizer_fingerprint: str, ids: Ids) -> str:
    """Name of a context: hex sha256 of the tokenizer fingerprint (32 raw bytes) and the ids as u32 little-endian.

    `ids` is the whole prefix, parents included, so the name does not depend on how the prefix was cut into parents.
    """
    digest = hashlib.sha256(bytes.fromhex(tokenizer_fingerprint))
    digest.update(np.ascontiguousarray(ids, dtype="<u4").tobytes())
    return digest.hexdigest()


@dataclass(frozen=True, slots=True)
class Context:
    """An immutable token prefix of the teacher's sequence (BOS and template head included).

    `ids` is the whole prefix. `parent` may name a context whose ids are a proper prefix of these; then only the
    difference travels and the parent's key-value cache is reused.
    """

    hash: str
    ids: Ids
    parent: str | None = None


@dataclass(frozen=True, slots=True)
class Game:
    """An episode to play: an environment by name, its constructor's arguments, the seed that it begins from."""

    environment: str
    options: dict[str, Any]
    seed: int
    context: str | None = None
    """Text that the teacher sees with every turn, where it is not the run's one context."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """One row of the data set as token sequences of both sides.

    The student sees ``student_ids``; the teacher sees ``context + teacher_ids`` (``teacher_ids`` alone when `context`
    is None). The response follows either.
    """

    row_id: str
    student_ids: Ids
    teacher_ids: Ids
    context: str | None
    answer: str | None = None
    teacher: str | None = None
    """Name of the teacher that scores it; None: the run's default."""
    game: Game | None = None
    """Of a row that is played: the tokens are those of its first turn, later ones are rendered while it is played."""
    context_id: str | None = None
    """What the pool calls the context that was drawn for it (``context.pool``)."""


@dataclass(frozen=True, slots=True)
class Trajectory:
    """One answer of the student, made without the context.

    ``response_ids [T]`` ends with the stop token when ``finish_reason`` is ``stop``. ``sampled_logprobs [T]`` are the
    engine's, at the sampling temperature. ``topk_ids [T, k]`` are the student's most likely ids, best first; ``k`` is
    0 where the learner picks them (``rollout.topk_from: learner``). ``versions`` are (first response position,
    weight version) spans: more than one when the weights changed while the answer was being made. ``loss_mask [T]`` is
    False where the environment spoke (a whole conversation as one response); None: the student made every token.
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


@dataclass(frozen=True, slots=True)
class Sampling:
    """How one answer is made. `temperature` 0 is greedy; `top_k` is how many of the student's ids come back per
    position (0: none), not a filter: that is `draw_from`, the number of most likely ids that may be drawn (0: all).
    `stop` are strings, resolved to tokens by the engine; `seed` fixes the draw.
    """

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    stop: tuple[str, ...] = ()
    seed: int | None = None
    draw_from: int = 0


@dataclass(frozen=True, slots=True)
class Sample:
    """Answer `number` of a run (from 0) that is to be made: of a prompt, under a seed of its own. `step` is the one it
    is meant for.
    """

    number: int
    step: int
    sample_id: str
    prompt: Prompt
    sampling: Sampling

    @property
    def most_tokens(self) -> int:
        """Prompt and longest answer."""
        return len(self.prompt.student_ids) + self.sampling.max_tokens


@dataclass(frozen=True, slots=True)
class TokenSequence:
    """A fixed prompt and response: what the parity probe scores on both sides after every weight sync."""

    prompt_ids: Ids
    response_ids: Ids


@dataclass(frozen=True, slots=True)
class ScoreItem:
    """One sequence to score: ``context + prompt_ids + response_ids``; ``topk_ids [T, k]`` for `at_ids` and `union`."""

    context: str | None
    prompt_ids: Ids
    response_ids: Ids
    topk_ids: Ids | None = None


@dataclass(frozen=True, slots=True)
class ScoreRequest:
    """A batch of items under one mode and temperature. `k` is the width of the teacher's own top-k, where it picks."""

    request_id: str
    run: str
    mode: ScoreMode
    temperature: float
    k: int
    items: tuple[ScoreItem, ...]


@dataclass(frozen=True, slots=True)
class ItemScore:
    """The teacher's log-probabilities for one item, normalised over the full vocabulary at the asked temperature.

    ``logprobs [T, k]`` f16 at ``topk_ids`` (the request's in mode `at_ids`, else the ones returned here);
    ``sampled_logprob [T]`` f32 of the response tokens; ``tail_logprob [T]`` f32, log of the mass outside the k ids,
    computed in f32 by the teacher. ``floored`` counts values clamped to `LOGPROB_FLOOR`.
    """

    logprobs: F16
    sampled_logprob: F32
    tail_logprob: F32
    topk_ids: Ids | None = None
    floored: int = 0


@dataclass(frozen=True, slots=True)
class ItemError:
    """Why one item was not scored; the other items of the batch are answered all the same."""

    code: Literal["unknown_context", "too_long", "bad_ids", "bad_shape", "internal"]
    message: str


@dataclass(frozen=True, slots=True)
class ScoreResponse:
    """Results in the order of the request's items, stamped with who computed them."""

    request_id: str
    model_fingerprint: str
    weight_version: int
    results: tuple[ItemScore | ItemError, ...]


@dataclass(frozen=True, slots=True)
class ScoredTrajectory:
    """What the learner trains on: an answer and the teacher's view of it. Never partial."""

    trajectory: Trajectory
    score: ItemScore
    model_fingerprint: str
    teacher_version: int


class TeacherInfo(BaseModel):
    """The handshake, ``GET /v1/info``. A client refuses what does not fit its run."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    protocol: int
    model: str
    model_fingerprint: str
    tokenizer_fingerprint: str
    chat_template_fingerprint: str
    backend: str
    dtype: str
    vocab_size: int
    max_k: int
    max_sequence_tokens: int
    max_items: int
    max_request_tokens: int
    """Prompt and response tokens of one request; a request of a single item may have more."""
    max_body_bytes: int
    modes: dict[ScoreMode, tuple[float, ...] | None]
    """Mode -> temperatures it can do; None: any positive one. A mode that is absent cannot be done."""
    kind: Literal["frozen", "live", "ema"]
    weight_version: int
