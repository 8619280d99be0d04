"""A pool of contexts: read, drawn for each sample, given to the teacher once, part of a run's identity."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import yaml

from common.config.loader import load_config
from common.config.model import Config, ConfigError, ContextConfig, StudentConfig
from common.data.contexts import PoolContext, check_context, context_index, pool_digest, read_pool
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


def write_pool(path: Path, *lines: Any) -> Path:
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
    return path


def chat(name: str, content: str, system: str | None = None) -> Row:
    head = [] if system is None else [{"role": "system", "content": system}]
    return Row.model_validate({"id": name, "messages": [*head, {"role": "user", "content": content}]})


def draw_over(rows: list[Row], seed: int = 0) -> tuple[ContextSampler, Renderer]:
    renderer = Renderer(make_tokenizer(), TEXTS["other"], StudentConfig(model="unused"))
    return ContextSampler(POOL, renderer, seed, [first_turn(row) for row in rows]), renderer


@pytest.fixture
def config(tmp_path: Path, tiny_model: Path) -> Config:
    """A run over six raw rows and the pool."""
    for name in ("train", "valid", "eval"):
        rows = [json.dumps({"id": f"{name}{i}", "prompt": f"Q: {i}\nA:", "answer": "x"}) for i in range(6)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(rows))
    write_pool(tmp_path / "pool.jsonl", *(one.model_dump() for one in POOL))
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


# --- the file ---------------------------------------------------------------------------------------------------------


def test_a_pool_is_its_lines_and_leaves_other_keys_alone(tmp_path: Path) -> None:
    path = write_pool(tmp_path / "p.jsonl", {"id": "a", "text": "A", "tokens": 3}, "", {"id": "b", "text": "A"})
    assert [(one.id, one.text) for one in read_pool(path)] == [("a", "A"), ("b", "A")]


@pytest.mark.parametrize(
    ("lines", "part"),
    [
        ([{"id": "a", "text": "A"}, {"id": "a", "text": "B"}], r":2: id 'a' is used twice"),
        ([{"id": "a"}], r":1: text: Field required"),
        ([{"id": "a", "text": ""}], r":1: text: "),
        (["{nope"], r":1: not JSON"),
        ([""], "holds no context"),
    ],
)
def test_a_bad_pool_is_named_by_file_and_line(tmp_path: Path, lines: list[Any], part: str) -> None:
    with pytest.raises(ConfigError, match=r"context\.pool: .*" + part):
        read_pool(write_pool(tmp_path / "p.jsonl", *lines))


def test_exactly_one_source_of_contexts(config: Config, tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    for overrides in (["context.pool=null"], ["context.text=x"], ["context.file=x"]):
        with pytest.raises(ConfigError, match=r"exactly one of context\.text, context\.file and context\.pool"):
            load_config(path, overrides)
    with pytest.raises(ConfigError, match="holds many contexts"):
        config.context.read()
    assert config.context.inline() == config.context
    check_context(config.context)
    with pytest.raises(ConfigError, match="cannot read"):
        check_context(load_config(path, [f"context.pool={tmp_path}/none"]).context)


def test_a_digest_knows_texts_ids_and_order() -> None:
    others = [POOL[::-1], POOL[:2], (POOL[0].model_copy(update={"id": "x"}), *POOL[1:])]
    assert len({pool_digest(pool) for pool in (POOL, *others)}) == 4
    assert pool_digest(list(POOL)) == pool_digest(POOL)


# --- the draw ---------------------------------------------------------------------------------------------------------


def test_the_draw_is_even_and_a_function_of_seed_and_key() -> None:
    keys = [f"{step}/{place}/row/{repeat}" for step in range(50) for place in range(16) for repeat in range(2)]
    picks = [context_index(7, key, 4) for key in keys]
    assert picks == [context_index(7, key, 4) for key in keys]
    assert picks != [context_index(8, key, 4) for key in keys]
    # 1,600 draws over 4: 400 each, standard deviation 17.
    assert all(abs(count - 400) < 70 for count in Counter(picks).values())
    assert len(set(picks)) == 4


def test_a_drawn_prompt_is_the_row_under_the_drawn_text() -> None:
    rows = [chat("a", "Hi"), chat("b", "Ho", system="Be a bot."), Row(id="c", prompt="Q:")]
    draw, renderer = draw_over(rows)
    seen = set()
    for key in range(40):
        for index, row in enumerate(rows):
            prompt = draw(index, f"{key}")
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
def test_a_context_put_before_a_row_is_what_rendering_the_whole_gives(split: bool, placement: Any) -> None:
    tokenizer = merging_tokenizer(split=split)
    pool = [
        PoolContext(id=f"{n}", text="\n".join(["- be kind", "- rules rules"] * n) + end)
        for n in (1, 12, 40)
        for end in ("", ".", "\n", "\n\n", " =", " how")
        for n in [n + len(end)]
    ]
    # Blanks for more than a stand-in, an odd number: the last of them is one token with what a row begins with.
    pool.append(PoolContext(id="-", text="- be kind" + "\n" * 299))
    pool = [one.model_copy(update={"id": f"c{i}"}) for i, one in enumerate(pool)]
    starts = ("How", "\nHello", "\n\n7", "(", " x", "=\n", "Zzz", "\u00e9t\u00e9", "7")
    rows = [chat(f"r{i}", f"{start} is it? {i}") for i, start in enumerate(starts)]
    renderer = Renderer(tokenizer, "unused", StudentConfig(model="unused"), placement)
    draw = ContextSampler(pool, renderer, 0, [first_turn(row) for row in rows])
    for one in pool:
        alone = Renderer(tokenizer, one.text, StudentConfig(model="unused"), placement)
        for row in rows:
            prompt, whole = draw.with_context(one.id, first_turn(row)), alone.render(row)
            assert teacher_sequence(prompt, renderer.contexts) == teacher_sequence(whole, alone.contexts)
            assert prompt.context == whole.context
            assert prompt.student_ids.tolist() == whole.student_ids.tolist()


def test_a_long_context_is_not_rendered_again_for_every_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    pool = [PoolContext(id=name, text=f"{name} rules.\n" * 400) for name in ("a", "b")]
    renderer = Renderer(make_tokenizer(), "unused", StudentConfig(model="unused"))
    draw = ContextSampler(pool, renderer, 0, [FirstTurn(chat(f"r{i}", f"Hi {i}")) for i in range(4)])
    lengths: list[int] = []
    tokens = Renderer._tokens

    def counted(self: Renderer, text: str) -> tuple[int, ...]:
        lengths.append(len(text))
        return tokens(self, text)

    monkeypatch.setattr(Renderer, "_tokens", counted)
    for key in range(20):
        draw(key % 4, f"{key}")
    assert lengths
    assert max(lengths) < 400


@pytest.mark.parametrize("text", ["", "short", "word " * 400, "word " * 400 + " " * 300, "x" * 900, "a " + "x" * 900])
def test_the_end_of_a_context_has_a_word_that_is_whole(text: str) -> None:
    end = end_of(text)
    assert text.endswith(end)
    assert len(end) < 1200
    assert end == text or (" word " in end and len(end.rstrip()) >= STAND_IN_CHARACTERS - 1)


def test_a_template_that_looks_at_the_whole_context_is_given_the_whole() -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE.replace("<|im_start|>", "<|im_start|>{{ messages[0]['content'][:9] }}", 1)
    pool = [PoolContext(id=name, text=f"{name} rules. " * 99) for name in ("first", "other")]
    renderer = Renderer(tokenizer, "unused", StudentConfig(model="unused"))
    row = chat("a", "Hi")
    draw = ContextSampler(pool, renderer, 0, [FirstTurn(row)])
    for one in pool:
        alone = Renderer(tokenizer, one.text, StudentConfig(model="unused"))
        whole = teacher_sequence(alone.render(row), alone.contexts)
        assert teacher_sequence(draw.with_context(one.id, FirstTurn(row)), renderer.contexts) == whole


def test_every_context_is_known_before_the_first_draw() -> None:
    rows = [chat("a", "Hi"), chat("b", "Ho", system="Be a bot."), chat("c", "Ha"), Row(id="d", prompt="Q:")]
    draw, renderer = draw_over(rows)
    known = dict(renderer.contexts)
    assert len(known) == 9  # three texts: raw, in a chat, in a chat with a system message
    for key in range(40):
        for index in range(4):
            assert draw(index, f"{key}").context in known
    assert renderer.contexts.keys() == known.keys()


def test_a_context_that_no_teacher_was_told_of_is_refused() -> None:
    draw, _ = draw_over([chat("a", "Hi")])
    draw._turns = [FirstTurn(chat("b", "Ho", system="Be a bot."))]  # what only a fault in the code brings about
    with pytest.raises(DataError, match="did not get when the run began"):
        draw(0, "0")


def test_what_must_fit_is_the_row_under_the_longest_context() -> None:
    draw, renderer = draw_over([chat("a", "Hi")])
    longest = draw.with_longest_context(first_turn(chat("a", "Hi")))
    assert longest.context_id == "long"
    lengths = [len(teacher_sequence(draw(0, f"{key}"), renderer.contexts)) for key in range(40)]
    assert max(lengths) == len(teacher_sequence(longest, renderer.contexts))


def test_a_game_takes_its_context_along() -> None:
    row = Row.model_validate({"id": "g", "environment": "FrozenLake", "seed": 5})
    draw, _ = draw_over([row])
    prompt = draw(0, "0")
    assert prompt.game is not None
    assert prompt.game.seed == 5
    assert prompt.game.context == TEXTS[str(prompt.context_id)]


def test_a_worker_renders_a_game_under_the_context_that_it_brings(config: Config) -> None:
    worker = RolloutWorker(config.student.model, config, None, max_logprobs=1)
    row = Row.model_validate({"id": "g", "environment": "FrozenLake", "seed": 5})
    draw, _ = draw_over([row])
    for key in range(12):
        prompt = draw(0, f"{key}")
        assert worker._renderer(prompt).context_text == TEXTS[str(prompt.context_id)]
    assert len(worker._renderers) == 3
    one = config.model_copy(update={"context": ContextConfig(text="Rules.")})
    worker = RolloutWorker(config.student.model, one, None, max_logprobs=1)
    assert worker._renderer(first_turn(row).render(worker._renderer(prompt))).context_text == "Rules."


# --- in a run ---------------------------------------------------------------------------------------------------------


def test_samples_draw_anew_in_every_step_and_the_same_when_asked_again(config: Config) -> None:
    inputs = read_inputs(config)
    source = SampleSource(config, inputs.train, inputs.context_sampler)
    numbers = range(8 * 12)
    first = [source[number] for number in numbers]
    again = SampleSource(config, inputs.train, read_inputs(config).context_sampler)
    for number in reversed(numbers):  # a resumed run comes from elsewhere
        sample = again[number]
        assert sample.prompt.context_id == first[number].prompt.context_id
        assert sample.prompt.context == first[number].prompt.context
        assert sample.prompt.context_id == POOL[context_index(3, sample.sample_id, 3)].id
    of_row: dict[str, set[str | None]] = {}
    for sample in first:
        of_row.setdefault(sample.prompt.row_id, set()).add(sample.prompt.context_id)
    assert all(len(names) > 1 for names in of_row.values())


def test_held_out_rows_have_one_context_each_whatever_the_step(config: Config) -> None:
    first, again = read_inputs(config), read_inputs(config)
    names = [prompt.context_id for prompt in first.eval]
    assert names == [prompt.context_id for prompt in again.eval]
    assert names == [POOL[context_index(3, f"held-out/eval{i}", 3)].id for i in range(6)]
    assert len(set(names)) > 1


def test_rows_of_one_context_are_as_they_were(config: Config, tmp_path: Path) -> None:
    one = load_config(tmp_path / "run.yaml", ["context.pool=null", f"context.text={json.dumps(TEXTS['long'])}"])
    inputs = read_inputs(one)
    assert inputs.context_sampler is None
    assert len(inputs.contexts) == 1
    source = SampleSource(one, inputs.train, inputs.context_sampler)
    assert source[0].prompt is inputs.train[next(i for i, p in enumerate(inputs.train) if p is source[0].prompt)]
    assert {prompt.context_id for prompt in (*inputs.train, *inputs.eval)} == {None}


def test_the_identity_has_the_pool(config: Config) -> None:
    def identity(contexts: tuple[str, ...], pool: str | None) -> Any:
        return identity_of(config, tokenizer="t", teachers={}, contexts=contexts, data="d", pool=pool)

    mine = identity(("b", "a"), "p")
    assert mine.pool == "p"
    assert len(mine.contexts) == 1
    assert list(mine.differences(identity(("a", "b"), "p"))) == []
    assert [line.split(":")[0] for line in mine.differences(identity(("a", "c"), "q"))] == ["contexts", "pool"]
    assert identity(("b", "a"), None).contexts == ("a", "b")
