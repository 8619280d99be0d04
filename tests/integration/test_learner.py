"""DeepSpeed for real, on one rank and on two, against one step written out with plain transformers."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import torch
from torch import Tensor

from common.config import Config
from common.schema import LOGPROB_FLOOR, PAD_ID, ScoredTrajectory, TokenSequence
from learner.reports import AccumulateReport, StepReport
from tests.learner_oracle import SMOOTH, expected_change, expected_gradients, relative_difference, weights_of
from tests.scored import learner_config, make_scored

STAGES = (0, 1, 2, 3)
Cut = Sequence[Sequence[ScoredTrajectory]]


class Host:
    """A process in which engines are made one after another: DeepSpeed allows one process group a process."""

    def __init__(self, rank: int, world_size: int) -> None:
        self._rank, self._world_size = rank, world_size

    def port(self) -> int:
        from learner.distributed import free_port

        return free_port()

    def join(self, port: int) -> None:
        from learner.distributed import join_ranks

        torch.set_num_threads(1)
        join_ranks(self._rank, self._world_size, "127.0.0.1", port, torch.device("cpu"), 200.0)

    def call(self, function: Callable[..., Any], *args: Any) -> Any:
        return function(self._rank, *args)


class Ranks:
    """`world_size` hosts in one group; `call` runs a function on all of them and returns every rank's result."""

    def __init__(self, world_size: int) -> None:
        actor = ray.remote(Host)
        self.hosts = [actor.options(num_cpus=0).remote(rank, world_size) for rank in range(world_size)]
        port = ray.get(self.hosts[0].port.remote())
        ray.get([host.join.remote(port) for host in self.hosts])

    def call(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        return ray.get([host.call.remote(function, *args) for host in self.hosts])


@pytest.fixture(scope="module", autouse=True)
def _cluster() -> Iterator[None]:
    mine = not ray.is_initialized()
    if mine:
        ray.init(num_cpus=2, include_dashboard=False, log_to_driver=bool(os.environ.get("OPCD_TEST_LOGS")))
    yield
    if mine:
        ray.shutdown()


@pytest.fixture(scope="module")
def one(_cluster: None) -> Ranks:
    """A world of one rank."""
    return Ranks(1)


@pytest.fixture(scope="module")
def two(_cluster: None) -> Ranks:
    """A world of two ranks."""
    return Ranks(2)


def smooth_config(model: Path, stage: int = 0, **sections: dict[str, Any]) -> Config:
    learner = {**SMOOTH, "zero_stage": stage, **sections.pop("learner", {})}
    return learner_config(model, learner=learner, **sections)


def totals(scored: Sequence[ScoredTrajectory]) -> tuple[int, int]:
    return sum(len(item.trajectory.response_ids) for item in scored), len(scored)


def weights_now(engine: Any) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in engine.named_weights()}


def step(
    rank: int, config: Config, cuts: Sequence[Cut]
) -> tuple[dict[str, Tensor], StepReport, list[AccumulateReport]]:
    """One optimiser step on `cuts[rank]`, one `accumulate` each; (weight change, report, reports)."""
    from learner.engine import LearnerEngine

    engine = LearnerEngine(config)
    before = weights_now(engine)
    reports = [engine.accumulate(batch) for batch in cuts[rank]]
    report = engine.finish_step(*totals([item for cut in cuts for batch in cut for item in batch]))
    after = weights_now(engine)
    return {name: after[name] - before[name] for name in before}, report, reports


# --- the gradient ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", STAGES)
def test_the_step_does_not_depend_on_the_cut(one: Ranks, two: Ranks, tiny_model: Path, stage: int) -> None:
    """1 rank × 1 batch = 1 × 4 = 2 × 2 = everything on one of two ranks = plain transformers."""
    scored = make_scored(8)
    config = smooth_config(tiny_model, stage, learner={"micro_batch_tokens": 4096})
    expected = expected_change(config, expected_gradients(config, scored))
    quarters = [scored[i::4] for i in range(4)]
    cuts: dict[str, tuple[Ranks, list[Cut]]] = {
        "1x1": (one, [[scored]]),
        "1x4": (one, [quarters]),
        "2x2": (two, [quarters[:2], quarters[2:]]),
        "uneven": (two, [[scored[:3], scored[3:]], [[], []]]),
    }
    for name, (ranks, cut) in cuts.items():
        for change, report, _ in ranks.call(step, config, cut):
            assert relative_difference(change, expected) < 1e-5, name
            assert report.applied
    small = smooth_config(tiny_model, stage, learner={"micro_batch_tokens": 40})
    ((change, _, reports),) = one.call(step, small, [[scored]])
    assert reports[0].micro_batches > 4
    assert relative_difference(change, expected) < 1e-5


