"""Which answers a run asks for, as a function of their number alone: nothing of it has to be remembered to resume."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import xxhash

from common.config.model import Config
from common.data.rows import batch_rows
from common.protocol.schema import Prompt, Sample, Sampling

Draw = Callable[[int, str], Prompt]
"""(row's index, sample's id) -> the sample's prompt."""


class SampleSource:
    """The samples of a run by number: ``batch_size * samples_per_prompt`` a step, a prompt's samples together."""

    def __init__(self, config: Config, prompts: Sequence[Prompt], draw: Draw | None = None) -> None:
        """`draw`: what `prompts` look like under the context of one sample, where each has one of its own."""
        self._draw = draw
        self._config = config
        self._prompts = prompts
        self.per_step = config.rollout.batch_size * config.rollout.samples_per_prompt
        self._rows: tuple[int, list[int]] = (-1, [])

    def __getitem__(self, number: int) -> Sample:
        config, rollout = self._config, self._config.rollout
        step, inside = divmod(number, self.per_step)
        place, repeat = divmod(inside, rollout.samples_per_prompt)
        if self._rows[0] != step:
            rows = batch_rows(step, batch_size=rollout.batch_size, rows=len(self._prompts), seed=config.run.seed)
            self._rows = (step, rows)
        index = self._rows[1][place]
        prompt = self._prompts[index]
        sample_id = f"{step}/{place}/{prompt.row_id}/{repeat}"
        if self._draw is not None:
            prompt = self._draw(index, sample_id)
        sampling = Sampling(
            max_tokens=rollout.max_tokens,
            temperature=rollout.temperature,
            top_p=rollout.top_p,
            top_k=self._own_topk(number),
            stop=rollout.stop,
            seed=sample_seed(config.run.name, config.run.seed, sample_id),
        )
        return Sample(number, step, sample_id, prompt, sampling)

    def _own_topk(self, number: int) -> int:
        """How many ids the engine returns: where the learner picks them, the first of a step only, to compare."""
        by_learner = self._config.rollout.topk_from == "learner"
        return 0 if by_learner and number % self.per_step else self._config.loss.top_k


def sample_seed(run: str, seed: int, sample_id: str) -> int:
    """Seed of one answer: a function of the run, the step, the row and the sample, not of scheduling."""
    return xxhash.xxh32_intdigest(f"{run}/{seed}/{sample_id}".encode()) & 0x7FFFFFFF
