"""A whole run on games: the played episodes are trained on, counted and evaluated.

`tests.integration.deploy.test_submit` trains on games one turn at a time.
"""

from __future__ import annotations

import json
from pathlib import Path

from tests.support.games import write_games
from tests.support.runs import finish, metric_lines, started_run, write_run


def test_whole_conversations_of_older_weights_weighted_by_their_ratio(
    tiny_model: Path, tmp_path: Path, shared_cluster: dict[str, str]
) -> None:
    """The game's messages are in the sequences and not in the loss, whose weights are those of prefixes."""
    config, run = (
        write_run(
            tmp_path,
            tiny_model,
            context={"text": "P is you, G the goal, H a hole."},
            rollout={"batch_size": 4, "max_tokens": 8, "stop": [], "max_staleness": 1},
            environment={"max_turns": 3, "sample_format": "conversation"},
            loss={"importance_clip": 1.5},
            learner={"steps": 4, "micro_batch_tokens": 1024},
            eval={"every": 0},
        ),
        tmp_path / "runs/tiny",
    )
    write_games(tmp_path, {"history": False})
    with started_run(config, environment=shared_cluster) as process:
        finish(process)
    lines = metric_lines(run)
    trace = json.loads((run / "trace.json").read_text())
    rollouts = [event["args"] for event in trace if event["name"] == "rollout" and event["ph"] == "X"]
    in_sequences = sum(one["response_tokens"] for one in rollouts)
    assert in_sequences > 1.5 * sum(line["rollout/tokens"] for line in lines)
    assert [line["weight_version"] for line in lines] == [1, 2, 3, 4]
    assert {line["staleness/max_age"] for line in lines} == {0, 1}
    for line in lines:
        assert 1 < line["env/turns"] <= 3
        # Four games of answers of at most eight tokens: the game's messages are in the sequences and not counted.
        assert 0 < line["rollout/tokens"] <= 4 * 8 * line["env/turns"]
        assert line["rollout/mean_tokens"] == line["rollout/tokens"] / 4
        assert 0 < line["importance/mean"] <= 1.5
        if line["staleness/max_age"] == 0:
            assert line["mismatch/rms"] < 2e-3
            assert abs(line["importance/mean"] - 1) < 0.01
        else:
            assert line["mismatch/rms"] > 2e-3
    summary = json.loads((run / "summary.json").read_text())
    assert summary["final"]["n"] == 3
