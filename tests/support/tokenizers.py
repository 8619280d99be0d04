"""Byte-level tokenizers with the special tokens and the chat template that a test needs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tests.support.tiny import CHAT_TEMPLATE


def build_tokenizer(
    template: str | None = CHAT_TEMPLATE,
    *,
    eos: str = "<|im_end|>",
    bos: str | None = None,
    named: Sequence[str] = ("<|im_start|>",),
    silent: Sequence[str] = (),
    plain: Sequence[str] = (),
    adds_bos: bool = False,
) -> Any:
    """A tokenizer whose 256 bytes come first. `named` are special tokens of the map, `silent` are flagged special in
    the vocabulary alone, `plain` are added tokens that are not special. With `adds_bos` a text gets `bos` before it.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={character: index for index, character in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special = dict.fromkeys([*named, eos, *([bos] if bos else []), *silent])
    backend.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in special])
    backend.add_tokens([AddedToken(text, special=False, normalized=False) for text in plain])
    if adds_bos:
        backend.post_processor = TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A $B", special_tokens=[(bos, backend.token_to_id(bos))]
        )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token=eos,
        pad_token=eos,
        additional_special_tokens=list(named),
        clean_up_tokenization_spaces=False,
        **({"bos_token": bos} if bos else {}),
    )
    tokenizer.chat_template = template
    return tokenizer


def ids_of(tokenizer: Any, text: str) -> list[int]:
    """Token ids of `text`, without added special tokens."""
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])
