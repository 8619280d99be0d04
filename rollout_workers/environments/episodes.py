"""One episode of an environment as training samples. Pure: the engine is a callable, no Ray, no HTTP.

Answers stay the tokens that the engine made. Prompts are rendered by `common.data.rendering`, so the student never sees
the context and the teacher does.
"""

from __future__ import annotations

from collections.abc import Awaitable, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import Any, Literal, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from common.data.rendering import Renderer, teacher_sequence
from common.data.rows import Message, Row
from common.protocol.schema import Ids, Mask, Prompt, as_ids
from rollout_workers.engine.engine import Generation
from rollout_workers.environments.base import Environment

Array = TypeVar("Array", bound=NDArray[Any])

SampleMode = Literal["observation", "chat", "conversation"]
"""What becomes a sample. `observation` (as in the paper): each answer, its prompt the observation alone, which repeats
what matters of the turns before. `chat`: each answer, its prompt the chat so far. `conversation`: the whole episode,
what the environment said in it masked out of the loss."""

MAX_TURNS = 5


class Generate(Protocol):
    """Makes one answer to the student's tokens; `turn` counts from 0, for seeds and request names."""

    def __call__(self, prompt_ids: Ids, turn: int, /) -> Awaitable[Generation]:
        """The answer."""
        ...


@dataclass(frozen=True, slots=True)
class EpisodeSample:
    """What a trajectory is made of. ``loss_mask [T]`` is None where the student made every token of the response."""

    prompt: Prompt
    generation: Generation
    loss_mask: Mask | None = None


@dataclass(frozen=True, slots=True)
class Exchange:
    """One turn as text: what the student was shown and what it answered, special tokens left out."""

    observation: str
    answer: str


@dataclass(frozen=True, slots=True)
class Episode:
    """A finished episode. `reward` is the sum over its turns; `outcome` the environment's last words, empty where the
    turns ran out first.
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
        """Whether all that can be won was won; a part of a reward is none."""
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
) -> Episode:
    """Play at most `max_turns` turns of the episode of `seed`; `in_context`: the player sees what the teacher sees.

    Prompts are named ``EPISODE_ID/TURN``. Raises what `generate` and the environment raise, and DataError where the
    chat template cannot render a turn; an episode is never returned in part.
    """
    talk = (
        _Conversation(renderer, episode_id, in_context)
        if samples == "conversation"
        else _Turns(renderer, episode_id, in_context, samples)
    )
    observation, reward, done = await environment.reset(seed), 0.0, False
    exchanges: list[Exchange] = []
    while not done and len(exchanges) < max_turns:
        generation = await generate(talk.ask(observation), len(exchanges))
        answer = str(renderer.tokenizer.decode(generation.response_ids.tolist(), skip_special_tokens=True))
        talk.hear(generation, answer)
        exchanges.append(Exchange(observation, answer))
        step = await environment.step(answer)
        observation, reward, done = step.observation, reward + step.reward, step.done
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
    """Each answer is a sample."""

    renderer: Renderer
    episode_id: str
    in_context: bool
    mode: SampleMode
    _messages: list[Message] = field(default_factory=list)
    _prompts: list[Prompt] = field(default_factory=list)
    _generations: list[Generation] = field(default_factory=list)

    def ask(self, observation: str) -> Ids:
        if self.mode == "observation":
            self._messages = []
        self._messages.append(Message(role="user", content=observation))
        name = f"{self.episode_id}/{len(self._prompts)}"
        self._prompts.append(self.renderer.render(Row(id=name, messages=tuple(self._messages))))
        return _shown(self._prompts[-1], self.renderer, self.in_context)

    def hear(self, generation: Generation, answer: str) -> None:
        self._messages.append(Message(role="assistant", content=answer))
        self._generations.append(generation)

    def samples(self) -> tuple[EpisodeSample, ...]:
        return tuple(EpisodeSample(p, g) for p, g in zip(self._prompts, self._generations, strict=True))


@dataclass
class _Conversation:
    """The whole episode is a sample: its prompt is the first, its response all that follows."""

    renderer: Renderer
    episode_id: str
    in_context: bool
    _prompt: Prompt | None = None
    _said: list[Ids] = field(default_factory=list)
    """Before each answer but the first: the end of the turn before it, the observation, the head of the answer."""
    _generations: list[Generation] = field(default_factory=list)

    def ask(self, observation: str) -> Ids:
        if self._prompt is None:
            row = Row(id=f"{self.episode_id}/0", messages=(Message(role="user", content=observation),))
            self._prompt = self.renderer.render(row)
            return _shown(self._prompt, self.renderer, self.in_context)
        between: Ids = as_ids(self.renderer.follow_up(observation))
        last = self._generations[-1].response_ids[-1]
        # A turn that was ended by its own token must not be ended twice.
        self._said.append(between[1:] if between[0] == last else between)
        answers = [generation.response_ids for generation in self._generations]
        shown = _shown(self._prompt, self.renderer, self.in_context)
        return as_ids(np.concatenate([shown, *_alternating(answers, self._said)]))

    def hear(self, generation: Generation, answer: str) -> None:
        self._generations.append(generation)

    def samples(self) -> tuple[EpisodeSample, ...]:
        assert self._prompt is not None
        generation, mask = join(self._generations, self._said)
        return (EpisodeSample(self._prompt, generation, mask),)


def _shown(prompt: Prompt, renderer: Renderer, in_context: bool) -> Ids:
    return as_ids(teacher_sequence(prompt, renderer.contexts)) if in_context else prompt.student_ids


def join(generations: Sequence[Generation], said: Sequence[Ids]) -> tuple[Generation, Mask]:
    """Answers and what was said between them (one fewer) as one response; the mask is True in the answers.

    Tokens that were said have placeholders for what only an engine knows: log-prob 0, the first ids as the top k (a
    teacher wants k different ones), the weight version of the answer before.
    """
    width = generations[0].topk_ids.shape[1]
    ids = _alternating([g.response_ids for g in generations], said)
    logprobs = _alternating(
        [g.sampled_logprobs for g in generations], [np.zeros(len(s), dtype=np.float32) for s in said]
    )
    topk = _alternating(
        [g.topk_ids for g in generations], [np.tile(np.arange(width, dtype=np.uint32), (len(s), 1)) for s in said]
    )
    mask = _alternating(
        [np.ones(len(g.response_ids), dtype=bool) for g in generations], [np.zeros(len(s), dtype=bool) for s in said]
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
    """first[0], second[0], first[1], …; `second` may be one shorter."""
    pairs = zip_longest(first, second)
    return [part for pair in pairs for part in pair if part is not None]