@pytest.mark.parametrize("shift", [-1, 1])
def test_a_position_shifted_by_one_would_be_noticed(one: Ranks, tiny_model: Path, shift: int) -> None:
    scored = make_scored(8, prompt_tokens=(4, 8))
    config = smooth_config(tiny_model)
    ((change, _, _),) = one.call(step, config, [[scored]])
    assert relative_difference(change, expected_change(config, expected_gradients(config, scored))) < 1e-5
    assert relative_difference(change, expected_change(config, expected_gradients(config, scored, shift=shift))) > 0.5


@pytest.mark.parametrize(
    "loss",
    [
        {"normalize": "sequence"},
        {"temperature": 0.6},
        {"skip_first_tokens": 3},
        {"skip_first_tokens": 3, "normalize": "sequence"},
        {"clip_per_token": 0.4},
        {"form": "raw"},
        {"form": "renorm", "direction": "forward"},
        {"form": "generalized"},
        {"direction": "jsd", "beta": 0.3},
    ],
    ids=str,
)
def test_every_setting_of_the_loss_reaches_the_gradient(two: Ranks, tiny_model: Path, loss: dict[str, Any]) -> None:
    scored = make_scored(6)  # some answers are shorter than the tokens skipped
    config = smooth_config(tiny_model, 2, loss=loss)
    gradients = expected_gradients(config, scored)
    for change, _, _ in two.call(step, config, [[scored[:4]], [scored[4:]]]):
        assert relative_difference(change, expected_change(config, gradients)) < 1e-5
    usual = expected_gradients(smooth_config(tiny_model), scored)
    assert relative_difference(gradients, usual) > 1e-2  # the setting does something here


@pytest.mark.parametrize("stage", STAGES)
def test_gradients_are_divided_before_they_are_clipped(two: Ranks, tiny_model: Path, stage: int) -> None:
    scored = make_scored(8)
    config = smooth_config(tiny_model, stage, learner={"grad_clip": 0.1})
    gradients = expected_gradients(config, scored)
    norm = torch.stack([gradient.norm() for gradient in gradients.values()]).norm().item()
    assert norm > 0.2  # clipping bites
    for change, report, _ in two.call(step, config, [[scored[:4]], [scored[4:]]]):
        assert report.metrics["grad_norm"] == pytest.approx(norm, rel=1e-4)
        assert relative_difference(change, expected_change(config, gradients)) < 1e-5


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_optimiser_state_in_host_memory_changes_nothing(two: Ranks, tiny_model: Path, stage: int) -> None:
    scored = make_scored(6)
    config = smooth_config(tiny_model, stage, learner={"cpu_offload": True, "grad_clip": 0.1})
    for change, _, _ in two.call(step, config, [[scored[:4], scored[4:]], [[], []]]):
        assert relative_difference(change, expected_change(config, expected_gradients(config, scored))) < 1e-5


def with_support(scored: list[ScoredTrajectory], support: str, k: int) -> list[ScoredTrajectory]:
    """As a teacher answers that picks the support: the student's k ids and k others (`union`), or others alone."""
    answers = []
    for item in scored:
        own, extra = item.trajectory.topk_ids[:, :k], item.trajectory.topk_ids[:, k : 2 * k].copy()
        values = item.score.logprobs.copy()
        if support == "union":  # one of the teacher's is the student's too: its place stays empty
            extra[:, -1], values[:, 2 * k - 1] = PAD_ID, LOGPROB_FLOOR
        ids = np.concatenate([own, extra], -1) if support == "union" else extra
        values = values[:, : 2 * k] if support == "union" else values[:, k : 2 * k]
        answers.append(
            replace(
                item,
                trajectory=replace(item.trajectory, topk_ids=own),
                score=replace(item.score, logprobs=values, topk_ids=ids),
            )
        )
    return answers


