"""Top-k ids of an answer in two growing arrays, in place of vLLM's lists.

vLLM's front end runs in the worker's process. Its `LogprobsProcessor` turns each row of k + 1 ids and values into
Python objects (`FlatLogprobs`): 60 us and 19 KB a token at k = 256, on the event loop that serves every answer. The
rows arrive as numpy arrays; here they stay that. Read against vLLM 0.32.0: `vllm/v1/engine/logprobs.py`,
`output_processor.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from vllm.v1.engine import output_processor
from vllm.v1.engine.logprobs import LogprobsProcessor

from common.protocol.schema import F32, Ids

GROWTH_ROWS = 64
"""An array that is full grows by a quarter and this many rows."""


class TopKRows:
    """Rows of one answer. The engine's top-k values are dropped: the learner computes them anew when it trains."""

    def __init__(self, k: int) -> None:
        self._length = 0
        self._sampled_ids = np.empty(0, np.uint32)
        self._sampled_logprobs = np.empty(0, np.float32)
        self._topk_ids = np.empty((0, k), np.uint32)

    def __len__(self) -> int:
        return self._length

    def append(self, ids: NDArray[Any], logprobs: NDArray[Any]) -> None:
        """Add the rows ``[n, k + 1]`` of the next n tokens, the sampled token in the first column.

        Rows are wider if another request of the batch asked for more than k ids. They are copied: those of vLLM lie in
        a received message, which they would keep in memory.
        """
        start, end = self._length, self._length + len(ids)
        if end > len(self._topk_ids):
            self._grow(end + end // 4 + GROWTH_ROWS)
        self._sampled_ids[start:end] = ids[:, 0]
        self._sampled_logprobs[start:end] = logprobs[:, 0]
        self._topk_ids[start:end] = ids[:, 1 : 1 + self._topk_ids.shape[1]]
        self._length = end

    def _grow(self, rows: int) -> None:
        for array in (self._sampled_ids, self._sampled_logprobs, self._topk_ids):
            array.resize((rows, *array.shape[1:]), refcheck=False)  # no view exists before `columns`

    def columns(self, token_ids: Sequence[int], k: int) -> tuple[F32, Ids]:
        """Return (log-prob of the sampled token ``[T]``, top-k ids ``[T, k]``) of a finished answer.

        Raises ValueError unless the rows are those of `token_ids` ``[T]``, with k ids each.
        """
        length = self._length
        if length != len(token_ids) or self._topk_ids.shape[1] != k:
            raise ValueError(f"{length} rows of {self._topk_ids.shape[1]} ids for {len(token_ids)} tokens of {k} ids")
        if not np.array_equal(self._sampled_ids[:length], np.asarray(token_ids, dtype=np.uint32)):
            raise ValueError("rows of other tokens than the answer's")
        return self._sampled_logprobs[:length], self._topk_ids[:length]


class TopKProcessor(LogprobsProcessor):
    """vLLM's processor of one request; the log-probs of its answer are `TopKRows`, those of its prompt vLLM's."""

    @classmethod
    def from_new_request(cls, tokenizer: Any, request: Any) -> TopKProcessor:
        """Make the processor of a request, as vLLM does when it registers one."""
        processor = super().from_new_request(tokenizer, request)
        if processor.num_logprobs is not None:
            processor.logprobs = TopKRows(processor.num_logprobs)
            processor.cumulative_logprob = None
        return processor

    def _update_sample_logprobs(self, logprobs_lists: Any) -> None:
        self.logprobs.append(logprobs_lists.logprob_token_ids, logprobs_lists.logprobs)


def install() -> None:
    """Make vLLM's front end in this process use `TopKProcessor` for every request from now on."""
    output_processor.LogprobsProcessor = TopKProcessor
