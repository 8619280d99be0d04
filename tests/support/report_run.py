"""Writes the folder of a small finished or unfinished run, for tests of the report."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from common.telemetry.trace import TraceFile, TraceSpan

WORDS = ("cat", "dog", "box", "city", "leaf", "man")
PLURALS = ("cats", "dogs", "boxes", "cities", "leaves", "men")
CONTEXT = "Q: apple\nA: apples\nQ: child\nA: children\n"


def write_run(folder: Path, *, steps: int = 12, finished: bool = True, lr: float = 2e-5) -> Path:
    """Write a run on plurals that closed five sixths of the gap; a finished one has a summary and final answers."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(_config(folder, steps, lr)))
    _lines(folder / "metrics.jsonl", _metrics(steps, finished))
    _lines(folder / "samples.jsonl", _samples(finished))
    _lines(folder / "tokens.jsonl", (_tokens(step) for step in (1, steps)))
    texts = [{"context": "c0", "text": CONTEXT}, *({"row": f"eval-{word}", "text": f"Q: {word}\nA:"} for word in WORDS)]
    _lines(folder / "texts.jsonl", texts)
    with TraceFile(folder / "trace.json") as trace:
        trace.write(_spans(steps))
    if finished:
        (folder / "summary.json").write_text(json.dumps(_summary(steps)))
        (folder / "environment.json").write_text(json.dumps({"python": "3.11.9", "git": {"commit": "0123abc"}}))
    return folder


def _lines(path: Path, values: Iterable[Mapping[str, Any]]) -> None:
    path.write_text("".join(json.dumps(value) + "\n" for value in values))


def _config(folder: Path, steps: int, lr: float) -> dict[str, Any]:
    return {
        "run": {"name": folder.name, "dir": str(folder.parent)},
        "student": {"model": "models/smollm2"},
        "teacher": {"kind": "frozen", "url": None, "model": None},
        "context": {"text": CONTEXT},
        "data": {"train": "train.jsonl", "eval": "eval.jsonl"},
        "learner": {"steps": steps, "lr": lr},
    }


def kl(step: int) -> float:
    return 1.9 * math.exp(-step / 4) + 0.1


def _metrics(steps: int, finished: bool) -> Iterable[dict[str, Any]]:
    yield {"step": 0, "accuracy/base": 0.0}
    yield {"step": 0, "accuracy/in_context": 1.0}
    for step in range(1, steps + 1):
        yield {
            "step": step,
            "kl/lower_bound": kl(step),
            "kl/support": kl(step) * 0.95,
            "kl/tail": kl(step) * 0.05,
            "loss": kl(step),
            "entropy": 1.5 - step / 20,
            "grad_norm": math.nan if step == 3 else 8 / step,
            "rollout/mean_tokens": 5 - step / 10,
            "rollout/stopped_by_length": 1 / step,
            "tokens_per_s": 12 + step / 3,
            "staleness/mean_age": 0.0,
            "support_coverage": 0.96,
            "mismatch/rms": 3e-5,
            "time/total_s": 6.0,
            "time/trainer_idle_ratio": 0.75,
            "time/wait_ratio/rollout": 0.25,
            "time/wait_ratio/score": 0.125,
            "time/wait_ratio/sync": 0.25,
            "time/wait_ratio/parity": 0.1,
            "time/wait_ratio/other": 0.025,
        }
        if step % 4 == 0:
            yield {"step": step, "accuracy/valid": 1 - kl(step) / 2}
    if finished:
        yield {"step": steps, "accuracy/final": 5 / 6}


def _samples(finished: bool) -> Iterable[dict[str, Any]]:
    for name in ("base", "in_context", *(["final"] if finished else [])):
        for index, (word, plural) in enumerate(zip(WORDS, PLURALS, strict=True)):
            right = name == "in_context" or (name == "final" and index < 5)
            yield {
                "set": name,
                "step": 0,
                "id": f"eval-{word}",
                "answer": f" {plural}" if right else f" The {word} is",
                "expected": plural,
                "right": right,
                "finish_reason": "stop",
            }


def _tokens(step: int) -> dict[str, Any]:
    divergences = [3.0 / step, 0.3, 0.08, 0.01]
    pieces = [" The" if step == 1 else " leaves", " leaf", "\n", ""]
    return {
        "step": step,
        "sample": f"{step}/0/train-leaf/0",
        "row": "train-leaf",
        "context": "c0",
        "teacher": None,
        "finish_reason": "stop",
        "prompt": "Q: leaf\nA:",
        "response_tokens": 4,
        "ids": [5, 6, 7, 8],
        "pieces": pieces,
        "student_logprobs": [-0.4, -1.2, -0.1, -0.01],
        "teacher_logprobs": [-4.8, -1.6, -0.2, -0.02],
        "kl": divergences,
        "counted": [True, True, True, False],
        "student_top": [[[piece, -0.2], [" it", -2.0]] for piece in pieces],
        "teacher_top": [[[" leaves", -0.1], [" leaf", -2.5]] for _ in pieces],
    }


def _spans(steps: int) -> Iterable[TraceSpan]:
    for step in range(steps):
        at = 1000.0 + 6 * step
        for worker in range(2):
            yield TraceSpan("rollout", f"worker {worker}", at, at + 1.8, {"sample": f"{step}/{worker}/x/0"})
        yield TraceSpan("score", "teacher", at + 0.9, at + 2.5, {})
        yield TraceSpan("accumulate", "rank 0", at + 2.4, at + 3.4, {"version": step})
        yield TraceSpan("step", "rank 0", at + 3.4, at + 3.8, {"version": step + 1})
        yield TraceSpan("sync", "controller", at + 3.8, at + 5.3, {"version": step + 1})
        yield TraceSpan("parity", "controller", at + 5.3, at + 6.0, {"version": step + 1})


def _summary(steps: int) -> dict[str, Any]:
    return {
        "outcome": "finished",
        "base": {"accuracy": 0.0, "n": 6, "ci95": [0.0, 0.39]},
        "in_context": {"accuracy": 1.0, "n": 6, "ci95": [0.61, 1.0]},
        "final": {"accuracy": 5 / 6, "n": 6, "ci95": [0.436, 0.97]},
        "gap_closed": 5 / 6,
        "gap_closed_ci95": [0.5, 1.0],
        "ood": {
            "sums": {
                "before": {"accuracy": 0.75},
                "after": {"accuracy": 0.625},
                "change": -0.125,
                "ci95": [-0.25, 0.01],
            }
        },
        "perplexity": {"prose": {"before": 3.0, "after": 3.25, "tokens": 99, "change": 0.25, "ci95": None}},
        "best_on_valid": {"step": steps, "accuracy": 0.9},
        "steps": steps,
        "kl_first": kl(1),
        "kl_last": kl(steps),
        "time_s": {"rollout": 20.0, "accumulate": 12.0, "total": 72.0},
        "parity_max_nats": 7.7e-5,
        "versions": {"weights": steps, "torch": "2.13.0"},
    }
