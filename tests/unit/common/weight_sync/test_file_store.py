"""Weights in a folder: readable by other programs, refused when damaged, rotated."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from common.config.model import SyncConfig
from common.weight_sync import file_store
from common.weight_sync.collective import SyncError
from learner.publishing.sender import Sender, open_sender
from tests.support.weight_groups import HOST, manifest_of, open_all, same, sync_once, together

TENSORS = {
    "model.a.weight": torch.randn(20, 30),
    "model.b.weight": torch.randn(7, 3).bfloat16(),
    "c": torch.tensor(2.5),
    "lm_head.weight": torch.randn(50, 3),
}
PLAN = manifest_of(TENSORS, 1000)


def settings(folder: Path, timeout_s: float = 10.0) -> SyncConfig:
    return SyncConfig(backend="file", folder=folder, timeout_s=timeout_s)


def published(sync: SyncConfig, *versions: int, port: int = 1) -> Sender:
    sender = open_sender(sync, HOST, port, 2)
    for version in versions:
        sender.send(iter({name: tensor + version for name, tensor in TENSORS.items()}.items()), PLAN.at(version))
    return sender


def test_receivers_get_every_tensor_bit_for_bit(tmp_path: Path) -> None:
    sender, receivers = open_all(settings(tmp_path), 2)
    for version in range(3):
        now = {name: tensor + version for name, tensor in TENSORS.items()}
        report, *got = sync_once(sender, receivers, PLAN.at(version), iter(now.items()))
        assert report.bytes == report.weight_bytes == PLAN.nbytes
        assert all(same(one, now) for one in got)


def test_anything_that_reads_safetensors_can_read_a_version(tmp_path: Path) -> None:
    published(settings(tmp_path), 7)
    folder = tmp_path / "version-000007"
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert sorted(index["weight_map"]) == sorted(TENSORS)
    assert index["metadata"]["total_size"] == PLAN.nbytes
    read: dict[str, Tensor] = {}
    for name in sorted(set(index["weight_map"].values())):
        read |= load_file(folder / name)
    assert len(set(index["weight_map"].values())) > 1
    assert all(read[name].equal(tensor + 7) and read[name].dtype == tensor.dtype for name, tensor in TENSORS.items())


def test_transformers_loads_a_published_model(tmp_path: Path, tiny_model: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.01
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    open_sender(settings(tmp_path), HOST, 1, 2).send(iter(weights.items()), manifest_of(weights, 100_000, 1))
    shutil.copy(tiny_model / "config.json", tmp_path / "version-000001")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "version-000001")
    tokens = torch.arange(20)[None]
    assert loaded(tokens).logits.equal(model(tokens).logits)


def test_the_last_two_versions_stay(tmp_path: Path) -> None:
    published(settings(tmp_path), 1, 2, 3, 4)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["version-000003", "version-000004"]


def test_a_run_that_goes_on_from_an_earlier_version_replaces_what_came_after(tmp_path: Path) -> None:
    published(settings(tmp_path), 1, 2, 3, 4)
    sender, receivers = open_all(settings(tmp_path), 1)
    now = {name: tensor * 2 for name, tensor in TENSORS.items()}
    _, got = sync_once(sender, receivers, PLAN.at(4), iter(now.items()))
    assert same(got, now)
    sync_once(sender, receivers, PLAN.at(2), iter(now.items()))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["version-000002"]


def test_an_earlier_senders_version_is_not_taken_for_the_awaited_one(tmp_path: Path) -> None:
    published(settings(tmp_path), 1, port=1)
    _, (receiver,) = open_all(settings(tmp_path, timeout_s=0.3), 1)
    (error,) = together(lambda: list(receiver.receive(PLAN.at(1))))
    assert "did not appear within 0 s" in str(error)
    assert "of an earlier sender" in str(error)


def test_a_version_that_is_not_complete_does_not_exist(tmp_path: Path) -> None:
    sender, (receiver,) = open_all(settings(tmp_path, timeout_s=0.3), 1)
    short = iter(list(TENSORS.items())[:3])
    sent, received = sync_once(sender, (receiver,), PLAN.at(1), short)
    assert "ended before lm_head.weight of the manifest" in str(sent)
    assert "the folder has none" in str(received)
    _, got = sync_once(sender, (receiver,), PLAN.at(1), iter(TENSORS.items()))  # and the rest is no obstacle
    assert same(got, TENSORS)
    assert [path.name for path in tmp_path.iterdir()] == ["version-000001"]


@pytest.mark.parametrize("damage", ["byte", "shorter", "longer", "header", "gone", "manifest"])
def test_a_damaged_version_is_refused(tmp_path: Path, damage: str) -> None:
    sender, (receiver,) = open_all(settings(tmp_path), 1)
    sender.send(iter(TENSORS.items()), PLAN.at(1))
    shard = tmp_path / "version-000001" / "model-00003-of-00003.safetensors"
    data = bytearray(shard.read_bytes())
    if damage == "byte":
        data[-1] ^= 1
    elif damage == "shorter":
        data = data[:-1]
    elif damage == "longer":
        data += b"0"
    elif damage == "header":
        data[12] ^= 1
    shard.write_bytes(data)
    if damage == "gone":
        shard.unlink()
    if damage == "manifest":
        (shard.parent / file_store.MANIFEST).write_text("{}")
    (error,) = together(lambda: list(receiver.receive(PLAN.at(1))))
    assert isinstance(error, SyncError)
    assert "version-000001" in str(error)


def test_another_plan_is_refused(tmp_path: Path) -> None:
    sender, (receiver,) = open_all(settings(tmp_path), 1)
    _, error = sync_once(sender, (receiver,), PLAN.at(1), iter(TENSORS.items()), [manifest_of(TENSORS, 999, 1)])
    assert "do not agree" in str(error)


def test_a_folder_that_cannot_be_written_is_a_sync_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(SyncError, match=r"sync\.folder: .*file/weights cannot be created"):
        open_sender(settings(tmp_path / "file" / "weights"), HOST, 1, 2)


def test_without_a_version_nothing_is_written_or_read(tmp_path: Path) -> None:
    sender, (receiver,) = open_all(settings(tmp_path), 1)
    sent, received = sync_once(sender, (receiver,), PLAN, iter(TENSORS.items()))
    assert "need a version" in str(sent)
    assert "needs the version" in str(received)
    assert list(tmp_path.iterdir()) == []
