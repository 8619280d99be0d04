"""The checks before a run: each finds its fault, and `preflight` reports all faults at once."""

from __future__ import annotations

import json
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from common.config.model import Config, ConfigError
from learner.preflight import machine
from learner.preflight.checks import CONFIG_CHECKS, INPUT_CHECKS, preflight
from learner.preflight.machine import check_devices, check_files, check_folders, check_packages, check_ports, check_ray
from learner.preflight.models import check_models, check_student_limits
from learner.preflight.report import Finding, Report
from tests.support.configs import config_of
from tests.support.tiny import CHAT_TEMPLATE, make_tokenizer
from tests.support.tokenizers import build_tokenizer

Make = Callable[..., Config]


def rows(path: Path, *words: str) -> str:
    lines = [json.dumps({"id": word, "prompt": f"Q: {word}\nA:", "answer": f"{word}s"}) for word in words]
    path.write_text("\n".join(lines))
    return str(path)


@pytest.fixture
def make(tmp_path: Path, tiny_model: Path) -> Make:
    """Configuration of a run whose parts are all there, with changed sections."""

    def config(**sections: dict[str, Any]) -> Config:
        settings: dict[str, Any] = {
            "run": {"name": "r", "dir": str(tmp_path / "runs")},
            "student": {"model": str(tiny_model)},
            "data": {
                "train": rows(tmp_path / "train.jsonl", "cat", "dog"),
                "eval": rows(tmp_path / "eval.jsonl", "sun"),
            },
        }
        return config_of(**{**settings, **{name: {**settings.get(name, {}), **one} for name, one in sections.items()}})

    return config


def errors(config: Config) -> list[str]:
    return preflight(config, offline=True).texts("error")


def texts(findings: Any) -> list[str]:
    found: list[Finding] = list(findings)
    assert all(one.level == "error" for one in found)
    return [one.text for one in found]


def test_a_run_whose_parts_are_there_has_neither_errors_nor_warnings(make: Make) -> None:
    report = preflight(make(), offline=True)
    assert report.texts("error") == report.texts("warning") == []
    assert report.inputs is not None
    report.raise_errors()


def test_all_faults_are_reported_at_once(make: Make, tmp_path: Path) -> None:
    faulty = make(
        data={"train": str(tmp_path / "none.jsonl")},
        teacher={"model": str(tmp_path / "none")},
        learner={"gpus_per_rank": 4096},
    )
    with pytest.raises(ConfigError) as caught:
        preflight(faulty, offline=True).raise_errors()
    data, model, gpus = str(caught.value).splitlines()
    assert data.startswith("data.train: ")
    assert model.startswith("teacher.model: no model at ")
    assert gpus.startswith("the run asks for 4096 GPUs")


def test_every_check_is_in_one_list() -> None:
    names = [check.__name__ for check in (*CONFIG_CHECKS, *INPUT_CHECKS)]
    assert len(set(names)) == len(names)


# --- models -----------------------------------------------------------------------------------------------------------


