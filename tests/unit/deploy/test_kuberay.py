"""The Kubernetes manifests without a cluster: schemas, references between objects, resources for a run."""

from __future__ import annotations

import importlib
import inspect
import shutil
import subprocess
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from pydantic import ValidationError
from ray.serve.schema import ServeDeploySchema

from common.config.loader import load_config, load_teacher_config
from common.sizing.disk import disk_needs
from common.sizing.machine import GIB
from deploy.docs_tools.sizes import qwen3
from learner.cluster.placement import bundles_of
from tests.support.kuberay_models import PodMonitor, RayClusterSpec, RayJob, RayService
from tests.support.kustomize import Manifest, patched, render
from tests.support.paths import ROOT

KUBERAY = ROOT / "deploy" / "kuberay"
OVERLAYS = ("cpu-small", "gpu-8", "cross-size")
FOLDERS = ("storage", "monitoring", *(f"overlays/{name}" for name in OVERLAYS))
KUBERNETES = "1.34"
CUSTOM = {"RayJob": RayJob, "RayService": RayService, "PodMonitor": PodMonitor}
SECRETS_MADE_BY_HAND = {"opcd-team-key", "opcd-teacher-keys"}
"""Secrets that a user makes by docs/kubernetes.md; the repository only refers to them."""


@cache
def rendered(folder: str) -> tuple[Manifest, ...]:
    return tuple(render(KUBERAY / folder))


def check(manifest: Manifest) -> None:
    """Raise for a field that the API does not have."""
    model = CUSTOM.get(manifest["kind"])
    if model is None:
        kubernetes_validate.validate(manifest, KUBERNETES, strict=True)
        return
    model.model_validate(manifest)
    for cluster in clusters([manifest]):
        for template in cluster.templates():
            wrapped = {"apiVersion": "v1", "kind": "PodTemplate", "metadata": {"name": "x"}, "template": template}
            kubernetes_validate.validate(wrapped, KUBERNETES, strict=True)


def clusters(manifests: Any) -> Iterator[RayClusterSpec]:
    for manifest in manifests:
        if manifest["kind"] == "RayJob":
            yield RayJob.model_validate(manifest).spec.rayClusterSpec
        if manifest["kind"] == "RayService":
            yield RayService.model_validate(manifest).spec.rayClusterConfig


def templates(manifests: Any) -> list[dict[str, Any]]:
    return [template for cluster in clusters(manifests) for template in cluster.templates()]


def containers(template: dict[str, Any]) -> list[dict[str, Any]]:
    return [*template["spec"].get("initContainers", []), *template["spec"]["containers"]]


def everything() -> list[Manifest]:
    return [manifest for folder in FOLDERS for manifest in rendered(folder)]


@pytest.mark.parametrize("folder", FOLDERS)
def test_every_field_is_known(folder: str) -> None:
    assert rendered(folder)
    for manifest in rendered(folder):
        check(manifest)


def test_every_file_is_part_of_something() -> None:
    kinds = {manifest["kind"] for manifest in everything()}
    assert kinds >= {"RayJob", "RayService", "PodMonitor", "ConfigMap", "PersistentVolumeClaim"}
    named = {"kustomization.yaml"}
    for plan in KUBERAY.rglob("kustomization.yaml"):
        tree = yaml.safe_load(plan.read_text())
        named |= {Path(name).name for name in tree.get("resources", [])}
        named |= {patch["path"] for patch in tree.get("patches", [])}
        named |= {name for generated in tree.get("configMapGenerator", []) for name in generated["files"]}
    assert {path.name for path in KUBERAY.rglob("*.yaml")} <= named


HEAD = "spec/rayClusterSpec/headGroupSpec"
CONTAINER = f"{HEAD}/template/spec/containers/0"


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("spec/ttlSecondsAfterFinish", 5),
        ("spec/rayClusterSpec/headGroupSpecs", {}),
        ("spec/rayClusterSpec/headGroupSpec/replicas", 1),
        ("spec/submissionMode", "JobMode"),
        ("spec/shutdownAfterJobFinishes", False),
        (f"{HEAD}/rayStartParams/num-cpus", 0),
        (f"{CONTAINER}/livenessProbe/periodSecond", 5),
        (f"{CONTAINER}/securitycontext", {}),
        (f"{CONTAINER}/ports/0/port", 80),
        (f"{HEAD}/template/spec/volumes/0/persistentVolumeClaim/claim", "x"),
        (f"{HEAD}/template/spec/runAsNonRoot", True),
    ],
)
def test_a_mistake_in_a_run_is_seen(path: str, value: object) -> None:
    (job,) = [one for one in rendered("overlays/gpu-8") if one["kind"] == "RayJob"]
    check(job)
    with pytest.raises((ValidationError, kubernetes_validate.ValidationError)):
        check(patched(job, [{"op": "add", "path": f"/{path}", "value": value}]))


