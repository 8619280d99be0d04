"""Packs the running opcd as a wheel for ``py_modules`` of a Ray job.

Nodes need opcd's entry points, by which vLLM finds the weight transfer, and an uploaded folder has none. Ray installs a
wheel with ``pip install --target`` and all its requirements, so this wheel has none: the nodes have the packages. Ray
identifies a wheel by its file name, so the version ends in a hash of the content.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import os
import zipfile
from base64 import urlsafe_b64encode
from collections.abc import Mapping
from pathlib import Path

import opcd_start
from common.config.model import ConfigError
from common.import_names import PACKAGES

LONG_AGO = (1980, 1, 1, 0, 0, 0)
"""Time of every file in the archive, so that equal content gives an equal wheel."""


def write_wheel(folder: Path) -> Path:
    """Write the wheel of the running code into `folder`, unless it exists; return its path.

    Raises ConfigError if opcd is not installed, OSError if `folder` cannot be written.
    """
    try:
        installed = importlib.metadata.distribution("opcd")
    except importlib.metadata.PackageNotFoundError:
        raise ConfigError("opcd is not installed, so its entry points are unknown: pip install .") from None
    files = read_packages()
    files_hash = hashlib.sha256()
    entry_points = entry_points_text(installed)
    for name, content in [*files.items(), ("entry_points.txt", entry_points.encode())]:
        files_hash.update(f"{name}\0{len(content)}\0".encode() + content)
    version = f"{installed.version.partition('+')[0]}+src.{files_hash.hexdigest()[:12]}"
    path = folder / f"opcd-{version}-py3-none-any.whl"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_suffix(f".{os.getpid()}.tmp")
        _write(unfinished, files | dist_info(version, entry_points))
        unfinished.replace(path)
    return path


def wheels_folder() -> Path:
    """Return the folder in the user's cache that keeps wheels between submissions."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "opcd"


def read_packages() -> dict[str, bytes]:
    """Return the files of ``opcd_start`` and the imported packages by their paths in a wheel, in a fixed order."""
    found = {"opcd_start.py": Path(opcd_start.__file__).read_bytes()}
    for package in PACKAGES:
        spec = importlib.util.find_spec(package)
        assert spec is not None, package
        (root,) = (Path(each) for each in spec.submodule_search_locations or ())
        for path in sorted(root.rglob("*")):
            if path.is_file() and "__pycache__" not in path.parts:
                found[f"{package}/{path.relative_to(root).as_posix()}"] = path.read_bytes()
    return found


def entry_points_text(installed: importlib.metadata.Distribution) -> str:
    """Return ``entry_points.txt`` of the installed distribution, in a fixed order."""
    groups: dict[str, list[str]] = {}
    for point in sorted(installed.entry_points):
        groups.setdefault(point.group, []).append(f"{point.name} = {point.value}\n")
    return "\n".join(f"[{group}]\n{''.join(lines)}" for group, lines in sorted(groups.items()))


def dist_info(version: str, entry_points: str) -> dict[str, bytes]:
    """Return the metadata files except RECORD; no requirements, see the module's docstring."""
    folder = f"opcd-{version}.dist-info"
    return {
        f"{folder}/METADATA": f"Metadata-Version: 2.1\nName: opcd\nVersion: {version}\n".encode(),
        f"{folder}/WHEEL": b"Wheel-Version: 1.0\nGenerator: opcd submit\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{folder}/entry_points.txt": entry_points.encode(),
    }


def _write(path: Path, files: Mapping[str, bytes]) -> None:
    """Write a wheel of `files` and their RECORD (https://packaging.python.org/specifications/binary-distribution-format)."""
    (folder,) = {name.partition("/")[0] for name in files if ".dist-info/" in name}
    record = "".join(f"{name},sha256={_digest(content)},{len(content)}\n" for name, content in files.items())
    record += f"{folder}/RECORD,,\n"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in [*files.items(), (f"{folder}/RECORD", record.encode())]:
            entry = zipfile.ZipInfo(name, LONG_AGO)
            entry.external_attr = 0o644 << 16
            entry.compress_type = zipfile.ZIP_DEFLATED
            archive.writestr(entry, content)


def _digest(content: bytes) -> str:
    return urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
