"""The metrics of a step: per-token values summed by the objective, and their means over the step's loss tokens."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from common.config.model import LossConfig, RolloutConfig

METRICS = (
    "loss",
    "kl/support",
    "kl/tail",
    "kl/lower_bound",
    "mass/student_topk",
    "mass/teacher_topk",
    "support_coverage",
    "topk_overlap",
    "entropy",
    "mismatch/counted",
    "mismatch/abs",
    "mismatch/squared",
    "mismatch/outside",
    "importance/mean",
    "importance/squared",
)
"""Per-token values, in this order, summed over the step's loss tokens.

- ``loss``: the minimised value before token weights.
- ``kl/support``, ``kl/tail``: the reverse KL on the support and in the tail bucket, whatever the loss's form.
  ``kl/lower_bound`` is their sum, a lower bound of the full KL.
- ``mass/*``: probability mass of the student and of the teacher on the support.
- ``support_coverage``: the student's mass, under the weights being trained, on the ids that it picked at sampling
  time, as far as the support contains them (if the teacher picks the support, it contains only some).
- ``topk_overlap``: share of the teacher's top k that is in the student's; NaN if only the student picks.
- ``entropy``: the student's entropy over the support and the tail bucket.
- ``mismatch/counted``: 1 for a token that a rollout engine sampled; the others count for no ``mismatch/*``.
- ``mismatch/abs``, ``mismatch/squared``: engine minus learner log-prob of the sampled token, absolute and squared (both
  must be at one temperature). ``mismatch/outside``: 1 if the ratio of the two probabilities is outside [0.9, 1.1].
- ``importance/*``: the prefix ratio (``loss.importance_clip``; 1 without it), and its square.
"""


def step_means(
    sums: Mapping[str, float], loss_tokens: int, loss: LossConfig, rollout: RolloutConfig
) -> dict[str, float]:
    """Return the reported means: roots and ratios replace squares; metrics undefined under these settings are left out.

    ``importance/ess_ratio`` is the effective sample size over the number of tokens, ``(Σw)² / (R Σw²)``.
    """
    count = max(loss_tokens, 1)
    means = {name: sums[name] / count for name in METRICS}
    by_student = means.pop("mismatch/counted")
    for name in ("mismatch/abs", "mismatch/squared", "mismatch/outside"):
        means[name] = means[name] / by_student if by_student else 0.0
    means["mismatch/rms"] = means.pop("mismatch/squared") ** 0.5
    squared = means.pop("importance/squared")
    means["importance/ess_ratio"] = means["importance/mean"] ** 2 / squared if squared else 0.0
    for name in _undefined_metrics(loss, rollout, has_student_tokens=by_student > 0):
        del means[name]
    return means


def _undefined_metrics(loss: LossConfig, rollout: RolloutConfig, *, has_student_tokens: bool) -> Iterator[str]:
    no_student_ids = rollout.teacher_answers and rollout.topk_from == "engine"
    if loss.support == "student" or no_student_ids:
        yield "topk_overlap"
    # A `teacher` support contains only those of the student's ids that the teacher picked too.
    if loss.support == "teacher" or no_student_ids:
        yield "support_coverage"
    if loss.importance_clip is None:
        yield from ("importance/mean", "importance/ess_ratio")
    if not has_student_tokens or loss.temperature != rollout.temperature or rollout.top_p != 1:
        yield from ("mismatch/abs", "mismatch/rms", "mismatch/outside")
