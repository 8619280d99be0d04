"""vLLM's command line for an export; `tests.integration.deploy.test_serve` starts it."""

from __future__ import annotations

import json
import os
import shlex
from pathlib import Path

import pytest
from typer.testing import CliRunner

from common.config.model import ConfigError
from common.files import apply_umask
from common.serving import exported_weights, server_arguments
from deploy.cli.main import app


def write_json(path: Path, value: dict[str, object]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def test_a_whole_model_is_served_in_its_own_precision(tmp_path: Path) -> None:
    write_json(tmp_path / "checkpoint/config.json", {"torch_dtype": "float32"})
    folder = exported_weights(tmp_path)
    expected = ["--model", f"{tmp_path}/checkpoint", "--served-model-name", "demo", "--dtype", "float32"]
    assert server_arguments(folder, "demo", gpu=True) == expected
    assert server_arguments(folder, "demo", gpu=False) == [*expected, "--kv-cache-memory-bytes", "2147483648"]


def test_an_adapter_is_served_on_its_base_model(tmp_path: Path) -> None:
    write_json(tmp_path / "checkpoint/adapter_config.json", {"base_model_name_or_path": "models/base", "r": 12})
    lora = ["--enable-lora", "--max-lora-rank", "16", "--lora-modules", f"demo={tmp_path}/checkpoint"]
    assert server_arguments(exported_weights(tmp_path), "demo", gpu=True) == ["--model", "models/base", *lora]


def test_best_is_served_if_the_run_did_not_end_and_a_run_without_weights_is_refused(tmp_path: Path) -> None:
    write_json(tmp_path / "best/config.json", {})
    assert exported_weights(tmp_path) == tmp_path / "best"
    with pytest.raises(ConfigError, match=r"no weights to serve: no model in exports/step-000002/"):
        exported_weights(tmp_path, "exports/step-000002")


def test_the_command_passes_further_options_on(tmp_path: Path) -> None:
    write_json(tmp_path / "demo/checkpoint/config.json", {"dtype": "bfloat16"})
    result = CliRunner().invoke(app, ["serve", str(tmp_path / "demo"), "--print", "--port", "8001"])
    assert result.exit_code == 0, result.output
    words = shlex.split(result.stdout)
    assert words[:3] == ["python", "-m", "vllm.entrypoints.openai.api_server"]
    assert words[-2:] == ["--port", "8001"]
    assert words[words.index("--served-model-name") + 1] == "demo"


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o027, 0o640), (0o077, 0o600)])
def test_files_get_the_modes_of_the_umask(tmp_path: Path, umask: int, mode: int) -> None:
    before = os.umask(umask)
    try:
        folder = tmp_path / "export"
        (folder / "below").mkdir(parents=True)
        for name in ("model.safetensors", "below/code.py"):
            (folder / name).touch(0o600)
        apply_umask(folder)
        (folder / "plain").touch()
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in folder.rglob("*") if path.is_file()} == {mode}
