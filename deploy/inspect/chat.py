"""Asks the base model, the base model with the context and the distilled student, by transformers' `generate`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from common.config.loader import load_config
from common.config.model import Config, ConfigError
from common.data.model_lookup import load_tokenizer, require_model
from common.data.rendering import Renderer, teacher_sequence
from common.data.rows import DataError, Message, Row, read_rows
from common.data.special_tokens import answer_text, end_ids
from common.files import seen_from
from common.models.families import load_language_model

ADAPTER = "adapter_config.json"
WEIGHTS = ("checkpoint", "best")
"""Folders in a run that may hold the student, in order of preference."""

BASE, IN_CONTEXT, DISTILLED = "base", "base + context", "distilled"
VOICES = (BASE, IN_CONTEXT, DISTILLED)


class ChatError(ValueError):
    """A run without a configuration or without a student."""


@dataclass(frozen=True, slots=True)
class Decoding:
    """Settings of `generate`; `temperature` 0 is greedy."""

    max_tokens: int
    temperature: float
    stop: tuple[str, ...]


def read_config(run: Path) -> Config:
    """Read the run's config.yaml. Raises ChatError if there is none, ConfigError if it cannot be used."""
    if not (run / "config.yaml").is_file():
        raise ChatError(f"{run} is not a run's folder: it holds no config.yaml{seen_from(run)}")
    return load_config(run / "config.yaml")


def find_weights(run: Path, name: str | None) -> Path:
    """Return the folder of the distilled student in `run`. Raises ChatError if there is none."""
    candidates = [name] if name is not None else list(WEIGHTS)
    for folder in candidates:
        if any((run / folder / file).is_file() for file in ("config.json", ADAPTER)):
            return run / folder
    exports = sorted(path.relative_to(run).as_posix() for path in run.glob("exports/*") if path.is_dir())
    remedy = f"--weights {exports[-1]}" if exports else "a run writes one at its end (earlier: checkpoint.export_every)"
    searched = ", ".join(f"{folder}/" for folder in candidates)
    raise ChatError(f"{run} holds no student yet (looked for {searched}): {remedy}")


def asks_raw(config: Config, tokenizer: Any) -> bool:
    """Return True if the run's prompts are raw text, False if they are chat turns.

    Decided by ``context.placement``, else the first row of data.train, else the tokenizer's chat template.
    """
    if config.context.placement is not None:
        return config.context.placement == "prefix"
    try:
        first = read_rows(config.data.train, config.data, own_contexts=config.context.from_rows)[0]
    except DataError:  # the data has been moved since the run
        return not tokenizer.chat_template
    return first.prompt is not None


@dataclass
class Conversation:
    """Asks the three models. Each question stands alone: earlier questions and answers are not part of the prompt."""

    config: Config
    student: Path
    """Folder of the distilled student."""
    context: str
    decoding: Decoding
    keep_both: bool
    """Keep both models in memory; False loads the base and the student again for each question."""
    device: str = "cpu"
    own_context: str | None = None
    """Context of a row, after `context`, with ``context.from_rows``."""
    tokenizer: Any = field(init=False)
    raw: bool = field(init=False)
    _models: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.tokenizer = load_tokenizer(self.config.student.model)
        self.raw = asks_raw(self.config, self.tokenizer)

    def ask(self, text: str) -> Iterator[tuple[str, str]]:
        """Yield (voice, answer), each when it is ready. Raises DataError for a prompt that cannot be rendered."""
        without, with_context = self.sequences(text)
        for voice, ids in ((BASE, without), (IN_CONTEXT, with_context), (DISTILLED, without)):
            if (
                voice == IN_CONTEXT and with_context == without
            ):  # rows with teacher_messages: none fits another question
                continue
            yield voice, self.answer(self._model(voice == DISTILLED), ids)

    def sequences(self, text: str) -> tuple[list[int], list[int]]:
        """Return the question's token ids without and with the context, rendered as in the run."""
        turn = Message(role="user", content=text)
        form: dict[str, Any] = {"prompt": text} if self.raw else {"messages": (turn,)}
        row = Row(id="question", context=self.own_context, **form)
        renderer = Renderer(
            self.tokenizer,
            self.context,
            self.config.student,
            self.config.context.placement,
            teacher_template_kwargs=self.config.context.chat_template_kwargs,
        )
        prompt = renderer.render(row)
        return prompt.student_ids.tolist(), teacher_sequence(prompt, renderer.contexts)

    def answer(self, model: Any, ids: Sequence[int]) -> str:
        """Generate the model's continuation, up to a stop string or the end of its turn."""
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
        ends = end_ids(self.tokenizer, model.generation_config.eos_token_id)
        return answer_text(self.tokenizer, whole[0, len(ids) :].tolist(), ends, self.decoding.stop)

    def _model(self, distilled: bool) -> Any:
        folder = str(self.student) if distilled else self.config.student.model
        if folder not in self._models:
            if not self.keep_both:
                self._models.clear()
            self._models[folder] = load_model(folder, self.config.student.model, self.device)
        return self._models[folder]


def load_model(folder: str, base: str, device: str) -> Any:
    """Load the model in `folder`, or the adapter in `folder` on `base`. Raises ConfigError if there is no model."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    adapter = (Path(folder) / ADAPTER).is_file()
    source = base if adapter else folder
    require_model(source)
    try:
        model = load_language_model(source, dtype=dtype_on(device))
    except OSError as error:
        raise ConfigError(f"cannot load the model at {source}: {str(error).splitlines()[0]}") from error
    if adapter:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, folder)
    return model.to(device).eval()


def dtype_on(device: str) -> Any:
    """Return the dtype that runs use: bfloat16 on a GPU, float32 on CPU."""
    import torch

    return torch.float32 if device == "cpu" else torch.bfloat16


def weight_bytes(folder: Path) -> int:
    """Return the size of a model's weights on disk; 0 if `folder` is not a local folder."""
    return sum(path.stat().st_size for path in folder.glob("*.safetensors")) if folder.is_dir() else 0
