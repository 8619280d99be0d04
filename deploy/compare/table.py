"""Result of a comparison as JSON and Markdown: a row for each method and setting, intervals over rows and seeds."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from common.evaluation.accuracy import Change, Interval
from common.evaluation.multi_seed import Rows, accuracy_over_seeds, change_over_seeds, gap_closed
from common.evaluation.pass_at_k import ks, rows_at_k
from deploy.compare.plan import METHODS, TITLES, PlannedRun


@dataclass(frozen=True, slots=True)
class Finished:
    """A finished run with ``summary.json`` and ``accuracy.json`` (set -> row -> fraction of right answers)."""

    run: PlannedRun
    summary: dict[str, Any]
    rows: dict[str, Rows]


@dataclass(frozen=True, slots=True)
class Failed:
    """A run without a result; `reason` is one line."""

    run: PlannedRun
    reason: str


Outcome = Finished | Failed


def read_outcome(run: PlannedRun) -> Outcome:
    """Read the result of a run; a run without a complete result has failed."""
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
    """The content of ``compare.json``. The first arm is the reference of the paired comparisons."""
    arms = list(dict.fromkeys(one.run.arm for one in sorted(outcomes, key=lambda one: METHODS.index(one.run.method))))
    reference = arms[0] if arms else ""
    return {
        "seeds": sorted({one.run.seed for one in outcomes}),
        "reference": reference,
        "before": _before(outcomes, methods),
        "arms": {arm: _arm([one for one in outcomes if one.run.arm == arm], reference, outcomes) for arm in arms},
        "runs": [_run(one) for one in outcomes],
    }


def _before(outcomes: Sequence[Outcome], methods: Sequence[str]) -> list[dict[str, Any]]:
    """Accuracies before training, without and in context; one row each if all settings have the same values."""
    found: dict[str, dict[str, Any]] = {}
    for settings in dict.fromkeys(one.run.settings for one in outcomes):
        finished = [one for one in outcomes if isinstance(one, Finished) and one.run.settings == settings]
        by_seed = {one.run.seed: one for one in reversed(finished)}
        for name, title in (("base", "without context, before"), ("in_context", TITLES["in_context"])):
            wanted = name == "base" or name in methods
            if by_seed and wanted and all(name in one.rows for one in by_seed.values()):
                result = _untrained([one.rows[name] for one in by_seed.values()], _samples([*by_seed.values()]))
                found[", ".join([title, *settings])] = {"set": name, "title": title, **result}
    alike = all(
        len({json.dumps(one) for one in found.values() if one["set"] == name}) == 1
        for name in {one["set"] for one in found.values()}
    )
    by_title = {one["title"]: one for one in found.values()} if alike else found
    return [{**one, "title": title} for title, one in by_title.items()]


def _untrained(rows: Sequence[Rows], samples: int) -> dict[str, Any]:
    found = accuracy_over_seeds(rows)
    return {
        "accuracy": found.accuracy,
        "ci95": found.ci95,
        "n": found.n,
        "seeds": len(rows),
        "pass_at": _pass_at(rows, samples),
    }


def _pass_at(rows: Sequence[Rows], samples: int) -> dict[str, Any]:
    """pass@k over seeds by k, for evaluations with several answers a row."""
    over_seeds = {k: accuracy_over_seeds([rows_at_k(one, samples, k) for one in rows]) for k in ks(samples)}
    return {str(k): {"value": found.accuracy, "ci95": found.ci95} for k, found in over_seeds.items()}


def _samples(runs: Sequence[Finished]) -> int:
    """Answers a row, which all compared runs share."""
    return min(int(one.summary["final"].get("samples", 1)) for one in runs)


def _arm(arm_outcomes: Sequence[Outcome], reference: str, outcomes: Sequence[Outcome]) -> dict[str, Any]:
    arm, title = arm_outcomes[0].run.arm, arm_outcomes[0].run.title
    runs = {one.run.seed: one for one in arm_outcomes if isinstance(one, Finished)}
    faults = [f"seed {one.run.seed}: {one.reason}" for one in arm_outcomes if isinstance(one, Failed)]
    if not runs:
        return {"title": title, "runs": 0, "planned": len(arm_outcomes), "faults": faults}
    each = list(runs.values())
    final = accuracy_over_seeds([one.rows["final"] for one in each])
    gap, interval = None, None
    if all("in_context" in one.rows for one in each):
        base, in_context, after = ([one.rows[name] for one in each] for name in ("base", "in_context", "final"))
        gap, interval = gap_closed(base, in_context, after)
    return {
        "title": title,
        "runs": len(runs),
        "planned": len(arm_outcomes),
        "faults": faults,
        "accuracy": final.accuracy,
        "ci95": final.ci95,
        "n": final.n,
        "pass_at": _pass_at([one.rows["final"] for one in each], _samples(each)),
        "gap_closed": gap,
        "gap_closed_ci95": interval,
        "against_reference": None if arm == reference else _against(reference, runs, outcomes),
        "ood": {name: _ood(name, each) for name in each[0].summary["ood"]},
        "perplexity": {name: _perplexity(name, each) for name in each[0].summary["perplexity"]},
        "seconds": statistics.fmean(one.summary["time_s"]["total"] for one in each),
    }


def _against(reference: str, runs: Mapping[int, Finished], outcomes: Sequence[Outcome]) -> dict[str, Any] | None:
    """Accuracy minus the reference's, over the seeds that both have."""
    first = {o.run.seed: o for o in outcomes if isinstance(o, Finished) and o.run.arm == reference}
    seeds = sorted(runs.keys() & first.keys())
    if not seeds:
        return None
    found = change_over_seeds([first[s].rows["final"] for s in seeds], [runs[s].rows["final"] for s in seeds])
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
    shared = {"arm": run.arm, "seed": run.seed}
    if isinstance(outcome, Failed):
        return {**shared, "outcome": outcome.reason}
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
    """The content of ``compare.md``: the table, a reading guide, and the runs."""
    faults = [f"- {one['title']}, {why}" for one in result["arms"].values() for why in one["faults"]]
    each = [[one["arm"], str(one["seed"]), *_run_cells(one)] for one in result["runs"] if one["outcome"] == "finished"]
    parts = [
        "# Methods compared",
        f"`{command}`",
        methods_table(result),
        "Means over seeds and rows; brackets are 95% intervals over both (docs/evaluation.md). *Against* a method: the "
        "difference from its accuracy, paired by row and seed.",
        *(["## Runs without a result", "\n".join(faults)] if faults else []),
        "## Runs",
        _table(["method", "seed", "accuracy", "gap closed", "KL, first", "last", "seconds"], each),
    ]
    return "\n\n".join(parts) + "\n"