@pytest.mark.parametrize("support", ["teacher", "union"])
def test_a_support_the_teacher_picked_reaches_the_gradient(one: Ranks, tiny_model: Path, support: str) -> None:
    k = 4
    scored = with_support(make_scored(4), support, k)
    plain = smooth_config(tiny_model)
    config = plain.model_copy(update={"loss": plain.loss.model_copy(update={"support": support, "top_k": k})})
    ((change, report, _),) = one.call(step, config, [[scored]])
    # The oracle knows no padding: drop the empty place, which holds no mass.
    width = 2 * k - 1 if support == "union" else k
    bare = [
        replace(
            item,
            trajectory=replace(item.trajectory, topk_ids=item.score.topk_ids[:, :width]),
            score=replace(item.score, logprobs=item.score.logprobs[:, :width], topk_ids=None),
        )
        for item in scored
        if item.score.topk_ids is not None
    ]
    assert relative_difference(change, expected_change(config, expected_gradients(config, bare))) < 1e-5
    metrics = report.metrics
    if support == "union":
        assert metrics["overlap"] == pytest.approx(1 / k)
        assert 0 < metrics["support_coverage"] < metrics["mass/student_topk"]
    else:
        assert metrics["overlap"] == metrics["support_coverage"] == 0


def test_the_policy_gradient_baseline_reaches_the_gradient(one: Ranks, tiny_model: Path) -> None:
    from transformers import AutoModelForCausalLM

    scored = make_scored(4)
    config = smooth_config(tiny_model, loss={"form": "policy_gradient", "ratio_clip": 2.0})
    ((change, _, _),) = one.call(step, config, [[scored]])
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    total = torch.zeros(())
    for item in scored:
        prompt, response = item.trajectory.prompt.student_ids, item.trajectory.response_ids
        ids = torch.tensor([[*prompt.tolist(), *response.tolist()]])
        logprobs = model(ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        chosen = logprobs.gather(-1, ids[0, len(prompt) :, None]).squeeze(-1)
        teacher, engine = (torch.from_numpy(x) for x in (item.score.sampled_logprob, item.trajectory.sampled_logprobs))
        ratio = (chosen - engine).exp().clamp(max=2.0)
        total = total + (ratio * (chosen - teacher).detach()).sum()
    (total / totals(scored)[0]).backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert relative_difference(change, expected_change(config, gradients)) < 1e-5


def test_an_output_layer_of_its_own_is_trained(one: Ranks, tiny_untied_model: Path) -> None:
    scored = make_scored(4)
    config = smooth_config(tiny_untied_model)
    ((change, _, _),) = one.call(step, config, [[scored]])
    assert "lm_head.weight" in change
    assert relative_difference(change, expected_change(config, expected_gradients(config, scored))) < 1e-5


@pytest.mark.parametrize("stage", [0, 3])
def test_gradient_checkpointing_changes_nothing(one: Ranks, tiny_model: Path, stage: int) -> None:
    scored = make_scored(4)
    config = smooth_config(tiny_model, stage, learner={"gradient_checkpointing": True})
    ((change, _, _),) = one.call(step, config, [[scored]])
    assert relative_difference(change, expected_change(config, expected_gradients(config, scored))) < 1e-5


def test_a_model_with_dropout_is_trained_without_it(one: Ranks, tiny_model: Path, tmp_path: Path) -> None:
    import shutil

    folder = tmp_path / "dropout"
    shutil.copytree(tiny_model, folder)
    text = (folder / "config.json").read_text().replace('"attention_dropout": 0.0', '"attention_dropout": 0.5')
    (folder / "config.json").write_text(text)
    assert "0.5" in text
    scored = make_scored(4)
    ((change, _, _),) = one.call(step, smooth_config(folder), [[scored]])
    config = smooth_config(tiny_model)
    assert relative_difference(change, expected_change(config, expected_gradients(config, scored))) < 1e-5


# --- several steps --------------------------------------------------------------------------------------------------


def train(
    rank: int, config: Config, scored: list[ScoredTrajectory], steps: int
) -> tuple[dict[str, Tensor], list[StepReport]]:
    """`steps` steps on the same answers, dealt out to the ranks."""
    import torch.distributed as dist

    from learner.engine import LearnerEngine

    engine = LearnerEngine(config)
    reports = []
    for _ in range(steps):
        engine.accumulate(scored[rank :: dist.get_world_size()])
        reports.append(engine.finish_step(*totals(scored)))
    return weights_now(engine), reports


def test_stages_and_worlds_train_alike(one: Ranks, two: Ranks, tiny_model: Path) -> None:
    """Five real AdamW steps with warm-up: the same losses, which fall, and the same learning rates."""
    scored = make_scored(8)
    runs = []
    for stage in STAGES:
        config = learner_config(tiny_model, learner={"zero_stage": stage, "warmup_steps": 4, "lr": 3e-3})
        runs += [reports for ranks in (one, two) for _, reports in ranks.call(train, config, scored, 5)]
    losses = np.array([[report.metrics["loss"] for report in reports] for reports in runs])
    np.testing.assert_allclose(losses, losses[:1].repeat(len(losses), 0), rtol=2e-3)
    assert losses[0, -1] < 0.9 * losses[0, 0]
    assert [report.metrics["lr"] for report in runs[0]] == pytest.approx([0.75e-3, 1.5e-3, 2.25e-3, 3e-3, 3e-3])
    assert [report.weight_version for report in runs[0]] == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_bfloat16_trains_on_float32_sums(one: Ranks, tiny_model: Path, stage: int) -> None:
    scored = make_scored(8)
    config = learner_config(tiny_model, student={"dtype": "bfloat16"}, learner={"zero_stage": stage, "lr": 3e-3})
    reference = learner_config(tiny_model, learner={"lr": 3e-3})
    ((weights, reports),) = one.call(train, config, scored, 5)
    ((_, expected),) = one.call(train, reference, scored, 5)
    assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16}
    got = [report.metrics["loss"] for report in reports]
    assert got == pytest.approx([report.metrics["loss"] for report in expected], rel=0.05)


