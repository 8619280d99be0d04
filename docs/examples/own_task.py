"""Your own task: an environment to play and a grader. Data and configuration name them ``own_task:HigherOrLower`` and
``own_task:close_enough``.

`opcd train` finds this module in the folder that it starts in. For another folder set PYTHONPATH, on every node.
"""

import asyncio
import json
import random
import sys

from rollout_workers.environments.base import EpisodeError, Step
from rollout_workers.environments.registry import make_environment


class HigherOrLower:
    """Find a hidden number. Equal seeds and answers give equal episodes; the prompt leaves out the rules."""

    def __init__(self, highest: int = 100) -> None:
        self.highest = highest
        self.hidden: int | None = None

    async def reset(self, seed: int) -> str:
        self.hidden = random.Random(seed).randint(1, self.highest)
        return f"A number between 1 and {self.highest}. Your guess:"

    async def step(self, answer: str) -> Step:
        if self.hidden is None:
            raise EpisodeError("step was called before reset")
        try:
            guess = int(answer.strip())
        except ValueError:
            return Step(f"Between 1 and {self.highest}, digits only. Your guess:", 0.0, False)
        if guess == self.hidden:
            self.hidden = None
            return Step("Found.", 1.0, True)
        return Step(f"{'Higher' if guess < self.hidden else 'Lower'} than {guess}. Your guess:", 0.0, False)


def close_enough(answer: str, expected: str) -> bool:
    """Grade an answer: right if it is within a tenth of the expected number."""
    try:
        return abs(float(answer) - float(expected)) <= 0.1 * abs(float(expected))
    except ValueError:
        return False


def write_rows(path: str, rows: int) -> None:
    """Write rows for `data.train`, one episode each."""
    with open(path, "w", encoding="utf-8") as stream:
        for seed in range(rows):
            row = {"id": f"hidden-{seed}", "environment": "own_task:HigherOrLower", "options": {"highest": 20}}
            stream.write(json.dumps({**row, "seed": seed}) + "\n")


async def play(seed: int) -> float:
    """Play one episode by bisection, to check the environment; returns the sum of rewards."""
    environment = make_environment("own_task:HigherOrLower", {"highest": 20})
    print(await environment.reset(seed))
    low, high, total, done = 1, 20, 0.0, False
    while not done:
        guess = (low + high) // 2
        step = await environment.step(str(guess))
        print(f"{guess}: {step.observation}")
        low, high = (guess + 1, high) if step.observation.startswith("Higher") else (low, guess - 1)
        total, done = total + step.reward, step.done
    return total


if __name__ == "__main__":
    write_rows(sys.argv[1], rows=8)
    print("return", asyncio.run(play(seed=0)))
