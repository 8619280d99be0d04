"""``python -m tests.gpu.wheels FOLDER``: collect the packages that a bare GPU machine lacks, as wheels to carry there.

Run it in .venv on a machine with a package index. The wheels have this environment's versions and are for the Python of
the GPU machine. torch is not among them. `unpack` runs on the GPU machine.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import re
import subprocess
import sys
import zipfile
from collections.abc import Collection, Sequence
from pathlib import Path

ROOTS = (
    "accelerate",
    "deepspeed",
    "fastapi",
    "httptools",
    "httpx",
    "jaxtyping",
    "msgpack",
    "numpy",
    "packaging",
    "peft",
    "prometheus-client",
    "pydantic",
    "pyyaml",
    "safetensors",
    "tenacity",
    "tokenizers",
    "transformers",
    "uvicorn",
    "uvloop",
    "xxhash",
)
"""Packages that the checks without vLLM and Ray import; `closure` adds what those need."""
PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64")
CARRY_MIB = 64.0


def closure(roots: Collection[str], have: Collection[str], python: str) -> list[str]:
    """Return `roots` and all that they need on Linux, without `have` and without what only `have` needs."""
    from packaging.requirements import Requirement

    skipped = {normalized(name) for name in have}
    found: set[str] = set()
    waiting = [normalized(name) for name in roots]
    while waiting:
        name = waiting.pop()
        if name in found or name in skipped:
            continue
        found.add(name)
        for text in importlib.metadata.requires(name) or ():
            requirement = Requirement(text)
            target = {"python_version": python, "python_full_version": f"{python}.0", "extra": ""}
            if requirement.marker is None or requirement.marker.evaluate(target):
                waiting.append(normalized(requirement.name))
    return sorted(found)


def normalized(name: str) -> str:
    """A project's name as package indexes compare it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def names_in(text: str) -> list[str]:
    """Read names: separated by commas, or the file that ``pip list --format=freeze`` wrote."""
    path = Path(text)
    lines = path.read_text().splitlines() if path.is_file() else text.split(",")
    return [re.split(r"[ =@\[]", line.strip())[0] for line in lines if line.strip()]


def collect(packages: Sequence[str], folder: Path, python: str) -> list[str]:
    """Put a wheel of each package into `folder`; returns the packages that have none for that Python."""
    folder.mkdir(parents=True, exist_ok=True)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    target = ["--only-binary=:all:", "--python-version", python, "--implementation", "cp"]
    target += [argument for platform in PLATFORMS for argument in ("--platform", platform)]
    missing = []
    for name in packages:
        pinned = f"{name}=={importlib.metadata.version(name)}"
        ways = (
            ["download", "--quiet", "--no-deps", *target, "--dest", str(folder), pinned],
            # Published as source only: built here, of use there if it is pure Python.
            ["wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", str(folder), pinned],
        )
        if not any(subprocess.run([*pip, *way], capture_output=True, check=False).returncode == 0 for way in ways):
            missing.append(pinned)
    foreign = [wheel for wheel in folder.glob("*.whl") if not fits(wheel.name, python)]
    for wheel in foreign:
        wheel.unlink()
    return missing + [wheel.name for wheel in foreign]


def fits(wheel: str, python: str) -> bool:
    """True for a wheel that CPython `python` on Linux x86-64 can import, by its file name."""
    tags, abi, platform = wheel.removesuffix(".whl").split("-")[-3:]
    this = f"cp{python.replace('.', '')}"
    version_ok = "py3" in tags.split(".") or this in tags.split(".") or "abi3" in abi
    return version_ok and (platform == "any" or "x86_64" in platform)


def unpack(wheels: Path, folder: Path) -> Path:
    """Unpack all wheels of `wheels` into `folder`, to be put on the path; needs no pip. Returns `folder`."""
    found = sorted(wheels.glob("*.whl"))
    if not found:
        sys.exit(f"gpu-check: {wheels} holds no wheels: python -m tests.gpu.wheels {wheels} collects them")
    for wheel in found:
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(folder)
    for part in (*folder.glob("*.data/purelib"), *folder.glob("*.data/platlib")):
        for entry in part.iterdir():
            entry.rename(folder / entry.name)
    return folder


def main(argv: Sequence[str]) -> int:
    """Collect the wheels, print their size; 1 if one is missing or the folder is too large to carry."""
    parser = argparse.ArgumentParser("python -m tests.gpu.wheels", description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--python", default="3.12", help="the GPU machine's Python, major.minor")
    parser.add_argument(
        "--have",
        default="",
        help="packages that the machine has: names with commas, or a file from `pip list --format=freeze`",
    )
    parser.add_argument("--also", default="", help="packages of --have to collect nevertheless")
    parser.add_argument("--max-mib", type=float, default=CARRY_MIB)
    options = parser.parse_args(argv)
    also = {normalized(name) for name in names_in(options.also)}
    have = {normalized(name) for name in ("torch", *names_in(options.have))} - also
    packages = closure([*ROOTS, *also], have, options.python)
    missing = collect(packages, options.folder, options.python)
    size = sum(wheel.stat().st_size for wheel in options.folder.glob("*.whl")) / (1 << 20)
    print(f"{len(packages) - len(missing)} wheels, {size:.1f} MiB, in {options.folder}: {', '.join(packages)}")
    if missing:
        print(f"no wheel for CPython {options.python} on Linux x86-64: {', '.join(missing)}", file=sys.stderr)
    if size > options.max_mib:
        print(f"more than {options.max_mib:g} MiB: name with --have what the machine has", file=sys.stderr)
    return int(bool(missing) or size > options.max_mib)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
