"""Small models that `opcd prepare` trains for the tasks of a laptop: byte tokens, a narrow Llama, AdamW on CPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from common.telemetry.run_files import Progress

if TYPE_CHECKING:
    from torch import Tensor

LEARNING_RATE, WARMUP = 2e-3, 50
INITIAL_SCALE = 5.0
"""Factor on the initial weights: the usual scale suits wide models, and a narrow model learns far slower from it."""
SHOW_EVERY = 10
"""Steps between updates of the progress display."""


@dataclass(frozen=True, slots=True)
class Size:
    """Size of a model and the limit of its training steps."""

    hidden: int
    layers: int
    max_steps: int = 6000

    def steps(self) -> Iterator[int]:
        """Yield steps 1 to `max_steps`; show progress on a terminal and print the number of steps at the end."""
        progress, step = Progress(), 0
        try:
            for step in range(1, self.max_steps + 1):
                if step % SHOW_EVERY == 1:
                    progress.status(f"training a model: step {step} of at most {self.max_steps}")
                yield step
        finally:
            progress.line(f"model trained: {step} steps")


def byte_tokenizer() -> Any:
    """Make a tokenizer with one token per byte, and ``<end>`` as EOS and padding."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {character: i for i, character in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    backend = Tokenizer(models.BPE(vocab={**vocabulary, "<end>": len(vocabulary)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<end>", pad_token="<end>", clean_up_tokenization_spaces=False
    )


def new_model(size: Size, tokenizer: Any = None) -> Any:
    """Make an untrained Llama of that size for `tokenizer` (default: `byte_tokenizer`)."""
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = tokenizer or byte_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=size.hidden,
        intermediate_size=4 * size.hidden,
        num_hidden_layers=size.layers,
        num_attention_heads=size.hidden // 32,  # heads of 32, the smallest that vLLM accepts on CPU
        num_key_value_heads=size.hidden // 32,
        head_dim=32,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


def fit(model: Any, size: Size, losses: Callable[[], Iterator[Tensor]]) -> Any:
    """Train `model` for all steps of `size` on the sum of the losses that `losses` yields at each step; return it."""
    import torch

    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.mul_(INITIAL_SCALE)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, size.max_steps))
    for _ in size.steps():
        optimizer.zero_grad()
        for loss in losses():
            loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return model.eval()


def _rate(step: int, steps: int) -> float:
    """Return the factor on the learning rate: linear warm-up over `WARMUP` steps, then linear decay to 0."""
    return min((step + 1) / WARMUP, (steps - step) / max(steps - WARMUP, 1))
