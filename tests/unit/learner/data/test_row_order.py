"""Rows of several sets by share: counts, order, and what of a set's settings reaches its rows."""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from common.config.loader import validate
from common.config.model import Config, ConfigError
from common.data.rows import batch_rows
from learner.data.inputs import read_sources
from learner.data.row_order import RowOrder
from learner.loop.checkpoints import identity_of
from tests.support.stub_loop import ROWS, OrderedServices, config_of, loop_over

SIZES, SHARES = (7, 5, 11), (0.55, 0.2, 0.25)


def order(batch_size: int = 10, seed: int = 3) -> RowOrder:
    return RowOrder(SIZES, SHARES, batch_size=batch_size, seed=seed)


@pytest.mark.parametrize("batch_size", [1, 3, 10])
def test_shares_are_exact_on_average_and_off_by_less_than_one_in_a_step(batch_size: int) -> None:
    deal, steps = order(batch_size), 1500
    counts = np.array([[Counter(part for _, part in deal(step))[part] for part in range(3)] for step in range(steps)])
    assert (counts.sum(axis=1) == batch_size).all()
    for part, share in enumerate(SHARES):
        assert set(counts[:, part].tolist()) <= {math.floor(batch_size * share), math.ceil(batch_size * share)}
        assert abs(counts[:, part].mean() - batch_size * share) < 4 * 0.5 / math.sqrt(steps)


def test_each_set_comes_epoch_after_epoch() -> None:
    """After every step the rows of a set have been dealt out equally often, or once more."""
    deal, dealt = order(), Counter[int]()
    for step in range(60):
        dealt.update(row for row, _ in deal(step))
        for first, size in ((0, 7), (7, 5), (12, 11)):
            times = [dealt[row] for row in range(first, first + size)]
            assert max(times) - min(times) <= 1
    assert min(dealt.values()) > 10


def test_a_step_is_the_same_whatever_was_asked_before() -> None:
    deal = order()
    expected = [deal(step) for step in range(9)]
    assert order()(8) == expected[8]
    assert order(seed=4)(8) != expected[8]
    assert {one for _, one in expected[0][:3]} != {0} or {one for _, one in expected[1][:3]} != {0}  # sets are mixed


def test_one_set_is_dealt_out_as_ever() -> None:
    deal = RowOrder((7,), (1.0,), batch_size=5, seed=3)
    for step in range(9):
        assert [row for row, _ in deal(step)] == batch_rows(step, batch_size=5, rows=7, seed=3)


def written(folder: Path, **data: Any) -> Config:
    for name, column in (("train", "prompt"), ("general", "question")):
        rows = [{"id": f"{number}", column: f"{name} {number}"} for number in range(4)]
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    settings = {
        "run": {"name": "r"},
        "student": {"model": "m"},
        "teachers": {"fixed": {"kind": "frozen"}},
        "context": {"text": "c"},
        "data": {
            "train": str(folder / "train.jsonl"),
            "mix": {
                "general": {
                    "train": str(folder / "general.jsonl"),
                    "share": 0.25,
                    "teacher": "fixed",
                    "columns": {"prompt": "question"},
                }
            },
            **data,
        },
    }
    return validate(Config, settings)


def test_rows_of_a_further_set_have_its_columns_its_teacher_and_its_name(tmp_path: Path) -> None:
    config = written(tmp_path)
    sources = read_sources(config)
    assert sources.set_sizes == (4, 4)
    assert [(row.id, row.prompt, row.teacher) for row in sources.train[3:5]] == [
        ("3", "train 3", None),
        ("general/0", "general 0", "fixed"),
    ]
    half = config.data.mix["general"].model_copy(update={"share": 0.5})
    other = config.data.model_copy(update={"mix": {"general": half}})
    assert read_sources(config.model_copy(update={"data": other})).data_digest != sources.data_digest


@pytest.mark.parametrize(
    ("mix", "why"),
    [
        ({"a": {"train": "x", "share": 0.5}, "b": {"train": "y", "share": 0.5}}, "add up to 1 and leave nothing"),
        ({"a": {"train": "x", "share": 0.5, "teacher": "none"}}, r"data\.mix\.a\.teacher 'none' is no teacher"),
        ({"train": {"train": "x", "share": 0.5}}, r"`train` is the name of data\.train"),
        ({"a": {"train": "x", "share": 0.5, "loss": {"form": "exact"}}}, r"tail', 'raw', 'renorm' or 'generalized'"),
    ],
)
def test_sets_that_cannot_be_meant_are_refused(tmp_path: Path, mix: dict[str, Any], why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        written(tmp_path, mix=mix)


def test_a_set_has_a_loss_of_its_own(tmp_path: Path) -> None:
    general = {"train": "x", "share": 0.5, "loss": {"direction": "forward", "weight": 0.1}}
    config = config_of(batch_size=8)
    plain = {"train": "y", "share": 0.1}
    tree = {**config.model_dump(), "data": {"train": "t", "mix": {"general": general, "plain": plain}}}
    mixed = validate(Config, tree)
    own = mixed.loss.of_mixed(mixed.mixed_losses()["general"])
    assert own == mixed.loss.model_copy(update={"direction": "forward"})
    assert mixed.loss.of_mixed(mixed.mixed_losses()["plain"]) == mixed.loss
    for form, source in (("policy_gradient", "student"), ("nll", "teacher")):
        with pytest.raises(ConfigError, match=r"data\.mix\.general\.loss changes a divergence"):
            validate(Config, {**tree, "rollout": {"source": source}, "loss": {"form": form, "support": source}})
    identities = [
        identity_of(one, tokenizer="t", teachers={}, contexts=(), data="d")
        for one in (mixed, validate(Config, {**tree, "data": {"train": "t"}}))
    ]
    assert list(identities[0].differences(identities[1])) == [
        "loss.mix.general.weight: the checkpoint has 0.1, this run has None",
        "loss.mix.general.direction: the checkpoint has forward, this run has None",
    ]


class Accumulating(OrderedServices):
    """Keeps what the learner is given."""

    def __init__(self) -> None:
        super().__init__()
        self.items: list[Any] = []

    def accumulate(self, group: Any) -> list[Any]:
        self.items += [item for share in group for item in share]
        return super().accumulate(group)


async def test_a_steps_shares_are_in_its_metrics_and_the_learner_knows_the_sets() -> None:
    config = config_of(batch_size=8)
    mixed = validate(
        Config, {**config.model_dump(), "data": {"train": "t", "mix": {"general": {"train": "g", "share": 0.25}}}}
    )
    services = Accumulating()
    loop = loop_over(services, mixed, set_sizes=(6, 4))
    await loop.begin(0)
    outcome = await loop.step(0)
    await loop.close()
    assert (outcome.metrics["mix/train"], outcome.metrics["mix/general"]) == (0.75, 0.25)
    assert Counter(data_set for _, _, data_set in services.items) == {"train": 6, "general": 2}
    assert len(ROWS) == 10
    assert sum(int(name.split("/row")[1].split("/")[0]) >= 6 for name in outcome.trained) == 2
