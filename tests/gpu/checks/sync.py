"""Weight syncs between processes: within one GPU, over nccl, with a killed receiver, and whole, into a live teacher."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from common.config.model import SyncConfig
from common.protocol.schema import TokenSequence
from common.weight_sync.checksum import mixed_sum
from common.weight_sync.collective import SyncError
from common.weight_sync.manifest import SyncManifest, TensorSpec
from learner.publishing.sender import Sender, open_sender
from tests.gpu.members import HOST, LiveTeacher, Member, Receiving
from tests.gpu.models import joined, load, model_folder, plain_logprobs, random_sequences, rms
from tests.gpu.place import SLACK_BYTES, Place, gib
from tests.gpu.report import Figure
from tests.gpu.training import new_engine, scored_batch, train, training_config
from tests.support.processes import free_port

TIMES_NOISE = 2.0
"""Allowed rms difference between learner and teacher in units of one's own error against float32: both have it."""


def open_group(sync: SyncConfig, members: list[Receiving], device: str) -> Sender:
    """Form a group of this process, the sender, and `members`."""
    port, world_size = free_port(), len(members) + 1
    for rank, member in enumerate(members, 1):
        member.start("join", port, rank, world_size)
    sender = open_sender(sync, HOST, port, world_size, device)
    for member in members:
        member.result()
    return sender


def ipc(place: Place) -> Iterator[Figure]:
    """Two receivers on this GPU; on CPU gloo stands in for CUDA's handles."""
    yield from between(place, "ipc" if place.on_gpu else "gloo", [str(place.device)] * 2)


def nccl2(place: Place) -> Iterator[Figure]:
    """One receiver on the second GPU, and one on a third if there is one; on CPU gloo stands in."""
    others = [f"cuda:{index}" for index in range(1, torch.cuda.device_count())][:2]
    devices = others if place.on_gpu else ["cpu", "cpu"]
    yield from between(place, "nccl" if place.on_gpu else "gloo", devices)


def between(place: Place, backend: Literal["ipc", "nccl", "gloo"], devices: list[str]) -> Iterator[Figure]:
    """Send to a process on each of `devices`; kill the last one, send again, then form a new group without it."""
    sizes = place.sizes
    sync = SyncConfig(backend=backend, timeout_s=sizes.sync_timeout_s, bucket_bytes=sizes.sync_bucket_bytes)
    generator = torch.Generator(place.device).manual_seed(0)
    count, items = 8, sizes.sync_bucket_bytes // 8
    tensors = [
        (f"t{i}", torch.randn(items, device=place.device, generator=generator).to(torch.bfloat16)) for i in range(count)
    ]
    specs = tuple(TensorSpec(name, "bfloat16", tuple(tensor.shape)) for name, tensor in tensors)
    manifest = SyncManifest(specs, sync.bucket_bytes, 1)
    expected = [mixed_sum(tensor.view(torch.uint8)) for _, tensor in tensors]
    before = place.allocated()
    members = [Receiving(Member, device, sync.model_dump(mode="json")) for device in devices]

    def send_to(group: list[Receiving], sender: Sender) -> tuple[int, float]:
        for member in group:
            member.start("sums", manifest)
        report = sender.send(iter(tensors), manifest)
        received = [member.result() for member in group]
        wrong = sum(a != b for one in received for a, b in zip(one, expected, strict=True))
        return wrong, report.bytes / report.seconds / 1e9

    try:
        for member in members:
            member.start("ready")
        for member in members:
            member.result()
        sender = open_group(sync, members, place.device)
        send_to(members, sender)
        wrong, speed = send_to(members, sender)
        yield Figure("tensors that differ", wrong, at_most=0)
        yield Figure("speed", speed, "GB/s")
        members[-1].kill()
        for member in members[:-1]:
            member.start("sums", manifest)
        started = time.monotonic()
        try:
            sender.send(iter(tensors), manifest)
            raise RuntimeError("sending to a killed receiver raised no error")
        except SyncError:
            yield Figure("killed receiver noticed after", time.monotonic() - started, "s", at_most=sync.timeout_s + 5)
        for member in members[:-1]:
            _ignore_error(member)
        sender.close()
        if len(members) > 1:
            sender = open_group(sync, members[:-1], place.device)
            wrong, _ = send_to(members[:-1], sender)
            yield Figure("in a new group", wrong, at_most=0)
            sender.close()
        del sender
        # A killed receiver never confirms that it is done with its handles: torch keeps the buffers that it had.
        yield gib("held afterwards", place.allocated() - before, 2 * sync.bucket_bytes + SLACK_BYTES)
    finally:
        for member in members:
            member.close()


