"""Loading of a run's configuration from YAML and overrides, and the error lines."""

from __future__ import annotations

import re
from datetime import date
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import BaseModel

from common.config.loader import RENAMED_KEYS, dump_config, load_config, load_teacher_config
from common.config.model import Config, ConfigError
from tests.support.configs import config_of
from tests.support.paths import ROOT

MINIMAL = """
run: {name: small}
student: {model: models/a}
context: {text: "Answer in one word."}
data: {train: train.jsonl}
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A file with only the required keys."""
    file = tmp_path / "run.yaml"
    file.write_text(MINIMAL)
    return file


def mistake(path: Path, *overrides: str) -> str:
    """The single error line of a bad configuration."""
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides)
    lines = str(caught.value).splitlines()
    assert len(lines) == 1, lines
    return lines[0]


def test_missing_keys_get_their_defaults(path: Path) -> None:
    config = load_config(path)
    assert config.run.path == Path("runs/small")
    assert (config.loss.form, config.loss.direction, config.loss.top_k) == ("tail", "reverse", 256)
    assert config.student.template_date == date(2026, 1, 1)


@pytest.mark.parametrize(
    ("override", "named", "nearest"),
    [
        ("learner.stesp=3", "learner.stesp=3", "learner.steps"),
        ("rollout.tempersture=0.7", "rollout.tempersture=0.7", "rollout.temperature"),
        ("rollout.zero_stage=3", "rollout.zero_stage=3", "learner.zero_stage"),  # right name, wrong section
        ("leaner.lr=1e-5", "leaner", "learner"),  # misspelt section
    ],
)
def test_an_unknown_key_names_the_nearest_one(path: Path, override: str, named: str, nearest: str) -> None:
    line = mistake(path, override)
    assert line.startswith(f"unknown key {named}")
    assert line.endswith(f"did you mean {nearest}?")


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("run.patience_s=60", "unknown key run.patience_s: it is now run.placement_timeout_s"),
        ("teacher.keys_file=k", "unknown key teacher.keys_file: it is now teacher.server_keys_file"),
        ("teacher.key_file=k", "unknown key teacher.key_file: it is now teacher.client_key_file"),
        ("teachers.big.key_file=k", "unknown key teachers.big.key_file: it is now teachers.big.client_key_file"),
        ("rollout.over_issue=0.1", "unknown key rollout.over_issue: it is now rollout.oversample_fraction"),
        ("environment.samples=chat", "unknown key environment.samples: it is now environment.sample_format"),
        ("sync.drift_warn_nats=1", "unknown key sync.drift_warn_nats: it is now sync.mismatch_warn_nats"),
        ("sync.drift_stop_nats=1", "unknown key sync.drift_stop_nats: it is now sync.mismatch_stop_nats"),
        ("sync.drift_warn_share=1", "unknown key sync.drift_warn_share: it is now sync.mismatch_warn_share"),
        ("sync.drift_stop_share=1", "unknown key sync.drift_stop_share: it is now sync.mismatch_stop_share"),
        ("teacher.kind=self", "bad value teacher.kind='self': it is now `live`"),
        ("teachers.big.kind=self", "bad value teachers.big.kind='self': it is now `live`"),
    ],
)
def test_an_old_name_is_refused_with_the_new_one(path: Path, override: str, line: str) -> None:
    assert mistake(path, override) == line
    key, _, value = override.partition("=")
    if key.startswith("teacher."):
        with pytest.raises(ConfigError, match=re.escape(line)):
            load_teacher_config(path, [f"{key}={value}"])


def test_every_renamed_key_points_to_an_existing_key() -> None:
    for old, new in RENAMED_KEYS.items():
        section, _, name = old.partition(".")
        fields = Config.model_fields[section].annotation.model_fields  # type: ignore[union-attr]
        assert new in fields
        assert name not in fields


