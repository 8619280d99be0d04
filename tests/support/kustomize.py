"""Renders a folder like ``kubectl kustomize``, for the features that deploy/kuberay uses; refuses all others.

Resources, JSON patches (RFC 6902; strategic merge patches replace whole lists in custom resources), ConfigMaps from
files under their plain names, image names. PyPI and Debian have no current kustomize; a test compares with kubectl's.
"""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict

Manifest = dict[str, Any]


class Closed(BaseModel):
    """No unknown field."""

    model_config = ConfigDict(extra="forbid", strict=True)


class Target(Closed):
    kind: str
    name: str


class Patch(Closed):
    path: str
    target: Target


class Image(Closed):
    name: str
    newName: str
    newTag: str


class Generated(Closed):
    name: str
    files: list[str]


class GeneratorOptions(Closed):
    disableNameSuffixHash: bool


class Kustomization(Closed):
    apiVersion: str
    kind: str
    resources: list[str] = []
    images: list[Image] = []
    generatorOptions: GeneratorOptions = GeneratorOptions(disableNameSuffixHash=False)
    configMapGenerator: list[Generated] = []
    patches: list[Patch] = []


def render(folder: Path) -> list[Manifest]:
    """Return the objects of a folder. Raises ValidationError for an unknown field, KeyError for a patch of nothing."""
    plan = Kustomization.model_validate(yaml.safe_load((folder / "kustomization.yaml").read_text()))
    if (plan.apiVersion, plan.kind) != ("kustomize.config.k8s.io/v1beta1", "Kustomization"):
        raise ValueError(f"{folder}: no kustomization")
    found: list[Manifest] = []
    for name in plan.resources:
        path = (folder / name).resolve()
        found += render(path) if path.is_dir() else load_manifests(path)
    for generated in plan.configMapGenerator:
        if not plan.generatorOptions.disableNameSuffixHash:
            raise ValueError(f"{folder}: a ConfigMap's hashed name would not be rewritten inside a RayJob")
        data = {name: (folder / name).read_text() for name in generated.files}
        found.append({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": generated.name}, "data": data})
    for patch in plan.patches:
        (index,) = [
            i
            for i, one in enumerate(found)
            if (one["kind"], one["metadata"]["name"]) == (patch.target.kind, patch.target.name)
        ]
        found[index] = patched(found[index], yaml.safe_load((folder / patch.path).read_text()))
    for image in plan.images:
        for manifest in found:
            _rename(manifest, image)
    return found


def load_manifests(path: Path) -> list[Manifest]:
    """Return all documents of a file."""
    return [document for document in yaml.safe_load_all(path.read_text()) if document is not None]


def patched(document: Manifest, operations: list[dict[str, Any]]) -> Manifest:
    """Apply `add` and `replace` operations (RFC 6902). Raises KeyError or IndexError for a path that does not exist."""
    result = deepcopy(document)
    for operation in operations:
        if set(operation) != {"op", "path", "value"} or operation["op"] not in ("add", "replace"):
            raise ValueError(f"not an add or replace with a value: {operation}")
        *parents, last = [part.replace("~1", "/").replace("~0", "~") for part in operation["path"].split("/")[1:]]
        node: Any = result
        for part in parents:
            node = node[int(part)] if isinstance(node, list) else node[part]
        value = deepcopy(operation["value"])
        if isinstance(node, list):
            if operation["op"] == "replace":
                node[int(last)] = value
            else:
                node.insert(len(node) if last == "-" else int(last), value)
        elif operation["op"] == "replace" and last not in node:
            raise KeyError(operation["path"])
        else:
            node[last] = value
    return result


def _rename(node: Any, image: Image) -> None:
    """Set the image of all containers with this image's name."""
    if isinstance(node, list):
        for item in node:
            _rename(item, image)
    elif isinstance(node, dict):
        for container in [*node.get("containers", []), *node.get("initContainers", [])]:
            if container["image"] == image.name:
                container["image"] = f"{image.newName}:{image.newTag}"
        for value in node.values():
            _rename(value, image)
