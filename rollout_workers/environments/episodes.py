"""Plays one episode of an environment and turns it into training samples. Pure: the engine is a callable.

Answers stay the tokens that the engine made. `common.data.rendering` renders the prompts, so only the teacher sees the
context.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import zip_longest
from typing import Any, Literal, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from common.data.rendering import Renderer, teacher_sequence
from common.data.rows import DataError, Message, Row
from common.data.special_tokens import answer_text, end_ids
from common.protocol.schema import Ids, Mask, Prompt, as_ids
from rollout_workers.engine.engine import Generation
from rollout_workers.environments.base import Environment

Array = TypeVar("Array", bound=NDArray[Any])

SampleMode = Literal["observation", "chat", "conversation"]
"""Form of the samples. `observation` (the paper's): one sample a turn, its prompt the observation, which must repeat
what matters from earlier turns. `chat`: one sample a turn, its prompt the chat so far. `conversation`: one sample an
episode, with the environment's words masked out of the loss."""

Tools = tuple[dict[str, Any], ...] | None

MAX_TURNS = 5


class Generate(Protocol):
    """Answers the student's tokens; `turn` counts from 0, for seeds and request names."""

    def __call__(self, prompt_ids: Ids, turn: int, /) -> Awaitable[Generation]:
        """Generate one answer."""
        ...


@dataclass(frozen=True, slots=True)
class EpisodeSample:
    """A prompt and its generation. ``loss_mask [T]`` is None if the student made every token of the response."""

    prompt: Prompt
    generation: Generation
    loss_mask: Mask | None = None


@dataclass(frozen=True, slots=True)
class Exchange:
    """One turn as text; the answer is without its end token."""

    observation: str
    answer: str


@dataclass(frozen=True, slots=True)
class Episode:
    """A finished episode. `reward` is the sum over its turns; `outcome` is the environment's last observation, empty if
    the turns ran out first.
    """

    episode_id: str
    seed: int
    samples: tuple[EpisodeSample, ...]
    exchanges: tuple[Exchange, ...]
    reward: float
    outcome: str
    done: bool

    @property
    def success(self) -> bool:
        """True for the full reward of 1; a partial reward is no success."""
        return self.reward == 1.0


async def play_episode(
    environment: Environment,
    seed: int,
    generate: Generate,
    renderer: Renderer,
    *,
    episode_id: str,
    max_turns: int = MAX_TURNS,
    samples: SampleMode = "observation",
    in_context: bool = False,
    own_context: str | None = None,
    text_of: Callable[[Sequence[int]], str] | None = None,
    max_prompt_tokens: int | None = None,
) -> Episode:
    """Play at most `max_turns` turns of the episode of `seed`; with `in_context` the player sees the context.

    `own_context` is the context of this episode alone, besides the renderer's.
    After the first turn, an episode whose prompt would exceed `max_prompt_tokens` ends as if its turns had run out.
    `text_of` gives an answer's text from its ids. Default: the text without the tokenizer's EOS at its end.
    Prompts are named ``EPISODE_ID/TURN``. Raises what `generate` and the environment raise, and DataError if the chat
    template cannot render a turn; never returns part of an episode.
    """
    tools = tools_of(environment)
    talk = (
        _Conversation(renderer, episode_id, in_context, own_context, tools)
        if samples == "conversation"
        else _Turns(renderer, episode_id, in_context, own_context, tools, samples)
    )
    text_of = text_of or partial(answer_text, renderer.tokenizer, ends=end_ids(renderer.tokenizer))
    observation, reward, done = await environment.reset(seed), 0.0, False
    exchanges: list[Exchange] = []
    turns: tuple[Message, ...] = (Message(role="user", content=observation),)
    while not done and len(exchanges) < max_turns:
        prompt = talk.ask(turns)
        if exchanges and max_prompt_tokens is not None and len(prompt) > max_prompt_tokens:
            talk.take_back()
            break
        generation = await generate(prompt, len(exchanges))
        answer = text_of(generation.response_ids.tolist())
        talk.hear(generation, answer)
        exchanges.append(Exchange(observation, answer))
        step = await environment.step(answer)
        observation, reward, done = step.observation, reward + step.reward, step.done
        if step.messages and samples == "observation":
            raise DataError(
                "environment.sample_format `observation` shows no tool results: use `conversation` or `chat`"
            )
        turns = tuple(map(Message.model_validate, step.messages or ({"role": "user", "content": observation},)))
    return Episode(
        episode_id=episode_id,
        seed=seed,
        samples=talk.samples(),
        exchanges=tuple(exchanges),
        reward=reward,
        outcome=observation if done else "",
        done=done,
    )


@dataclass
class _Turns:
    """Makes every answer a sample."""

    renderer: Renderer
    episode_id: str
    in_context: bool
    context: str | None
    tools: Tools
    mode: SampleMode
    _messages: list[Message] = field(default_factory=list)
    _prompts: list[Prompt] = field(default_factory=list)
    _generations: list[Generation] = field(default_factory=list)

    def ask(self, turns: Sequence[Message]) -> Ids:
        if self.mode == "observation":
            self._messages = []
        self._messages += turns
        name = f"{self.episode_id}/{len(self._prompts)}"
        row = Row(id=name, messages=tuple(self._messages), context=self.context, tools=self.tools)
        self._prompts.append(self.renderer.render(row))
        return _shown(self._prompts[-1], self.renderer, self.in_context)

    def take_back(self) -> None:
        """Forget the last question."""
        self._prompts.pop()

    def hear(self, generation: Generation, answer: str) -> None:
        self._messages.append(Message(role="assistant", content=answer))
        self._generations.append(generation)

    def samples(self) -> tuple[EpisodeSample, ...]:
        return tuple(EpisodeSample(p, g) for p, g in zip(self._prompts, self._generations, strict=True))


@dataclass
class _Conversation:
    """Makes the whole episode one sample: the first prompt, and all that follows as the response."""

    renderer: Renderer
    episode_id: str
    in_context: bool
    context: str | None
    tools: Tools
    _prompt: Prompt | None = None
    _between: list[Ids] = field(default_factory=list)
    """Tokens before each answer after the first: end of the last turn, observation, head of the answer."""
    _generations: list[Generation] = field(default_factory=list)

    def ask(self, turns: Sequence[Message]) -> Ids:
        if self._prompt is None:
            row = Row(id=f"{self.episode_id}/0", messages=tuple(turns), context=self.context, tools=self.tools)
            self._prompt = self.renderer.render(row)
            return _shown(self._prompt, self.renderer, self.in_context)
        between: Ids = as_ids(self.renderer.follow_up(turns, self.tools))
        last = self._generations[-1].response_ids[-1]
        # A turn that ended with its own end token must not be ended twice.
        self._between.append(between[1:] if between[0] == last else between)
        answers = [generation.response_ids for generation in self._generations]
        shown = _shown(self._prompt, self.renderer, self.in_context)
        return as_ids(np.concatenate([shown, *_alternating(answers, self._between)]))

    def take_back(self) -> None:
        """Forget the last question."""
        self._between.pop()

    def hear(self, generation: Generation, answer: str) -> None:
        self._generations.append(generation)

    def samples(self) -> tuple[EpisodeSample, ...]:
        assert self._prompt is not None
        generation, mask = join(self._generations, self._between)
        return (EpisodeSample(self._prompt, generation, mask),)


def tools_of(environment: Environment) -> Tools:
    """The tools that `environment` offers, as JSON schemas; None if it offers none."""
    tools = getattr(environment, "tools", None)
    return None if tools is None else tuple(tools)


def _shown(prompt: Prompt, renderer: Renderer, in_context: bool) -> Ids:
    return as_ids(teacher_sequence(prompt, renderer.contexts)) if in_context else prompt.student_ids


def join(generations: Sequence[Generation], between: Sequence[Ids]) -> tuple[Generation, Mask]:
    """Join answers and the tokens `between` them (one item fewer) into one response; the mask is True in the answers.

    The environment's tokens get placeholders for the engine's values: log-prob 0, the first k ids as the top k (a
    teacher wants k different ones), the weight version of the answer before.
    """
    width = generations[0].topk_ids.shape[1]
    ids = _alternating([g.response_ids for g in generations], between)
    logprobs = _alternating(
        [g.sampled_logprobs for g in generations], [np.zeros(len(s), dtype=np.float32) for s in between]
    )
    topk = _alternating(
        [g.topk_ids for g in generations], [np.tile(np.arange(width, dtype=np.uint32), (len(s), 1)) for s in between]
    )
    mask = _alternating(
        [np.ones(len(g.response_ids), dtype=bool) for g in generations], [np.zeros(len(s), dtype=bool) for s in between]
    )
    versions: list[tuple[int, int]] = []
    starts = np.cumsum([0, *(len(part) for part in ids)])[::2]
    for start, generation in zip(starts, generations, strict=False):
        for position, version in generation.versions:
            if not versions or versions[-1][1] != version:
                versions.append((int(start) + position, version))
    joined = Generation(
        response_ids=as_ids(np.concatenate(ids)),
        sampled_logprobs=np.concatenate(logprobs),
        topk_ids=as_ids(np.concatenate(topk)),
        finish_reason=generations[-1].finish_reason,
        versions=tuple(versions),
    )
    return joined, np.concatenate(mask)


def _alternating(first: Sequence[Array], second: Sequence[Array]) -> list[Array]:
    """Interleave: first[0], second[0], first[1], …; `second` may be one shorter."""
    pairs = zip_longest(first, second)
    return [part for pair in pairs for part in pair if part is not None]
