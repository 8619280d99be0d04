"""``opcd chat`` on tiny models, against plain forward passes of the same weights."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner, Result

from common.data.model_lookup import load_tokenizer
from deploy.cli import chat as cli_chat
from deploy.cli.chat import line_ends
from deploy.cli.main import app
from deploy.inspect import chat
from deploy.inspect.chat import ChatError, Conversation, Decoding, asks_raw, find_weights, read_config
from tests.support.tiny import make_tiny_model

CONTEXT = "Q: dog\nA: dogs\n"
QUESTION = "Q: cat\nA:"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    """A finished run of raw prompts: its student has other weights than its base."""
    folder = tmp_path_factory.mktemp("chat") / "run"
    make_tiny_model(folder / "checkpoint", seed=3)
    (folder.parent / "train.jsonl").write_text('{"id": "a", "prompt": "Q: a\\nA:"}\n')
    settings = {
        "run": {"name": "run", "dir": str(folder.parent)},
        "student": {"model": str(tiny_model)},
        "context": {"text": CONTEXT},
        "data": {"train": str(folder.parent / "train.jsonl")},
        "rollout": {"max_tokens": 6},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(settings))
    return folder


def greedy(model: Path, text: str, tokens: int = 6) -> str:
    """Token by token, the whole sequence each time."""
    tokenizer, network = load_tokenizer(str(model)), AutoModelForCausalLM.from_pretrained(model).eval()
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    begun = len(ids)
    while len(ids) < begun + tokens:
        with torch.no_grad():
            ids.append(int(network(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
        if ids[-1] == tokenizer.eos_token_id:
            return str(tokenizer.decode(ids[begun:-1]))
    return str(tokenizer.decode(ids[begun:]))


@pytest.fixture(scope="module")
def expected(run: Path, tiny_model: Path) -> dict[str, str]:
    return {
        "base": greedy(tiny_model, QUESTION),
        "base + context": greedy(tiny_model, CONTEXT + QUESTION),
        "distilled": greedy(run / "checkpoint", QUESTION),
    }


def talk_to(run: Path, *, stop: tuple[str, ...] = (), keep_both: bool = True) -> Conversation:
    config = read_config(run)
    return Conversation(config, find_weights(run, None), CONTEXT, Decoding(6, 0.0, stop), keep_both)


@pytest.mark.parametrize("keep_both", [True, False])
def test_each_answers_as_its_weights_do(run: Path, expected: dict[str, str], keep_both: bool) -> None:
    answers = dict(talk_to(run, keep_both=keep_both).ask(QUESTION))
    assert answers == expected
    assert len(set(answers.values())) == 3


def test_one_at_a_time_holds_one_model(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[str] = []
    load = chat.load_model
    monkeypatch.setattr(chat, "load_model", lambda folder, *more: (loaded.append(folder), load(folder, *more))[1])
    for keep_both, count in ((True, 2), (False, 4)):
        loaded.clear()
        talk = talk_to(run, keep_both=keep_both)
        for _ in range(2):
            list(talk.ask(QUESTION))
        assert len(loaded) == count
        assert loaded[2:] == ([] if keep_both else loaded[:2])  # the second question loads both again, or neither


def test_an_answer_ends_before_a_stop_string(run: Path, expected: dict[str, str]) -> None:
    whole = expected["base + context"]
    first, second = whole[:2]
    assert second not in whole[:1]
    for stop, left in (((second,), first), ((second, first + second), ""), (("never",), whole)):
        assert dict(talk_to(run, stop=stop).ask(QUESTION))["base + context"] == left


def test_both_models_stay_where_that_leaves_half_of_the_free_memory(
    run: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = chat.weight_bytes(tiny_model) + chat.weight_bytes(run / "checkpoint")
    assert size > 10_000
    for free, fits in ((2 * size, True), (2 * size - 1, False)):
        monkeypatch.setattr("common.sizing.machine.available_memory_bytes", lambda free=free: free)
        assert cli_chat.open_conversation(run, None, None, None, 0.0, False).keep_both is fits
        assert not cli_chat.open_conversation(run, None, None, None, 0.0, True).keep_both


def test_answers_are_as_long_as_asked_else_as_the_run_evaluates(run: Path, tmp_path: Path) -> None:
    settings = yaml.safe_load((run / "config.yaml").read_text())
    settings["eval"] = {"max_tokens": 4}
    settings["rollout"]["stop"] = [";"]
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(settings))
    (tmp_path / "checkpoint").symlink_to(run / "checkpoint")
    for folder, asked, length in ((run, None, 6), (tmp_path, None, 4), (tmp_path, 2, 2)):
        assert cli_chat.open_conversation(folder, None, None, asked, 0.5, False).decoding.max_tokens == length
    assert cli_chat.open_conversation(tmp_path, None, None, None, 0.5, False).decoding == Decoding(4, 0.5, (";",))


def test_an_adapter_answers_on_its_base(run: Path, tiny_model: Path, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(tiny_model),
        LoraConfig(target_modules="all-linear", init_lora_weights=False),
    )
    model.save_pretrained(tmp_path / "adapter")
    merged = model.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    load_tokenizer(str(tiny_model)).save_pretrained(tmp_path / "merged")
    talk = talk_to(run)
    answer = talk.answer(
        chat.load_model(str(tmp_path / "adapter"), str(tiny_model), "cpu"), talk.sequences(QUESTION)[0]
    )
    assert answer == greedy(tmp_path / "merged", QUESTION) != greedy(tiny_model, QUESTION)


def test_the_runs_data_says_whether_prompts_are_turns(run: Path, tmp_path: Path) -> None:
    config, tokenizer = read_config(run), load_tokenizer(str(run / "checkpoint"))
    assert asks_raw(config, tokenizer)
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"id": "a", "messages": [{"role": "user", "content": "x"}]}\n')
    as_chat = config.model_copy(update={"data": config.data.model_copy(update={"train": rows})})
    assert not asks_raw(as_chat, tokenizer)
    rows.unlink()  # only the chat template is left to decide
    assert not asks_raw(as_chat, tokenizer)
    tokenizer.chat_template = None
    assert asks_raw(as_chat, tokenizer)


def test_a_chat_question_becomes_a_turn_and_the_context_a_system_turn(run: Path) -> None:
    talk = talk_to(run)
    talk.raw = False
    without, with_context = map(talk.tokenizer.decode, talk.sequences("two and two?"))
    assert without == "<|im_start|>user\ntwo and two?<|im_end|>\n<|im_start|>assistant\n"
    assert with_context == f"<|im_start|>system\n{CONTEXT}<|im_end|>\n{without}"


def test_the_runs_placement_is_the_chats(run: Path) -> None:
    config = read_config(run)
    as_chat = config.model_copy(update={"context": config.context.model_copy(update={"placement": "user_prefix"})})
    talk = Conversation(as_chat, find_weights(run, None), "Rules.", Decoding(6, 0.0, ()), True)
    assert not talk.raw
    _, with_context = map(talk.tokenizer.decode, talk.sequences("two and two?"))
    assert with_context.startswith("<|im_start|>user\nRules.\n\ntwo and two?<|im_end|>")


def test_a_high_temperature_is_not_greedy_and_a_low_one_nearly_is(run: Path, expected: dict[str, str]) -> None:
    torch.manual_seed(0)
    answers = {}
    for temperature in (1e-4, 5.0):
        talk = Conversation(read_config(run), run / "checkpoint", CONTEXT, Decoding(6, temperature, ()), True)
        answers[temperature] = {dict(talk.ask(QUESTION))["distilled"] for _ in range(4)}
    assert answers[1e-4] == {expected["distilled"]}
    assert len(answers[5.0]) > 1


def test_typed_line_ends() -> None:
    assert line_ends(r"Q: a\nA:") == "Q: a\nA:"
    assert line_ends(r"a\\nb") == r"a\nb"


def opcd(*arguments: str | Path, stdin: str | None = None) -> Result:
    return CliRunner().invoke(app, ["chat", *map(str, arguments)], input=stdin)


def test_one_question(run: Path, expected: dict[str, str]) -> None:
    result = opcd(run, "--prompt", r"Q: cat\nA:")
    assert result.exit_code == 0, result.output
    assert result.stdout.strip() == "\n".join(f"{voice}: {answer.strip()}" for voice, answer in expected.items())


def test_lines_of_a_pipe_are_questions(run: Path) -> None:
    result = opcd(run, "--max-tokens", "2", stdin="Q: cat\\nA:\n\nQ: [b]dog\\nA:\n")
    assert result.exit_code == 0, result.output
    assert result.stdout.count("distilled: ") == 2
    assert "> Q: [b]dog\nA:" in result.stdout


@pytest.mark.parametrize(("weights", "named"), [(None, "checkpoint/, best/"), ("exports/step-1", "exports/step-1/")])
def test_a_run_without_a_student_is_refused(run: Path, tmp_path: Path, weights: str | None, named: str) -> None:
    (tmp_path / "config.yaml").write_text((run / "config.yaml").read_text())
    with pytest.raises(ChatError, match="holds no student yet"):
        find_weights(tmp_path, weights)
    result = opcd(tmp_path, *(() if weights is None else ("--weights", weights)))
    assert result.exit_code == 2
    assert result.stderr.startswith(f"opcd: {tmp_path} holds no student yet (looked for {named}): a run writes one at ")
    for step in ("step-000005", "step-000010"):
        (tmp_path / "exports" / step).mkdir(parents=True)
    with pytest.raises(ChatError, match=r": --weights exports/step-000010$"):
        find_weights(tmp_path, weights)


def test_the_best_weights_stand_in_for_the_last(run: Path, tmp_path: Path) -> None:
    (tmp_path / "best").mkdir()
    (tmp_path / "best/config.json").write_text("{}")
    assert find_weights(tmp_path, None) == tmp_path / "best"
    (tmp_path / "checkpoint").mkdir()
    (tmp_path / "checkpoint/adapter_config.json").write_text("{}")
    assert find_weights(tmp_path, None) == tmp_path / "checkpoint"


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    assert "is not a run's folder" in opcd(tmp_path).stderr
    (tmp_path / "config.yaml").touch()
    assert "expected sections such as `run:`" in opcd(tmp_path).stderr


def test_a_missing_base_model_is_named(run: Path, tmp_path: Path) -> None:
    with pytest.raises(chat.ConfigError, match=f"no model at {tmp_path / 'nowhere'}: no such folder"):
        chat.load_model(str(tmp_path / "nowhere"), "unused", "cpu")


def test_the_base_sees_the_context_of_a_row(run: Path, tmp_path: Path, tiny_model: Path) -> None:
    """Of the row that is named, or of the first; rows with whole chats of the teacher's have none for a question."""
    rows = [
        '{"id": "a", "prompt": "Q", "context": "one"}',
        '{"id": "b", "prompt": "Q", "context": "Q: dog\\nA: dogs\\n"}',
    ]
    (tmp_path / "train.jsonl").write_text("\n".join(rows))
    settings = yaml.safe_load((run / "config.yaml").read_text())
    settings |= {"context": {"from_rows": True}, "data": {"train": str(tmp_path / "train.jsonl")}}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(settings))
    make_tiny_model(tmp_path / "checkpoint", seed=3)
    own = cli_chat.open_conversation(tmp_path, None, "b", 6, 0.0, False)
    assert dict(own.ask(QUESTION))["base + context"] == greedy(tiny_model, CONTEXT + QUESTION)
    first = cli_chat.open_conversation(tmp_path, None, None, 6, 0.0, False)
    assert first.sequences(QUESTION)[1] != own.sequences(QUESTION)[1]
    turn = [{"role": "user", "content": "u"}]
    (tmp_path / "train.jsonl").write_text(json.dumps({"id": "a", "messages": turn, "teacher_messages": turn}))
    without = cli_chat.open_conversation(tmp_path, None, None, 6, 0.0, False)
    assert list(dict(without.ask("u"))) == ["base", "distilled"]
