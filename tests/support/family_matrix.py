"""The table of docs/models.md: what each service does with each family, each cell from a run on a tiny model.

``python -m tests.support.family_matrix`` writes the table of all families (a quarter of an hour); with names of
families, their rows.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from common.config.model import Config
from common.protocol.schema import ItemScore, ScoredTrajectory, as_ids
from learner.trainer.batch_layout import PACKED, PADDED
from learner.trainer.export import WeightView
from learner.trainer.inference import PolicyInference
from learner.trainer.micro_batch import build_micro_batch, count_loss_tokens, student_sequence
from learner.trainer.objective import Objective
from learner.trainer.packing import pack
from learner.trainer.policy import dtype_of, load_policy
from teacher_server.backends.base import BackendError, Work
from teacher_server.backends.hf.backend import TransformersBackend
from tests.support.configs import config_of
from tests.support.families import FAMILIES, Families
from tests.support.family_engine import FamilyEngines
from tests.support.learner_oracle import expected_gradients, relative_difference
from tests.support.scored import make_scored
from tests.support.teacher_oracle import Oracle, assert_score, random_item

LONGEST = 160
"""Tokens of the longest sequence, above every window and every original length."""
PAGE = Path(__file__).parents[2] / "docs" / "models.md"
HEADER = "| family | teacher (transformers) | learner | engine (vLLM on CPU) |\n|---|---|---|---|\n"


def rows() -> dict[str, str]:
    """Lines of the table by family, as they are in docs/models.md."""
    lines = PAGE.read_text().partition(HEADER)[2].splitlines()
    return {line.split(" | ")[0].removeprefix("| "): line for line in lines}


def matrix_row(name: str, folder: Path) -> str:
    """Return the first cells of the table's line of family `name`: all but the engine's.

    Raises AssertionError for numbers that are not exact.
    """
    return f"| {name} | {_teacher(folder)} | {_learner(folder)} |"


def whole_row(name: str, folder: Path, engines: FamilyEngines) -> str:
    """Return the table's line of family `name`; without a learner there is nothing to compare an engine with."""
    teacher, learner = _teacher(folder), _learner(folder)
    engine = "-" if learner.startswith("refused") else engines.cell(folder)
    return f"| {name} | {teacher} | {learner} | {engine} |"


def _teacher(folder: Path) -> str:
    try:
        backend = TransformersBackend.load(str(folder), max_sequence_tokens=LONGEST, prefill_tokens=64)
    except (BackendError, ValueError) as error:
        return _refusal(error)
    context = as_ids(np.random.default_rng(7).integers(0, 490, 80))
    rng, prefix = np.random.default_rng(0), backend.prefill([context], None)[0]
    batch = [
        Work(random_item(rng, prompt=p, response=r, vocabulary=490), prefix, "at_ids", 1.0, 8)
        for p, r in ((7, 20), (0, 9))
    ]
    oracle = Oracle.load(folder, pad_to=LONGEST)
    for work, score in zip(batch, backend.score(batch), strict=True):
        assert isinstance(score, ItemScore)
        assert_score(score, oracle.logprobs(context, work.item.prompt_ids, work.item.response_ids), work.item)
    return f"exact, `{backend.path}`"


def load_learner(
    folder: Path, limit: int = LONGEST, dtype: Literal["float32", "bfloat16"] = "float32"
) -> tuple[Config, PolicyInference]:
    """Load a family as the learner does, without DeepSpeed."""
    config = config_of(
        student={"model": str(folder), "max_sequence_tokens": limit, "dtype": dtype},
        learner={"micro_batch_tokens": 4096},
    )
    device = torch.device("cpu")
    policy = load_policy(config.student, config.learner, device, dtype_of(config.student, device))
    policy.check()
    layout = PACKED if pack(policy.model) is None else PADDED
    return config, PolicyInference(policy, layout, config.learner, 1.0, device, lambda passes: passes)


def four_rows() -> list[ScoredTrajectory]:
    """Rows of one micro-batch: two below every window and original length, two above."""
    short = make_scored(2, prompt_tokens=(4, 6), response_tokens=(6, 9), vocabulary=490)
    return short + make_scored(2, seed=1, prompt_tokens=(40, 70), response_tokens=(30, 50), vocabulary=490)


def gradients(inference: PolicyInference, config: Config, scored: list[ScoredTrajectory]) -> dict[str, torch.Tensor]:
    """Gradient of the step's loss by parameter name, from one micro-batch."""
    policy = inference._policy
    batch = build_micro_batch(scored, config.loss, inference._layout)
    policy(batch, Objective(batch, config.loss, scale=1.0)).backward()
    tokens = sum(count_loss_tokens(item.trajectory, config.loss) for item in scored)
    return {name: p.grad / tokens for name, p in policy.model.named_parameters() if p.grad is not None}


def assert_same_alone(inference: PolicyInference, scored: list[ScoredTrajectory]) -> None:
    """Check that the log-probs of a row are the same alone and in the company of all others."""
    sequences = [student_sequence(item) for item in scored]
    for sequence, among_others in zip(sequences, inference.logprobs(sequences), strict=True):
        (alone,) = inference.logprobs([sequence])
        np.testing.assert_allclose(among_others, alone, rtol=0, atol=1e-4)


def _learner(folder: Path) -> str:
    try:
        config, inference = load_learner(folder)
        WeightView(inference._policy.model)
    except ValueError as error:
        return _refusal(error)
    scored = four_rows()
    expected = expected_gradients(config, scored, pad_to=LONGEST)
    assert relative_difference(gradients(inference, config, scored), expected) < 2e-5
    assert_same_alone(inference, scored)
    return f"exact, {'packed' if inference._layout is PACKED else 'padded'}"


def _refusal(error: Exception) -> str:
    if "not a decoder" in str(error):
        return "refused: not a decoder with a separate output layer"
    raise error


def main(names: Sequence[str]) -> None:
    """Replace the rows of `names`, or all, in the table of docs/models.md."""
    torch.set_num_threads(1)
    table, engines = rows(), FamilyEngines()
    with tempfile.TemporaryDirectory() as folder:
        families = Families(Path(folder))
        for name in names or FAMILIES:
            table[name] = whole_row(name, families / name, engines)
            print(table[name], file=sys.stderr, flush=True)
            before = PAGE.read_text().partition(HEADER)[0]
            PAGE.write_text(before + HEADER + "\n".join(table[name] for name in FAMILIES if name in table) + "\n")
    engines.close()


if __name__ == "__main__":
    main(sys.argv[1:])
