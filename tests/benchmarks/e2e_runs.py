"""Whole runs on SmolLM2 for the end-to-end figures: the same prompts, contexts and lengths for us and for others."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from tests.benchmarks.figures import THREADS
from tests.support.paths import ROOT

MODEL = ROOT / "models/smollm2"
DEMO = ROOT / "deploy/configs/demo"
BATCH, TOP_K, LEARNING_RATE = 16, 256, 1e-6


@dataclass(frozen=True)
class Setting:
    """Lengths of one comparison, in tokens."""

    context_tokens: int
    answer_tokens: int


@dataclass(frozen=True)
class RunSteps:
    """The metrics of a run's steps, in order. The first step is start-up: it computes the context's cache."""

    steps: tuple[dict[str, float], ...]

    def seconds(self) -> list[float]:
        """Of each step but the first."""
        return [step["time/total_s"] for step in self.steps[1:]]

    @property
    def step_s(self) -> float:
        """Median seconds of a step, the cache warm."""
        return statistics.median(self.seconds())

    @property
    def first_extra_s(self) -> float:
        """Seconds that the first step took longer than the others."""
        return self.steps[0]["time/total_s"] - self.step_s

    def share(self, stage: str) -> float:
        """Of all steps' time but the first's, the part in which `stage` was at work."""
        return sum(step[f"time/{stage}_s"] for step in self.steps[1:]) / sum(self.seconds())

    @property
    def mean_tokens(self) -> float:
        """Response tokens of an answer."""
        return statistics.fmean(step["rollout/mean_tokens"] for step in self.steps[1:])

    def stages(self) -> str:
        """Mean seconds of the stages, as text."""
        names = ("rollout", "score", "accumulate", "step", "sync", "parity")
        means = {name: statistics.fmean(step.get(f"time/{name}_s", 0.0) for step in self.steps[1:]) for name in names}
        return ", ".join(f"{name} {seconds:.1f}" for name, seconds in means.items())


def story_prompts(count: int) -> list[str]:
    """Raw prompts of about 16 tokens that a student goes on from for long: the words of the demo's rows, in turn."""
    rows = [json.loads(line)["prompt"] for line in (DEMO / "train.jsonl").read_text().splitlines()]
    words = [row.removeprefix("Q: ").removesuffix("\nA:") for row in rows]
    return [
        f"Once upon a time there was a {words[i % len(words)]}. One day the {words[i % len(words)]} went"
        for i in range(count)
    ]


def context_text(tokens: int) -> str:
    """Text of `tokens` tokens of SmolLM2: the demo's rows one after the other."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    rows = [json.loads(line) for line in (DEMO / "train.jsonl").read_text().splitlines()]
    lines = [f"{row['prompt']} {i}\n" for i, row in enumerate(rows * (1 + tokens // (4 * len(rows))))]
    ids = tokenizer("".join(lines), add_special_tokens=False)["input_ids"][:tokens]
    text = tokenizer.decode(ids)
    found = len(tokenizer(text, add_special_tokens=False)["input_ids"])
    if len(ids) < tokens or abs(found - tokens) > 2:
        raise AssertionError(f"the context has {found} tokens, asked for {tokens}")
    return str(text)


@contextmanager
def folder_for(name: str) -> Iterator[Path]:
    """A folder of its own; with ``KEEP_BENCH_RUNS=FOLDER`` in the environment it is made there and stays."""
    kept = os.environ.get("KEEP_BENCH_RUNS")
    if kept:
        folder = Path(kept) / name
        folder.mkdir(parents=True, exist_ok=True)
        yield folder
        return
    with tempfile.TemporaryDirectory(prefix="bench-e2e-") as made:
        yield Path(made)


def our_run(setting: Setting, steps: int, **sections: dict[str, Any]) -> RunSteps:
    """`steps` steps of 16 prompts; keyword arguments are sections to change."""
    with folder_for(f"{setting.context_tokens}-{setting.answer_tokens}") as folder:
        return train(write_config(folder, setting, steps, **sections), folder / "run")


def write_config(folder: Path, setting: Setting, steps: int, **sections: dict[str, Any]) -> Path:
    """The configuration of such a run, with its data beside it; it will leave its files in ``folder/run``."""
    settings: dict[str, dict[str, Any]] = {
        "run": {"name": "run", "dir": str(folder)},
        "student": {"model": str(MODEL)},
        "teacher": {"threads": THREADS},
        "context": {"file": str(folder / "context.txt")},
        "data": {"train": str(folder / "train.jsonl")},
        "rollout": {"batch_size": BATCH, "max_tokens": setting.answer_tokens, "threads": THREADS},
        "loss": {"top_k": TOP_K},
        "learner": {"steps": steps, "lr": LEARNING_RATE, "threads": THREADS, "micro_batch_tokens": 512},
        "sync": {"probe_prompts": 4, "probe_tokens": 16},
        "eval": {"every": 0},
    }
    for section, values in sections.items():
        settings.setdefault(section, {}).update(values)
    prompts = story_prompts(settings["rollout"]["batch_size"] * steps)
    folder.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps({"id": str(i), "prompt": text}) for i, text in enumerate(prompts)]
    (folder / "train.jsonl").write_text("\n".join(lines))
    (folder / "context.txt").write_text(context_text(setting.context_tokens))
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


def train(config: Path, run: Path, overrides: Sequence[str] = ()) -> RunSteps:
    """Run a configuration to its end in processes of its own; its steps."""
    environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    subprocess.run(
        [sys.executable, "-m", "learner.train", str(config), *overrides], cwd=ROOT, check=True, env=environment
    )
    return RunSteps(tuple(step_metrics(run)))


def step_metrics(run: Path) -> list[dict[str, float]]:
    """The lines of ``metrics.jsonl`` that are steps."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "time/total_s" in line]
