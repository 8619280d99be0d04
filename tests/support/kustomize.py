"""What ``kubectl kustomize`` makes of a folder, for the part of it that deploy/kuberay uses; anything else is refused.

Resources, JSON patches (RFC 6902: the other kind replaces whole lists in custom resources), ConfigMaps from files
under their plain names, image names.
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
    """The objects of a folder. Raises pydantic's error for what is unknown, KeyError for a patch that hits nothing."""
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
    """All documents of a file."""
    return [document for document in yaml.safe_load_all(path.read_text()) if document is not None]


def patched(document: Manifest, operations: list[dict[str, Any]]) -> Manifest:
    """`add` and `replace` of RFC 6902. Raises KeyError or IndexError where the place is not there."""
    result = deepcopy(document)
    for operation in operations:
        if set(operation) != {"op", "path", "value"} or operation["op"] not in ("add", "replace"):
            raise ValueError(f"not an add or replace with a value: {operation}")
        *parents, last = [part.replace("~1", "/").replace("~0", "~") for part in operation["path"].split("/")[1:]]
        place: Any = result
        for part in parents:
            place = place[int(part)] if isinstance(place, list) else place[part]
        value = deepcopy(operation["value"])
        if isinstance(place, list):
            if operation["op"] == "replace":
                place[int(last)] = value
            else:
                place.insert(len(place) if last == "-" else int(last), value)
        elif operation["op"] == "replace" and last not in place:
            raise KeyError(operation["path"])
        else:
            place[last] = value
    return result


def _rename(node: Any, image: Image) -> None:
    """Containers of this image, wherever they are."""
    if isinstance(node, list):
        for item in node:
            _rename(item, image)
    elif isinstance(node, dict):
        for container in [*node.get("containers", []), *node.get("initContainers", [])]:
            if container["image"] == image.name:
                container["image"] = f"{image.newName}:{image.newTag}"
        for value in node.values():
            _rename(value, image)
