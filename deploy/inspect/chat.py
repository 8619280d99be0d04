"""Base, base with the context and distilled student, asked the same: plain transformers generation, no engine."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from common.config.loader import validate
from common.config.model import Config, ConfigError
from common.data.rendering import Renderer, load_tokenizer, teacher_sequence
from common.data.rows import DataError, Message, Row, read_rows
from common.data.token_text import text_of

ADAPTER = "adapter_config.json"
WEIGHTS = ("checkpoint", "best")
"""Where a run leaves a student, the first that is there is taken."""

BASE, IN_CONTEXT, DISTILLED = "base", "base + context", "distilled"
VOICES = (BASE, IN_CONTEXT, DISTILLED)


class ChatError(ValueError):
    """Why a run cannot be talked to."""


@dataclass(frozen=True, slots=True)
class Decoding:
    """How an answer is made; `temperature` 0 is greedy."""

    max_tokens: int
    temperature: float
    stop: tuple[str, ...]


def read_config(run: Path) -> Config:
    """The configuration that a run kept. Raises ChatError where `run` is none, ConfigError where it does not fit this
    version.
    """
    try:
        text = (run / "config.yaml").read_text(encoding="utf-8")
    except OSError as error:
        raise ChatError(f"{run} is no run's folder: config.yaml: {error.strerror}") from error
    return validate(Config, yaml.safe_load(text))


def find_weights(run: Path, name: str | None) -> Path:
    """The folder of the distilled student. Raises ChatError where there is none."""
    tried = [name] if name is not None else list(WEIGHTS)
    for one in tried:
        if any((run / one / mark).is_file() for mark in ("config.json", ADAPTER)):
            return run / one
    there = sorted(path.relative_to(run).as_posix() for path in run.glob("exports/*") if path.is_dir())
    remedy = f"--weights {there[-1]}" if there else "a run writes one at its end (checkpoint.export_every: before)"
    raise ChatError(f"{run} holds no student yet (looked for {', '.join(f'{one}/' for one in tried)}): {remedy}")


def asks_raw(config: Config, tokenizer: Any) -> bool:
    """Whether the run's prompts are raw text, not turns: as its data says, else its context's placement, else whether
    the tokenizer has a chat template.
    """
    if config.context.placement is not None:
        return config.context.placement == "prefix"
    try:
        first = read_rows(config.data.train, config.data)[0]
    except DataError:  # the data is elsewhere by now
        return not tokenizer.chat_template
    return first.prompt is not None


@dataclass
class Conversation:
    """Asks the three; every question by itself, without memory of the ones before."""

    config: Config
    student: Path
    """Folder of the distilled student."""
    context: str
    decoding: Decoding
    keep_both: bool
    """Hold both models in memory; else one is loaded for each part of a question."""
    device: str = "cpu"
    tokenizer: Any = field(init=False)
    raw: bool = field(init=False)
    _models: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.tokenizer = load_tokenizer(self.config.student.model)
        self.raw = asks_raw(self.config, self.tokenizer)

    def ask(self, text: str) -> Iterator[tuple[str, str]]:
        """(who, answer), as each is ready. Raises DataError for a prompt that cannot be rendered as in the run."""
        without, with_context = self.sequences(text)
        for voice, ids in ((BASE, without), (IN_CONTEXT, with_context), (DISTILLED, without)):
            yield voice, self.answer(self._model(voice == DISTILLED), ids)

    def sequences(self, text: str) -> tuple[list[int], list[int]]:
        """Token ids of a question without the context and with it, as the run renders them."""
        row = Row(id="question", prompt=text) if self.raw else _turn(text)
        renderer = Renderer(self.tokenizer, self.context, self.config.student, self.config.context.placement)
        prompt = renderer.render(row)
        return prompt.student_ids.tolist(), teacher_sequence(prompt, renderer.contexts)

    def answer(self, model: Any, ids: Sequence[int]) -> str:
        """What the model says next, up to a stop string or the end of its turn."""
        import torch

        options: dict[str, Any] = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
        if self.decoding.temperature > 0:
            options = {"do_sample": True, "temperature": self.decoding.temperature, "top_p": 1.0, "top_k": 0}
        if self.decoding.stop:
            options |= {"stop_strings": list(self.decoding.stop), "tokenizer": self.tokenizer}
        prompt = torch.tensor([list(ids)], device=self.device)
        with torch.inference_mode():
            whole = model.generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                max_new_tokens=self.decoding.max_tokens,
                pad_token_id=self.tokenizer.eos_token_id,
                **options,
            )
        return self._cut(whole[0, len(ids) :].tolist())

    def _cut(self, ids: list[int]) -> str:
        eos = self.tokenizer.eos_token_id
        text = text_of(self.tokenizer, ids[: ids.index(eos)] if eos in ids else ids)
        ends = [place for stop in self.decoding.stop if (place := text.find(stop)) >= 0]
        return text[: min(ends)] if ends else text

    def _model(self, distilled: bool) -> Any:
        folder = str(self.student) if distilled else self.config.student.model
        if folder not in self._models:
            if not self.keep_both:
                self._models.clear()
            self._models[folder] = load_model(folder, self.config.student.model, self.device)
        return self._models[folder]


def _turn(text: str) -> Row:
    return Row(id="question", messages=(Message(role="user", content=text),))


def load_model(folder: str, base: str, device: str) -> Any:
    """A causal language model, or the adapter in `folder` on `base`. Raises ConfigError where there is none."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    adapter = (Path(folder) / ADAPTER).is_file()
    try:
        model = AutoModelForCausalLM.from_pretrained(base if adapter else folder, dtype=dtype_on(device))
    except OSError as error:
        raise ConfigError(
            f"no model at {base if adapter else folder} (relative paths count from the folder that the run was "
            f"started in): {str(error).splitlines()[0]}"
        ) from error
    if adapter:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, folder)
    return model.to(device).eval()


def dtype_on(device: str) -> Any:
    """bfloat16 on a GPU, float32 on CPU, as runs have it."""
    import torch

    return torch.float32 if device == "cpu" else torch.bfloat16


def weight_bytes(folder: Path) -> int:
    """Size of a model's weights on disk; 0 where they are not a folder here."""
    return sum(path.stat().st_size for path in folder.glob("*.safetensors")) if folder.is_dir() else 0
