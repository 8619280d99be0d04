"""Weight groups between threads: arrival, checks, lost members, membership changes, deltas."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

import learner.publishing.packer
from common.config.model import SyncConfig
from common.weight_sync import delta
from common.weight_sync.checksum import checksum
from common.weight_sync.collective import SyncError
from common.weight_sync.manifest import SyncManifest
from learner.publishing.sender import open_sender
from tests.support.processes import free_port
from tests.support.weight_groups import HOST, manifest_of, open_all, same, sync_once, together

TENSORS = {
    "a": torch.arange(10, dtype=torch.float32).reshape(2, 5),
    "b": torch.ones(3, dtype=torch.bfloat16),
    "c": torch.tensor(7.0),
    "d": torch.randn(100),
}
SHORT = SyncConfig(timeout_s=2.0)
PATIENT = SyncConfig(timeout_s=60.0)
"""For tests in which an error must come long before the timeout."""


def exchange(
    sent: SyncManifest,
    *expected: SyncManifest,
    tensors: Iterator[tuple[str, Tensor]] | None = None,
) -> list:
    """One sync in a new group, with a receiver for each manifest in `expected`."""
    sender, receivers = open_all(PATIENT, len(expected))
    results = sync_once(sender, receivers, sent, tensors or iter(TENSORS.items()), expected)
    for end in (sender, *receivers):
        end.close()
    return results


def test_every_receiver_gets_every_tensor_bit_for_bit() -> None:
    plan = manifest_of(TENSORS)
    report, first, second = exchange(plan, plan, plan)
    assert report.bytes == report.weight_bytes == 10 * 4 + 3 * 2 + 4 + 400
    assert same(first, TENSORS)
    assert same(second, TENSORS)


@pytest.mark.parametrize("other", [manifest_of(TENSORS, 61), manifest_of({**TENSORS, "a": torch.zeros(5, 2)})])
def test_another_plan_is_refused_by_all_before_a_byte_is_sent(other: SyncManifest) -> None:
    stream = iter(TENSORS.items())
    sent, fitting, received = exchange(manifest_of(TENSORS), manifest_of(TENSORS), other, tensors=stream)
    assert "do not agree" in str(received)
    assert "a receiver refused the manifest" in str(sent)
    assert "another receiver refused" in str(fitting)
    assert next(stream)[0] == "a"  # the sender had not even asked for its weights


def test_another_version_is_refused() -> None:
    sent, received = exchange(manifest_of(TENSORS, version=3), manifest_of(TENSORS, version=4))
    assert "publishes version 3, this receiver expects 4" in str(received)
    assert isinstance(sent, SyncError)


def test_bytes_that_change_on_the_way_are_found_by_both_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(learner.publishing.packer, "checksum", lambda data: checksum(data ^ 1))
    sent, received = exchange(manifest_of(TENSORS), manifest_of(TENSORS))
    for end in (sent, received):
        assert isinstance(end, SyncError)
        assert "bucket 0 (a) arrived with other bytes" in str(end)


def test_weights_that_do_not_fit_the_manifest_are_not_sent() -> None:
    started = time.monotonic()
    swapped = iter([("b", TENSORS["b"]), ("a", TENSORS["a"])])
    sent, received = exchange(manifest_of(TENSORS), manifest_of(TENSORS), tensors=swapped)
    assert "the learner's next weight is" in str(sent)
    assert "weight sync broke at bucket 0 (a)" in str(received)
    assert time.monotonic() - started < 30  # the receiver failed at once, before its timeout


def test_weights_beyond_the_manifest_are_an_error() -> None:
    sent, _ = exchange(
        manifest_of(TENSORS), manifest_of(TENSORS), tensors=iter([*TENSORS.items(), ("e", TENSORS["c"])])
    )
    assert "the learner has e beyond the end" in str(sent)


def test_a_receiver_that_never_comes_is_named() -> None:
    with pytest.raises(SyncError, match=r"rank 0 of 2 could not join .* within 1 s"):
        open_sender(SyncConfig(timeout_s=1.0), HOST, free_port(), 2)


def test_a_receiver_that_falls_silent_is_a_timeout_that_names_the_bucket() -> None:
    sender, (receiver,) = open_all(SHORT, 1)
    plan = manifest_of(TENSORS)
    silent = receiver.receive(plan)

    def takes_one() -> None:
        next(silent)
        time.sleep(4)

    sent, _ = together(lambda: sender.send(iter(TENSORS.items()), plan), takes_one)
    assert "weight sync broke at bucket 2 (c)" in str(sent)
    with pytest.raises(SyncError):
        list(silent)


def test_a_receiver_that_gives_up_ends_the_sync_for_all_at_once() -> None:
    sender, (quitter, other) = open_all(PATIENT, 2)
    plan = manifest_of(TENSORS)

    def quits() -> None:
        stream = quitter.receive(plan)
        next(stream)
        stream.close()

    started = time.monotonic()
    sent, _, received = together(
        lambda: sender.send(iter(TENSORS.items()), plan), quits, lambda: dict(other.receive(plan))
    )
    assert isinstance(sent, SyncError)
    assert isinstance(received, SyncError)
    assert time.monotonic() - started < 30


# --- members come and go --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("deltas", [False, True])
def test_one_leaves_another_joins_and_all_have_the_current_version(deltas: bool) -> None:
    sync = PATIENT.model_copy(update={"delta": deltas})
    plan = manifest_of(TENSORS)
    sender, (stays, leaves) = open_all(sync, 2)
    assert all(same(got, TENSORS) for got in sync_once(sender, (stays, leaves), plan, iter(TENSORS.items()))[1:])
    for end in (sender, stays, leaves):
        end.close()

    now = {name: tensor + 1 for name, tensor in TENSORS.items()}
    sender, receivers = open_all(sync, 3)  # the one that stays, and two new ones
    report, *got = sync_once(sender, receivers, plan, iter(now.items()))
    assert all(same(one, now) for one in got)
    assert report.bytes == report.weight_bytes  # whole: no receiver holds a base in the new group


def test_after_leaving_nothing_can_be_sent_or_received() -> None:
    sender, (receiver,) = open_all(SHORT, 1)
    for end in (sender, receiver, sender, receiver):
        end.close()
    with pytest.raises(SyncError, match="has left its weight group"):
        sender.send(iter(TENSORS.items()), manifest_of(TENSORS))
    with pytest.raises(SyncError, match="has left its weight group"):
        next(receiver.receive(manifest_of(TENSORS)))


# --- deltas ---------------------------------------------------------------------------------------------------------

DELTAS = SyncConfig(timeout_s=60.0, delta=True)


def weights(seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "x": torch.randn(3000, generator=generator).bfloat16(),
        "y": torch.randn(40, 50, generator=generator).bfloat16(),
        "z": torch.randn(1000, generator=generator),
    }


def stepped(before: dict[str, Tensor], places: slice) -> dict[str, Tensor]:
    """`before` with some elements of each tensor changed."""
    after = {name: tensor.clone() for name, tensor in before.items()}
    for tensor in after.values():
        tensor.view(-1)[places] *= 1.5
    return after


def test_a_delta_is_short_and_arrives_bit_for_bit() -> None:
    sender, receivers = open_all(DELTAS, 2)
    plan = manifest_of(weights(0), 7000)
    current = weights(0)
    sync_once(sender, receivers, plan, iter(current.items()))
    for step in range(3):
        current = stepped(current, slice(step, None, 100))
        report, *got = sync_once(sender, receivers, plan, iter(current.items()))
        assert all(same(one, current) for one in got)
        assert report.bytes < 0.05 * report.weight_bytes


def test_a_delta_is_never_longer_than_the_whole() -> None:
    sender, receivers = open_all(DELTAS, 1)
    plan = manifest_of(weights(0), 7000)
    for seed in range(2):
        report, got = sync_once(sender, receivers, plan, iter(weights(seed).items()))
        assert same(got, weights(seed))
        assert report.bytes == report.weight_bytes


def test_a_base_that_went_bad_is_found_and_the_bucket_comes_whole() -> None:
    sender, receivers = open_all(DELTAS, 2)
    plan = manifest_of(weights(0), 7000)
    sync_once(sender, receivers, plan, iter(weights(0).items()))
    receivers[1]._base[0][11] ^= 1
    current = stepped(weights(0), slice(0, None, 100))
    report, *got = sync_once(sender, receivers, plan, iter(current.items()))
    assert all(same(one, current) for one in got)
    assert 6000 < report.bytes < report.weight_bytes  # x whole, the others as deltas


def test_a_receiver_without_the_base_makes_the_sync_a_whole_one() -> None:
    sender, receivers = open_all(DELTAS, 2)
    plan = manifest_of(weights(0), 7000)
    sync_once(sender, receivers, plan, iter(weights(0).items()))
    receivers[0]._base_serial = 0
    report, *got = sync_once(sender, receivers, plan, iter(weights(0).items()))
    assert all(same(one, weights(0)) for one in got)
    assert report.bytes == report.weight_bytes
    report, *_ = sync_once(sender, receivers, plan, iter(weights(0).items()))
    assert report.bytes < 0.05 * report.weight_bytes  # and the next one builds on it


def test_a_delta_that_cannot_be_applied_is_a_mismatch(monkeypatch: pytest.MonkeyPatch) -> None:
    sender, receivers = open_all(DELTAS, 1)
    plan = manifest_of(weights(0), 7000)
    sync_once(sender, receivers, plan, iter(weights(0).items()))
    encode = delta.encode
    monkeypatch.setattr(delta, "encode", lambda *pair: encode(*pair)[:-1])
    current = stepped(weights(0), slice(0, None, 100))
    report, got = sync_once(sender, receivers, plan, iter(current.items()))
    assert same(got, current)
    assert report.bytes > report.weight_bytes
