"""Checks of this machine: GPUs, packages, folders, ports. Skipped where the run's processes are on other machines."""

from __future__ import annotations

import os
import socket
import tempfile
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

from common.config.model import Config
from common.files import seen_from
from common.network import LOOPBACK
from learner.cluster.placement import bundles_of, shortfall
from learner.preflight.report import Finding, error

SOCKET_PATH_BYTES = 107
"""Longest path of a socket on Linux."""
SESSION_BYTES = len("/ray/session_2026-01-01_00-00-00_000000_0000000/sockets/plasma_store")
"""Part of the path that Ray adds."""
PACKAGES = {"wandb": "run.wandb", "mlflow": "run.mlflow"}


def on_this_machine() -> bool:
    """True if the run starts Ray here; with ``RAY_ADDRESS`` its processes may be on other machines."""
    return "RAY_ADDRESS" not in os.environ


def gpu_count() -> int:
    """GPUs that torch can use here. Imports torch."""
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def check_devices(config: Config) -> Iterator[Finding]:
    """Find GPUs that the run asks for and this machine lacks."""
    bundles = bundles_of(config)
    if not on_this_machine() or not bundles:
        return
    count = gpu_count()
    if (why := shortfall(bundles, {"this machine": count} if count else {})) is not None:
        yield error(f"{why}; for a run on a cluster: opcd submit, or set RAY_ADDRESS")


def check_ray(config: Config) -> Iterator[Finding]:
    """Find an address that Ray does not take, and a folder for temporary files whose name is too long for sockets."""
    address = os.environ.get("RAY_ADDRESS")
    if address is not None and address.startswith(("http://", "https://")):
        yield error(
            f"RAY_ADDRESS is {address}, the address of the dashboard: a run joins a cluster by HOST:PORT or `auto`; "
            "`opcd submit --address` takes the dashboard's"
        )
    folder = os.environ.get("RAY_TMPDIR") or os.environ.get("TMPDIR", "/tmp")
    if on_this_machine() and len(os.fsencode(folder)) + SESSION_BYTES > SOCKET_PATH_BYTES:
        yield error(
            f"the folder {folder} for temporary files is too long: paths of Ray's sockets in it would have over "
            f"{SOCKET_PATH_BYTES} bytes; set RAY_TMPDIR to one of at most {SOCKET_PATH_BYTES - SESSION_BYTES} bytes"
        )


def check_packages(config: Config) -> Iterator[Finding]:
    """Find optional packages that the configuration needs and that are not installed."""
    for package, key in PACKAGES.items():
        if getattr(config.run, package) is not None and find_spec(package) is None:
            yield error(f"{key} needs the package {package}, which is not installed: pip install {package}")


def check_folders(config: Config) -> Iterator[Finding]:
    """Find folders that the run cannot write to."""
    folders = {"run.dir": config.run.path}
    if config.sync.backend == "file" and config.sync.folder is not None:
        folders["sync.folder"] = config.sync.folder
    if config.rollout.answers_file is not None:
        folders["rollout.answers_file"] = config.rollout.answers_file.parent
    for key, folder in folders.items():
        existing = nearest_folder(folder)
        if not existing.is_dir():
            yield error(f"{key}: {folder.absolute()} cannot be made, {existing} is a file")
        elif (why := _unwritable(existing)) is not None:
            yield error(f"{key}: {folder.absolute()} cannot be written, {why} in {existing}")


def check_files(config: Config) -> Iterator[Finding]:
    """Find files of keys and certificates that cannot be read."""
    for name, teacher in config.named_teachers().items():
        section = "teacher" if name == "default" else f"teachers.{name}"
        for key in (
            ("client_key_file", "ca_file")
            if teacher.url
            else ("server_keys_file", "tls_certificate", "tls_key", "endpoint_key_file", "ca_file")
        ):
            path: Path | None = getattr(teacher, key)
            try:
                if path is not None:
                    path.open("rb").close()
            except OSError as fault:
                yield error(f"{section}.{key}: cannot read {path}: {fault.strerror}{seen_from(Path(str(path)))}")


def _unwritable(folder: Path) -> str | None:
    """Try to write into `folder`: permissions alone say nothing of NFS servers and quotas. Leaves no file."""
    try:
        with tempfile.TemporaryFile(dir=folder) as stream:
            stream.write(b"x")
            stream.flush()
    except OSError as fault:
        return (fault.strerror or str(fault)).lower()
    return None


def check_ports(config: Config) -> Iterator[Finding]:
    """Find fixed ports that another program listens on."""
    if not on_this_machine():
        return
    ports = []
    if config.run.metrics_port:
        ports.append(("run.metrics_port", config.run.metrics_host, config.run.metrics_port))
    for name, teacher in config.named_teachers().items():
        if teacher.url is None and teacher.port and teacher.kind != "base":
            section = "teacher" if name == "default" else f"teachers.{name}"
            ports.append((f"{section}.port", teacher.host or LOOPBACK, teacher.port))
    seen: dict[int, str] = {}
    for key, host, port in ports:
        if port in seen:
            yield error(f"{key} and {seen[port]} are both {port}: choose two ports, or 0 for a free one")
        elif (why := _busy(host, port)) is not None:
            yield error(f"{key} {port} on {host} cannot be used ({why}): choose another, or 0 for a free one")
        seen[port] = key


def _busy(host: str, port: int) -> str | None:
    try:
        with socket.create_server((host, port)):
            return None
    except OSError as fault:
        return fault.strerror or str(fault)


def nearest_folder(path: Path) -> Path:
    """The folder itself, or the nearest parent that exists."""
    return next(parent for parent in (path, *path.absolute().parents) if parent.exists())