def test_a_folder_that_is_no_model_and_a_path_that_is_none_are_errors(make: Make, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    found = texts(check_models(make(student={"model": str(tmp_path / "empty")}, teacher={"model": f"{tmp_path}/none"})))
    assert found[0].endswith("not a model folder (no config.json)")
    assert "no such folder" in found[1]


def test_a_model_folder_without_a_tokenizer_is_an_error(make: Make, tmp_path: Path, tiny_model: Path) -> None:
    shutil.copytree(tiny_model, tmp_path / "bare", ignore=shutil.ignore_patterns("tokenizer*", "special*", "chat*"))
    (found,) = errors(make(student={"model": str(tmp_path / "bare")}))
    assert found.startswith(f"no tokenizer at {tmp_path / 'bare'}")


def test_a_student_cannot_be_longer_than_its_model(make: Make) -> None:
    assert not texts(check_student_limits(make(student={"max_sequence_tokens": 4096})))
    (found,) = texts(check_student_limits(make(student={"max_sequence_tokens": 4097})))
    assert "student.max_sequence_tokens is 4097" in found
    assert "at most 4096" in found


# --- this machine -----------------------------------------------------------------------------------------------------


def test_gpus_that_are_not_there_are_errors(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    asks = make(rollout={"gpus_per_worker": 1}, learner={"gpus_per_rank": 1}, sync={"backend": "nccl"})
    for count, named in ((0, "free are 0 (none)"), (1, "free are 1 (this machine: 1)")):
        monkeypatch.setattr(machine, "gpu_count", lambda count=count: count)
        (found,) = texts(check_devices(asks))
        assert "the run asks for 2 GPUs" in found
        assert named in found
    monkeypatch.setattr(machine, "gpu_count", lambda: 2)
    assert not texts(check_devices(asks))


def test_a_run_on_a_cluster_is_not_judged_by_this_machine(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "auto")
    monkeypatch.setattr(machine, "gpu_count", lambda: 0)
    assert not texts(check_devices(make(learner={"gpus_per_rank": 1})))


def test_a_folder_that_cannot_be_written_is_an_error(make: Make, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (found,) = texts(check_folders(make(run={"dir": str(tmp_path / "file" / "deeper")})))
    assert f"{tmp_path / 'file'} is a file" in found
    assert not texts(check_folders(make()))
    before = sorted(tmp_path.iterdir())
    assert not texts(check_folders(make()))
    assert sorted(tmp_path.iterdir()) == before
    unwritable = {"run": {"dir": "/proc/runs"}, "sync": {"backend": "file", "folder": "/proc/weights"}}
    found = texts(check_folders(make(**unwritable)))  # even root cannot write there
    assert [one.partition(" cannot be written")[0] for one in found] == [
        "run.dir: /proc/runs/r",
        "sync.folder: /proc/weights",
    ]
    assert all(one.endswith(" in /proc") for one in found)


def test_files_of_keys_that_cannot_be_read_are_errors(make: Make, tmp_path: Path) -> None:
    missing = str(tmp_path / "none")
    remote = {"url": "https://teacher:8001", "client_key_file": missing, "ca_file": missing}
    found = texts(check_files(make(teacher=remote)))
    assert [one.partition(":")[0] for one in found] == ["teacher.client_key_file", "teacher.ca_file"]
    (found,) = texts(check_files(make(teacher={"server_keys_file": missing})))
    assert found == f"teacher.server_keys_file: cannot read {missing}: No such file or directory"
    asking = {"backend": "remote", "endpoint": "http://e:1", "model": "m", "endpoint_key_file": missing}
    found = texts(check_files(make(teacher=asking)))
    assert found == [f"teacher.endpoint_key_file: cannot read {missing}: No such file or directory"]
    (tmp_path / "key").write_text("secret")
    assert not texts(check_files(make(teacher={"url": "http://t:1", "client_key_file": str(tmp_path / "key")})))


@pytest.mark.parametrize("variable", ["RAY_TMPDIR", "TMPDIR"])
def test_a_folder_too_long_for_sockets_is_an_error(variable: str, make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RAY_ADDRESS", "RAY_TMPDIR", "TMPDIR"):
        monkeypatch.delenv(name, raising=False)
    assert not texts(check_ray(make()))
    monkeypatch.setenv(variable, "/" + "x" * 60)
    (found,) = texts(check_ray(make()))
    assert "set RAY_TMPDIR to one of at most 39 bytes" in found


def test_the_address_of_the_dashboard_is_no_cluster_to_join(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "http://head:8265")
    (found,) = texts(check_ray(make()))
    assert found.startswith("RAY_ADDRESS is http://head:8265, the address of the dashboard")
    monkeypatch.setenv("RAY_ADDRESS", "head:6379")
    assert not texts(check_ray(make()))


def test_a_port_in_use_and_one_used_twice_are_errors(make: Make) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        (found,) = texts(check_ports(make(run={"metrics_port": port})))
        assert found.startswith(f"run.metrics_port {port} on 127.0.0.1 cannot be used")
    assert not texts(check_ports(make(run={"metrics_port": port})))
    (found,) = texts(check_ports(make(run={"metrics_port": port}, teacher={"port": port})))
    assert found.startswith(f"teacher.port and run.metrics_port are both {port}")


def test_a_missing_package_is_an_error(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "find_spec", lambda name: None)
    (found,) = texts(check_packages(make(run={"wandb": "project"})))
    assert found == "run.wandb needs the package wandb, which is not installed: pip install wandb"
    assert not texts(check_packages(make()))


# --- rows against the models ------------------------------------------------------------------------------------------


def narrow(model: Path, folder: Path, vocab_size: int) -> str:
    """A copy of `model` whose configuration says that it has `vocab_size` embedding rows."""
    shutil.copytree(model, folder)
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**settings, "vocab_size": vocab_size, "pad_token_id": None}))
    return str(folder)


@pytest.mark.parametrize("part", ["train", "eval", "context", "text"])
def test_a_token_id_outside_the_embedding_is_an_error(part: str, make: Make, tmp_path: Path, tiny_model: Path) -> None:
    special = "<|im_end|>"
    width = make_tokenizer().convert_tokens_to_ids(special)  # its id is the first outside
    config = make(student={"model": narrow(tiny_model, tmp_path / "narrow", width)}, loss={"top_k": 8})
    assert errors(config) == []
    changes: dict[str, dict[str, Any]] = {
        "train": {"data": {"train": rows(tmp_path / "special.jsonl", special)}},
        "eval": {"data": {"eval": rows(tmp_path / "special.jsonl", special)}},
        "context": {"context": {"text": special}},
        "text": {"eval": {"perplexity": {"book": str(tmp_path / "book.txt")}}},
    }
    (tmp_path / "book.txt").write_text(f"once {special}")
    student = {"model": config.student.model}
    found = errors(make(student=student, loss={"top_k": 8}, **changes[part]))
    assert found
    assert all(f"token id {width} is not in the embedding of" in one for one in found)
    assert any(f"which has {width} rows" in one for one in found)


def test_the_teacher_is_judged_by_its_own_embedding(make: Make, tmp_path: Path, tiny_model: Path) -> None:
    width = make_tokenizer().convert_tokens_to_ids("<|im_end|>")
    teacher = narrow(tiny_model, tmp_path / "narrow", width)
    config = make(teacher={"model": teacher}, context={"text": "<|im_end|>"}, loss={"top_k": 8})
    (found,) = errors(config)
    assert found.startswith(f"the context: token id {width} is not in the embedding of teacher.model")


@pytest.mark.parametrize("form", ["conversation", "chat"])
def test_what_stands_between_the_turns_of_a_game_is_checked(
    form: str, make: Make, tmp_path: Path, tiny_model: Path
) -> None:
    """A template that ends answers by a token which no prompt of one turn holds; and one that drops answers."""
    (tmp_path / "games.jsonl").write_text('{"id": "g", "environment": "FrozenLake", "options": {"size": 3}}')
    games: dict[str, Any] = {"data": {"train": str(tmp_path / "games.jsonl")}, "environment": {"sample_format": form}}
    ends = CHAT_TEMPLATE.replace("<|im_end|>", "{{ '<|said|>' if message.role == 'assistant' else '<|im_end|>' }}")
    drops = "{% if message.role != 'assistant' %}" + CHAT_TEMPLATE.partition("%}")[2].replace(
        "{% endfor", "{% endif %}{% endfor"
    )
    drops = CHAT_TEMPLATE.partition("%}")[0] + "%}" + drops
    width = 258
    found = {}
    for name, template in (("ends", ends), ("drops", drops)):
        folder = Path(narrow(tiny_model, tmp_path / name, width))
        tokenizer = build_tokenizer(template, named=("<|im_start|>", "<|im_end|>", "<|said|>"))
        assert tokenizer.convert_tokens_to_ids("<|said|>") == width
        tokenizer.save_pretrained(folder)
        found[name] = errors(make(student={"model": str(folder)}, loss={"top_k": 8}, **games))
    if form == "chat":
        assert found == {"ends": [], "drops": []}
        return
    assert [one.partition(" is not in")[0] for one in found["ends"]] == [f"a game's next turn: token id {width}"]
    (line,) = found["drops"]
    assert line.startswith("environment.sample_format `conversation`: this chat template does not render an answer")


def test_each_set_is_checked_for_itself(make: Make, tmp_path: Path) -> None:
    """Rows of two sets with one id: the long one is found, in whichever set it is."""
    long, short = "x" * 90, "y"
    for train, held_out, key in ((long, short, "data.train"), (short, long, "data.eval")):
        for name, text in (("a", train), ("b", held_out)):
            (tmp_path / f"{name}.jsonl").write_text(json.dumps({"id": 0, "prompt": text, "answer": "z"}))
        data = {"train": str(tmp_path / "a.jsonl"), "eval": str(tmp_path / "b.jsonl")}
        config = make(student={"max_sequence_tokens": 64}, rollout={"max_tokens": 8}, data=data)
        found = [one for one in errors(config) if "student tokens" in one]
        assert [one.split(": row")[0] for one in found] == [key]


def test_the_longest_answer_is_that_of_the_set(make: Make) -> None:
    config = make(student={"max_sequence_tokens": 64}, rollout={"max_tokens": 8}, eval={"max_tokens": 60})
    (found,) = errors(config)
    assert found.startswith("data.eval: row 'sun': 69 student tokens")
    assert found.endswith("lower eval.max_tokens")


def test_a_context_that_the_teacher_or_the_answering_engine_cannot_hold_is_an_error(make: Make) -> None:
    """One line if no row would fit, else a line for each row that does not."""
    short = {"max_sequence_tokens": 64}
    (found,) = errors(make(context={"text": "x" * 100}, teacher=short, rollout={"max_tokens": 8}))
    assert found.startswith(
        "the context has 100 tokens, which with the longest answer (rollout.max_tokens 8) leaves no"
    )
    assert found.endswith("within 64 (teacher.max_sequence_tokens): shorten the context")
    (found,) = errors(make(context={"text": "x" * 100}, student=short, rollout={"max_tokens": 8}))
    assert "within 64 (student.max_sequence_tokens)" in found
    found_rows = errors(make(context={"text": "x" * 50}, teacher=short, rollout={"max_tokens": 8}))
    assert [one.split(": row")[0] for one in found_rows] == ["data.train", "data.train"]
    (found,) = errors(make(context={"text": "x" * 50}, student=short, rollout={"max_tokens": 8}))
    assert found.startswith("data.eval: row 'sun': 67 teacher tokens")


def test_more_ids_than_the_vocabulary_has_are_an_error(make: Make) -> None:
    (found,) = errors(make(loss={"top_k": 513}))
    assert found.startswith("loss.top_k is 513")
    (found,) = errors(make(loss={"top_k": 256, "form": "exact"}))
    assert "set loss.top_k=512" in found


TURNS = """
- {role: system, content: Give the plural.}
- {role: user, content: dog}
- {role: assistant, content: dogs}
"""


def test_few_shot_turns_are_checked_and_a_list_of_messages_as_text_is_a_warning(make: Make, tmp_path: Path) -> None:
    chat = {"id": "a", "messages": [{"role": "user", "content": "cat"}], "answer": "cats"}
    (tmp_path / "chat.jsonl").write_text(json.dumps(chat))
    (tmp_path / "context.yaml").write_text(TURNS)
    data = {name: str(tmp_path / "chat.jsonl") for name in ("train", "eval")}

    def checked(text: str | None = None, placement: str | None = "turns") -> Report:
        source = {"file": str(tmp_path / "context.yaml")} if text is None else {"text": text}
        return preflight(make(data=data, context={**source, "placement": placement}), offline=True)

    right = checked()
    assert right.texts("error") == right.texts("warning") == []
    assert right.inputs is not None
    (context,) = right.inputs.contexts.values()
    assert "dog<|im_end|>\n<|im_start|>assistant\ndogs" in make_tokenizer().decode(context.ids.tolist())
    (fault,) = checked("Give the plural.").texts("error")
    assert fault.startswith("context.text: context.placement `turns` needs a list of messages")
    (line,) = checked(placement="system").texts("warning")
    assert "is inserted as it is written: set context.placement=turns" in line
    (line,) = checked("dogs<|im_end|>", placement="system").texts("warning")
    assert line.startswith("the context holds the text of a special token, '<|im_end|>'")


# --- a teacher of another model ---------------------------------------------------------------------------------------


def with_tokenizer(model: Path, folder: Path, **options: Any) -> str:
    """A copy of `model` with another tokenizer; by default with the same special tokens."""
    shutil.copytree(model, folder)
    build_tokenizer(**{"named": ("<|im_end|>", "<|im_start|>"), **options}).save_pretrained(folder)
    return str(folder)


def test_a_teacher_with_the_same_ids_and_another_eos_fits(make: Make, tmp_path: Path, tiny_model: Path) -> None:
    """Base student, instruct teacher: one vocabulary, in which another token ends a text."""
    teacher = with_tokenizer(tiny_model, tmp_path / "t", eos="<|im_start|>")
    assert errors(make(teacher={"model": teacher})) == []


def test_a_teacher_may_know_more_tokens_but_not_fewer_or_others(make: Make, tmp_path: Path, tiny_model: Path) -> None:
    more = with_tokenizer(tiny_model, tmp_path / "more", plain=("<tool>",))
    other = with_tokenizer(tiny_model, tmp_path / "other", named=("<|im_end|>", "<|user|>"))
    assert errors(make(teacher={"model": more})) == []
    (found,) = errors(make(student={"model": more}, teacher={"model": str(tiny_model)}))
    assert "token id 258 is '<tool>' for the student and does not exist for the teacher" in found
    (found,) = errors(make(teacher={"model": other}))
    assert "is '<|im_start|>' for the student and is '<|user|>' for the teacher" in found


def test_a_teachers_own_tokens_are_no_support_of_a_narrower_student(
    make: Make, tmp_path: Path, tiny_model: Path
) -> None:
    more = with_tokenizer(tiny_model, tmp_path / "more", plain=("<tool>",))
    student = narrow(tiny_model, tmp_path / "narrow", 258)
    parts: dict[str, Any] = {"student": {"model": student}, "teacher": {"model": more}}
    assert errors(make(loss={"top_k": 8}, **parts)) == []
    (found,) = errors(make(loss={"top_k": 8, "support": "union"}, **parts))
    assert "up to 258, and the student has 258 outputs" in found


def test_a_template_that_gives_bos_to_one_side_alone_is_a_warning(make: Make, tmp_path: Path) -> None:
    template = "{% if messages[0].role != 'system' %}{{ bos_token }}{% endif %}" + CHAT_TEMPLATE
    folder = shutil.copytree(make().student.model, tmp_path / "uneven")
    build_tokenizer(template, bos="<|begin|>").save_pretrained(folder)
    chat = tmp_path / "chat.jsonl"
    chat.write_text('{"id": "a", "messages": [{"role": "user", "content": "hi"}]}')
    uneven = make(student={"model": str(folder)}, data={"train": str(chat)})
    (line,) = preflight(uneven, offline=True).texts("warning")
    assert line.startswith("data.train: 1 rows begin with the BOS token for one of student and teacher alone")
    even = make(
        student={"model": str(folder)}, data={"train": str(chat)}, context={"text": "c", "placement": "user_prefix"}
    )
    assert preflight(even, offline=True).texts("warning") == []
