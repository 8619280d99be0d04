"""``python -m tests.gpu``: run the check-up, print a line a check, write results.json, table.md and log.txt.

Exit status 0: no check failed; 1: a check failed; 2: wrong arguments.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from tests.gpu.checks import CHECKS
from tests.gpu.report import Result, as_json, markdown, summary
from tests.gpu.runner import Check, Runner
from tests.gpu.wheels import unpack

MINUTES = 8.0
"""Limit of the checks without vLLM."""
SLOWER = 10.0
"""The limits are a GPU's: small sizes on a busy CPU get this many times as long."""
_MACHINE = """
import json, torch
gpus = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
print(json.dumps({"torch": torch.__version__, "gpus": [f"{g.name} ({g.total_memory >> 30} GiB)" for g in gpus]}))
"""


def arguments() -> argparse.ArgumentParser:
    """The command's arguments."""
    parser = argparse.ArgumentParser("python -m tests.gpu", description="Check a GPU machine before the first run.")
    parser.add_argument("only", nargs="*", metavar="CHECK", help="checks to run (default: all)")
    parser.add_argument("--list", action="store_true", help="list the checks and end")
    parser.add_argument("--device", choices=("cuda", "cpu"), help="default: cuda if there is a GPU")
    parser.add_argument("--small", action="store_true", help="tiny sizes, all checks in one process; always on CPU")
    parser.add_argument("--minutes", type=float, help=f"limit of all checks (default: {MINUTES:g}, more with vLLM)")
    parser.add_argument("--out", type=Path, default=Path("runs/gpu-check"), help="folder for the results")
    parser.add_argument("--wheels", type=Path, help="folder of wheels to use (python -m tests.gpu.wheels makes one)")
    parser.add_argument("--without", default="", metavar="PACKAGES", help="treat these as not installed: ray,vllm")
    return parser


def machine() -> dict[str, object]:
    """Versions and GPUs, read in another process: this one must not hold memory of a GPU."""
    process = subprocess.run([sys.executable, "-c", _MACHINE], capture_output=True, text=True, check=False)
    if process.returncode:
        lines = process.stderr.strip().splitlines()
        sys.exit(f"gpu-check: torch cannot be imported: {lines[-1] if lines else process.returncode}")
    return json.loads(process.stdout.splitlines()[-1])


def default_minutes(checks: Sequence[Check]) -> float:
    """The limit for machines without vLLM, plus the limits of the checks that need it, if it is there."""
    if importlib.util.find_spec("vllm") is None:
        return MINUTES
    return MINUTES + sum(check.limit_s for check in checks if "vllm" in check.needs) / 60


def main(argv: Sequence[str]) -> int:
    """Run the command."""
    options = arguments().parse_args(argv)
    if options.list:
        for check in CHECKS:
            print(f"{check.name:<10} {check.about}")
        return 0
    known = {check.name: check for check in CHECKS}
    unknown = sorted(set(options.only) - set(known))
    if unknown:
        print(f"gpu-check: no check is called {', '.join(unknown)}; known: {', '.join(known)}", file=sys.stderr)
        return 2
    checks = [known[name] for name in options.only] or list(CHECKS)
    options.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="gpu-check-") as scratch:
        if options.wheels is not None:
            packages = unpack(options.wheels, Path(scratch) / "packages")
            sys.path.insert(0, str(packages))
            os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(packages), os.environ.get("PYTHONPATH")]))
        found = machine()
        gpus = found["gpus"]
        assert isinstance(gpus, list)
        device = options.device or ("cuda" if gpus else "cpu")
        if device == "cuda" and not gpus:
            print("gpu-check: torch sees no GPU; --device cpu runs the same code in tiny sizes", file=sys.stderr)
            return 2
        described = {
            "machine": ", ".join(gpus) if device == "cuda" else f"no GPU, {os.cpu_count()} cores, sizes: small",
            "torch": str(found["torch"]),
            "Python": platform.python_version(),
        }
        print(", ".join(f"{name}: {value}" for name, value in described.items()), flush=True)
        small = options.small or device == "cpu"
        log = options.out / "log.txt"
        log.write_text("")
        runner = Runner(
            place={"device": device, "sizes": "small" if small else "full", "folder": str(scratch)},
            gpus=len(gpus) if device == "cuda" else 0,
            log=log,
            without=[name for name in options.without.split(",") if name],
            together=small,
            slower=SLOWER if small else 1.0,
            report=lambda result: print(result.line(), flush=True),
        )
        minutes = options.minutes or default_minutes(checks) * (SLOWER if small else 1.0)
        results = runner.run(checks, 60 * minutes)
    return finish(results, described, options.out)


def finish(results: Sequence[Result], described: dict[str, str], out: Path) -> int:
    """Write the results; 1 if a check failed."""
    (out / "results.json").write_text(json.dumps(as_json(results, described), indent=1))
    (out / "table.md").write_text(markdown(results, described))
    print(f"{summary(results)}; {out}/results.json, table.md, log.txt")
    return int(any(result.verdict == "FAIL" for result in results))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