def test_a_mistake_in_a_monitor_or_claim_is_seen() -> None:
    (monitor, *_), (claim,) = rendered("monitoring"), rendered("storage")
    for good, path in ((monitor, "/spec/podMetricsEndpoints/0/ports"), (claim, "/spec/accessmodes")):
        with pytest.raises((ValidationError, kubernetes_validate.ValidationError)):
            check(patched(good, [{"op": "add", "path": path, "value": "metrics"}]))


def test_a_patch_must_hit_something() -> None:
    (claim,) = rendered("storage")
    with pytest.raises(KeyError):
        patched(claim, [{"op": "replace", "path": "/spec/nothing", "value": 1}])
    with pytest.raises(ValueError, match="not an add or replace"):
        patched(claim, [{"op": "move", "path": "/spec", "from": "/metadata"}])


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="kubectl is not installed")
@pytest.mark.parametrize("folder", FOLDERS)
def test_kubectl_renders_the_same(folder: str) -> None:
    done = subprocess.run(["kubectl", "kustomize", KUBERAY / folder], capture_output=True, text=True, check=True)
    theirs = list(yaml.safe_load_all(done.stdout))
    ours = list(rendered(folder))
    assert sorted(theirs, key=repr_of) == sorted(ours, key=repr_of)


def repr_of(manifest: Manifest) -> str:
    return f"{manifest['kind']} {manifest['metadata']['name']}"


@pytest.mark.parametrize("name", OVERLAYS)
def test_references_resolve(name: str) -> None:
    manifests = [*rendered(f"overlays/{name}"), *rendered("storage")]
    names = {kind: {one["metadata"]["name"] for one in manifests if one["kind"] == kind} for kind in ("ConfigMap",)}
    for template in templates(manifests):
        volumes = {volume["name"]: volume for volume in template["spec"]["volumes"]}
        for container in containers(template):
            assert {mount["name"] for mount in container["volumeMounts"]} <= set(volumes)
        for volume in volumes.values():
            if "configMap" in volume:
                assert volume["configMap"]["name"] in names["ConfigMap"]
            if "secret" in volume:
                assert volume["secret"]["secretName"] in SECRETS_MADE_BY_HAND
            if "persistentVolumeClaim" in volume:
                assert volume["persistentVolumeClaim"]["claimName"] == "opcd-data"


def test_no_secret_is_in_the_repository() -> None:
    assert not [manifest for manifest in everything() if manifest["kind"] == "Secret"]