def test_an_unknown_key_without_a_near_one_lists_the_section(path: Path) -> None:
    line = mistake(path, "eval.qqqq=1")
    assert "unknown key eval.qqqq=1" in line
    assert "every, grader, max_tokens" in line


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("learner.lr=0", ("learner.lr=0", "greater than 0")),
        ("learner.lr=fast", ("learner.lr='fast'", "number")),
        ("learner.steps=1.5", ("learner.steps=1.5", "integer")),
        ("learner.zero_stage=4", ("learner.zero_stage=4", "0, 1, 2 or 3")),
        ("rollout.top_p=1.5", ("rollout.top_p=1.5", "less than or equal to 1")),
        ("loss.form=tial", ("loss.form='tial'", "did you mean tail?")),
        ("run.name=../up", ("run.name='../up'", "pattern")),
        ("rollout.stop=foo", ("expected a list: rollout.stop=[foo]",)),
    ],
)
def test_a_bad_value_names_key_value_and_what_is_valid(path: Path, override: str, parts: tuple[str, ...]) -> None:
    line = mistake(path, override)
    assert line.startswith("bad value ")
    for part in parts:
        assert part in line


@pytest.mark.parametrize("many", [{"from_rows": True}, {"pool": "p.jsonl"}, {"from_rollout": "a:b"}])
def test_turns_are_one_list_of_messages_for_all_rows(many: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="`turns` takes one list of messages"):
        config_of(context={**many, "placement": "turns"})


@pytest.mark.parametrize(
    ("override", "part"),
    [
        ("context.file=c.txt", "exactly one of context.text, context.file and context.pool"),
        ("context.pool=c.jsonl", "exactly one of context.text, context.file and context.pool"),
        ("context.text=null", "exactly one of context.text, context.file and context.pool"),
        ("loss.top_k=2048", "loss.top_k 2048 is larger than teacher.max_k 1024"),
        ("student.system=text", "student.system_text must be set if and only if"),
        ("learner.cpu_offload=true", "needs learner.zero_stage 1, 2 or 3"),
    ],
)
def test_contradicting_keys_are_refused(path: Path, override: str, part: str) -> None:
    assert part in mistake(path, override)


def test_exact_is_over_the_whole_vocabulary(path: Path) -> None:
    assert "set loss.support to `student`, not `union`" in mistake(path, "loss.form=exact", "loss.support=union")


