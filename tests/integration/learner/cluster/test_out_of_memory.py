"""Ray ends processes itself where a node runs out of memory, and then says another thing than of those that died."""

from __future__ import annotations

import os
import subprocess
import sys

from tests.support.paths import ROOT

SCRIPT = """
import ray

from rollout_workers.pool.failures import ACTOR_LOST
from learner.errors import ServiceLost
from learner.loop.user_errors import unwrap_ray_error

ray.init(
    "local",  # not a cluster that another test has started on this machine
    num_cpus=1,
    include_dashboard=False,
    log_to_driver=False,
    # Of the node's memory: less than is in use already.
    _system_config={"memory_usage_threshold": 0.01, "memory_monitor_refresh_ms": 100},
)


@ray.remote
class Actor:
    def __init__(self):
        self.much = bytearray(300_000_000)

    def wait(self):
        import time

        time.sleep(60)


actor = Actor.remote()
for _ in range(2):  # in the middle of a call, and after it
    try:
        ray.get(actor.wait.remote(), timeout=50)
    except ACTOR_LOST as error:
        found = unwrap_ray_error(error)
        print(isinstance(found, ServiceLost), len(str(found).splitlines()), str(found)[:200])
"""


def test_an_actor_that_ray_ends_for_its_memory_is_lost_like_any_other() -> None:
    alone = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], cwd=ROOT, env=alone, capture_output=True, text=True, timeout=120, check=False
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("True 1 an actor of the run died: ")]
    assert len(lines) == 2, done.stdout + done.stderr
    assert all("low on memory" in line for line in lines)
