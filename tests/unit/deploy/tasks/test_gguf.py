"""Conversion of GGUF files."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2Config
from typer.testing import CliRunner

from deploy.cli.main import app
from deploy.tasks.folders import PrepareError
from deploy.tasks.gguf import TIED, check_language, prepare_gguf, relative_distance, tie

CONFIG = {
    "vocab_size": 258,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}


def write_qwen2(path: Path, weights: dict[str, torch.Tensor], *, output: bool) -> None:
    """Write the weights of a Qwen 2 of `CONFIG` as llama.cpp does, unquantised, with a tokenizer of bytes."""
    writer = gguf.GGUFWriter(path, "qwen2")
    writer.add_block_count(2)
    writer.add_context_length(256)
    writer.add_embedding_length(64)
    writer.add_feed_forward_length(96)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_rope_freq_base(1e6)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list([*sorted(pre_tokenizers.ByteLevel.alphabet()), "ab", "<|im_end|>"])
    writer.add_token_types([gguf.TokenType.NORMAL] * 257 + [gguf.TokenType.CONTROL])
    writer.add_token_merges(["a b"])
    writer.add_eos_token_id(257)
    writer.add_chat_template("{% for m in messages %}<{{ m.content }}>{% endfor %}")
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN2, 2)
    for name, weight in weights.items():
        if output or name != "lm_head.weight":
            stem, suffix = name.rsplit(".", 1)
            writer.add_tensor(f"{names.get_name(stem)}.{suffix}", weight.numpy())
    finish(writer)


def finish(writer: gguf.GGUFWriter) -> None:
    """Write the file and close it."""
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("tied", [False, True])
def test_the_weights_are_those_of_the_model(tied: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = AutoModelForCausalLM.from_config(Qwen2Config(**CONFIG, tie_word_embeddings=tied))
    write_qwen2(tmp_path / "x.gguf", model.state_dict(), output=not tied)
    monkeypatch.setattr("deploy.tasks.gguf.check_language", lambda *_: None)  # the weights are random
    written_to = ["--out", str(tmp_path / "model"), "--dtype", "bfloat16"]
    result = CliRunner().invoke(app, ["prepare", "gguf", str(tmp_path / "x.gguf"), *written_to])
    assert result.exit_code == 0, result.output
    assert (tmp_path / "model/model.safetensors").stat().st_mode & 0o777 == 0o644
    settings = json.loads((tmp_path / "model/config.json").read_text())
    assert settings["dtype"] == "bfloat16"
    assert settings["tie_word_embeddings"] == tied
    assert not settings.keys() & {"quantization_config", "_name_or_path", "_model_name_or_path"}
    written = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype="auto").state_dict()
    assert written.keys() == model.state_dict().keys()
    assert all(torch.equal(written[name], weight.bfloat16()) for name, weight in model.state_dict().items())
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    assert len(tokenizer("abc", add_special_tokens=False)["input_ids"]) == 2
    assert tokenizer.eos_token_id == 257
    assert tokenizer.apply_chat_template([{"role": "user", "content": "x"}], tokenize=False) == "<x>"


def test_a_file_that_lacks_a_weight_is_refused(tmp_path: Path) -> None:
    weights = AutoModelForCausalLM.from_config(Qwen2Config(**CONFIG)).state_dict()
    del weights["model.layers.1.mlp.up_proj.weight"]
    write_qwen2(tmp_path / "x.gguf", weights, output=True)
    with pytest.raises(PrepareError, match=r"lacks 1 weights of a qwen2: model.layers.1.mlp.up_proj.weight"):
        prepare_gguf(tmp_path / "x.gguf", tmp_path / "model", "float32")
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize(
    ("kept", "stored"), [("output.weight", ("Q4_0", "Q8_0")), ("token_embd.weight", ("Q8_0", "Q4_0"))]
)
def test_two_quantisations_of_one_matrix_are_tied_and_the_finer_one_is_kept(
    kept: str, stored: tuple[str, str], tmp_path: Path
) -> None:
    matrix = np.random.default_rng(0).standard_normal((256, 64)).astype(np.float32)
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "llama")
    values = {}
    for name, kind in zip(("token_embd.weight", "output.weight"), stored, strict=True):
        quantisation = gguf.GGMLQuantizationType[kind]
        data = gguf.quantize(matrix, quantisation)
        writer.add_tensor(name, data, raw_dtype=quantisation)
        values[name] = torch.from_numpy(gguf.dequantize(data, quantisation))
    finish(writer)
    tensors = {"embed": values["token_embd.weight"], "out": values["output.weight"]}
    assert 0.05 < relative_distance(tensors["out"], tensors["embed"]) < TIED
    assert tie(tmp_path / "x.gguf", tensors, "out", "embed")
    assert tensors.keys() == {"embed"}
    assert tensors["embed"] is values[kept]


def test_another_matrix_is_not_tied() -> None:
    other = {"out": torch.randn(256, 64), "embed": torch.randn(256, 64)}
    assert relative_distance(other["out"], other["embed"]) > 5 * TIED
    assert not tie(Path("none"), other, "out", "embed")
    assert other.keys() == {"out", "embed"}
    assert relative_distance(torch.ones(3, 2), torch.ones(2, 2)) > TIED


def test_a_model_that_does_not_know_language_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_model, tmp_path / "model")
    with pytest.raises(PrepareError, match="nats a token for a plain sentence"):
        check_language(tmp_path / "model", AutoTokenizer.from_pretrained(tiny_model))


def test_what_is_no_gguf_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(b"PK")
    with pytest.raises(PrepareError, match="is not a GGUF file"):
        prepare_gguf(tmp_path / "x.gguf", tmp_path / "model", "float32")
    (tmp_path / "x.gguf").write_bytes(b"GGUF" + bytes(64))
    with pytest.raises(PrepareError, match="transformers cannot read it"):
        prepare_gguf(tmp_path / "x.gguf", tmp_path / "model", "float32")
    assert [path.name for path in tmp_path.iterdir()] == ["x.gguf"]


@pytest.mark.parametrize("arguments", [["gguf"], ["few-shot", "x.gguf"]])
def test_a_file_goes_with_gguf_alone(arguments: list[str]) -> None:
    result = CliRunner().invoke(app, ["prepare", *arguments])
    assert result.exit_code == 2
    assert "no other task takes one" in result.output
