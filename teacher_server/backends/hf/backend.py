"""Backend for Hugging Face models on any device: packed forward passes over shared context caches."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM

from common.float32_head import float32_forward
from common.protocol.schema import Ids, ItemError, ItemScore, ScoreItem, ScoreMode, as_ids
from common.weight_sync.collective import SyncError
from teacher_server.backends.base import BackendError, Work
from teacher_server.backends.hf.attention import (
    ATTENTION_NAME,
    AttentionPlan,
    KeyValues,
    refuse_unusual_attention,
    shared_prefix_attention,
)
from teacher_server.backends.hf.fingerprint import model_fingerprint
from teacher_server.backends.hf.live_weights import LiveWeights
from teacher_server.backends.hf.outputs import PositionScores, score_hidden, spans
from teacher_server.backends.hf.packing import PackedBatch, PrefixedSequence, PrefixState, pack_batch, split_into_passes

SELF_CHECK_NATS = {torch.float32: 2e-3, torch.float16: 0.1, torch.bfloat16: 0.5}
"""Allowed difference of packed scores from the model's own forward pass at load; a wrong architecture is nats off."""

AttentionInterface.register(ATTENTION_NAME, shared_prefix_attention)

CPU_PASS_TOKENS = 512
"""Tokens of a forward pass on CPU. More tokens are not faster, and their activations take memory and exceed caches."""


