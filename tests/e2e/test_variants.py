"""A whole run with as many other settings at once as go together, on a cluster of two nodes.

The nodes share no loopback device, so every address must be a node's own. Each claims a GPU for one worker: wherever
the teachers and the learner's ranks are placed, one worker is remote.
"""

from __future__ import annotations

import json
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.support.namespaces import missing_rights, two_namespaces
from tests.support.ray_nodes import ONE_WORKER_A_NODE, ray_cluster
from tests.support.runs import finish, metric_lines, started_run, write_run
from tests.support.tiny import make_tiny_model
from tests.support.tokenizers import build_tokenizer


@contextmanager
def two_nodes() -> Iterator[tuple[dict[str, str], list[str]]]:
    """The cluster: variables of a driver, and words before its command. Warns if the nodes must share a loopback."""
    if (reason := missing_rights()) is not None:
        warnings.warn(f"the two nodes share a loopback device: {reason}", stacklevel=3)
        with ray_cluster(worker_nodes=1, gpus=(1, 1)) as environment:
            yield environment, []
        return
    with (
        two_namespaces() as namespaces,
        ray_cluster(worker_nodes=1, gpus=(1, 1), namespaces=namespaces) as environment,
    ):
        yield environment, namespaces[0].prefix


def write_variants(folder: Path, model: Path) -> Path:
    """The larger teacher is an instruct model of the student's family: another token ends its texts, and it knows one
    token more.
    """
    big = make_tiny_model(folder / "big", hidden=128, seed=3)
    build_tokenizer(eos="<|im_start|>", named=("<|im_end|>", "<|im_start|>"), plain=("<tool>",)).save_pretrained(big)
    config = write_run(
        folder,
        model,
        rollout={"workers": 2, "samples_per_prompt": 2, "topk_from": "learner", "max_staleness": 1},
        loss={"support": "union", "top_k": 32},
        learner={"ranks": 2, "steps": 4},
        teachers={
            "big": {"model": str(big), "threads": 1},
            "live": {"kind": "live", "threads": 1},
            "average": {"kind": "ema", "ema_decay": 0.5, "threads": 1},
        },
        eval={"every": 0},
    )
    rows = [json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()]
    for row, name in zip(rows, ["big", "live", "average", None] * 2, strict=True):
        row["teacher"] = name
    (folder / "train.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    return config


def test_two_workers_two_ranks_four_teachers_and_the_learners_own_topk_running_ahead(
    tiny_model: Path, tmp_path: Path
) -> None:
    """The support is the union of both sides' top-k, the student's part chosen by the learner."""
    config, run = write_variants(tmp_path, tiny_model), tmp_path / "runs/tiny"
    with (
        two_nodes() as (environment, prefix),
        started_run(config, ONE_WORKER_A_NODE, environment=environment, prefix=prefix) as process,
    ):
        finish(process)
    lines = metric_lines(run)
    assert [line["weight_version"] for line in lines] == [1, 2, 3, 4]
    for line in lines:
        assert 0 < line["topk_overlap"] < 1
        assert 0 < line["mass/student_topk"] <= 1
        assert line["staleness/max_age"] <= 1
    agreements = [line for line in lines if "topk_agreement" in line]
    assert agreements
    for line in agreements:  # with the same weights engine and learner rank alike, ties and last bits apart
        assert line["topk_agreement"] > (0.95 if line["staleness/max_age"] == 0 else 0.3)
    assert max(line["staleness/mean_age"] for line in lines) > 0
    audit = [json.loads(line) for line in (run / "audit.jsonl").read_text().splitlines()]
    assert [len(line["trained"]) for line in audit] == [16] * 4
    assert Counter(sample for line in audit for sample in line["trained"]).most_common(1)[0][1] == 1
    trace = json.loads((run / "trace.json").read_text())
    tracks = {event["args"]["name"] for event in trace if event["name"] == "process_name"}
    assert tracks >= {"worker 0", "worker 1", "rank 0", "rank 1", "teacher", "controller"}
    summary = json.loads((run / "summary.json").read_text())
    assert 0 <= summary["trainer_idle_ratio"] <= 1


def test_low_rank_adapters_in_bfloat16_end_without_a_warning_of_mismatch(
    tiny_model: Path, tmp_path: Path, shared_cluster: dict[str, str]
) -> None:
    """The learner trains the weights that engines get: only their kernels round differently."""
    config = write_run(
        tmp_path,
        tiny_model,
        student={"dtype": "bfloat16"},
        learner={"steps": 3, "lora": {"rank": 4, "alpha": 8}},
        sync={"probe_prompts": 8, "probe_tokens": 32},
        eval={"every": 0},
    )
    with started_run(config, environment=shared_cluster) as process:
        assert "log-probs of engine and learner differ" not in finish(process)
    lines = metric_lines(tmp_path / "runs/tiny")
    assert [line["weight_version"] for line in lines] == [1, 2, 3]
    for line in lines:
        assert 1e-4 < line["parity/rms_nats"] < 0.1  # bfloat16 it is
        assert 1e-4 < line["mismatch/rms"] < 0.1
