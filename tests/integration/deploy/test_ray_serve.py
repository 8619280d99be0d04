"""The teacher under Ray Serve: one replica a context, the same scores from all, whichever come, go or are killed."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import httpx
import numpy as np
import pytest
import ray
import yaml
from ray import serve
from ray.serve._private.api import call_user_app_builder_with_args_if_necessary
from ray.serve.schema import ServeDeploySchema

from common.config.loader import load_teacher_config
from common.config.model import TeacherConfig
from common.protocol.codec import encode_context
from common.protocol.schema import Context, ItemScore, TeacherInfo, as_ids, context_hash
from common.protocol.scoring import TeacherError
from deploy.serve.ray_serve import REPLICA_HEADER, TeacherArgs, TeacherReplica, teacher
from teacher_server.client import TeacherClient
from teacher_server.http.auth import KEYS_VARIABLE, key_digest
from teacher_server.http.headers import ROUTE_HEADER
from teacher_server.http.serve import build_app
from teacher_server.scoring.checks import RequestRefused
from tests.support.processes import free_port
from tests.support.teacher_oracle import Oracle, assert_score
from tests.support.teacher_running import KEYS, items, request_of, tokens


@pytest.fixture(scope="module")
def config(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("serve")
    (folder / "keys").write_text("".join(f"{tenant} {key_digest(key)}\n" for tenant, key in KEYS.items()))
    path = folder / "teacher.yaml"
    path.write_text(f"teacher: {{model: {tiny_model}, threads: 1, server_keys_file: {folder / 'keys'}}}\n")
    return str(path)


@pytest.fixture(scope="module")
def url(config: str) -> Iterator[str]:
    """Address of the proxy, with two replicas up."""
    port = free_port()
    with pytest.MonkeyPatch.context() as patch:
        for check in ("READY_CHECK", "HEALTH_CHECK"):  # Serve gives up a proxy that is slow on a busy machine
            patch.setenv(f"RAY_SERVE_PROXY_{check}_TIMEOUT_S", "90")
        ray.init("local", num_cpus=2, log_to_driver=False, include_dashboard=False)
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    serve.run(teacher(TeacherArgs(config=config, min_replicas=2, max_replicas=2, cpus=0.5)), name="teacher")
    yield f"http://127.0.0.1:{port}"
    serve.shutdown()
    ray.shutdown()


def contexts_of(info: TeacherInfo) -> list[Context]:
    """Sixteen contexts, the last under a parent: by chance all on one replica once in 32,768 times."""
    ids = [tokens(n, 20 + n) for n in range(15)]
    ids.append(as_ids(np.concatenate([ids[0], tokens(9, 30)])))
    names = [context_hash(info.tokenizer_fingerprint, each) for each in ids]
    return [
        Context(name, each, names[0] if n == 15 else None)
        for n, (name, each) in enumerate(zip(names, ids, strict=True))
    ]


def headers(tenant: str, context: Context) -> dict[str, str]:
    """Headers of a request about a context."""
    return {ROUTE_HEADER: context.hash, "Authorization": f"Bearer {KEYS[tenant]}"}


async def replica_of(url: str, context: Context) -> str:
    """Return the replica that answers for a context."""
    async with httpx.AsyncClient(trust_env=False) as http:
        body = encode_context(Context(context.hash, context.ids))
        reply = await http.put(
            f"{url}/v1/contexts/{context.hash}", content=body, headers=headers("red", context), timeout=300
        )
    assert reply.status_code == 200
    return reply.headers[REPLICA_HEADER]


async def computed(url: str, context: Context) -> float:
    """Context tokens that the replica of a context has computed so far."""
    async with httpx.AsyncClient(trust_env=False) as http:
        reply = await http.get(url + "/metrics", headers=headers("operator", context), timeout=300)
    name = "opcd_teacher_context_tokens_computed_total{"
    counts = [line.rsplit(" ", 1)[1] for line in reply.text.splitlines() if line.startswith(name)]
    return sum(map(float, counts))


async def test_each_context_is_computed_by_one_replica_and_scored_right(url: str, tiny_model: Path) -> None:
    client = TeacherClient(url, "run", 60, KEYS["red"])
    contexts = contexts_of(await client.info())
    for context in contexts:
        await client.put_context(context)
    batch = [item for n, context in enumerate(contexts) for item in items(n, 3, context=context.hash)]
    for _ in range(3):
        response = await client.score(batch, "at_ids", 1.0, 8)
    await client.close()
    oracle, by_name = Oracle.load(tiny_model), {context.hash: context.ids for context in contexts}
    for item, result in zip(batch, response.results, strict=True):
        assert isinstance(result, ItemScore)
        assert item.context is not None
        assert_score(result, oracle.logprobs(by_name[item.context], item.prompt_ids, item.response_ids), item)

    owners: dict[str, list[Context]] = {}
    for context in contexts:
        names = {await replica_of(url, context) for _ in range(5)}
        assert len(names) == 1
        owners.setdefault(names.pop(), []).append(context)
    assert len(owners) == 2
    total = 0.0
    for own in owners.values():
        total += await computed(url, own[0])
    # Each once, whichever replica; the parent a second time where the child lives elsewhere.
    least = sum(context.ids.size for context in contexts) - contexts[0].ids.size
    assert total in (least, least + contexts[0].ids.size)


async def test_a_replica_is_killed_and_the_run_goes_on(url: str, tiny_model: Path) -> None:
    """Whoever asked it is answered by the other, which computes the context anew; a fresh replica takes its place."""
    oracle = Oracle.load(tiny_model)
    client = TeacherClient(url, "run", 120, KEYS["red"])
    contexts = contexts_of(await client.info())
    for context in contexts:
        await client.put_context(context)
    lost = await replica_of(url, contexts[1])
    stop = time.monotonic() + 8

    async def ask(n: int) -> int:
        answers = 0
        while time.monotonic() < stop:
            context = contexts[n % len(contexts)]
            item = items(n + answers, 1, response=30, context=context.hash)[0]
            (result,) = (await client.score([item], "at_ids", 1.0, 8)).results
            assert isinstance(result, ItemScore), result
            assert_score(result, oracle.logprobs(context.ids, item.prompt_ids, item.response_ids), item)
            answers += 1
        return answers

    asked = [asyncio.create_task(ask(n)) for n in range(32)]
    await asyncio.sleep(1)
    (actor,) = (a for a in ray.util.list_named_actors(all_namespaces=True) if lost in a["name"])
    ray.kill(ray.get_actor(actor["name"], namespace=actor["namespace"]))
    answers = await asyncio.gather(*asked)
    assert all(answers)
    assert await replica_of(url, contexts[1]) != lost
    await client.close()


async def test_replicas_come_with_the_load_and_go_with_it(url: str, config: str, tiny_model: Path) -> None:
    """Contexts move to the new replica and back; the clients notice nothing."""
    few = TeacherArgs(
        config=config,
        max_replicas=2,
        target_requests=0.5,
        load_window_s=10.1,
        upscale_delay_s=1,
        downscale_delay_s=1,
        cpus=0.5,
    )
    serve.run(teacher(few), name="scaled", route_prefix="/scaled")
    oracle = Oracle.load(tiny_model)
    client = TeacherClient(url + "/scaled", "run", 120, KEYS["red"])
    contexts = contexts_of(await client.info())
    for context in contexts:
        await client.put_context(context)
    homes = {await replica_of(client.url, context) for context in contexts}
    assert len(homes) == 1
    loaded = asyncio.Event()

    async def score_one(n: int) -> None:
        context = contexts[n % len(contexts)]
        item = items(n, 1, response=30, context=context.hash)[0]
        (result,) = (await client.score([item], "at_ids", 1.0, 8)).results
        assert isinstance(result, ItemScore), result
        assert_score(result, oracle.logprobs(context.ids, item.prompt_ids, item.response_ids), item)

    async def ask(n: int) -> int:
        answers = 0
        while not loaded.is_set():
            await score_one(n + answers)
            answers += 1
            await asyncio.sleep(0.1)
        return answers

    asked = [asyncio.create_task(ask(n)) for n in range(8)]
    try:
        while len(homes) < 2:
            assert not any(task.done() for task in asked)
            await asyncio.sleep(1)
            homes = {await replica_of(client.url, context) for context in contexts}
    finally:
        loaded.set()
    assert all(await asyncio.gather(*asked))
    while len(homes) > 1:
        await asyncio.sleep(1)
        homes = {await replica_of(client.url, context) for context in contexts}
    for n in range(len(contexts)):
        await score_one(n)
    await client.close()
    serve.delete("scaled")


async def test_a_replica_that_computes_nothing_any_more_fails_its_health_check(
    config: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Serve then replaces the replica, which would answer only 503."""
    name = SimpleNamespace(replica_id=SimpleNamespace(unique_id="one"))
    monkeypatch.setattr(serve, "get_replica_context", lambda: name)
    replica = TeacherReplica(load_teacher_config(config, ()))
    replica.check_health()
    replica.__serve_build_asgi_app__()
    service = replica._service
    assert service is not None
    service.start()
    replica.check_health()

    def faulty(_: object) -> None:
        raise KeyError("a series that is not there")

    assert service._scheduler is not None
    service._scheduler._on_batch = faulty
    with pytest.raises(RequestRefused, match="a series that is not there"):
        await service.score("red", request_of(items(1, 1)))
    with pytest.raises(RuntimeError, match=r"must be replaced: the batch loop failed: .*a series that is not there"):
        replica.check_health()
    await service.stop()


@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0"])
def test_nobody_is_anonymous_behind_serves_proxy(host: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It listens where its own options say, whatever teacher.host is."""
    monkeypatch.delenv(KEYS_VARIABLE, raising=False)
    section = TeacherConfig(model="is not loaded", host=host, allow_anonymous=True)
    with pytest.raises(TeacherError, match=r"allow_anonymous is refused under Ray Serve.*set teacher.server_keys_file"):
        build_app(section)


def test_the_example_is_what_serve_reads(config: str) -> None:
    """Every field of the file, and arguments as the command line hands them over: all strings."""
    example = ServeDeploySchema.model_validate(yaml.safe_load(Path("deploy/configs/ray-serve.yaml").read_text()))
    (application,) = example.applications
    assert application.import_path == "deploy.serve.ray_serve:teacher"
    assert TeacherArgs.model_validate(application.args).max_replicas == 4
    # What `serve run` and `serve deploy` call the builder with.
    built = call_user_app_builder_with_args_if_necessary(teacher, {"config": config, "max_replicas": "3"})
    scaling = built._bound_deployment._deployment_config.autoscaling_config
    assert (scaling.min_replicas, scaling.max_replicas) == (1, 3)