def _ignore_error(member: Receiving) -> None:
    try:
        member.result()
    except RuntimeError:
        return
    raise RuntimeError("a receiver did not notice that another one was killed")


def nccl(place: Place) -> Iterator[Figure]:
    """A group of one: broadcast, abort, and again; gloo stands in on CPU."""
    from common.weight_sync.transports import open_group as open_transport

    sync = SyncConfig(backend="nccl" if place.on_gpu else "gloo", timeout_s=place.sizes.sync_timeout_s)
    buckets, seconds = 0, 0.0
    for _ in range(2):
        group = open_transport(sync, HOST, free_port(), 0, 1, place.device)
        data = group.transport.allocate(place.sizes.sync_bucket_bytes)
        data.fill_(7)
        group.transport.broadcast(data, "the check")
        buckets += bool((data == 7).all())
        seconds = max(seconds, place.seconds_once(group.close))
    yield Figure("broadcasts", buckets, at_least=2)
    yield Figure("abort", seconds, "s", at_most=10)


def weights(place: Place) -> Iterator[Figure]:
    """Two versions from a ZeRO-3 learner into a live teacher: gather, pack, send, load; then log-probs agree."""
    sizes, shape = place.sizes, place.sizes.trained
    folder = model_folder(place, shape)
    sync = SyncConfig(backend="ipc" if place.on_gpu else "gloo", timeout_s=60, bucket_bytes=sizes.sync_bucket_bytes)
    teacher = Receiving(LiveTeacher, str(place.device), sync.model_dump(mode="json"), str(folder))
    sequences = random_sequences(place, sizes.samples, shape.vocabulary, seed=5)
    try:
        teacher.start("score", sequences)
        engine = new_engine(training_config(place, folder, "bfloat16", zero_stage=3))
        first = joined(teacher.result())
        sender = open_group(sync, [teacher], place.device)
        batch = scored_batch(place)
        speed = 0.0
        for _ in range(2):
            train(engine, batch, 1)
            manifest = SyncManifest(engine.weight_specs(), sync.bucket_bytes, engine.weight_version)
            teacher.start("load", manifest)
            report = sender.send(engine.named_weights(), manifest)
            teacher.result()
            speed = report.bytes / report.seconds / 1e9
        sender.close()
        second = joined(teacher.call("score", sequences))
        learner = joined(engine.inference.logprobs(sequences))
        exact = exact_logprobs(place, engine, folder, sequences)
    finally:
        teacher.close()
    noise = rms(learner - exact)
    yield Figure("learner-teacher sd", rms(second - learner), "nats", at_most=TIMES_NOISE * noise)
    moved = rms(second - first)
    yield Figure("change in two versions", moved, "nats", at_least=3 * noise)
    yield Figure("speed", speed, "GB/s")


def exact_logprobs(place: Place, engine: Any, folder: Any, sequences: list[TokenSequence]) -> Tensor:
    """Log-probs in float32 of the learner's weights, which are bfloat16 numbers."""
    model = load(folder, place, torch.float32)
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, tensor in engine.named_weights():
            parameters[name].copy_(tensor)
    return joined([plain_logprobs(model, sequence_ids(s), len(s.response_ids)) for s in sequences])


def sequence_ids(sequence: TokenSequence) -> Any:
    """Prompt and response as one array."""
    return np.concatenate([sequence.prompt_ids, sequence.response_ids])
