"""A model that does not exist is refused within seconds, in one line."""

from __future__ import annotations

import socket
import time
from pathlib import Path

import pytest

from common.config.model import ConfigError
from common.data import model_lookup
from common.data.model_lookup import load_tokenizer, require_model

IN_SECONDS = 5.0


@pytest.fixture(autouse=True)
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Run in an empty folder with an empty hub cache."""
    (tmp_path / "local").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def refusal(model: str) -> str:
    """Return the error line and check that it came fast."""
    start = time.monotonic()
    with pytest.raises(ConfigError) as caught:
        require_model(model)
    assert time.monotonic() - start < IN_SECONDS
    line = str(caught.value)
    assert len(line.splitlines()) == 1
    return line


@pytest.mark.parametrize(
    "model", ["./none", "../none", "/none", "~/none", "a/b/c", "local/none", "models/none", "no name", "-x"]
)
def test_a_path_without_a_folder_is_refused_without_asking_the_hub(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", lambda *_, **__: pytest.fail("asked the hub"))
    remedy = "; opcd prepare writes the examples' models there" if model == "models/none" else ""
    assert refusal(model) == f"no model at {model}: no such folder (seen from {tmp_path}){remedy}"


@pytest.mark.parametrize("model", ["Qwen/none", "gpt-none"])
def test_a_hub_name_without_a_network_is_refused_in_seconds(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as closed:  # a port without a listener
        closed.bind(("127.0.0.1", 0))
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{closed.getsockname()[1]}")
        line = refusal(model)
    assert line.startswith(f"no model at {model}: no such folder (seen from ")
    assert "not in the local Hugging Face cache" in line


def test_a_silent_hub_is_refused_in_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_lookup, "HUB_TIMEOUT_S", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        assert "the hub does not provide it" in refusal("Qwen/none")


def test_folders_and_cached_models_pass_without_asking_the_hub(
    tmp_path: Path, empty_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", lambda *_, **__: pytest.fail("asked the hub"))
    require_model(str(tmp_path / "local"))
    repository = empty_cache / "models--Qwen--small"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs/main").write_text("abc")
    (repository / "snapshots/abc").mkdir(parents=True)
    (repository / "snapshots/abc/config.json").write_text("{}")
    require_model("Qwen/small")


def test_a_folder_without_a_tokenizer_is_refused_in_one_line() -> None:
    with pytest.raises(ConfigError, match=r"^no tokenizer at local: [^\n]*$"):
        load_tokenizer("local")
