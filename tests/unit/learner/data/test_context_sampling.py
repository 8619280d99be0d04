"""Rows rendered with contexts of a pool: samples, held-out rows, games."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from common.config.loader import load_config
from common.config.model import Config, ContextConfig, StudentConfig
from common.data.contexts import PoolContext, context_index
from common.data.rendering import Renderer, teacher_sequence
from common.data.rows import DataError, Row
from learner.data.context_sampling import STAND_IN_CHARACTERS, ContextSampler, end_of
from learner.data.games import FirstTurn, first_turn
from learner.data.inputs import read_inputs
from learner.data.samples import SampleSource
from learner.loop.checkpoints import identity_of
from rollout_workers.actor import RolloutWorker
from tests.support.tiny import CHAT_TEMPLATE, make_tokenizer

TEXTS = {"short": "Be brief.\n", "long": "Be brief, be kind, be right.\n", "other": "Guess.\n"}
POOL = tuple(PoolContext(id=name, text=text) for name, text in TEXTS.items())


def chat(name: str, content: str, system: str | None = None) -> Row:
    head = [] if system is None else [{"role": "system", "content": system}]
    return Row.model_validate({"id": name, "messages": [*head, {"role": "user", "content": content}]})


def sampler_over(rows: list[Row], seed: int = 0) -> tuple[ContextSampler, Renderer]:
    renderer = Renderer(make_tokenizer(), TEXTS["other"], StudentConfig(model="unused"))
    return ContextSampler(POOL, renderer, seed, [first_turn(row) for row in rows]), renderer


@pytest.fixture
def config(tmp_path: Path, tiny_model: Path) -> Config:
    """A run over six raw rows and the pool."""
    for name in ("train", "valid", "eval"):
        rows = [json.dumps({"id": f"{name}{i}", "prompt": f"Q: {i}\nA:", "answer": "x"}) for i in range(6)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(rows))
    (tmp_path / "pool.jsonl").write_text("\n".join(entry.model_dump_json() for entry in POOL))
    settings = {
        "run": {"name": "small", "seed": 3},
        "student": {"model": str(tiny_model)},
        "context": {"pool": str(tmp_path / "pool.jsonl")},
        "data": {name: str(tmp_path / f"{name}.jsonl") for name in ("train", "valid", "eval")},
        "rollout": {"batch_size": 4, "samples_per_prompt": 2},
    }
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(settings))
    return load_config(path)


def test_a_prompt_is_the_row_rendered_with_its_context() -> None:
    rows = [chat("a", "Hi"), chat("b", "Ho", system="Be a bot."), Row(id="c", prompt="Q:")]
    sampler, renderer = sampler_over(rows)
    seen = set()
    for key in range(40):
        for index, row in enumerate(rows):
            prompt = sampler(index, f"{key}")
            name = POOL[context_index(0, f"{key}", 3)].id
            assert prompt.context_id == name
            seen.add(name)
            alone = Renderer(make_tokenizer(), TEXTS[name], StudentConfig(model="unused"))
            assert teacher_sequence(prompt, renderer.contexts) == teacher_sequence(alone.render(row), alone.contexts)
            assert prompt.student_ids.tolist() == alone.render(row).student_ids.tolist()
    assert seen == set(TEXTS)


def merging_tokenizer(*, split: bool) -> Any:
    """Byte-level BPE with merges that go over line ends; without `split` also over everything else."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split)
    backend.decoder = decoders.ByteLevel()
    text = [
        "Be brief.\n\nHow is it?",
        "Be kind.\n\nHello there.",
        "rules rules rules\n\n\n7 is odd",
        "=\n\n=\n(",
        "\n" * 64,
    ] * 9
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=420, initial_alphabet=alphabet, special_tokens=special, show_progress=False
    )
    backend.train_from_iterator(text, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>")
    tokenizer.chat_template = CHAT_TEMPLATE.replace("role }}\n", "role }}:")
    return tokenizer


@pytest.mark.parametrize("split", [True, False])
@pytest.mark.parametrize("placement", ["system", "user_prefix"])
def test_a_context_joined_to_a_row_equals_the_whole_rendering(split: bool, placement: Any) -> None:
    tokenizer = merging_tokenizer(split=split)
    pool = [
        PoolContext(id=f"{n}", text="\n".join(["- be kind", "- rules rules"] * n) + end)
        for n in (1, 12, 40)
        for end in ("", ".", "\n", "\n\n", " =", " how")
        for n in [n + len(end)]
    ]
    # Blanks for more than a stand-in, an odd number: the last of them is one token with what a row begins with.
    pool.append(PoolContext(id="-", text="- be kind" + "\n" * 299))
    pool = [entry.model_copy(update={"id": f"c{i}"}) for i, entry in enumerate(pool)]
    starts = ("How", "\nHello", "\n\n7", "(", " x", "=\n", "Zzz", "\u00e9t\u00e9", "7")
    rows = [chat(f"r{i}", f"{start} is it? {i}") for i, start in enumerate(starts)]
    renderer = Renderer(tokenizer, "unused", StudentConfig(model="unused"), placement)
    sampler = ContextSampler(pool, renderer, 0, [first_turn(row) for row in rows])
    for entry in pool:
        alone = Renderer(tokenizer, entry.text, StudentConfig(model="unused"), placement)
        for row in rows:
            prompt, whole = sampler.with_context(entry.id, first_turn(row)), alone.render(row)
            assert teacher_sequence(prompt, renderer.contexts) == teacher_sequence(whole, alone.contexts)
            assert prompt.context == whole.context
            assert prompt.student_ids.tolist() == whole.student_ids.tolist()


def test_a_long_context_is_not_rendered_again_for_every_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    pool = [PoolContext(id=name, text=f"{name} rules.\n" * 400) for name in ("a", "b")]
    renderer = Renderer(make_tokenizer(), "unused", StudentConfig(model="unused"))
    sampler = ContextSampler(pool, renderer, 0, [FirstTurn(chat(f"r{i}", f"Hi {i}")) for i in range(4)])
    lengths: list[int] = []
    tokens = Renderer._tokens

    def counted(self: Renderer, text: str) -> tuple[int, ...]:
        lengths.append(len(text))
        return tokens(self, text)

    monkeypatch.setattr(Renderer, "_tokens", counted)
    for key in range(20):
        sampler(key % 4, f"{key}")
    assert lengths
    assert max(lengths) < 400


@pytest.mark.parametrize("text", ["", "short", "word " * 400, "word " * 400 + " " * 300, "x" * 900, "a " + "x" * 900])
def test_the_end_of_a_context_has_a_word_that_is_whole(text: str) -> None:
    end = end_of(text)
    assert text.endswith(end)
    assert len(end) < 1200
    assert end == text or (" word " in end and len(end.rstrip()) >= STAND_IN_CHARACTERS - 1)


def test_a_template_that_reads_the_whole_context_gets_the_whole() -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE.replace("<|im_start|>", "<|im_start|>{{ messages[0]['content'][:9] }}", 1)
    pool = [PoolContext(id=name, text=f"{name} rules. " * 99) for name in ("first", "other")]
    renderer = Renderer(tokenizer, "unused", StudentConfig(model="unused"))
    row = chat("a", "Hi")
    sampler = ContextSampler(pool, renderer, 0, [FirstTurn(row)])
    for entry in pool:
        alone = Renderer(tokenizer, entry.text, StudentConfig(model="unused"))
        whole = teacher_sequence(alone.render(row), alone.contexts)
        assert teacher_sequence(sampler.with_context(entry.id, FirstTurn(row)), renderer.contexts) == whole


def test_every_context_is_known_before_the_first_sample() -> None:
    rows = [chat("a", "Hi"), chat("b", "Ho", system="Be a bot."), chat("c", "Ha"), Row(id="d", prompt="Q:")]
    sampler, renderer = sampler_over(rows)
    known = dict(renderer.contexts)
    assert len(known) == 9  # three texts: raw, in a chat, in a chat with a system message
    for key in range(40):
        for index in range(4):
            assert sampler(index, f"{key}").context in known
    assert renderer.contexts.keys() == known.keys()


def test_a_context_unknown_to_the_teachers_is_refused() -> None:
    turns = [FirstTurn(chat("a", "Hi"))]
    renderer = Renderer(make_tokenizer(), TEXTS["other"], StudentConfig(model="unused"))
    sampler = ContextSampler(POOL, renderer, 0, turns)
    turns[0] = FirstTurn(chat("b", "Ho", system="Be a bot."))  # only a fault in the code leads here
    with pytest.raises(DataError, match="did not get when the run began"):
        sampler(0, "0")


def test_lengths_are_checked_with_the_longest_context() -> None:
    sampler, renderer = sampler_over([chat("a", "Hi")])
    longest = sampler.with_longest_context(first_turn(chat("a", "Hi")))
    assert longest.context_id == "long"
    lengths = [len(teacher_sequence(sampler(0, f"{key}"), renderer.contexts)) for key in range(40)]
    assert max(lengths) == len(teacher_sequence(longest, renderer.contexts))


def test_a_game_carries_its_context() -> None:
    row = Row.model_validate({"id": "g", "environment": "FrozenLake", "seed": 5})
    sampler, _ = sampler_over([row])
    prompt = sampler(0, "0")
    assert prompt.game is not None
    assert prompt.game.seed == 5
    assert prompt.game.context == TEXTS[str(prompt.context_id)]


def test_a_worker_renders_a_game_with_the_games_context(config: Config) -> None:
    worker = RolloutWorker(config.student.model, config, None, max_logprobs=1)
    row = Row.model_validate({"id": "g", "environment": "FrozenLake", "seed": 5})
    sampler, _ = sampler_over([row])
    for key in range(12):
        prompt = sampler(0, f"{key}")
        assert worker._renderer(prompt).context_text == TEXTS[str(prompt.context_id)]
    assert len(worker._renderers) == 3
    one = config.model_copy(update={"context": ContextConfig(text="Rules.")})
    worker = RolloutWorker(config.student.model, one, None, max_logprobs=1)
    assert worker._renderer(first_turn(row).render(worker._renderer(prompt))).context_text == "Rules."


# --- in a run ---------------------------------------------------------------------------------------------------------


def test_samples_get_new_contexts_every_step_and_the_same_after_a_resume(config: Config) -> None:
    inputs = read_inputs(config)
    source = SampleSource(config, inputs.train, inputs.context_sampler)
    numbers = range(8 * 12)
    first = [source[number] for number in numbers]
    again = SampleSource(config, inputs.train, read_inputs(config).context_sampler)
    for number in reversed(numbers):  # a resumed run asks in another order
        sample = again[number]
        assert sample.prompt.context_id == first[number].prompt.context_id
        assert sample.prompt.context == first[number].prompt.context
        assert sample.prompt.context_id == POOL[context_index(3, sample.sample_id, 3)].id
    of_row: dict[str, set[str | None]] = {}
    for sample in first:
        of_row.setdefault(sample.prompt.row_id, set()).add(sample.prompt.context_id)
    assert all(len(names) > 1 for names in of_row.values())


def test_a_held_out_row_keeps_one_context(config: Config) -> None:
    first, again = read_inputs(config), read_inputs(config)
    names = [prompt.context_id for prompt in first.eval]
    assert names == [prompt.context_id for prompt in again.eval]
    assert names == [POOL[context_index(3, f"held-out/eval{i}", 3)].id for i in range(6)]
    assert len(set(names)) > 1


def test_a_run_with_one_context_has_no_sampler(config: Config, tmp_path: Path) -> None:
    one = load_config(tmp_path / "run.yaml", ["context.pool=null", f"context.text={json.dumps(TEXTS['long'])}"])
    inputs = read_inputs(one)
    assert inputs.context_sampler is None
    assert len(inputs.contexts) == 1
    source = SampleSource(one, inputs.train, inputs.context_sampler)
    assert source[0].prompt is inputs.train[next(i for i, p in enumerate(inputs.train) if p is source[0].prompt)]
    assert {prompt.context_id for prompt in (*inputs.train, *inputs.eval)} == {None}


def test_the_identity_contains_the_pool(config: Config) -> None:
    def identity(contexts: tuple[str, ...], pool: str | None) -> Any:
        return identity_of(config, tokenizer="t", teachers={}, contexts=contexts, data="d", pool=pool)

    mine = identity(("b", "a"), "p")
    assert mine.pool == "p"
    assert len(mine.contexts) == 1
    assert list(mine.differences(identity(("a", "b"), "p"))) == []
    assert [line.split(":")[0] for line in mine.differences(identity(("a", "c"), "q"))] == ["contexts", "pool"]
    assert identity(("b", "a"), None).contexts == ("a", "b")
