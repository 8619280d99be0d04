"""Backend for Hugging Face models on any device; `forward_path` chooses how contexts are shared."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from common.models.attention import attention_implementation
from common.models.families import load_language_model
from common.models.logits import check_logit_transform, logit_transform
from common.models.positions import fix_rope, sequence_limit
from common.protocol.schema import Ids, ItemError, ItemScore, ScoreMode, as_ids
from common.weight_sync.collective import SyncError
from teacher_server.backends.base import BackendError, Work
from teacher_server.backends.hf.fingerprint import model_fingerprint
from teacher_server.backends.hf.forward_path import choose_path
from teacher_server.backends.hf.live_weights import LiveWeights
from teacher_server.backends.hf.outputs import PositionScores, score_hidden, spans
from teacher_server.backends.hf.packing import PrefixedSequence


class TransformersBackend:
    """Scores with a causal language model of transformers, on the fastest path that repeats its own forward pass.

    Raises BackendError for a model that no path repeats: scores are never approximated.
    """

    name = "transformers"
    modes: Mapping[ScoreMode, tuple[float, ...] | None] = {
        "at_ids": None,
        "teacher_topk": None,
        "union": None,
        "sampled": None,
    }

    def __init__(
        self,
        model: Any,
        *,
        model_name: str,
        max_sequence_tokens: int | None = None,
        prefill_tokens: int = 8192,
        kind: Literal["frozen", "live", "ema"] = "frozen",
        ema_decay: float = 0.0,
    ) -> None:
        """`model` is a loaded ``*ForCausalLM``; a prefill pass computes at most `prefill_tokens` tokens."""
        self.model_name = model_name
        self.weight_version = 0
        self._model = model.eval()
        if model.get_output_embeddings() is None or model.get_decoder() is model:
            raise BackendError(f"{type(model).__name__} is not a decoder with a separate output layer")
        self._output_layer = model.get_output_embeddings()
        self.vocab_size = int(self._output_layer.weight.shape[0])
        self._embedded = int(model.get_input_embeddings().weight.shape[0])
        self.device = model.device
        self.dtype = str(model.dtype).removeprefix("torch.")
        limit = sequence_limit(model.config, max_sequence_tokens)
        if limit is None:
            raise BackendError(f"{model_name} names no longest sequence: set teacher.max_sequence_tokens")
        self.max_sequence_tokens = limit
        self.model_fingerprint = model_fingerprint(model)
        self._transform = logit_transform(model.config)
        if (attention := attention_implementation(model.config)) is not None:
            model.set_attn_implementation(attention)
        try:
            fix_rope(model, limit)
            check_logit_transform(model, model.get_decoder(), self._transform)
        except ValueError as error:
            raise BackendError(f"{model_name}: {error}") from error
        self._path = choose_path(model, self._transform, limit, prefill_tokens)
        self.path, self.path_cost = self._path.name, self._path.cost
        self._live = None if kind == "frozen" else LiveWeights(model, ema_decay if kind == "ema" else None)

    @classmethod
    def load(
        cls,
        folder: str,
        *,
        dtype: str = "auto",
        device_map: str | None = None,
        max_sequence_tokens: int | None = None,
        prefill_tokens: int = 8192,
        kind: Literal["frozen", "live", "ema"] = "frozen",
        ema_decay: float = 0.0,
    ) -> TransformersBackend:
        """Load a folder or hub name; `dtype` ``auto`` is bfloat16 on a GPU and float32 on CPU."""
        gpu = torch.cuda.is_available()
        if dtype == "auto":
            dtype = "bfloat16" if gpu else "float32"
        device_map = device_map or ("auto" if gpu else None)
        model = load_language_model(folder, dtype=getattr(torch, dtype), device_map=device_map)
        offloaded = sum(weights.is_meta for weights in model.parameters())
        if offloaded:
            raise BackendError(
                f"{folder} does not fit on the devices of teacher.device_map `{device_map}`: every forward pass "
                f"would fetch {offloaded} of its tensors; use more or larger GPUs"
            )
        return cls(
            model,
            model_name=folder,
            max_sequence_tokens=max_sequence_tokens,
            prefill_tokens=prefill_tokens,
            kind=kind,
            ema_decay=ema_decay,
        )

    @torch.inference_mode()
    def prefill(self, parts: Sequence[Ids], parent: Any | None) -> list[Any]:
        """States of the prefixes ``parent + parts[0]``, ``parent + parts[0] + parts[1]``, ... on this model's path."""
        return self._path.prefill(parts, parent)

    @torch.inference_mode()
    def score(self, batch: Sequence[Work]) -> list[ItemScore | ItemError]:
        """Run forward passes, then the output layer at response positions only."""
        sequences = [PrefixedSequence(work.prefix, work.item.prompt_ids, work.item.response_ids) for work in batch]
        results: dict[int, ItemScore | ItemError] = {}
        for indices, hidden in self._path.passes(sequences):
            works = [batch[i] for i in indices]
            for group in _groups_of_equal_settings(works):
                scores = self._score_group([works[i] for i in group], [hidden[i] for i in group])
                results.update(zip((indices[i] for i in group), scores, strict=True))
        return [results[i] for i in range(len(batch))]

    def restart(self) -> None:
        """The model runs in this process, which cannot lose it."""

    def embeds(self, ids: Ids) -> bool:
        return int(ids.max(initial=0)) < self._embedded

    def prefix_bytes(self, tokens: int) -> int:
        """Upper bound of a prefix's bytes, see `ForwardPath.prefix_bytes`."""
        return self._path.prefix_bytes(tokens)

    def load_weights(self, tensors: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Load the weights of `version` into a `live` or `ema` teacher. Raises SyncError; it is then unusable."""
        if self._live is None:
            raise SyncError(f"{self.model_name} is a frozen teacher: it takes no weights")
        self._live.load(tensors, repeated=version == self.weight_version)
        self.weight_version = version

    def save_state(self, path: Path) -> None:
        """Write the average, or the weights, and the version as safetensors."""
        if self._live is not None:
            save_file(self._live.state(), path, metadata={"version": str(self.weight_version)})

    def load_state(self, path: Path) -> None:
        """Restore the file of `save_state`."""
        if self._live is not None:
            self._live.restore(load_file(path))
            with safe_open(path, "pt") as stored:
                self.weight_version = int(stored.metadata()["version"])

    def _score_group(self, works: list[Work], hidden: list[Tensor]) -> list[ItemScore | ItemError]:
        """Scores of items with equal mode, temperature, k and width, computed together."""
        first = works[0]
        lengths = [work.item.response_ids.size for work in works]
        if not sum(lengths):
            return [work.empty_score() for work in works]
        rows = torch.cat(hidden).to(self._output_layer.weight.device)
        ids = None
        if first.mode in ("at_ids", "union"):
            ids = _ids_tensor([work.item.topk_ids for work in works if work.item.topk_ids is not None], rows.device)
        values = score_hidden(
            rows,
            self._output_layer,
            self._transform,
            self.vocab_size,
            sampled=_ids_tensor([work.item.response_ids for work in works], rows.device),
            ids=ids,
            mode=first.mode,
            temperature=first.temperature,
            k=first.k,
        )
        return [_item_score(values, span) for span in spans(lengths)]


def _groups_of_equal_settings(batch: Sequence[Work]) -> list[list[int]]:
    """Indices of the items that the output layer scores together."""
    groups: dict[tuple[object, ...], list[int]] = {}
    for i, work in enumerate(batch):
        width = 0 if work.item.topk_ids is None else work.item.topk_ids.shape[1]
        groups.setdefault((work.mode, work.temperature, work.k, width), []).append(i)
    return list(groups.values())


def _ids_tensor(arrays: list[Ids], device: torch.device) -> Tensor:
    return torch.from_numpy(np.concatenate(arrays).astype(np.int64)).to(device)


def _item_score(values: PositionScores, span: slice) -> ItemScore | ItemError:
    if not bool(values.finite[span].all()):
        return ItemError(code="internal", message="the model returned logits that are NaN or infinite")
    if bool(values.repeated[span].any()):
        position = int(values.repeated[span].nonzero()[0, 0])
        return ItemError(code="bad_ids", message=f"the support at position {position} has an id twice")
    return ItemScore(
        logprobs=values.logprobs[span].to(torch.float16).cpu().numpy(),
        sampled_logprob=values.sampled[span].cpu().numpy(),
        tail_logprob=values.tail[span].cpu().numpy(),
        topk_ids=None if values.ids is None else as_ids(values.ids[span].cpu().numpy()),
        floored=int(values.floored[span].sum()),
    )
