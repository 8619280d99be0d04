"""The result of a comparison: one row a method, with intervals over rows and seeds; as Markdown and as JSON."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from common.evaluation import Change, Interval
from common.over_seeds import Rows, accuracy_over_seeds, change_over_seeds, gap_closed_over_seeds
from deploy.compare_plan import TITLES, Method, PlannedRun

REFERENCE: Method = "opcd"
"""What the others are compared with, pair by pair."""


@dataclass(frozen=True, slots=True)
class Finished:
    """A run that came to its end: ``summary.json``, and ``accuracy.json`` (set -> row -> share of right answers)."""

    run: PlannedRun
    summary: dict[str, Any]
    rows: dict[str, Rows]


@dataclass(frozen=True, slots=True)
class Failed:
    """A run that did not; `why` in one line."""

    run: PlannedRun
    why: str


Outcome = Finished | Failed


def read(run: PlannedRun) -> Outcome:
    """What a run left behind. One without a whole result has failed."""
    if run.config is None:
        return Failed(run, run.fault or "")
    folder = run.config.run.path
    try:
        summary, rows = (json.loads((folder / name).read_text("utf-8")) for name in ("summary.json", "accuracy.json"))
    except (OSError, json.JSONDecodeError) as error:
        return Failed(run, f"no result: {error}")
    if summary["outcome"] != "finished":
        return Failed(run, str(summary["outcome"]))
    return Finished(run, summary, rows)


def compared(outcomes: Sequence[Outcome], methods: Sequence[str]) -> dict[str, Any]:
    """The content of ``compare.json``."""
    finished = [one for one in outcomes if isinstance(one, Finished)]
    by_seed = {one.run.seed: one for one in reversed(finished)}
    before = {
        name: _untrained([one.rows[name] for one in by_seed.values()])
        for name in ("base", "in_context")
        if by_seed and (name == "base" or name in methods) and all(name in one.rows for one in by_seed.values())
    }
    trained = [method for method in TITLES if any(one.run.method == method for one in outcomes)]
    return {
        "seeds": sorted({one.run.seed for one in outcomes}),
        "before": before,
        "methods": {method: _method(method, outcomes) for method in trained},
        "runs": [_run(one) for one in outcomes],
    }


def _untrained(rows: Sequence[Rows]) -> dict[str, Any]:
    found = accuracy_over_seeds(rows)
    return {"accuracy": found.accuracy, "ci95": found.ci95, "n": found.n, "seeds": len(rows)}


def _method(method: str, outcomes: Sequence[Outcome]) -> dict[str, Any]:
    own = [one for one in outcomes if one.run.method == method]
    runs = {one.run.seed: one for one in own if isinstance(one, Finished)}
    faults = [f"seed {one.run.seed}: {one.why}" for one in own if isinstance(one, Failed)]
    if not runs:
        return {"runs": 0, "planned": len(own), "faults": faults}
    each = list(runs.values())
    final = accuracy_over_seeds([one.rows["final"] for one in each])
    gap, interval = None, None
    if all("in_context" in one.rows for one in each):
        base, in_context, after = ([one.rows[name] for one in each] for name in ("base", "in_context", "final"))
        gap, interval = gap_closed_over_seeds(base, in_context, after)
    return {
        "runs": len(runs),
        "planned": len(own),
        "faults": faults,
        "accuracy": final.accuracy,
        "ci95": final.ci95,
        "n": final.n,
        "gap_closed": gap,
        "gap_closed_ci95": interval,
        "against_opcd": _against(method, runs, outcomes),
        "ood": {name: _ood(name, each) for name in each[0].summary["ood"]},
        "perplexity": {name: _perplexity(name, each) for name in each[0].summary["perplexity"]},
        "seconds": statistics.fmean(one.summary["time_s"]["total"] for one in each),
    }


def _against(method: str, runs: Mapping[int, Finished], outcomes: Sequence[Outcome]) -> dict[str, Any] | None:
    """Accuracy minus that of the reference, over seeds that both have."""
    if method == REFERENCE:
        return None
    reference = {o.run.seed: o for o in outcomes if isinstance(o, Finished) and o.run.method == REFERENCE}
    seeds = sorted(runs.keys() & reference.keys())
    if not seeds:
        return None
    found = change_over_seeds([reference[s].rows["final"] for s in seeds], [runs[s].rows["final"] for s in seeds])
    return {"change": found.change, "ci95": found.ci95, "seeds": len(seeds)}


def _ood(name: str, runs: Sequence[Finished]) -> dict[str, Any]:
    before, after = ([one.rows[f"ood/{name}/{when}"] for one in runs] for when in ("before", "after"))
    found = change_over_seeds(before, after)
    return {"change": found.change, "ci95": found.ci95}


def _perplexity(name: str, runs: Sequence[Finished]) -> dict[str, Any]:
    changes = [one.summary["perplexity"][name]["change"] for one in runs]
    return {"change": statistics.fmean(changes), "each": changes}


def _run(outcome: Outcome) -> dict[str, Any]:
    run = outcome.run
    shared = {"method": run.method, "seed": run.seed}
    if isinstance(outcome, Failed):
        return {**shared, "outcome": outcome.why}
    summary = outcome.summary
    return {
        **shared,
        "outcome": "finished",
        "accuracy": summary["final"]["accuracy"],
        "gap_closed": summary["gap_closed"],
        "kl_first": summary["kl_first"],
        "kl_last": summary["kl_last"],
        "seconds": summary["time_s"]["total"],
    }


# --- Markdown -------------------------------------------------------------------------------------------------------


def markdown(result: Mapping[str, Any], command: str) -> str:
    """The content of ``compare.md``: the table, its runs, and how to read it."""
    tasks = sorted({name for one in result["methods"].values() for name in one.get("ood", {})})
    texts = sorted({name for one in result["methods"].values() for name in one.get("perplexity", {})})
    head = ["method", "runs", "accuracy", "gap closed", "against opcd"]
    head += [*(f"change on {name}" for name in tasks), *(f"{name}, nats a token" for name in texts), "seconds a run"]
    width = len(head)
    rows = [
        [title, "", _share(found["accuracy"], found["ci95"]), *[""] * (width - 3)]
        for name, title in (("base", "without context, before"), ("in_context", TITLES["in_context"]))
        if (found := result["before"].get(name)) is not None
    ]
    rows += [_cells(TITLES[method], one, tasks, texts, width) for method, one in result["methods"].items()]
    faults = [f"- {TITLES[method]}, {why}" for method, one in result["methods"].items() for why in one["faults"]]
    each = [
        [one["method"], str(one["seed"]), *_run_cells(one)] for one in result["runs"] if one["outcome"] == "finished"
    ]
    parts = [
        "# Methods compared",
        f"`{command}`",
        _table(head, rows),
        "Means over seeds and rows; brackets are 95% intervals that know of both (docs/evaluation.md). *Against opcd*: "
        "accuracy minus that of on-policy context distillation, paired by row and seed.",
        *(["## Runs without a result", "\n".join(faults)] if faults else []),
        "## Runs",
        _table(["method", "seed", "accuracy", "gap closed", "divergence, first", "last", "seconds"], each),
    ]
    return "\n\n".join(parts) + "\n"


def _cells(title: str, one: Mapping[str, Any], tasks: Sequence[str], texts: Sequence[str], width: int) -> list[str]:
    runs = f"{one['runs']}/{one['planned']}"
    if not one["runs"]:
        return [title, runs, "failed", *[""] * (width - 3)]
    against = one["against_opcd"]
    return [
        title,
        runs,
        _share(one["accuracy"], one["ci95"]),
        "" if one["gap_closed"] is None else _share(one["gap_closed"], one["gap_closed_ci95"]),
        "" if against is None else _signed(Change(against["change"], against["ci95"])),
        *(_signed(Change(**one["ood"][name])) if name in one["ood"] else "" for name in tasks),
        *(f"{one['perplexity'][name]['change']:+.3f}" if name in one["perplexity"] else "" for name in texts),
        f"{one['seconds']:.0f}",
    ]


def _run_cells(one: Mapping[str, Any]) -> list[str]:
    values = [one["accuracy"], one["gap_closed"], one["kl_first"], one["kl_last"]]
    return [*("" if value is None else f"{value:.3f}" for value in values), f"{one['seconds']:.0f}"]


def _share(value: float, interval: Interval | None) -> str:
    return f"{value:.3f}" if interval is None else f"{value:.3f} [{interval[0]:.3f}, {interval[1]:.3f}]"


def _signed(found: Change) -> str:
    return f"{found.change:+.3f} [{found.ci95[0]:+.3f}, {found.ci95[1]:+.3f}]"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
