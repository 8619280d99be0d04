"""A vLLM engine as a teacher: tensor parallel, contexts in the engine's own prefix cache.

Whatever it answers is exact: tails are summed by the workers from their own terms (`vllm_worker`), every row is proved
to have been written, and every row's mass to be 1 (`vllm_rows`). An answer that falls short is asked for again without
the cache, once; then it is an error of its item.
"""

from __future__ import annotations

import logging
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from common.config.model import TeacherConfig
from common.protocol.schema import Ids, ItemError, ItemScore, ScoreItem, ScoreMode, as_ids
from teacher_server.backends.base import BackendError, Work
from teacher_server.backends.vllm.engine import Ask, ScoringEngine
from teacher_server.backends.vllm.files import folder_of, weights_fingerprint
from teacher_server.backends.vllm.rows import (
    Rows,
    RowsLost,
    empty_score,
    fault_of,
    fixed_ids,
    item_score,
    rows_of_fixed_ids,
    rows_of_top_k,
)

log = logging.getLogger(__name__)

MODES: dict[bool, tuple[ScoreMode, ...]] = {
    True: ("at_ids", "teacher_topk", "union", "sampled"),
    False: ("teacher_topk", "sampled"),
}
"""By whether the engine's model runner scores fixed ids (V2: on GPUs) or its own best ones only (V1: on CPU)."""

TEMPERATURES = (1.0,)
"""vLLM gives prompt log-probs of unscaled logits."""


@dataclass(frozen=True, slots=True, eq=False)
class VllmPrefix:
    """A context: its ids, and the name under which the engine's cache holds its keys and values.

    Names are random, one for each chain of contexts: what one tenant put is never found by another's tokens. What the
    engine itself evicts it computes again.
    """

    ids: Ids
    salt: str
    nbytes: int

    @property
    def total_tokens(self) -> int:
        """Tokens of the whole prefix."""
        return int(self.ids.size)