# --- guards ---------------------------------------------------------------------------------------------------------


def poison(item: ScoredTrajectory) -> ScoredTrajectory:
    values = item.score.logprobs.copy()
    values[0, 0] = np.nan
    return replace(item, score=replace(item.score, logprobs=values))


def guarded(rank: int, config: Config, bad: Cut, good: Cut) -> tuple[list[StepReport], list[float], float]:
    """A poisoned step, then a clean one: (reports, largest weight change of each, difference to a clean run)."""
    from learner.engine import LearnerEngine

    engine = LearnerEngine(config)
    reports, changes = [], []
    for cut in (bad, good):
        before = weights_now(engine)
        engine.accumulate(cut[rank])
        reports.append(engine.finish_step(*totals([item for part in cut for item in part])))
        after = weights_now(engine)
        changes.append(max((after[name] - before[name]).abs().max().item() for name in before))
    clean = LearnerEngine(config)
    clean.accumulate(good[rank])
    clean.finish_step(*totals([item for part in good for item in part]))
    return reports, changes, relative_difference(weights_now(engine), weights_now(clean))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("stage", STAGES)
def test_a_step_with_nan_is_skipped_on_all_ranks(two: Ranks, tiny_model: Path, stage: int, dtype: str) -> None:
    """Only rank 1 holds the bad sample. Nothing moves, it is named, and the next step is as if it had not been."""
    good = make_scored(4)
    bad = [*good[:3], poison(good[3])]
    config = learner_config(tiny_model, learner={"zero_stage": stage}, student={"dtype": dtype})
    results = two.call(guarded, config, [bad[:2], bad[2:]], [good[:2], good[2:]])
    for rank, (reports, changes, difference) in enumerate(results):
        assert [report.applied for report in reports] == [False, True]
        assert [report.skipped_in_a_row for report in reports] == [1, 0]
        assert [report.weight_version for report in reports] == [1, 2]
        assert reports[0].nonfinite == (() if rank == 0 else (good[3].trajectory.sample_id,))
        assert changes[0] == 0
        assert changes[1] > 0
        assert difference < 1e-6


@pytest.mark.parametrize("stage", STAGES)
def test_the_update_norm_is_that_of_the_change(two: Ranks, tiny_model: Path, stage: int) -> None:
    scored = make_scored(6)
    config = smooth_config(tiny_model, stage, learner={"weight_decay": 0.1})
    for change, report, _ in two.call(step, config, [[scored[:3]], [scored[3:]]]):
        norm = float(sum(tensor.double().square().sum() for tensor in change.values())) ** 0.5
        assert report.metrics["update_norm"] == pytest.approx(norm, rel=1e-3)