def test_every_mistake_has_a_line_of_its_own(path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(path, ["learner.lr=0", "learner.stesp=3"])
    assert len(str(caught.value).splitlines()) == 2


@pytest.mark.parametrize("key", ["run", "student", "context", "data"])
def test_a_missing_section_is_named(path: Path, key: str) -> None:
    tree = yaml.safe_load(MINIMAL)
    del tree[key]
    path.write_text(yaml.safe_dump(tree))
    assert mistake(path) == f"missing key {key}"


@pytest.mark.parametrize(
    ("text", "value"), [("1e-5", 1e-5), ("2.0e-5", 2e-5), ("1E-3", 1e-3), ("3", 3.0), (".5e-4", 5e-5)]
)
def test_numbers_may_have_any_notation(path: Path, text: str, value: float) -> None:
    assert load_config(path, [f"learner.lr={text}"]).learner.lr == value


def test_a_text_that_only_looks_like_a_number_stays_text(path: Path) -> None:
    assert load_config(path, ["context.text=none", "run.name=1e"]).run.name == "1e"


def test_lists_and_texts_with_an_equals_sign(path: Path) -> None:
    config = load_config(path, ['rollout.stop=["\\n", "Q:"]', "context.text=a=b"])
    assert config.rollout.stop == ("\n", "Q:")
    assert config.context.text == "a=b"


def test_null_unsets_a_key(path: Path) -> None:
    config = load_config(path, ["learner.lr=1e-3", "learner.lr=null", "context.text=null", "context.file=c.txt"])
    assert config.learner.lr == 1e-6
    assert (config.context.text, config.context.file) == (None, Path("c.txt"))
    assert mistake(path, "run.name=null") == "missing key run.name"


def test_later_overrides_win(path: Path) -> None:
    assert load_config(path, ["learner.steps=2", "learner.steps=5"]).learner.steps == 5


@pytest.mark.parametrize("override", ["learner.lr", "lr=1e-5", "=3", "learner.=3"])
def test_a_bad_override_shows_the_expected_form(path: Path, override: str) -> None:
    assert "expected section.key=value" in mistake(path, override)


def test_a_value_is_not_a_section(path: Path) -> None:
    assert "run.name.first=1" in mistake(path, "run.name.first=1")


@pytest.mark.parametrize(("text", "part"), [("[1, 2]", "got list"), ("run: {name: a", "is not YAML"), ("", "NoneType")])
def test_a_file_without_a_configuration_is_refused(path: Path, text: str, part: str) -> None:
    path.write_text(text)
    assert part in mistake(path)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    assert mistake(tmp_path / "none.yaml").startswith("cannot read ")
    assert mistake(Path("none.yaml")).endswith(f"(seen from {Path.cwd()})")


def test_sections_are_closed_and_immutable(path: Path) -> None:
    config = load_config(path)
    sections = [value for _, value in config if isinstance(value, BaseModel)]
    assert len(sections) == len(Config.model_fields) - 1  # `teachers` maps names to sections
    for section in sections:
        assert section.model_config["extra"] == "forbid"
        assert section.model_config["frozen"] is True


def test_a_dumped_configuration_loads_to_an_equal_one(path: Path, tmp_path: Path) -> None:
    overrides = ["learner.lr=1e-5", 'rollout.stop=["\\n"]', "context.text=Äh\\n", "learner.betas=[0.9, 0.95]"]
    config = load_config(path, overrides)
    again = tmp_path / "again.yaml"
    again.write_text(dump_config(config), encoding="utf-8")
    assert load_config(again) == config


def test_the_demo_resolves_and_survives_a_dump(tmp_path: Path) -> None:
    config = load_config(ROOT / "deploy/configs/demo.yaml")
    again = tmp_path / "again.yaml"
    again.write_text(dump_config(config), encoding="utf-8")
    assert load_config(again) == config


def test_the_teacher_falls_back_to_the_students_model(path: Path) -> None:
    assert load_teacher_config(path).teacher.model == "models/a"
    assert load_teacher_config(path, ["teacher.model=models/b"]).teacher.model == "models/b"
    assert load_config(path).teacher_model == "models/a"
    assert load_config(path, ["teacher.model=models/b"]).teacher_model == "models/b"


def test_weights_go_into_the_runs_folder_unless_another_is_named(path: Path) -> None:
    config = load_config(path, ["sync.backend=file"])
    assert config.sync_in_run.folder == Path("runs/small/weights").absolute()
    assert load_config(path, ["sync.backend=file", "sync.folder=/share/w"]).sync_in_run.folder == Path("/share/w")


@pytest.mark.parametrize("backend", ["nccl", "ipc", "file"])
def test_delta_needs_gloo(path: Path, backend: str) -> None:
    assert load_config(path, ["sync.delta=true"]).sync.delta
    assert f"not `{backend}`" in mistake(path, "sync.delta=true", f"sync.backend={backend}")


def test_a_teacher_needs_nothing_but_its_own_section(tmp_path: Path) -> None:
    path = tmp_path / "teacher.yaml"
    path.write_text("teacher: {model: models/b, port: 8001}")
    assert load_teacher_config(path).teacher.port == 8001
    with pytest.raises(ConfigError, match=r"teacher\.model is missing"):
        load_teacher_config(path, ["teacher.model=null"])
    with pytest.raises(ConfigError, match=r"did you mean teacher\.port\?"):
        load_teacher_config(path, ["teacher.prot=1"])


def test_a_context_is_read_byte_for_byte(path: Path, tmp_path: Path) -> None:
    file = tmp_path / "context.txt"
    file.write_bytes(b"Q: dog\r\nA: dogs\n\n")
    config = load_config(path, ["context.text=null", f"context.file={file}"])
    assert config.context.read() == "Q: dog\r\nA: dogs\n\n"
    file.unlink()
    with pytest.raises(ConfigError, match="cannot read"):
        config.context.read()


def test_more_teachers_are_checked_like_the_first(path: Path) -> None:
    config = load_config(path, ["teachers.big.model=models/b", "teachers.live.kind=live"])
    assert {name: one.kind for name, one in config.named_teachers().items()} == {
        "default": "frozen",
        "big": "frozen",
        "live": "live",
    }
    assert "teachers.live.kind `live`" in mistake(path, "teachers.live.kind=live", "teachers.live.url=http://x")
    assert "did you mean" in mistake(path, "teachers.big.modle=x")
    assert "`default` is the name" in mistake(path, "teachers.default.model=x")
    assert "teachers.big.max_k 8" in mistake(path, "teachers.big.max_k=8")


def test_a_teacher_with_changing_weights_cannot_be_served(path: Path) -> None:
    with pytest.raises(ConfigError, match=r"teacher\.kind `ema` follows one run's student"):
        load_teacher_config(path, ["teacher.kind=ema"])
    assert "receives new weights" in mistake(path, "teacher.kind=live", "teacher.backend=vllm")


def test_vllm_as_the_teacher_takes_every_loss_that_its_runner_has(path: Path) -> None:
    load_config(path, ["teacher.backend=vllm", "loss.support=teacher", "loss.temperature=0.7"])
    for support in ("student", "union", "teacher"):
        load_config(path, ["teacher.backend=vllm", f"loss.support={support}", "teacher.gpus=1", "loss.temperature=2"])
        load_config(path, ["teacher.backend=vllm", f"loss.support={support}", "teacher.url=http://127.0.0.1:1"])


REMOTE = ("teacher.backend=remote", "teacher.endpoint=http://e:8000/v1", "teacher.model=m", "loss.support=teacher")


def test_a_teacher_in_front_of_an_endpoint(path: Path) -> None:
    teacher = load_config(path, [*REMOTE, "teacher.endpoint_model=big", "teacher.endpoint_key_file=key"]).teacher
    assert (teacher.endpoint, teacher.endpoint_model) == ("http://e:8000/v1", "big")
    assert load_teacher_config(path, REMOTE[:2]).teacher.model == "models/a"
    as_client = [f"teachers.far.{key.partition('.')[2]}" for key in REMOTE[:3]]
    load_config(path, [*as_client, "teachers.far.url=http://t:1", "loss.temperature=2"])  # the server decides


@pytest.mark.parametrize(
    ("overrides", "model"),
    [
        ([], "models/a"),
        (["teacher.model=models/b"], "models/b"),
        (["teacher.url=http://t:1"], None),
        (["teacher.url=http://t:1", "teacher.model=models/b"], "models/b"),
        ([*REMOTE], None),
        ([*REMOTE, "teacher.model=models/a"], "models/a"),  # the student's: its engines hold it anyway
        ([*REMOTE, "teacher.url=http://t:1"], None),
    ],
)
def test_the_model_that_answers_with_the_context(path: Path, overrides: list[str], model: str | None) -> None:
    """No run loads the weights that an endpoint holds."""
    assert load_config(path, overrides).answering_model == model


@pytest.mark.parametrize(
    ("overrides", "why"),
    [
        (["teacher.endpoint=null"], "backend `remote` needs endpoint"),
        (["teacher.backend=vllm"], "endpoint is for backend `remote`, not `vllm`"),
        (["teacher.backend=transformers", "teacher.endpoint=null", "teacher.endpoint_model=m"], "need endpoint"),
        (["teacher.endpoint=e:8000"], "endpoint 'e:8000' is not an address: write it as http://HOST:PORT"),
        (["teacher.endpoint=https://user:secret@e"], "put the key into endpoint_key_file"),
        (["teacher.endpoint=http://e/?key=secret"], "put the key into endpoint_key_file"),
        (["teacher.model=null"], "backend `remote` needs model"),
        (["teacher.gpus=1"], "gpus is for a teacher that loads its model"),
        (["teacher.tensor_parallel_size=2"], "tensor_parallel_size is for a teacher that loads"),
        (["teacher.device_map=auto"], "device_map is for a teacher that loads"),
        (["teacher.gpu_memory_utilization=0.5"], "gpu_memory_utilization is for a teacher that loads"),
        (["teacher.kind=live"], "kind `live` receives new weights, which backend `remote` cannot"),
        (["teacher.kind=ema"], "kind `ema` receives new weights, which backend `remote` cannot"),
        (["teacher.kind=base"], "kind `base` is computed by the learner: it has no endpoint"),
        (["loss.temperature=0.7"], "at temperature 1 only, loss.temperature is 0.7"),
        (["learner.deterministic=true"], "learner.deterministic is not possible"),
        (["rollout.source=teacher"], "teacher.backend `remote` only scores; choose a backend that loads"),
    ],
)
def test_what_an_endpoint_cannot_do_is_refused(path: Path, overrides: list[str], why: str) -> None:
    found = mistake(path, *REMOTE, *overrides)
    assert why in found
    assert "secret" not in found


@pytest.mark.parametrize(
    ("overrides", "why"),
    [
        (["teacher.kind=base"], "needs learner.lora"),
        (["teacher.kind=base", "learner.lora.rank=4", "teachers.big.model=m"], "`teachers` must be empty"),
        (["teachers.own.kind=base", "learner.lora.rank=4"], "possible for `teacher` only"),
        (["teacher.kind=base", "learner.lora.rank=4", "loss.support=union"], "loss.support must be `student`"),
        (["rollout.colocated=true"], "unknown key rollout.colocated: give worker, rank and teacher parts of one GPU"),
        (["learner.ranks=2", "learner.gpus_per_rank=0.5"], "learner.gpus_per_rank is 0.5 for 2 ranks"),
        (["rollout.tensor_parallel_size=2", "rollout.gpus_per_worker=0.5"], "needs whole GPUs"),
        (
            ["rollout.gpus_per_worker=0.5", "rollout.gpu_memory_utilization=0.6"],
            "(0.6) is more than the process's part",
        ),
        (["teacher.backend=vllm"], "teacher.backend `vllm` on CPU returns log-probs at its own top k only"),
        (["teachers.big.model=m", "teachers.big.backend=vllm", "loss.support=union"], "teachers.big.backend `vllm` on"),
        (["teacher.gpus=0.2", "teacher.gpu_memory_utilization=0.3"], "teacher.gpu_memory_utilization (0.3) is more"),
        (["rollout.workers=3", "rollout.max_workers=2"], "rollout.max_workers (2) is less than rollout.workers (3)"),
        (["sync.delta=true", "sync.backend=file"], "not `file`"),
        (["sync.expert_mismatch=true"], "records experts on GPUs only: set rollout.gpus_per_worker"),
        (
            ["sync.expert_mismatch=true", "rollout.gpus_per_worker=1", "learner.deterministic=true"],
            "needs the prefix cache, which learner.deterministic turns off",
        ),
        (["learner.ranks=2", "sync.timeout_s=1800"], "learner.collective_timeout_s (1800) must be longer than"),
        (["rollout.topk_from=learner", "loss.support=teacher"], "does not use"),
        (["eval.every=2", "data.valid=null"], "data.valid is not set"),
    ],
)
def test_rules_between_sections(path: Path, overrides: list[str], why: str) -> None:
    assert why in mistake(path, *overrides)


def test_a_base_teacher_with_adapters_is_fine(path: Path) -> None:
    assert load_config(path, ["teacher.kind=base", "learner.lora.rank=4"]).teacher.kind == "base"


@pytest.mark.parametrize(
    ("content", "part"),
    [
        (b"", "is empty"),
        (b" \n", "is empty"),
        (b"\xef\xbb\xbfRules.", "begins with a byte-order mark"),
        (b"\xff", "is not UTF-8"),
    ],
)
def test_a_context_that_no_run_means_is_refused(content: bytes, part: str, path: Path, tmp_path: Path) -> None:
    (tmp_path / "c.txt").write_bytes(content)
    with pytest.raises(ConfigError, match=rf"context\.file: .*c\.txt {part}"):
        load_config(path, ["context.text=null", f"context.file={tmp_path / 'c.txt'}"]).context.read()
    with pytest.raises(ConfigError, match=r"context\.text is empty"):
        load_config(path, ['context.text=""']).context.read()


def test_a_missing_relative_context_names_the_folder_searched(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=rf"cannot read none\.txt: .* \(seen from {tmp_path}\)"):
        load_config(path, ["context.text=null", "context.file=none.txt"]).context.read()


def test_half_a_character_in_the_configuration_is_one_line(path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^[^\n]*holds half a character \('\\ud83d'\)[^\n]*$"):
        load_config(path, [r'context.text="cut \ud83d"'])


def test_a_teacher_that_keeps_its_weights_is_not_refreshed(path: Path) -> None:
    assert "refresh_every is 30, but kind `frozen`" in mistake(path, "teacher.refresh_every=30")
    assert load_config(path, ["teacher.refresh_every=30", "teacher.kind=ema"]).teacher.refresh_every == 30


def test_entries_are_clipped_in_divergences_only(path: Path) -> None:
    assert load_config(path, ["loss.clip_per_entry=0.5"]).loss.clip_per_entry == 0.5
    assert "loss.form `policy_gradient` has one term" in mistake(
        path, "loss.clip_per_entry=0.5", "loss.form=policy_gradient"
    )