class TransformersBackend:
    """Scores with a causal language model of transformers.

    Raises BackendError for models without full causal attention (sliding windows, chunks, capped scores): their scores
    are never approximated.
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
        prefill_tokens: int = 8192,
        kind: Literal["frozen", "live", "ema"] = "frozen",
        ema_decay: float = 0.0,
    ) -> None:
        """`model` is a loaded ``*ForCausalLM``; a prefill pass computes at most `prefill_tokens` tokens."""
        self.model_name = model_name
        self.weight_version = 0
        self._prefill_tokens = prefill_tokens
        self._model = model.eval()
        self._decoder = model.get_decoder()
        self._output_layer = model.get_output_embeddings()
        self.vocab_size = int(self._output_layer.weight.shape[0])
        self._embedded = int(model.get_input_embeddings().weight.shape[0])
        self.device = model.device
        self.dtype = str(model.dtype).removeprefix("torch.")
        self.max_sequence_tokens = int(model.config.max_position_embeddings)
        self.model_fingerprint = model_fingerprint(model)
        refuse_unusual_attention(model.config)
        self._token_bytes = self._hidden_bytes = 0
        self._check_against_plain_forward()
        self._live = None if kind == "frozen" else LiveWeights(model, ema_decay if kind == "ema" else None)

    @classmethod
    def load(
        cls,
        folder: str,
        *,
        dtype: str = "auto",
        device_map: str | None = None,
        prefill_tokens: int = 8192,
        kind: Literal["frozen", "live", "ema"] = "frozen",
        ema_decay: float = 0.0,
    ) -> TransformersBackend:
        """Load a folder or hub name; `dtype` ``auto`` is bfloat16 on a GPU and float32 on CPU."""
        gpu = torch.cuda.is_available()
        if dtype == "auto":
            dtype = "bfloat16" if gpu else "float32"
        refuse_unusual_attention(AutoConfig.from_pretrained(folder))
        device_map = device_map or ("auto" if gpu else None)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype), device_map=device_map)
        offloaded = sum(weights.is_meta for weights in model.parameters())
        if offloaded:
            raise BackendError(
                f"{folder} does not fit on the devices of teacher.device_map `{device_map}`: every forward pass "
                f"would fetch {offloaded} of its tensors; use more or larger GPUs"
            )
        return cls(model, model_name=folder, prefill_tokens=prefill_tokens, kind=kind, ema_decay=ema_decay)

    @torch.inference_mode()
    def prefill(self, ids: Ids, parent: PrefixState | None) -> PrefixState:
        """Keys and values of `ids` after `parent`, computed in chunks of `prefill_tokens`."""
        chunks: list[PrefixState] = []
        last = parent
        for start in range(0, ids.size, self._prefill_tokens):
            last = self._prefill_chunk(ids[start : start + self._prefill_tokens], last)
            chunks.append(last)
        assert last is not None
        if len(chunks) == 1:
            return chunks[0]
        layers = range(len(last.own.keys))
        own = KeyValues(
            keys=[torch.cat([chunk.own.keys[layer] for chunk in chunks], 1) for layer in layers],
            values=[torch.cat([chunk.own.values[layer] for chunk in chunks], 1) for layer in layers],
        )
        return _state(parent, own, int(ids.size), last.last_hidden)

    @torch.inference_mode()
    def score(self, batch: Sequence[Work]) -> list[ItemScore | ItemError]:
        """Run packed forward passes, then the output layer at response positions only."""
        sequences = [PrefixedSequence(work.prefix, work.item.prompt_ids, work.item.response_ids) for work in batch]
        results: dict[int, ItemScore | ItemError] = {}
        for indices in split_into_passes(sequences, CPU_PASS_TOKENS if self.device.type == "cpu" else None):
            packed = pack_batch([sequences[i] for i in indices])
            hidden = self._hidden(packed)
            works = [batch[i] for i in indices]
            for group in _groups_of_equal_settings(works):
                scores = self._score_group([works[i] for i in group], [hidden[packed.rows[i]] for i in group])
                results.update(zip((indices[i] for i in group), scores, strict=True))
        return [results[i] for i in range(len(batch))]

    def embeds(self, ids: Ids) -> bool:
        return int(ids.max(initial=0)) < self._embedded

    def prefix_bytes(self, tokens: int) -> int:
        """Bytes of keys and values of `tokens` tokens in all layers, and of the last hidden state."""
        return tokens * self._token_bytes + self._hidden_bytes

    def load_weights(self, tensors: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Load the weights of `version` into a `live` or `ema` teacher. Raises SyncError; it is then unusable."""
        if self._live is None:
            raise SyncError(f"{self.model_name} is a frozen teacher: it takes no weights")
        self._live.load(tensors, repeated=version == self.weight_version)
        self.weight_version = version

    def save_state(self, path: Path) -> None:
        """Write the average and its version as safetensors."""
        if self._live is not None:
            save_file(self._live.state(), path, metadata={"version": str(self.weight_version)})

    def load_state(self, path: Path) -> None:
        """Restore the file of `save_state`."""
        if self._live is not None:
            self._live.restore(load_file(path))
            with safe_open(path, "pt") as stored:
                self.weight_version = int(stored.metadata()["version"])

    def _prefill_chunk(self, ids: Ids, parent: PrefixState | None) -> PrefixState:
        packed = pack_batch([PrefixedSequence(parent, ids, as_ids([0]))])
        record: dict[int, tuple[Tensor, Tensor]] = {}
        plan = AttentionPlan(packed.plan.blocks, packed.plan.prefix_spans, record)
        hidden = self._forward(packed.ids, packed.positions, plan)
        layers = range(len(record))
        own = KeyValues([record[layer][0] for layer in layers], [record[layer][1] for layer in layers])
        return _state(parent, own, int(ids.size), hidden[-1].clone())

    def _hidden(self, packed: PackedBatch) -> Tensor:
        """Final hidden states ``[N + prefixes, H]`` of the packed tokens, then of the prefixes' last tokens."""
        parts = [prefix.last_hidden[None] for prefix in packed.prefixes]
        if packed.ids.numel():
            parts.insert(0, self._forward(packed.ids, packed.positions, packed.plan))
        if not parts:
            return torch.empty((0, self._output_layer.weight.shape[1]), dtype=self._model.dtype)
        return torch.cat(parts)

    def _forward(self, ids: Tensor, positions: Tensor, plan: AttentionPlan) -> Tensor:
        device = self._model.device
        output = self._decoder(
            input_ids=ids[None].to(device),
            position_ids=positions[None].to(device),
            use_cache=False,
            attention_plan=plan,
        )
        return output.last_hidden_state[0]

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
            self.vocab_size,
            sampled=_ids_tensor([work.item.response_ids for work in works], rows.device),
            ids=ids,
            mode=first.mode,
            temperature=first.temperature,
            k=first.k,
        )
        return [_item_score(values, span) for span in spans(lengths)]

    def _check_against_plain_forward(self) -> None:
        """Compare packed scores over a cached context and its child with the model's own forward pass; BackendError."""
        generator = np.random.default_rng(0)
        length = min(24, self.max_sequence_tokens)
        ids = as_ids(generator.integers(0, min(self.vocab_size, self._embedded), length))
        a, b, c = length // 4, length // 2, 3 * length // 4
        with torch.inference_mode():
            tokens = torch.from_numpy(ids.astype(np.int64))[None].to(self._model.device)
            with float32_forward(self._output_layer):
                logits = self._model(input_ids=tokens, use_cache=False).logits[0, c - 1 : -1].float()
        expected = logits.log_softmax(-1).cpu().gather(-1, torch.from_numpy(ids[c:].astype(np.int64))[:, None])[:, 0]
        self._model.set_attn_implementation(ATTENTION_NAME)
        prefix = self.prefill(ids[a:b], self.prefill(ids[:a], None))
        self._token_bytes = sum(t.nbytes for t in (*prefix.own.keys, *prefix.own.values)) // prefix.own_tokens
        self._hidden_bytes = prefix.last_hidden.nbytes
        item = ScoreItem(context=None, prompt_ids=ids[b:c], response_ids=ids[c:])
        (result,) = self.score([Work(item, prefix, "sampled", 1.0, 0)])
        difference = (
            float(np.abs(result.sampled_logprob - expected.numpy()).max())
            if isinstance(result, ItemScore)
            else float("nan")
        )
        allowed = SELF_CHECK_NATS.get(self._model.dtype, 0.5)
        if not difference <= allowed:
            raise BackendError(
                f"{self.model_name} ({self._model.config.model_type}): scores over a cached context differ from "
                f"its own forward pass by {difference:.2g} nats (at most {allowed:g}): not supported"
            )


def _state(parent: PrefixState | None, own: KeyValues, tokens: int, last_hidden: Tensor) -> PrefixState:
    return PrefixState(
        parent=parent,
        own=own,
        own_tokens=tokens,
        total_tokens=tokens + (0 if parent is None else parent.total_tokens),
        last_hidden=last_hidden,
        nbytes=sum(tensor.nbytes for tensor in (*own.keys, *own.values)) + last_hidden.nbytes,
    )


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