def test_pods_are_unprivileged() -> None:
    for template in templates(everything()):
        pod = template["spec"]
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["securityContext"]["runAsUser"] == 10001  # the user of deploy/docker
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert pod["automountServiceAccountToken"] is False
        for container in containers(template):
            context = container["securityContext"]
            assert context == {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
            assert container["resources"]["requests"] == container["resources"]["limits"]


def test_ray_containers_define_their_probes() -> None:
    """KubeRay's default probes need `wget`, which the images may lack."""
    for template in templates(everything()):
        for container in template["spec"]["containers"]:
            assert {"startupProbe", "readinessProbe", "livenessProbe"} <= set(container)


def test_monitors_find_their_pods() -> None:
    pods = templates(everything())
    for manifest in rendered("monitoring"):
        monitor = PodMonitor.model_validate(manifest).spec
        chosen = [pod for pod in pods if monitor.selector.matchLabels.items() <= pod["metadata"]["labels"].items()]
        ports = {port["name"] for pod in chosen for container in containers(pod) for port in container.get("ports", [])}
        assert chosen
        for endpoint in monitor.podMetricsEndpoints:
            assert endpoint.port in ports


def test_versions_are_those_of_the_lock() -> None:
    lock = (ROOT / "deploy/requirements/cpu.txt").read_text().split()
    for cluster in clusters(everything()):
        assert f"ray=={cluster.rayVersion}" in lock


@pytest.mark.parametrize("name", OVERLAYS)
def test_a_run_fits_into_its_pods(name: str, tmp_path: Path) -> None:
    manifests = rendered(f"overlays/{name}")
    config = load_config(config_file(manifests, "run.yaml", tmp_path))
    (job,) = [RayJob.model_validate(one) for one in manifests if one["kind"] == "RayJob"]
    pods = job.spec.rayClusterSpec.templates()
    gpus = [
        float(container["resources"]["limits"].get("nvidia.com/gpu", 0))
        for pod in pods
        for container in containers(pod)
    ]
    assert sum(bundle.gpus for bundle in bundles_of(config)) == sum(gpus)
    assert config.run.metrics_port in {
        port["containerPort"] for pod in pods for container in containers(pod) for port in container.get("ports", [])
    }
    assert config.run.metrics_host == "0.0.0.0"
    for pod in pods:
        mounts = [mount["mountPath"] for mount in pod["spec"]["containers"][0]["volumeMounts"]]
        for path in (config.student.model, config.run.dir, *filter(None, [config.teacher.client_key_file])):
            assert any(str(path).startswith(f"{mount}/") for mount in mounts)


def config_file(manifests: Any, name: str, folder: Path) -> Path:
    """Write a ConfigMap's file as a pod sees it."""
    (text,) = [one["data"][name] for one in manifests if one["kind"] == "ConfigMap" and name in one["data"]]
    path = folder / name
    path.write_text(text)
    return path


def test_the_shared_teacher_is_the_one_that_the_run_asks(tmp_path: Path) -> None:
    manifests = rendered("overlays/cross-size")
    run = load_config(config_file(manifests, "run.yaml", tmp_path))
    (service,) = [RayService.model_validate(one) for one in manifests if one["kind"] == "RayService"]
    serve = ServeDeploySchema.model_validate(yaml.safe_load(service.spec.serveConfigV2))
    assert run.teacher.url == f"http://{service.metadata.name}-serve-svc:{serve.http_options.port}"
    assert serve.http_options.host == "0.0.0.0"


def test_the_shared_teacher_fits_into_its_pods(tmp_path: Path) -> None:
    manifests = rendered("overlays/cross-size")
    (service,) = [RayService.model_validate(one) for one in manifests if one["kind"] == "RayService"]
    (application,) = ServeDeploySchema.model_validate(yaml.safe_load(service.spec.serveConfigV2)).applications
    module, _, name = application.import_path.partition(":")
    builder = getattr(importlib.import_module(module), name)
    (arguments,) = inspect.signature(builder, eval_str=True).parameters.values()
    args = arguments.annotation.model_validate(application.args)
    (pods,) = service.spec.rayClusterConfig.workerGroupSpecs
    (container,) = pods.template["spec"]["containers"]
    mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
    assert str(Path(args.config).parent) in mounts
    config = load_teacher_config(config_file(manifests, Path(args.config).name, tmp_path), args.overrides).teacher
    assert config.server_keys_file is not None
    assert str(config.server_keys_file.parent) in mounts
    assert str(config.model).startswith("/data/")
    limits = container["resources"]["limits"]
    assert (config.gpus, args.min_replicas, args.max_replicas) == (
        float(limits["nvidia.com/gpu"]),
        pods.minReplicas,
        pods.maxReplicas,
    )
    assert args.cpus <= float(limits["cpu"])


@pytest.mark.parametrize(("name", "teacher"), [("gpu-8", "8B"), ("cross-size", "32B")])
def test_the_claim_holds_a_run_of_an_8b_student_and_its_models(name: str, teacher: str, tmp_path: Path) -> None:
    (claim,) = rendered("storage")
    storage = str(claim["spec"]["resources"]["requests"]["storage"])
    assert storage.endswith("Gi")
    config = load_config(config_file(rendered(f"overlays/{name}"), "run.yaml", tmp_path))
    run = sum(disk_needs(config, qwen3("8B")).values())
    models = 2 * (qwen3("8B").parameters + qwen3(teacher).parameters)
    assert 200 < (run + models) / GIB <= int(storage.removesuffix("Gi"))
