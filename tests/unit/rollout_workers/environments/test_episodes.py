"""Episodes as samples: what each side is shown, which tokens are trained, that answers are never re-tokenised."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from common.config.model import StudentConfig
from common.data.rendering import Renderer, teacher_sequence
from common.data.rows import DataError
from common.protocol.schema import Sample, Sampling, as_ids
from rollout_workers.engine.engine import Generation
from rollout_workers.environments.base import Step
from rollout_workers.environments.episodes import Episode, SampleMode, join, play_episode
from rollout_workers.environments.playing import student_tokens, trajectories_of
from rollout_workers.environments.registry import make_environment
from tests.support.episodes import TOKENIZER, Student, text
from tests.support.tiny import make_tokenizer

CONTEXT = "H is a hole. Reach G."


class Countdown:
    """Says the numbers from `seed` down to 1; each right echo earns half a point."""

    async def reset(self, seed: int) -> str:
        self.left = seed
        return f"start {self.left}"

    async def step(self, answer: str) -> Step:
        reward = 0.5 if answer == str(self.left) else 0.0
        self.left -= 1
        return Step("over" if not self.left else f"now {self.left}", reward, done=not self.left)


def renderer(**student: Any) -> Renderer:
    return Renderer(TOKENIZER, CONTEXT, StudentConfig(model="unused", **student))


async def episode_of(mode: SampleMode, student: Student, *, seed: int = 3, max_turns: int = 5) -> Episode:
    return await play_episode(
        Countdown(), seed, student, renderer(), episode_id="e7", max_turns=max_turns, samples=mode
    )


TURN = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"


async def test_each_turn_is_a_sample_of_its_own_observation() -> None:
    student = Student(["3", "x", "1"])
    episode = await episode_of("observation", student)
    assert [text(sample.prompt.student_ids) for sample in episode.samples] == [
        TURN.format("start 3"),
        TURN.format("now 2"),
        TURN.format("now 1"),
    ]
    assert [sample.prompt.student_ids.tolist() for sample in episode.samples] == student.prompts
    assert [sample.generation for sample in episode.samples] == student.made
    assert [sample.prompt.row_id for sample in episode.samples] == ["e7/0", "e7/1", "e7/2"]
    assert [sample.loss_mask for sample in episode.samples] == [None] * 3
    assert [(e.observation, e.answer) for e in episode.exchanges] == [("start 3", "3"), ("now 2", "x"), ("now 1", "1")]
    assert (episode.reward, episode.done, episode.success, episode.outcome) == (1.0, True, True, "over")


async def test_the_teacher_sees_the_context_and_the_student_does_not() -> None:
    render = renderer()
    episode = await play_episode(Countdown(), 2, Student(["2", "1"]), render, episode_id="e")
    for sample in episode.samples:
        assert CONTEXT not in text(sample.prompt.student_ids)
        whole = text(teacher_sequence(sample.prompt, render.contexts))
        assert whole == f"<|im_start|>system\n{CONTEXT}<|im_end|>\n" + text(sample.prompt.student_ids)
    assert len(render.contexts) == 1  # one cache for all turns


async def test_a_chat_shows_the_turns_before() -> None:
    student = Student(["3", "2", "1"])
    episode = await episode_of("chat", student)
    assert text(episode.samples[2].prompt.student_ids) == (
        TURN.format("start 3") + "3<|im_end|>\n" + TURN.format("now 2") + "2<|im_end|>\n" + TURN.format("now 1")
    )
    assert [text(sample.generation.response_ids) for sample in episode.samples] == [f"{n}<|im_end|>" for n in (3, 2, 1)]


@pytest.mark.parametrize("stop", [True, False])
async def test_a_conversation_is_one_sample_with_the_environment_masked(stop: bool) -> None:
    student = Student(["3", "22", "1"], stop=stop)
    episode = await episode_of("conversation", student)
    (sample,) = episode.samples
    response, mask = sample.generation.response_ids, sample.loss_mask
    assert mask is not None
    assert text(sample.prompt.student_ids) == TURN.format("start 3")
    end = "<|im_end|>\n"
    assert text(response) == f"3{end}{TURN.format('now 2')}22{end}{TURN.format('now 1')}1" + (
        "<|im_end|>" if stop else ""
    )
    # The student's own tokens are the ones it made, and nothing else.
    assert response[mask].tolist() == [i for made in student.made for i in made.response_ids.tolist()]
    assert text(response[mask]) == ("3<|im_end|>22<|im_end|>1<|im_end|>" if stop else "3221")
    # What the engine was asked is what the sample says stood before each answer.
    whole = [*sample.prompt.student_ids.tolist(), *response.tolist()]
    for prompt in student.prompts:
        assert whole[: len(prompt)] == prompt
    assert sample.generation.finish_reason == student.made[-1].finish_reason


async def test_a_conversation_keeps_what_the_engine_knew_of_each_token() -> None:
    student = Student(["3", "22", "1"])
    (sample,) = (await episode_of("conversation", student)).samples
    generation, mask = sample.generation, sample.loss_mask
    assert mask is not None
    np.testing.assert_array_equal(
        generation.sampled_logprobs[mask], np.concatenate([made.sampled_logprobs for made in student.made])
    )
    np.testing.assert_array_equal(generation.topk_ids[mask], np.concatenate([made.topk_ids for made in student.made]))
    assert (generation.topk_ids[~mask] == [0, 1, 2]).all()
    assert generation.topk_ids.dtype == np.uint32
    assert len(generation.topk_ids) == len(generation.sampled_logprobs) == len(generation.response_ids) == len(mask)
    # Versions by turn were (0, 1), (0, 1), (1, 2), tokens of the environment count to the answer before them.
    expected = np.concatenate([[0, 1], [1] * (len(mask))])[: len(mask)]
    own = np.flatnonzero(mask)
    expected[own[2] : own[3]] = 0
    expected[own[3] : own[6]] = 1
    expected[own[6] :] = 2
    spans = dict(generation.versions)
    actual = [spans[max(start for start in spans if start <= position)] for position in range(len(mask))]
    assert actual == expected.tolist()
    assert [version for _, version in generation.versions] == [0, 1, 0, 1, 2]


@pytest.mark.parametrize("mode", ["observation", "chat", "conversation"])
async def test_tokens_are_counted_that_the_student_made(mode: SampleMode) -> None:
    """The worker's summary and the run's tokens a second."""
    student = Student(["3", "22", "1"])
    episode = await episode_of(mode, student)
    prompt = episode.samples[0].prompt
    made = trajectories_of(episode, Sample(0, 0, "e7", prompt, Sampling(8)))
    assert student_tokens(made) == sum(len(one.response_ids) for one in student.made)
    in_sequences = sum(len(one.response_ids) for one in made)
    assert (in_sequences > student_tokens(made)) == (mode == "conversation")


def test_one_answer_joins_to_itself() -> None:
    made = Generation(as_ids([5, 6]), np.float32([1, 2]), as_ids([[1], [2]]), "length", ((0, 4), (1, 5)))
    joined, mask = join([made], [])
    assert mask.all()
    assert joined.versions == made.versions
    assert joined.response_ids.tolist() == [5, 6]


async def test_an_episode_that_runs_out_of_turns_is_not_done() -> None:
    episode = await episode_of("observation", Student(["9", "8", "7"]), seed=9, max_turns=2)
    assert len(episode.samples) == len(episode.exchanges) == 2
    assert (episode.done, episode.outcome, episode.success) == (False, "", True)  # two right echoes are worth 1.0
    assert not (await episode_of("observation", Student(["9", "x"]), seed=9, max_turns=2)).success


async def test_a_game_is_played_to_its_end() -> None:
    student = Student(["[down]", "so: [down]", "[right]", "[right]"])
    episode = await play_episode(make_environment("FrozenLake"), 3, student, renderer(), episode_id="g")
    assert episode.success
    assert "Congratulations" in episode.outcome
    assert len(episode.samples) == 4
    lost = await play_episode(make_environment("FrozenLake"), 3, Student(["?", "?"]), renderer(), episode_id="g")
    assert (lost.done, lost.success, len(lost.samples)) == (True, False, 2)


async def test_a_template_that_hides_answers_cannot_hold_a_conversation() -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role != 'assistant' %}{{ m.role }}:{{ m.content }}\n{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    )
    render = Renderer(tokenizer, CONTEXT, StudentConfig(model="unused"))
    with pytest.raises(DataError, match="does not render an answer"):
        await play_episode(Countdown(), 2, Student(["2", "1"]), render, episode_id="e", samples="conversation")
