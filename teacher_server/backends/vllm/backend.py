"""Backend with a vLLM engine: tensor parallel, contexts in the engine's prefix cache.

Scores are exact: the workers sum tails from their own terms (`worker`), and `rows` validates that every row was written
and has mass 1. An invalid result is requested once more without the cache, and is then an error of its item.
"""

from __future__ import annotations

import logging
import uuid
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from common.config.model import TeacherConfig
from common.protocol.schema import ForwardPathName, Ids, ItemError, ItemScore, ScoreItem, ScoreMode, as_ids
from teacher_server.backends.base import BackendError, Work
from teacher_server.backends.rows import InvalidRows, Rows, item_score, support_error
from teacher_server.backends.salted_prefix import SaltedPrefix
from teacher_server.backends.vllm.engine import EngineRequest, ScoringEngine
from teacher_server.backends.vllm.files import model_folder, weights_fingerprint
from teacher_server.backends.vllm.rows import fixed_ids, rows_of_fixed_ids, rows_of_top_k

log = logging.getLogger(__name__)

MODES: dict[bool, tuple[ScoreMode, ...]] = {
    True: ("at_ids", "teacher_topk", "union", "sampled"),
    False: ("teacher_topk", "sampled"),
}
"""Modes of a model runner that scores fixed ids (V2, on GPUs) or only its own best ids (V1, on CPU)."""


