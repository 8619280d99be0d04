"""Copies of checkpoints and exports in stores: fsspec's memory, a folder, and moto's S3 server."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import cast

import fsspec
import pytest
from moto.server import ThreadedMotoServer

from common.config.model import CheckpointConfig, ConfigError
from common.telemetry.run_files import Progress
from learner.cluster.services import Services
from learner.evaluation.summary import RunSummary
from learner.loop.checkpoints import MANIFEST, Identity, Manifest
from learner.loop.remote_copy import RemoteCopy
from learner.loop.run_saves import RunSaves
from tests.support.stub_loop import config_of

IDENTITY = Identity(student="a", tokenizer="t", teachers={}, contexts=(), data="d", loss={}, rollout={}, learner={})


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


class Disk:
    """Services of a learner that holds `version`."""

    def __init__(self, version: int) -> None:
        self.version = version

    async def save(self, folder: str) -> None:
        write(Path(folder) / "model.safetensors", str(self.version))

    async def save_state(self, folder: str, *, drop_step: bool) -> None:
        write(Path(folder) / "state", str(self.version))


@pytest.fixture(scope="module")
def s3() -> Iterator[str]:
    """An S3 server, which the environment names, as a user names a store that is not Amazon's."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("AWS_ACCESS_KEY_ID", "test")
        environment.setenv("AWS_SECRET_ACCESS_KEY", "test")
        environment.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture(params=["memory", "file", "s3"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty folder of a store."""
    name = uuid.uuid4().hex
    if request.param == "s3":
        request.getfixturevalue("s3")
        fsspec.filesystem("s3").mkdir(name)
    return {"memory": f"memory://{name}/runs", "file": f"file://{tmp_path}/store", "s3": f"s3://{name}/runs"}[
        request.param
    ]


def stored(url: str) -> dict[str, bytes]:
    """Path below `url` -> content."""
    fs, root = fsspec.core.url_to_fs(url)
    fs.invalidate_cache()
    return {str(path).split(root.strip("/") + "/")[-1]: fs.cat_file(path) for path in fs.find(root)}


def saves_of(folder: Path, url: str, *, version: int, keep: int = 2) -> RunSaves:
    config = config_of()
    config = config.model_copy(
        update={
            "run": config.run.model_copy(update={"dir": folder / "runs"}),
            "checkpoint": CheckpointConfig(every=1, keep=keep, export_at=(2,), copy_to=url),
        }
    )
    summary = RunSummary(planned_steps=10, steps=version)
    return RunSaves(
        config,
        cast(Services, Disk(version)),
        Progress(),
        summary,
        lambda: Manifest(step=summary.steps, identity=IDENTITY, loop={}),
    )


async def test_checkpoints_and_exports_are_copied_and_old_checkpoints_go(tmp_path: Path, url: str) -> None:
    for version in (1, 2, 3):
        saves = saves_of(tmp_path, url, version=version)
        await saves.after_step(version)
    await saves.at_end()
    found = stored(url)
    assert {name for name in found if name.endswith(MANIFEST)} == {
        f"r/checkpoints/step-00000{version}/{MANIFEST}" for version in (2, 3)
    }
    assert found["r/checkpoints/step-000003/learner/state"] == b"3"
    assert found["r/exports/step-000002/model.safetensors"] == b"2"
    assert found["r/checkpoint/model.safetensors"] == b"3"
    assert not any(name.endswith(".writable") for name in found)
    for name, content in found.items():
        assert (tmp_path / "runs" / name).read_bytes() == content


def test_a_copy_replaces_the_one_before(tmp_path: Path, url: str) -> None:
    copy = RemoteCopy(url, "r")
    write(tmp_path / "best/old.safetensors", "1")
    copy.put(tmp_path / "best", "best")
    (tmp_path / "best/old.safetensors").unlink()
    write(tmp_path / "best/new.safetensors", "2")
    copy.put(tmp_path / "best", "best")
    assert stored(url) == {"r/best/new.safetensors": b"2"}


def test_a_manifest_goes_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copy = RemoteCopy(f"memory://{uuid.uuid4().hex}", "r")
    for name in ("a.pt", MANIFEST, "z.pt"):
        write(tmp_path / "step" / name, name)
    order: list[str] = []
    monkeypatch.setattr(copy._fs, "put_file", lambda source, target: order.append(target.rpartition("/")[2]))
    copy.put(tmp_path / "step", "step")
    assert order == ["a.pt", "z.pt", MANIFEST]


async def test_a_store_that_fails_costs_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    saves = saves_of(tmp_path, f"memory://{uuid.uuid4().hex}", version=2)

    def refuse(source: str, target: str) -> None:
        raise RuntimeError("the store is down")

    monkeypatch.setattr(saves._copy._fs, "put_file", refuse)  # type: ignore[union-attr]
    await saves.after_step(2)
    lines = [line for line in capsys.readouterr().out.splitlines() if "WARNING" in line]
    assert len(lines) == 2
    assert "exports/step-000002 was not copied to" in lines[0]
    assert "the store is down; the run goes on without it" in lines[1]
    assert (tmp_path / "runs/r/exports/step-000002/model.safetensors").exists()


@pytest.mark.parametrize("address", ["nonsense://bucket", "file:///proc/none", "s3://none/runs"])
def test_a_store_that_takes_no_file_is_refused_before_the_run(address: str, s3: str) -> None:
    with pytest.raises(ConfigError, match=rf"^checkpoint\.copy_to: {address} takes no files: [^\n]*$"):
        RemoteCopy(address, "r")