class VllmBackend:
    """Scores with a vLLM engine in processes of its own."""

    name = "vllm"
    weight_version = 0

    def __init__(self, engine: ScoringEngine, *, model_name: str, fingerprint: str) -> None:
        """`engine` is a running one, ended by `close`."""
        self._engine = engine
        self.model_name = model_name
        self.model_fingerprint = fingerprint
        self.dtype = engine.dtype
        self.vocab_size = engine.vocab_size
        self.max_sequence_tokens = engine.max_sequence_tokens
        self.modes: Mapping[ScoreMode, tuple[float, ...] | None] = dict.fromkeys(MODES[engine.fixed_ids], TEMPERATURES)

    @classmethod
    def load(cls, model: str, config: TeacherConfig) -> VllmBackend:
        """A folder or hub name in a new engine, each mode tried once. Raises BackendError."""
        fingerprint = weights_fingerprint(folder_of(model))
        engine = ScoringEngine(model, config)
        try:
            backend = cls(engine, model_name=model, fingerprint=fingerprint)
            backend._check_every_mode()
        except BaseException:
            engine.close()
            raise
        return backend

    def close(self) -> None:
        """End the engine's processes."""
        self._engine.close()

    def prefix_bytes(self, tokens: int) -> int:
        """Keys and values of `tokens` tokens, in the engine's memory."""
        return tokens * self._engine.token_bytes

    def embeds(self, ids: Ids) -> bool:
        """Whether the model has an input embedding for every id."""
        return int(ids.max(initial=0)) < self.vocab_size

    def prefill(self, ids: Ids, parent: VllmPrefix | None) -> VllmPrefix:
        """Let the engine compute ``parent + ids`` into its cache."""
        whole = ids if parent is None else np.concatenate([parent.ids, ids])
        salt = uuid.uuid4().hex if parent is None else parent.salt
        self._engine.run([Ask(whole.tolist(), salt)])
        return VllmPrefix(whole, salt, self.prefix_bytes(int(ids.size)))

    def score(self, batch: Sequence[Work]) -> list[ItemScore | ItemError]:
        """Results in order. The engine batches the requests as its memory allows."""
        results: list[ItemScore | ItemError | None] = [fault_of(work, self.vocab_size) for work in batch]
        left = []
        for i, work in enumerate(batch):
            if results[i] is None and not work.item.response_ids.size:
                results[i] = empty_score(work)
            elif results[i] is None:
                left.append(i)
        again = []
        for i, rows in zip(left, self._rows([batch[i] for i in left], cached=True), strict=True):
            if isinstance(rows, RowsLost):
                again.append(i)
            else:
                results[i] = item_score(rows, batch[i])
        for i, rows in zip(again, self._rows([batch[i] for i in again], cached=False), strict=True):
            if isinstance(rows, RowsLost):
                log.error("vLLM's answer is not whole, without its cache too: %s", rows)
                results[i] = ItemError("internal", f"vLLM's answer is not whole: {rows}")
            else:
                results[i] = item_score(rows, batch[i])
        return [result for result in results if result is not None]

    def _rows(self, works: Sequence[Work], *, cached: bool) -> Iterator[Rows | RowsLost]:
        for start, stop in self._loads(works, cached=cached):
            part = works[start:stop]
            outputs = self._engine.run([self._ask(work, cached=cached) for work in part])
            for work, output in zip(part, outputs, strict=True):
                try:
                    yield self._read(work, output)
                except RowsLost as lost:
                    yield lost

    def _ask(self, work: Work, *, cached: bool) -> Ask:
        item = work.item
        before = as_ids([]) if work.prefix is None else work.prefix.ids
        ids = np.concatenate([before, item.prompt_ids, item.response_ids]).tolist()
        salt = work.prefix.salt if cached and work.prefix is not None else None
        first = _first_row(work)
        if self._engine.fixed_ids:
            return Ask(ids, salt, start=first, fixed_ids=fixed_ids(work, self.vocab_size))
        return Ask(ids, salt, start=first, top_k_columns=1 + (work.k if work.mode == "teacher_topk" else 0))

    def _read(self, work: Work, output: object) -> Rows:
        """Raises RowsLost. Rows of cached positions are never computed, whatever stands in their place."""
        found = getattr(output, "num_cached_tokens", None)
        if found is None or found > _first_row(work):
            raise RowsLost(f"{found} tokens were read from the cache, the first scored row is {_first_row(work)}")
        if self._engine.fixed_ids:
            return rows_of_fixed_ids(getattr(output, "prompt_token_id_logprobs", None), work, self.vocab_size)
        return rows_of_top_k(getattr(output, "prompt_logprobs", None), work, self.vocab_size)

    def _loads(self, works: Sequence[Work], *, cached: bool) -> Iterator[tuple[int, int]]:
        """Spans of `works` whose keys and values fit into the engine's memory together.

        A request that vLLM puts back for want of memory would resume from its own cached rows, never scored.
        """
        start, used, seen = 0, 0, set[str]()
        block = self._engine.block_tokens
        for i, work in enumerate(works):
            own = work.own_tokens + 2 * block
            context = 0 if work.prefix is None else work.prefix.total_tokens
            salt = None if work.prefix is None or not cached else work.prefix.salt
            needed = own + (0 if salt in seen else context)
            if i > start and used + needed > self._engine.cache_tokens:
                yield start, i
                start, used, needed = i, 0, own + context
                seen.clear()
            used += needed
            if salt is not None:
                seen.add(salt)
        if start < len(works):
            yield start, len(works)

    def _check_every_mode(self) -> None:
        """A few random tokens in every mode: that this vLLM's workers took our functions and give whole rows."""
        generator = np.random.default_rng(0)
        length, k = min(12, self.max_sequence_tokens), min(4, self.vocab_size)
        ids = as_ids(generator.integers(0, self.vocab_size, length))
        support = as_ids(np.stack([generator.choice(self.vocab_size, k, replace=False) for _ in ids[2:]]))
        for mode in self.modes:
            asked = support if mode in ("at_ids", "union") else None
            item = ScoreItem(None, prompt_ids=ids[:2], response_ids=ids[2:], topk_ids=asked)
            (result,) = self.score([Work(item, None, mode, 1.0, k)])
            if isinstance(result, ItemError):
                raise BackendError(f"this vLLM does not score in mode {mode} as it should: {result.message}")


def _first_row(work: Work) -> int:
    """Place in the whole sequence of the token whose row predicts the first response token."""
    context = 0 if work.prefix is None else work.prefix.total_tokens
    return int(context + work.item.prompt_ids.size) - 1
