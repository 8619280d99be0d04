"""The student model for the learner: a backbone that computes hidden states, and the chunked output layer."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from common.config.gpus import logit_chunk_tokens
from common.config.model import LearnerConfig, StudentConfig
from common.models.attention import attention_implementation
from common.models.families import model_class
from common.models.logits import check_logit_transform, logit_transform
from common.models.positions import fix_rope
from common.protocol.schema import LOGPROB_FLOOR, Ids, ItemScore
from learner.trainer.batch_layout import SequenceBatch
from learner.trainer.experts import recorded_experts
from learner.trainer.lora import add_adapters
from learner.trainer.micro_batch import MicroBatch
from learner.trainer.objective import Objective
from learner.trainer.output_layer import OutputLayer
from learner.trainer.untrained import freeze_untrained

log = logging.getLogger(__name__)


class Policy(nn.Module):
    """A Hugging Face causal language model whose logits are computed chunk by chunk.

    `model` holds all parameters under their checkpoint names; `head` shares the output embedding's parameters.
    """

    def __init__(self, model: Any, chunk_tokens: int) -> None:
        """Raises ValueError for a model that is not a decoder with a separate output layer."""
        super().__init__()
        linear = model.get_output_embeddings()
        backbone = model.base_model
        if linear is None or backbone is model or model.config.is_encoder_decoder:
            raise ValueError(f"{type(model).__name__} is not a decoder with a separate output layer")
        self.model = model
        self.head = OutputLayer(linear, logit_transform(model.config), chunk_tokens)

    def check(self) -> None:
        """Raise ValueError if the head's logits differ from the model's; under ZeRO-3 a collective."""
        check_logit_transform(self.model, self.model.base_model, self.head.transform)

    def hidden(self, batch: SequenceBatch) -> Tensor:
        """Compute the hidden states that predict the response tokens, ``[R, d]``."""
        states = self.model.base_model(**batch.inputs, use_cache=False).last_hidden_state
        return states.flatten(0, 1)[batch.positions]

    def forward(self, batch: MicroBatch, objective: Objective) -> Tensor:
        """Compute the weighted sum of `objective` over the micro-batch, a scalar."""
        return self.head(
            self.hidden(batch.sequences),
            batch.ids,
            batch.sequences.response_ids,
            temperature=objective.config.temperature,
            loss=objective,
        )

    def response_logprobs(self, batch: SequenceBatch, temperature: float) -> Tensor:
        """Compute the log-probs of the response tokens, ``[R]`` float32, without gradient."""
        out = torch.empty(len(batch.positions), dtype=torch.float32, device=batch.positions.device)

        def read(rows: slice, logits: Tensor) -> None:
            sampled = logits.gather(-1, batch.response_ids[rows].unsqueeze(-1)).squeeze(-1)
            out[rows] = sampled - logits.logsumexp(dim=-1)

        with torch.no_grad():
            self.head(self.hidden(batch), temperature=temperature, read=read)
        return out

    def experts(self, batch: SequenceBatch) -> dict[int, Tensor]:
        """Return the experts that predict the response tokens, ``[R, k]`` by layer, without gradient."""
        with recorded_experts(self.model) as chosen:
            self.response_logprobs(batch, 1.0)  # the collectives of ZeRO-3 are those of every other pass
        return {layer: experts[batch.positions] for layer, experts in chosen.items()}

    def topk(self, batch: SequenceBatch, k: int) -> Tensor:
        """Compute the k most likely ids at each response position, best first, ``[R, k]``, without gradient."""
        out = torch.empty(len(batch.positions), k, dtype=torch.long, device=batch.positions.device)

        def read(rows: slice, logits: Tensor) -> None:
            out[rows] = logits.topk(k, dim=-1).indices

        with torch.no_grad():
            self.head(self.hidden(batch), read=read)
        return out

    def scores(self, batch: SequenceBatch, supports: Sequence[Ids], temperature: float) -> list[ItemScore]:
        """Score each response as a teacher would, without gradient.

        Log-probs are normalised over the full vocabulary at `temperature`: at the ids of `supports` (``[T, k]`` each,
        one k), at the response tokens, and of the mass outside the support.
        """
        ids = torch.from_numpy(np.concatenate(supports).astype(np.int64)).to(batch.positions.device)
        values = torch.empty(len(ids), ids.shape[1] + 2, dtype=torch.float32, device=ids.device)

        def read(rows: slice, logits: Tensor) -> None:
            total = logits.logsumexp(dim=-1, keepdim=True)
            values[rows, :-2] = logits.gather(-1, ids[rows]) - total
            values[rows, -2:-1] = logits.gather(-1, batch.response_ids[rows].unsqueeze(-1)) - total
            # The tail is summed over the entries outside the support, never computed as one minus the others.
            values[rows, -1:] = logits.scatter_(-1, ids[rows], float("-inf")).logsumexp(dim=-1, keepdim=True) - total

        with torch.no_grad():
            self.head(self.hidden(batch), temperature=temperature, read=read)
        floored = (values < LOGPROB_FLOOR).sum(dim=-1).cpu()
        values = values.clamp(min=LOGPROB_FLOOR).cpu()
        return [
            ItemScore(
                logprobs=part[:, :-2].to(torch.float16).numpy(),
                sampled_logprob=part[:, -2].numpy().copy(),
                tail_logprob=part[:, -1].numpy().copy(),
                floored=int(low.sum()),
            )
            for part, low in zip(values.split(batch.lengths), floored.split(batch.lengths), strict=True)
        ]


def load_policy(
    student: StudentConfig,
    learner: LearnerConfig,
    device: torch.device,
    dtype: torch.dtype,
    partition: dict[str, Any] | None = None,
) -> Policy:
    """Load the student's initial weights onto `device`; call `Policy.check` once the model can run.

    `partition` is the DeepSpeed configuration of a ZeRO-3 run. Each parameter is then partitioned over the ranks as it
    is created, so a model may be larger than any one device; the model can run after `deepspeed.initialize`.
    Dropout is set to 0: the policy that is trained must be the one that was sampled from. Raises ValueError for a model
    whose positions depend on the batch (`fix_rope`).
    """
    from transformers import AutoConfig

    settings = AutoConfig.from_pretrained(student.model)
    _disable_dropout(settings)
    with _partitioned(partition):
        model = model_class(settings).from_pretrained(
            student.model, config=settings, dtype=dtype, attn_implementation=attention_implementation(settings)
        )
    model.to(device)
    fix_rope(model, student.max_sequence_tokens)
    freeze_untrained(model)
    if learner.lora is not None:
        add_adapters(model, learner.lora)
    if learner.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    policy = Policy(model, logit_chunk_tokens(learner))
    policy.train()  # Hugging Face uses activation checkpointing in training mode only
    _route_without_noise(model)
    return policy


@contextmanager
def _partitioned(settings: dict[str, Any] | None) -> Iterator[None]:
    """Make transformers build models under ``deepspeed.zero.Init`` inside this scope."""
    if settings is None:
        yield
        return
    from transformers.integrations.deepspeed import HfDeepSpeedConfig, unset_hf_deepspeed_config

    reference = HfDeepSpeedConfig(settings)  # transformers keeps a weak reference only
    try:
        yield
    finally:
        unset_hf_deepspeed_config()
        del reference


def _disable_dropout(settings: Any) -> None:
    for part in {id(c): c for c in (settings, settings.get_text_config())}.values():
        for name, value in list(vars(part).items()):
            if ("dropout" in name or name.endswith("_pdrop")) and isinstance(value, int | float) and value:
                log.info("%s %s -> 0", name, value)
                setattr(part, name, 0.0)


def _route_without_noise(model: nn.Module) -> None:
    """Put routers in evaluation mode: in training mode some pick experts at random (Phi-3.5-MoE, Mixtral's jitter).

    No auxiliary loss of a router is added either: the loss is this project's objective alone.
    """
    routers = [module for module in model.modules() if re.search("Router|MoeBlock|MoE$", type(module).__name__)]
    for module in routers:
        module.eval()
    if routers:
        log.info("mixture of experts: routers run without noise, and without an auxiliary loss")


def device_of(learner: LearnerConfig) -> torch.device:
    """Return the rank's device: CUDA if ranks get GPUs, else CPU."""
    return torch.device("cuda", 0) if learner.gpus_per_rank > 0 else torch.device("cpu")


def dtype_of(student: StudentConfig, device: torch.device) -> torch.dtype:
    """Return the dtype of weights and activations; `auto` is bfloat16 on a GPU and float32 on CPU."""
    if student.dtype == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[student.dtype]
