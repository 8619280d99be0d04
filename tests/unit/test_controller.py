"""What a step says of itself."""

from __future__ import annotations

from typing import Any, cast

import pytest

from common.schema import Sample
from learner.controller import Controller
from learner.parity import ParityReport
from learner.reports import StepReport
from learner.services import Services
from tests.unit.test_colocated import TakesTurns
from tests.unit.test_stream import ROWS, config_of


class Conversations(TakesTurns):
    """Of three response tokens an environment said one."""

    counted = 0

    def _summary(self, sample: Sample, version: int) -> Any:
        summary = super()._summary(sample, version)
        summary.student_tokens = summary.response_tokens - 1
        return summary

    async def finish_step(self, tokens: int, sequences: int) -> list[StepReport]:
        self.counted = tokens
        return await super().finish_step(tokens, sequences)


async def test_tokens_are_the_students_and_the_learner_hears_of_all_in_the_sequences() -> None:
    services, said = Conversations(), list[str]()
    controller = Controller(config_of(), cast(Services, services), ROWS, said.append)

    async def publish(version: int) -> ParityReport:
        return ParityReport(0.0, 0.0, 0.0, 0.0)

    controller._publisher.publish = publish
    await controller.begin(0)
    outcome = await controller.step(0)
    await controller.close()
    assert services.counted == 4 * 3
    assert outcome.metrics["rollout/tokens"] == 4 * 2
    assert outcome.metrics["rollout/mean_tokens"] == 2
    assert outcome.metrics["tokens_per_s"] * outcome.metrics["time/total_s"] == pytest.approx(4 * 2)
    assert said[-1] == "step 1: 8 tokens, learning"
