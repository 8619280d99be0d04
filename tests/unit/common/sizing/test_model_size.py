"""Sizes from the headers of files against the models that transformers builds from them."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest

from common.config.base import ConfigError
from common.config.training import LoraConfig
from common.sizing.model_size import read_model_size
from deploy.docs_tools.sizes import QWEN3, qwen3


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("shard", ["10GB", "200KB"], ids=["one file", "shards"])
def test_a_saved_model_has_the_parameters_that_transformers_counts(
    tied: bool, shard: str, tiny_model: Path, tiny_untied_model: Path, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_model if tied else tiny_untied_model)
    model.save_pretrained(tmp_path, max_shard_size=shard)
    assert (tmp_path / "model.safetensors.index.json").exists() == (shard == "200KB")
    size = read_model_size(str(tmp_path))
    assert size is not None
    assert size.parameters == sum(p.numel() for p in model.parameters())
    assert size.largest == max(p.numel() for p in model.parameters())
    assert (size.vocabulary, size.layers, size.hidden, size.max_tokens) == (512, 2, 64, 4096)
    assert (size.query, size.key_value, size.inner) == (128, 64, 128)


def test_a_tied_output_layer_that_a_file_holds_twice_counts_once(tiny_untied_model: Path, tmp_path: Path) -> None:
    for file in tiny_untied_model.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    untied = read_model_size(str(tmp_path))
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    tied = read_model_size(str(tmp_path))
    assert untied is not None
    assert tied is not None
    assert untied.parameters - tied.parameters == 512 * 64


@pytest.mark.parametrize("modules", [("all-linear",), ("q_proj", "down_proj")])
def test_adapters_have_the_parameters_that_peft_adds(modules: tuple[str, ...], tiny_untied_model: Path) -> None:
    from transformers import AutoModelForCausalLM

    from learner.trainer.lora import add_adapters

    lora = LoraConfig(rank=4, target_modules=modules)
    model = AutoModelForCausalLM.from_pretrained(tiny_untied_model)
    add_adapters(model, lora)
    size = read_model_size(str(tiny_untied_model))
    assert size is not None
    assert size.trained(lora) == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert size.trained(None) == size.parameters


@pytest.mark.parametrize("name", ["1.7B", "8B"])
def test_the_tables_models_have_the_parameters_that_transformers_builds(name: str) -> None:
    import torch
    from transformers import AutoModelForCausalLM, Qwen3Config

    shape, size = QWEN3[name], qwen3(name)
    config = Qwen3Config(
        hidden_size=shape["hidden"],
        intermediate_size=shape["inner"],
        num_hidden_layers=shape["layers"],
        num_attention_heads=shape["heads"],
        num_key_value_heads=8,
        head_dim=128,
        vocab_size=151_936,
        tie_word_embeddings=shape["tied"],
    )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert size.parameters == sum(p.numel() for p in model.parameters())


def test_keys_and_values_are_those_of_a_cache(tiny_model: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    cache = AutoModelForCausalLM.from_pretrained(tiny_model)(torch.tensor([[5, 6, 7]]), use_cache=True).past_key_values
    held = sum(tensor.nbytes for layer in cache.layers for tensor in (layer.keys, layer.values))
    size = read_model_size(str(tiny_model))
    assert size is not None
    assert size.context_bytes(3, 4) == held


def test_what_is_not_here_is_unknown_and_what_is_broken_is_named(tmp_path: Path) -> None:
    assert read_model_size(str(tmp_path)) is None
    assert read_model_size("nobody/has-this-model") is None
    (tmp_path / "config.json").write_text("{}")
    assert read_model_size(str(tmp_path)) is None  # no weights
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", 2**40))
    with pytest.raises(ConfigError, match=r"sizes of the model cannot be read: model.safetensors is no safetensors"):
        read_model_size(str(tmp_path))
