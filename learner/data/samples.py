"""The samples of a run. Each is a function of its number alone, so a resumed run needs no stored order."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import xxhash

from common.config.model import Config, RolloutConfig
from common.protocol.schema import Prompt, Sample, Sampling
from learner.data.context_sampling import ContextSampler
from learner.data.row_order import RowOrder

MIX_STREAM = 0x6D6978
"""Tells the random numbers of `teacher_positions` from others of the same seed and step."""


class SampleSource:
    """Samples of a run by number: ``batch_size * samples_per_prompt`` a step, samples of one prompt adjacent."""

    def __init__(
        self,
        config: Config,
        prompts: Sequence[Prompt],
        context_sampler: ContextSampler | None = None,
        set_sizes: Sequence[int] = (),
    ) -> None:
        """`context_sampler` re-renders a prompt with the context of its sample; None keeps `prompts`. `set_sizes` are
        the rows of ``data.train`` and of each set of ``data.mix``, in the order of `prompts`.
        """
        shares = [one.share for one in config.data.mix.values()]
        self._order = RowOrder(
            set_sizes or (len(prompts),),
            [1 - sum(shares), *shares],
            batch_size=config.rollout.batch_size,
            seed=config.run.seed,
        )
        self._set_names = ("train", *config.data.mix)
        self._context_sampler = context_sampler
        self._config = config
        self._prompts = prompts
        self.per_step = config.rollout.batch_size * config.rollout.samples_per_prompt
        self._rows: tuple[int, list[tuple[int, int]], frozenset[int]] = (-1, [], frozenset())

    def __getitem__(self, number: int) -> Sample:
        config, rollout = self._config, self._config.rollout
        step, within_step = divmod(number, self.per_step)
        position, repeat = divmod(within_step, rollout.samples_per_prompt)
        if self._rows[0] != step:
            self._rows = (step, self._order(step), teacher_positions(step, rollout, config.run.seed))
        index, part = self._rows[1][position]
        prompt = self._prompts[index]
        sample_id = f"{step}/{position}/{prompt.row_id}/{repeat}"
        if self._context_sampler is not None:
            prompt = self._context_sampler(index, sample_id)
        # If the learner picks the ids, the engine returns its own only for the first sample of a step, to compare.
        by_learner = rollout.topk_from == "learner"
        sampling = Sampling(
            max_tokens=rollout.max_tokens,
            temperature=rollout.temperature,
            top_p=rollout.top_p,
            top_logprobs=0 if by_learner and within_step else config.loss.top_k,
            stop=rollout.stop,
            seed=sample_seed(config.run.name, config.run.seed, sample_id),
        )
        taught = position in self._rows[2]
        return Sample(number, step, sample_id, prompt, sampling, from_teacher=taught, data_set=self._set_names[part])


def teacher_positions(step: int, rollout: RolloutConfig, seed: int) -> frozenset[int]:
    """Positions of the step's batch whose responses are the teacher's, a function of `seed` and `step`.

    Their number is the share of the batch, rounded up or down at random, so that it is exact on average.
    """
    mix, size = rollout.mix, rollout.batch_size
    if mix is None or step < mix.teacher_steps:
        return frozenset(range(size) if rollout.teacher_answers else ())
    rng = np.random.default_rng([seed, step, MIX_STREAM])
    count = math.floor(mix.teacher * size + rng.random())
    return frozenset(rng.permutation(size)[:count].tolist())


def sample_seed(run: str, seed: int, sample_id: str) -> int:
    """Seed of one answer: a function of run, seed and sample id, independent of scheduling."""
    return xxhash.xxh32_intdigest(f"{run}/{seed}/{sample_id}".encode()) & 0x7FFFFFFF