def methods_table(result: Mapping[str, Any]) -> str:
    """A row for each method and setting; the untrained model comes first."""
    arms = result["arms"].values()
    tasks = sorted({name for one in arms for name in one.get("ood", {})})
    texts = sorted({name for one in arms for name in one.get("perplexity", {})})
    at_k = sorted({k for one in arms for k in one.get("pass_at", {})}, key=int)
    head = ["method", "runs", "accuracy", *(f"pass@{k}" for k in at_k), "gap closed", f"against {result['reference']}"]
    head += [
        *(f"change on {name}" for name in tasks),
        *(f"{name}, nats per token" for name in texts),
        "seconds per run",
    ]
    width = len(head)
    rows = [
        [one["title"], "", _share(one["accuracy"], one["ci95"]), *_at_k(one, at_k), *[""] * (width - 3 - len(at_k))]
        for one in result["before"]
    ]
    return _table(head, rows + [_cells(one, at_k, tasks, texts, width) for one in arms])


def _at_k(one: Mapping[str, Any], at_k: Sequence[str]) -> list[str]:
    found = [one.get("pass_at", {}).get(k) for k in at_k]
    return ["" if value is None else _share(value["value"], value["ci95"]) for value in found]


def _cells(
    one: Mapping[str, Any], at_k: Sequence[str], tasks: Sequence[str], texts: Sequence[str], width: int
) -> list[str]:
    title = one["title"]
    runs = f"{one['runs']}/{one['planned']}"
    if not one["runs"]:
        return [title, runs, "failed", *[""] * (width - 3)]
    against = one["against_reference"]
    return [
        title,
        runs,
        _share(one["accuracy"], one["ci95"]),
        *_at_k(one, at_k),
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