class VllmBackend:
    """Scores with a vLLM engine, which runs in other processes."""

    name = "vllm"
    path: ForwardPathName = "engine"
    path_cost = "a context is computed once and stays in the engine's prefix cache"
    weight_version = 0

    def __init__(self, engine: ScoringEngine, *, model_name: str, fingerprint: str) -> None:
        """`engine` is running; `close` ends it."""
        self.engine = engine
        self.model_name = model_name
        self.model_fingerprint = fingerprint
        self.dtype = engine.dtype
        self.vocab_size = engine.vocab_size
        self.max_sequence_tokens = engine.max_sequence_tokens
        self.modes: Mapping[ScoreMode, tuple[float, ...] | None] = dict.fromkeys(MODES[engine.fixed_ids])

    @classmethod
    def load(cls, model: str, config: TeacherConfig) -> VllmBackend:
        """Load a folder or hub name into a new engine and try each mode once. Raises BackendError."""
        fingerprint = weights_fingerprint(model_folder(model))
        engine = ScoringEngine(model, config)
        try:
            backend = cls(engine, model_name=model, fingerprint=fingerprint)
            backend._check_modes()
        except BaseException:
            engine.close()
            raise
        return backend

    def close(self) -> None:
        """End the engine's processes."""
        self.engine.close()

    def restart(self) -> None:
        """Start a new engine, which computes each context again when an item needs it. Raises BackendError."""
        self.engine.restart()

    def prefix_bytes(self, tokens: int) -> int:
        """Bytes of keys and values of `tokens` tokens in the engine's memory."""
        return tokens * self.engine.token_bytes

    def embeds(self, ids: Ids) -> bool:
        return int(ids.max(initial=0)) < self.vocab_size

    def prefill(self, parts: Sequence[Ids], parent: SaltedPrefix | None) -> list[SaltedPrefix]:
        """Have the engine compute the longest of the prefixes into its cache, where it serves the shorter ones."""
        whole = np.concatenate([*([] if parent is None else [parent.ids]), *parts])
        salt = uuid.uuid4().hex if parent is None else parent.salt
        self.engine.run([EngineRequest(whole.tolist(), salt)])
        ends = np.cumsum([0 if parent is None else parent.ids.size, *(part.size for part in parts)])[1:]
        return [
            SaltedPrefix(whole[:end], salt, self.prefix_bytes(int(part.size)))
            for part, end in zip(parts, ends, strict=True)
        ]

    def score(self, batch: Sequence[Work]) -> list[ItemScore | ItemError]:
        """Results in the order of `batch`; the engine forms its own batches."""
        results: list[ItemScore | ItemError | None] = [support_error(work, self.vocab_size) for work in batch]
        pending = []
        for i, work in enumerate(batch):
            if results[i] is None and not work.item.response_ids.size:
                results[i] = work.empty_score()
            elif results[i] is None:
                pending.append(i)
        for cached in (True, False):
            invalid = []
            for i, rows in self._rows(batch, pending, cached=cached):
                if not isinstance(rows, InvalidRows):
                    results[i] = item_score(rows, batch[i])
                    continue
                invalid.append(i)
                if not cached:
                    log.error("vLLM's result is invalid, also without its cache: %s", rows)
                    results[i] = ItemError("internal", f"vLLM's result is invalid: {rows}")
            pending = invalid
        return [result for result in results if result is not None]

    def _rows(
        self, batch: Sequence[Work], pending: Sequence[int], *, cached: bool
    ) -> Iterator[tuple[int, Rows | InvalidRows]]:
        """Yield the rows of the `pending` items of `batch`; the engine scores at one temperature at a time."""
        salts = _prompt_salts([batch[i] for i in pending]) if cached else {}
        for temperature in dict.fromkeys(batch[i].temperature for i in pending):
            same = [i for i in pending if batch[i].temperature == temperature]
            for start, stop in self._spans_that_fit([batch[i] for i in same], cached=cached):
                part = same[start:stop]
                requests = [self._request(batch[i], salts, cached=cached) for i in part]
                for i, output in zip(part, self.engine.run(requests, temperature), strict=True):
                    try:
                        yield i, self._read(batch[i], output)
                    except InvalidRows as error:
                        yield i, error

    def _request(self, work: Work, salts: Mapping[bytes, str], *, cached: bool) -> EngineRequest:
        item = work.item
        context = as_ids([]) if work.prefix is None else work.prefix.ids
        ids = np.concatenate([context, item.prompt_ids, item.response_ids]).tolist()
        salt = salts.get(item.prompt_ids.tobytes()) if work.prefix is None else work.prefix.salt if cached else None
        first = _first_row(work)
        if self.engine.fixed_ids:
            return EngineRequest(ids, salt, start=first, fixed_ids=fixed_ids(work, self.vocab_size))
        return EngineRequest(ids, salt, start=first, top_k_columns=1 + work.teacher_ids)

    def _read(self, work: Work, output: object) -> Rows:
        """Rows of `output`. Raises InvalidRows, also if a scored position was cached: vLLM does not compute its row."""
        cached = getattr(output, "num_cached_tokens", None)
        if cached is None or cached > _first_row(work):
            raise InvalidRows(f"{cached} tokens came from the cache, the first scored row is {_first_row(work)}")
        if self.engine.fixed_ids:
            return rows_of_fixed_ids(getattr(output, "prompt_token_id_logprobs", None), work, self.vocab_size)
        return rows_of_top_k(getattr(output, "prompt_logprobs", None), work, self.vocab_size)

    def _spans_that_fit(self, works: Sequence[Work], *, cached: bool) -> Iterator[tuple[int, int]]:
        """Spans of `works` whose keys and values fit into the engine's memory together.

        A request that vLLM preempts for lack of memory would resume from cached positions, which have no rows.
        """
        start, used, seen = 0, 0, set[str]()
        block = self.engine.block_tokens
        for i, work in enumerate(works):
            own = work.own_tokens + 2 * block
            context = 0 if work.prefix is None else work.prefix.total_tokens
            salt = None if work.prefix is None or not cached else work.prefix.salt
            needed = own + (0 if salt in seen else context)
            if i > start and used + needed > self.engine.cache_tokens:
                yield start, i
                start, used, needed = i, 0, own + context
                seen.clear()
            used += needed
            if salt is not None:
                seen.add(salt)
        if start < len(works):
            yield start, len(works)

    def _check_modes(self) -> None:
        """Score a few random tokens in every mode, so that a vLLM without the replaced functions fails at load."""
        generator = np.random.default_rng(0)
        length, k = min(12, self.max_sequence_tokens), min(4, self.vocab_size)
        ids = as_ids(generator.integers(0, self.vocab_size, length))
        support = as_ids(np.stack([generator.choice(self.vocab_size, k, replace=False) for _ in ids[2:]]))
        for mode in self.modes:
            topk_ids = support if mode in ("at_ids", "union") else None
            item = ScoreItem(None, prompt_ids=ids[:2], response_ids=ids[2:], topk_ids=topk_ids)
            (result,) = self.score([Work(item, None, mode, 1.0, k)])
            if isinstance(result, ItemError):
                raise BackendError(f"this vLLM does not score in mode {mode}: {result.message}")


def _prompt_salts(works: Sequence[Work]) -> dict[bytes, str]:
    """Salts of the prompts without a context that several of `works` share: the engine computes each of them once."""
    prompts = Counter(work.item.prompt_ids.tobytes() for work in works if work.prefix is None)
    return {prompt: uuid.uuid4().hex for prompt, times in prompts.items() if times > 1}


def _first_row(work: Work) -> int:
    """Index in the whole sequence of the token whose row predicts the first response token."""
    context = 0 if work.prefix is None else work.prefix.total_tokens
    return int(context + work.item.prompt_ids.size) - 1