def test_samples_that_break_a_step_are_told_as_plain_values(one: Ranks, tiny_model: Path) -> None:
    scored = make_scored(3)
    bad = replace(scored[1], score=replace(scored[1].score, logprobs=np.full_like(scored[1].score.logprobs, np.nan)))
    ((_, report, _),) = one.call(step, smooth_config(tiny_model), [[[scored[0], bad, scored[2]]]])
    assert not report.applied
    assert report.metrics["update_norm"] == 0
    (told,) = report.records
    assert told["sample_id"] == bad.trajectory.sample_id
    assert told["response_ids"] == bad.trajectory.response_ids.tolist()
    assert told["teacher_topk_logprobs"][0][0] == "nan"
    assert json.loads(json.dumps(told, allow_nan=False)) == told


def test_a_lost_answer_is_noticed(one: Ranks, tiny_model: Path) -> None:
    def miscount(rank: int, config: Config, scored: list[ScoredTrajectory]) -> None:
        from learner.engine import LearnerEngine

        engine = LearnerEngine(config)
        engine.accumulate(scored[1:])
        engine.finish_step(*totals(scored))

    with pytest.raises(ray.exceptions.RayTaskError, match="the ranks were given"):
        one.call(miscount, learner_config(tiny_model), make_scored(3))


def test_a_step_without_any_answer_is_skipped(two: Ranks, tiny_model: Path) -> None:
    for stage in STAGES:
        config = learner_config(tiny_model, learner={"zero_stage": stage})
        for change, report, _ in two.call(step, config, [[[]], [[]]]):
            assert not report.applied
            assert max(tensor.abs().max().item() for tensor in change.values()) == 0


def test_metrics_are_global_means(two: Ranks, one: Ranks, tiny_model: Path) -> None:
    scored = make_scored(6)
    config = learner_config(tiny_model)
    ((_, alone, _),) = one.call(step, config, [[scored]])
    for _, report, _ in two.call(step, config, [[scored[:1]], [scored[1:]]]):
        assert report.metrics == pytest.approx(alone.metrics, rel=1e-4)
    metrics = alone.metrics
    assert metrics["kl/full_bound"] == pytest.approx(metrics["kl/support"] + metrics["kl/tail"], rel=1e-6)
    assert metrics["loss"] == pytest.approx(metrics["kl/full_bound"], rel=1e-6)  # `tail`, reverse
    assert 0 < metrics["mass/student_topk"] < 1
    teacher = np.concatenate([np.exp(item.score.logprobs.astype(np.float64)).sum(-1) for item in scored])
    assert metrics["mass/teacher_topk"] == pytest.approx(teacher.mean(), rel=1e-4)


# --- reading and writing the weights --------------------------------------------------------------------------------


def read_logprobs(rank: int, config: Config, sequences: list[TokenSequence], temperature: float) -> list[np.ndarray]:
    from learner.engine import LearnerEngine

    return list(LearnerEngine(config).logprobs(sequences, temperature))


def expected_logprobs(model: Path, sequence: TokenSequence, temperature: float) -> np.ndarray:
    from transformers import AutoModelForCausalLM

    ids = torch.tensor([[*sequence.prompt_ids.tolist(), *sequence.response_ids.tolist()]])
    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(model)(ids).logits[0] / temperature
    logprobs = logits.log_softmax(-1)[:-1].gather(-1, ids[0, 1:, None]).squeeze(-1)
    return logprobs[len(sequence.prompt_ids) - 1 :].numpy()


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_logprobs_equal_plain_transformers(one: Ranks, two: Ranks, tiny_model: Path, temperature: float) -> None:
    """In the order asked, whatever the micro-batches; every rank of a partitioned model has all of them."""
    sequences = [
        TokenSequence(item.trajectory.prompt.student_ids, item.trajectory.response_ids) for item in make_scored(9)
    ]
    expected = [expected_logprobs(tiny_model, sequence, temperature) for sequence in sequences]
    plain, partitioned = smooth_config(tiny_model), smooth_config(tiny_model, 3)
    for results in one.call(read_logprobs, plain, sequences, temperature) + two.call(
        read_logprobs, partitioned, sequences, temperature
    ):
        for got, wanted in zip(results, expected, strict=True):
            assert got.dtype == np.float32
            np.testing.assert_allclose(got, wanted, atol=2e-5)


