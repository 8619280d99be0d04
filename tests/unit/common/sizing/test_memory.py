"""Memory by arithmetic: the terms, and the activations against what autograd keeps of real layers."""

from __future__ import annotations

from typing import Any

import pytest

from common.config.loader import validate
from common.config.model import Config, TeacherConfig
from common.sizing.machine import GIB
from common.sizing.memory import (
    ProcessNeed,
    layer_token_bytes,
    longest_trainable,
    process_needs,
    rank_need,
    teacher_need,
)
from common.sizing.model_size import size_of
from deploy.docs_tools.sizes import qwen3

EIGHT = qwen3("8B")
N = EIGHT.parameters


def config(**sections: dict[str, Any]) -> Config:
    tree: dict[str, Any] = {
        "run": {"name": "sizes"},
        "student": {"model": "unused"},
        "context": {"text": "unused"},
        "data": {"train": "unused"},
    }
    return validate(Config, {**tree, **sections})


def rank(**learner: Any) -> ProcessNeed:
    return rank_need(config(learner={"gpus_per_rank": 1, **learner}), EIGHT, 0)


def test_an_8b_student_needs_134_gib_of_state_before_any_activation() -> None:
    need = rank(zero_stage=3)
    state = need.certain + need.peak["the update"]
    assert need.certain == (2 + 4 + 12) * N
    assert state == pytest.approx(18 * N + 4e9)  # float32 gradients, and a float32 copy of 1e9 of them
    assert 136 < state / GIB < 142


@pytest.mark.parametrize(
    ("stage", "runs_at", "per_parameter"),
    [
        (0, 2, 2 + (4 + 12) / 4),  # bfloat16 runs at stage 2 at least
        (1, 2, 2 + (4 + 12) / 4),
        (2, 2, 2 + (4 + 12) / 4),
        (3, 3, (2 + 4 + 12) / 4),
    ],
)
def test_bfloat16_by_stage_on_four_ranks(stage: int, runs_at: int, per_parameter: float) -> None:
    need = rank(zero_stage=stage, ranks=4)
    assert need.certain == pytest.approx(per_parameter * N, rel=1e-6)
    assert (need.peak["the update"] > 0) == (runs_at == 3)


def test_offload_moves_the_optimiser_to_host_memory() -> None:
    here, there = rank(zero_stage=3, ranks=2), rank(zero_stage=3, ranks=2, cpu_offload=True)
    assert here.certain - there.certain == pytest.approx(16 * N / 2, rel=1e-6)
    assert there.host["optimiser"] == pytest.approx(12 * N / 2, rel=1e-6)
    assert there.host["gradients"] == pytest.approx(8 * N / 2, rel=1e-6)


def test_adapters_leave_little_but_the_weights() -> None:
    need = rank(lora={"rank": 16})
    assert 2 * N < need.certain < 2.2 * N


def test_the_longest_sequence_fills_the_gpu_and_one_more_token_does_not_fit() -> None:
    settings = config(
        learner={
            "gpus_per_rank": 1,
            "zero_stage": 3,
            "ranks": 8,
            "gradient_checkpointing": True,
            "micro_batch_tokens": 1,
        }
    )
    memory = int(79.6 * GIB)
    longest = longest_trainable(settings, EIGHT, memory)
    assert rank_need(settings, EIGHT, longest).total <= memory < rank_need(settings, EIGHT, longest + 1).total
    assert 40_000 < longest < 100_000
    assert longest_trainable(settings, EIGHT, 10 * GIB) == 0


def test_processes_and_contexts() -> None:
    settings = config(
        rollout={"gpus_per_worker": 1, "workers": 3, "max_tokens": 1000},
        teacher={"gpus": 1, "context_cache_bytes": 2**30},
        teachers={"far": {"url": "http://somewhere:1"}},
        learner={"gpus_per_rank": 1, "ranks": 2},
    )
    sizes = {"default": EIGHT, "far": EIGHT}
    needs = {need.name: need for need in process_needs(settings, EIGHT, sizes, context_tokens=1000, longest_prompt=24)}
    assert {name: need.count for name, need in needs.items()} == {
        "rank": 2,
        "rollout worker": 3,
        "teacher": 1,
        "driver": 1,
    }
    assert needs["teacher"].parts == {"weights": 2 * N, "contexts": 1000 * 2 * 36 * 1024 * 2}
    assert needs["rollout worker"].parts == {"weights": 2 * N, "cache of one sequence": 1024 * 2 * 36 * 1024 * 2}
    assert needs["rollout worker"].peak["a sync"] == 0
    on_cpu = settings.model_copy(update={"rollout": settings.rollout.model_copy(update={"gpus_per_worker": 0})})
    engine = next(need for need in process_needs(on_cpu, EIGHT, sizes) if need.name == "rollout worker")
    # Measured with 0.5B parameters in float32: 5.3 GB, and 7.6 GB while a sync packs the weights anew.
    packed = 4 * (N + EIGHT.vocabulary * EIGHT.hidden)
    assert engine.parts == {"weights": packed, "key-value cache": GIB}
    assert engine.peak["a sync"] == packed
    many = {need.name: need for need in process_needs(settings, EIGHT, sizes, context_tokens=10**9)}
    assert many["teacher"].parts["contexts"] == 2**30
    asking = TeacherConfig(model="m", backend="remote", endpoint="http://e")
    assert teacher_need("default", asking, EIGHT, 0, 1000).total == 0  # the endpoint holds the model


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("family", "low", "high"), [("Qwen3", 0.99, 1.01), ("Llama", 0.7, 1.0), ("Gemma2", 0.9, 1.6)])
def test_autograd_keeps_as_much_of_a_layer(family: str, low: float, high: float, dtype: str) -> None:
    """`layer_token_bytes` against the bytes of all tensors that autograd saves: four layers against two."""
    import torch
    import transformers

    def saved(layers: int) -> int:
        settings = getattr(transformers, f"{family}Config")(
            vocab_size=64, hidden_size=256, intermediate_size=640, num_hidden_layers=layers, num_attention_heads=8,
            num_key_value_heads=2, head_dim=64, pad_token_id=0, bos_token_id=0, eos_token_id=0,
        )  # fmt: skip
        model = transformers.AutoModelForCausalLM.from_config(settings, dtype=getattr(torch, dtype)).train()
        own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
        kept: dict[int, torch.Tensor] = {}

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            if tensor.untyped_storage().data_ptr() not in own:
                kept[tensor.untyped_storage().data_ptr()] = tensor
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            model.base_model(input_ids=torch.arange(96)[None] % 64, use_cache=False)
            return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())

    names = {"hidden_size": 256, "intermediate_size": 640, "num_hidden_layers": 1, "num_attention_heads": 8}
    size = size_of(
        {**names, "num_key_value_heads": 2, "head_dim": 64, "vocab_size": 64, "max_position_embeddings": 9}, {"x": (1,)}
    )
    assert size is not None
    measured = (saved(4) - saved(2)) / 2 / 96
    assert low < measured / layer_token_bytes(size, 4 if dtype == "float32" else 2) < high
