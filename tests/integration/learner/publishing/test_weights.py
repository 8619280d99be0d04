"""The learner's weights read, saved, resumed; the learner as Ray actors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import torch
from torch import Tensor

from common.config.model import Config
from common.protocol.schema import ScoredTrajectory, TokenSequence
from tests.support.families import Families
from tests.support.learner_oracle import expected_change, expected_gradients, relative_difference, weights_of
from tests.support.learner_ranks import Cut, Ranks, smooth_config, step, totals, weights_now
from tests.support.scored import learner_config, make_scored


def read_logprobs(rank: int, config: Config, sequences: list[TokenSequence], temperature: float) -> list[np.ndarray]:
    from learner.trainer.engine import LearnerEngine

    return list(LearnerEngine(config).inference.logprobs(sequences, temperature))


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
    """Train one step, save; results of `named_weights` and `weight_specs` in their order."""
    from learner.trainer.engine import LearnerEngine

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


def whole_at_a_time(rank: int, config: Config) -> tuple[int, int, int]:
    """Bytes of gathered parameters on this rank: before publishing, the maximum during it, after."""
    from learner.trainer.engine import LearnerEngine

    engine = LearnerEngine(config)
    parameters = [weight for _, weight, _ in engine._weights._named]

    def whole() -> int:
        return sum(parameter.numel() * parameter.itemsize for parameter in parameters)  # partitioned ones have none

    before = whole()
    peak = max(whole() for _ in engine.named_weights())
    return before, peak, whole()


def test_publishing_a_partitioned_model_gathers_no_more_than_a_bucket(two: Ranks, tiny_model: Path) -> None:
    bucket_bytes, embedding_bytes = 40_000, 512 * 64 * 4
    config = smooth_config(tiny_model, 3, sync={"bucket_bytes": bucket_bytes})
    for before, peak, after in two.call(whole_at_a_time, config):
        assert before < peak <= before + max(bucket_bytes, embedding_bytes)
        assert after == before
    total = sum(tensor.nbytes for tensor in weights_of(tiny_model).values())
    assert peak < total / 2  # the bound is one


def test_a_save_replaces_the_folder_as_a_whole(one: Ranks, tiny_model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    (folder / "stale").touch()
    one.call(export, smooth_config(tiny_model), make_scored(2), str(folder))
    assert not (folder / "stale").exists()
    assert not folder.with_name("checkpoint.partial").exists()


def continued(rank: int, config: Config, cuts: Sequence[Cut], folder: str | None) -> dict[str, Tensor]:
    """Run four steps; with a `folder`, a second engine resumes the state that the first saved after two."""
    from learner.trainer.engine import LearnerEngine

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
        from learner.trainer.engine import LearnerEngine

        engine = LearnerEngine(config)
        engine.accumulate(scored)
        engine.save_state(Path(folder))

    def load(rank: int, config: Config, folder: str) -> None:
        from learner.trainer.engine import LearnerEngine

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
    assert replace(report, token_records=()) == replace(again, token_records=())
    assert [kept.values for kept in report.token_records] == [kept.values for kept in again.token_records]
    assert [r.sequences for r in reports] == [2, 5]
    ((usual, _, _),) = one.call(step, learner_config(tiny_model), [[scored]])
    assert relative_difference(a, usual) < 1e-2  # Adam at its usual eps


def test_the_learners_topk_are_the_most_likely_ids(one: Ranks, two: Ranks, tiny_model: Path) -> None:
    from transformers import AutoModelForCausalLM

    def read_topk(rank: int, config: Config, sequences: list[TokenSequence]) -> list[np.ndarray]:
        from learner.trainer.engine import LearnerEngine

        return list(LearnerEngine(config).inference.topk(sequences, 5))

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
    from learner.cluster.rank import LearnerRank

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
    reports = ray.get(
        [
            ranks[0].accumulate.remote([(0.0, "train")] * 3, *refs[:3]),
            ranks[1].accumulate.remote([(0.0, "train")], refs[3]),
        ]
    )
    assert [report.sequences for report in reports] == [3, 1]
    steps = ray.get([rank.finish_step.remote(*totals(scored)) for rank in ranks])
    assert replace(steps[0], token_records=()) == replace(steps[1], token_records=())
    ray.get([rank.save.remote(str(tmp_path / "out")) for rank in ranks])
    after, before = weights_of(tmp_path / "out"), weights_of(tiny_model)
    change = {name: after[name] - before[name] for name in before}
    assert relative_difference(change, expected_change(config, expected_gradients(config, scored))) < 1e-5
    ray.get([rank.close.remote() for rank in ranks])
    for rank in ranks:
        ray.kill(rank)


def test_experts_of_a_partitioned_model_are_published_one_by_one(
    one: Ranks, two: Ranks, families: Families, tmp_path: Path
) -> None:
    """Under ZeRO-3 as without: the same step, names of the checkpoint, an export that reloads."""
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    source, scored = families / "qwen3_moe", make_scored(3)
    results = []
    for ranks, stage in ((one, 0), (two, 3)):
        config = smooth_config(source, stage, sync={"bucket_bytes": 40_000})
        results.append(ranks.call(export, config, scored, str(tmp_path / str(stage)))[0])
    assert results[0]["weights"].keys() == load_file(source / "model.safetensors").keys()
    stored = load_file(tmp_path / "3/model.safetensors")
    before = weights_of(tmp_path / "0")
    assert relative_difference(weights_of(tmp_path / "3"), before) < 1e-4
    for name, tensor in results[1]["weights"].items():
        torch.testing.assert_close(tensor, stored[name], rtol=0, atol=0)
        torch.testing.assert_close(tensor, results[0]["weights"][name], rtol=0, atol=1e-5)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "3")
    assert relative_difference({n: p.detach() for n, p in model.named_parameters()}, weights_of(source)) > 1e-3