def export(rank: int, config: Config, scored: list[ScoredTrajectory], folder: str) -> dict[str, Any]:
    """Train one step, save; what `named_weights` and `weight_specs` say, in their order."""
    from learner.engine import LearnerEngine

    engine = LearnerEngine(config)
    engine.accumulate(scored if rank == 0 else [])
    engine.finish_step(*totals(scored))
    engine.save(Path(folder))
    return {"weights": weights_now(engine), "specs": engine.weight_specs(), "info": engine.info()}


@pytest.mark.parametrize("stage", [0, 3])
@pytest.mark.parametrize("kind", ["tied", "untied"])
def test_saved_weights_open_and_equal_the_published_ones(
    two: Ranks, tiny_model: Path, tiny_untied_model: Path, tmp_path: Path, stage: int, kind: str
) -> None:
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = tiny_model if kind == "tied" else tiny_untied_model
    folder = tmp_path / "checkpoint"
    # A bucket smaller than the embedding: groups of one, groups of many.
    config = smooth_config(source, stage, sync={"bucket_bytes": 40_000})
    results = two.call(export, config, make_scored(3), str(folder))
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert AutoTokenizer.from_pretrained(folder).chat_template
    stored = load_file(folder / "model.safetensors")
    assert ("lm_head.weight" in stored) == (kind == "untied")
    for result in results:
        assert {name: (str(t.dtype)[6:], tuple(t.shape)) for name, t in result["weights"].items()} == {
            spec.name: (spec.dtype, spec.shape) for spec in result["specs"]
        }
        assert [spec.name for spec in result["specs"]] == list(result["weights"])
        assert result["info"].tensors == result["specs"]
        assert result["weights"].keys() == stored.keys()
        for name, tensor in result["weights"].items():
            torch.testing.assert_close(tensor, stored[name], rtol=0, atol=0)
    before = weights_of(source)
    assert relative_difference({n: p.detach() for n, p in model.named_parameters()}, before) > 1e-3
    if kind == "tied":
        assert model.lm_head.weight is model.model.embed_tokens.weight


