"""Random models in the shape of real ones, and their log-probs by the shortest way."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from common.protocol.schema import Ids, TokenSequence, as_ids
from tests.gpu.place import Place, Shape
from tests.support.tiny import make_tokenizer

LOGIT_SPREAD = 4.0
"""Standard deviation of the logits. The entropy of a position is about ln V - SPREAD² / 2, 4 nats at V = 151,936.
Random weights of the usual size would give a flat distribution, which hides errors."""


def model_folder(place: Place, shape: Shape) -> Path:
    """Return the folder of the random model of `shape` with a byte-level tokenizer; the first call writes it.

    The weights are bfloat16 numbers, so that bfloat16 and float32 copies of the model are equal to the bit.
    """
    from transformers import Qwen3Config, Qwen3ForCausalLM

    folder = place.folder / f"model-{shape.hidden}-{shape.layers}-{shape.vocabulary}"
    if folder.exists():
        return folder
    partial = folder.with_suffix(".partial")
    shutil.rmtree(partial, ignore_errors=True)
    tokenizer = make_tokenizer()
    config = Qwen3Config(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        max_position_embeddings=40_960,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.eos_token_id,
    )
    torch.manual_seed(0)
    with torch.device(place.device):
        model = Qwen3ForCausalLM(config).to(torch.bfloat16)
    with torch.no_grad():
        model.lm_head.weight.normal_(0, LOGIT_SPREAD / shape.hidden**0.5)
    model.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    os.replace(partial, folder)
    return folder


def load(folder: Path, place: Place, dtype: torch.dtype) -> Any:
    """Load the model with transformers' own attention."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(place.device).eval()


def random_sequences(place: Place, count: int, vocabulary: int, *, seed: int = 1) -> list[TokenSequence]:
    """Make prompts and responses of random ids; lengths vary from half of the sizes' to the whole."""
    rng, sizes = np.random.default_rng(seed), place.sizes

    def ids(longest: int) -> Ids:
        return as_ids(rng.integers(0, vocabulary, int(rng.integers(longest // 2, longest + 1))))

    return [TokenSequence(ids(sizes.prompt_tokens), ids(sizes.response_tokens)) for _ in range(count)]


@torch.inference_mode()
def plain_logprobs(model: Any, ids: Ids, count: int) -> Tensor:
    """Log-probs ``[count]`` of the last `count` tokens of `ids`: one sequence, one pass, float32 output layer."""
    tokens = torch.from_numpy(ids.astype(np.int64))[None].to(model.device)
    hidden = model.get_decoder()(input_ids=tokens, use_cache=False).last_hidden_state[0, -count - 1 : -1]
    logits = hidden.float() @ model.get_output_embeddings().weight.float().T
    return logits.log_softmax(-1).gather(-1, tokens[0, -count:, None])[:, 0].cpu()


def rms(difference: Tensor) -> float:
    """Root mean square."""
    return difference.double().square().mean().sqrt().item()


def joined(values: Sequence[Any]) -> Tensor:
    """Concatenate arrays or tensors to one float64 tensor on the CPU."""
    return torch.cat([torch.as_tensor(value).detach().cpu().double().flatten() for value in values])
