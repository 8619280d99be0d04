"""Families that cannot be right are refused by name, from the configuration alone; all others pass."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig

from learner.preflight.families import check_families
from tests.support.configs import config_of
from tests.support.families import CORE, family_config


def faults(folder: Path, name: str, **sections: Any) -> list[str]:
    family_config(name).save_pretrained(folder)
    found = check_families(config_of(student={"model": str(folder), **sections.pop("student", {})}, **sections))
    return [finding.text.replace(str(folder), name) for finding in found]


@pytest.mark.parametrize("name", CORE)
def test_families_of_the_core_pass_without_weights(name: str, tmp_path: Path) -> None:
    assert faults(tmp_path, name) == []


@pytest.mark.parametrize(
    ("name", "sections", "message"),
    [
        ("llama4-text", {}, "student.model llama4-text: Llama4ForCausalLM is not a decoder"),
        ("bloom", {}, "student.model bloom: its configuration names no longest sequence: set student.max_sequence"),
        ("gpt2", {"learner": {"lora": {"rank": 4}}}, "learner.lora: transformer.h.0.attn.c_attn is a Conv1D"),
        ("mamba2", {"learner": {"lora": {"rank": 4}}}, "incompatible with Mamba-based models"),
        (
            "llama",
            {"sync": {"expert_mismatch": True}, "rollout": {"gpus_per_worker": 1}},
            "LlamaForCausalLM has no experts: remove sync.expert_mismatch",
        ),
        ("llama-dynamic-ntk", {"student": {"max_sequence_tokens": 1024}}, "set student.max_sequence_tokens to at most"),
        ("llama-dynamic-ntk", {"teacher": {"max_sequence_tokens": 1024}}, "set teacher.max_sequence_tokens to at most"),
    ],
)
def test_what_cannot_be_right_is_refused_by_name(
    name: str, sections: dict[str, Any], message: str, tmp_path: Path
) -> None:
    assert any(message in fault for fault in faults(tmp_path, name, **sections))


def test_a_configuration_that_transformers_cannot_build_is_one_line(tmp_path: Path) -> None:
    settings = family_config("llama").to_dict()
    (tmp_path / "config.json").write_text(json.dumps({**settings, "pad_token_id": settings["vocab_size"]}))
    (fault, _) = check_families(config_of(student={"model": str(tmp_path)}))
    assert "transformers cannot build it: " in fault.text


def test_a_model_type_without_a_language_model_is_refused(tmp_path: Path) -> None:
    AutoConfig.for_model("t5").save_pretrained(tmp_path)
    found = [finding.text for finding in check_families(config_of(student={"model": str(tmp_path)}))]
    assert any("model type t5: transformers has no language model for it" in text for text in found)


def test_quantised_weights_are_refused(tmp_path: Path) -> None:
    settings = family_config("gpt_oss").to_dict() | {"quantization_config": {"quant_method": "mxfp4"}}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    found = [finding.text for finding in check_families(config_of(student={"model": str(tmp_path)}))]
    assert any("its weights are quantised (mxfp4)" in text for text in found)


def test_a_teacher_elsewhere_or_in_vllm_is_not_checked(tmp_path: Path) -> None:
    for teacher in ({"url": "http://127.0.0.1:1"}, {"backend": "vllm", "gpus": 1}):
        assert [fault for fault in faults(tmp_path, "llama4-text", teacher=teacher) if "teacher" in fault] == []