def test_a_save_replaces_the_folder_as_a_whole(one: Ranks, tiny_model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    (folder / "stale").touch()
    one.call(export, smooth_config(tiny_model), make_scored(2), str(folder))
    assert not (folder / "stale").exists()
    assert not folder.with_name("checkpoint.partial").exists()


def continued(rank: int, config: Config, cuts: Sequence[Cut], folder: str | None) -> dict[str, Tensor]:
    """Four steps; with a `folder`, by two engines: the second starts from what the first left after two."""
    from learner.engine import LearnerEngine

    engine = LearnerEngine(config)
    for number in range(4):
        if number == 2 and folder is not None:
            engine.save_state(Path(folder))
            engine = LearnerEngine(config)
            engine.load_state(Path(folder))
            assert engine.weight_version == 2
        batch = cuts[number][rank]
        engine.accumulate(batch)
        report = engine.finish_step(*totals([item for part in cuts[number] for item in part]))
        assert report.weight_version == number + 1
    return weights_now(engine)


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize(
    ("stage", "dtype"), [(0, "float32"), (1, "float32"), (2, "float32"), (3, "float32"), (2, "bfloat16")]
)
def test_a_resumed_learner_ends_bit_equal(
    one: Ranks, two: Ranks, tiny_model: Path, tmp_path: Path, world: int, stage: int, dtype: str
) -> None:
    config = learner_config(
        tiny_model,
        student={"dtype": dtype},
        learner={"zero_stage": stage, "deterministic": True, "warmup_steps": 6, "weight_decay": 0.1},
    )
    steps = [make_scored(4, seed=seed) for seed in range(4)]
    cuts = [[scored[rank::world] for rank in range(world)] for scored in steps]
    ranks = {1: one, 2: two}[world]
    whole = ranks.call(continued, config, cuts, None)
    resumed = ranks.call(continued, config, cuts, str(tmp_path))
    for a, b in zip(whole, resumed, strict=True):
        assert all(torch.equal(a[name], b[name]) for name in a)


def test_state_of_another_shape_or_from_within_a_step_is_refused(one: Ranks, tiny_model: Path, tmp_path: Path) -> None:
    def save(rank: int, config: Config, scored: list[ScoredTrajectory], folder: str) -> None:
        from learner.engine import LearnerEngine

        engine = LearnerEngine(config)
        engine.accumulate(scored)
        engine.save_state(Path(folder))

    def load(rank: int, config: Config, folder: str) -> None:
        from learner.engine import LearnerEngine

        LearnerEngine(config).load_state(Path(folder))

    with pytest.raises(ray.exceptions.RayTaskError, match="middle of a step"):
        one.call(save, learner_config(tiny_model), make_scored(1), str(tmp_path))
    one.call(save, learner_config(tiny_model), [], str(tmp_path))
    with pytest.raises(ray.exceptions.RayTaskError, match="ZeRO stage 0"):
        one.call(load, learner_config(tiny_model, learner={"zero_stage": 1}), str(tmp_path))


def test_a_deterministic_step_does_not_see_the_order_of_arrival(one: Ranks, tiny_model: Path) -> None:
    scored = make_scored(7)
    config = learner_config(tiny_model, learner={"deterministic": True, "micro_batch_tokens": 60})
    ((a, report, _),) = one.call(step, config, [[scored[:3], scored[3:]]])
    ((b, again, reports),) = one.call(step, config, [[scored[5:], scored[4::-1]]])
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert report == again
    assert [r.sequences for r in reports] == [2, 5]
    ((usual, _, _),) = one.call(step, learner_config(tiny_model), [[scored]])
    assert relative_difference(a, usual) < 1e-2  # Adam at its usual eps


def test_the_learners_topk_are_the_most_likely_ids(one: Ranks, two: Ranks, tiny_model: Path) -> None:
    from transformers import AutoModelForCausalLM

    def read_topk(rank: int, config: Config, sequences: list[TokenSequence]) -> list[np.ndarray]:
        from learner.engine import LearnerEngine

        return list(LearnerEngine(config).topk(sequences, 5))

    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    sequences = [
        TokenSequence(item.trajectory.prompt.student_ids, item.trajectory.response_ids) for item in make_scored(5)
    ]
    for results in one.call(read_topk, smooth_config(tiny_model), sequences) + two.call(
        read_topk, smooth_config(tiny_model, 3), sequences
    ):
        for got, sequence in zip(results, sequences, strict=True):
            ids = torch.tensor([[*sequence.prompt_ids.tolist(), *sequence.response_ids.tolist()]])
            logits = model(ids).logits[0, len(sequence.prompt_ids) - 1 : -1]
            assert got.dtype == np.uint32
            assert got.tolist() == logits.topk(5).indices.tolist()


# --- the actor ------------------------------------------------------------------------------------------------------


def test_ranks_as_ray_actors(tiny_model: Path, tmp_path: Path) -> None:
    """The calls of the controller, in its order, on two `LearnerRank` actors and object references."""
    from learner.rank import LearnerRank

    config = smooth_config(tiny_model, 2, learner={"ranks": 2})
    scored = make_scored(4)
    actor = ray.remote(LearnerRank)
    ranks = [actor.options(num_cpus=0).remote(rank, 2, config) for rank in range(2)]
    with pytest.raises(ray.exceptions.RayTaskError, match="before setup"):
        ray.get(ranks[0].finish_step.remote(0, 0))
    host, port = ray.get(ranks[0].address.remote())
    infos = ray.get([rank.setup.remote(host, port) for rank in ranks])
    assert [(info.rank, info.world_size, info.dtype) for info in infos] == [(0, 2, "float32"), (1, 2, "float32")]
    refs = [ray.put(item) for item in scored]
    reports = ray.get([ranks[0].accumulate.remote(*refs[:3]), ranks[1].accumulate.remote(refs[3])])
    assert [report.sequences for report in reports] == [3, 1]
    steps = ray.get([rank.finish_step.remote(*totals(scored)) for rank in ranks])
    assert steps[0] == steps[1]
    ray.get([rank.save.remote(str(tmp_path / "out")) for rank in ranks])
    after, before = weights_of(tmp_path / "out"), weights_of(tiny_model)
    change = {name: after[name] - before[name] for name in before}
    assert relative_difference(change, expected_change(config, expected_gradients(config, scored))) < 1e-5
    ray.get([rank.close.remote() for rank in ranks])
    for rank in ranks:
        ray.kill(rank)
