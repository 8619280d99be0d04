"""Episodes with tool results, on the documentation's calculator: what is shown, what is trained, when they end."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from common.config.model import ConfigError, StudentConfig
from common.data.rendering import Renderer, teacher_sequence
from common.data.rows import DataError, Row
from learner.data.games import first_turn, refuse_games_if_unsupported
from rollout_workers.environments.episodes import Episode, SampleMode, play_episode
from rollout_workers.environments.registry import make_environment
from tests.support.configs import config_of
from tests.support.episodes import Student, text
from tests.support.paths import ROOT
from tests.support.tiny import TOOL_TEMPLATE, make_tokenizer

CONTEXT = "Compute with the calculator."
SEED = 3


@pytest.fixture(autouse=True)
def examples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "docs/examples"))


def call(expression: str) -> str:
    return f"<tool_call>{json.dumps({'name': 'calculator', 'arguments': {'expression': expression}})}</tool_call>"


def renderer() -> Renderer:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = TOOL_TEMPLATE
    return Renderer(tokenizer, CONTEXT, StudentConfig(model="unused"))


async def question() -> tuple[str, int]:
    """(question, value) of the seed, by Python."""
    asked = await make_environment("calculator:Sums").reset(SEED)
    expression = asked.removeprefix("What is ").removesuffix("?")
    return expression, eval(expression)


async def play(answers: Sequence[str], mode: SampleMode = "conversation", **options: Any) -> tuple[Episode, Student]:
    student = Student(answers)
    episode = await play_episode(
        make_environment("calculator:Sums"), SEED, student, renderer(), episode_id="e", samples=mode, **options
    )
    return episode, student


async def chat_of(calls: int, *, system: str | None = None) -> list[dict[str, str]]:
    expression, value = await question()
    head = [] if system is None else [{"role": "system", "content": system}]
    turns = [{"role": "user", "content": f"What is {expression}?"}]
    for _ in range(calls):
        turns += [{"role": "assistant", "content": call(expression)}, {"role": "tool", "content": str(value)}]
    return [*head, *turns]


def rendered(chat: list[dict[str, str]]) -> str:
    tools = list(make_environment("calculator:Sums").tools)  # type: ignore[attr-defined]
    return str(renderer().tokenizer.apply_chat_template(chat, tools=tools, add_generation_prompt=True, tokenize=False))


async def test_a_conversation_goes_on_with_the_tools_result_which_is_not_trained() -> None:
    expression, value = await question()
    episode, student = await play([call(expression), f"It is {value}."])
    assert (episode.reward, episode.done, episode.outcome) == (1.0, True, "Right.")
    assert [text(prompt) for prompt in student.prompts] == [rendered(await chat_of(0)), rendered(await chat_of(1))]
    (sample,) = episode.samples
    assert sample.loss_mask is not None
    trained = text(sample.generation.response_ids[sample.loss_mask])
    assert trained == f"{call(expression)}<|im_end|>It is {value}.<|im_end|>"
    assert f"<|im_start|>tool\n{value}<|im_end|>" in text(sample.generation.response_ids)


async def test_every_answer_is_a_sample_under_the_chat_so_far() -> None:
    expression, value = await question()
    render = renderer()
    student = Student([call(expression), call(expression), str(value)])
    environment = make_environment("calculator:Sums")
    episode = await play_episode(environment, SEED, student, render, episode_id="e", samples="chat")
    for number, sample in enumerate(episode.samples):
        assert text(sample.prompt.student_ids) == rendered(await chat_of(number))
        assert text(teacher_sequence(sample.prompt, render.contexts)) == rendered(await chat_of(number, system=CONTEXT))
    assert episode.success


@pytest.mark.parametrize("mode", ["conversation", "chat"])
async def test_many_turns_end_where_the_next_prompt_would_not_fit(mode: SampleMode) -> None:
    expression, _ = await question()
    whole, student = await play([call(expression)] * 40, mode, max_turns=40)
    assert len(whole.exchanges) == 40
    assert not whole.done
    limit = len(student.prompts[7])
    cut, shorter = await play([call(expression)] * 40, mode, max_turns=40, max_prompt_tokens=limit)
    assert [len(prompt) for prompt in shorter.prompts] == [len(prompt) for prompt in student.prompts[:8]]
    assert len(cut.exchanges) == 8
    assert (cut.done, cut.outcome) == (False, "")
    assert len(cut.samples) == (1 if mode == "conversation" else 8)
    (tokens,) = {len(sample.generation.response_ids) for sample in cut.samples[-1:]}
    assert tokens > 0


async def test_a_tool_says_what_is_wrong_with_a_call() -> None:
    episode, _ = await play([call("2 ** 9"), "<tool_call>{oops}</tool_call>", call("1" * 300), "no"])
    observations = [exchange.observation for exchange in episode.exchanges[1:]]
    assert observations == ["error: ValueError", "error: JSONDecodeError", "error: ValueError"]
    assert (episode.reward, episode.outcome) == (0.0, "Wrong.")


async def test_an_observation_alone_shows_no_tool_result() -> None:
    expression, _ = await question()
    with pytest.raises(DataError, match="shows no tool result"):
        await play([call(expression), "1"], "observation")


def test_a_run_over_tools_by_observation_is_refused() -> None:
    turns = [first_turn(Row.model_validate({"id": "g", "environment": "calculator:Sums"}))]
    config = config_of()
    with pytest.raises(ConfigError, match=r"environments with tools: environment.sample_format must be"):
        refuse_games_if_unsupported(turns, config)
    environment = config.environment.model_copy(update={"sample_format": "chat"})
    refuse_games_if_unsupported(turns, config.model_copy(update={"environment": environment}))
    assert turns[0].row.tools is not None
    assert np.all([tool["function"]["name"] == "calculator" for tool in turns[0].row.tools])
