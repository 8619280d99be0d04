"""A whole run over rows with their own contexts: what was trained is what a plain model says under each row's chat."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tests.support.runs import WORDS, finish, metric_lines, started_run, write_run

SYSTEM = "Answer with the plural of the noun, and with nothing else."
TEMPLATE = "{prompt} A hint: {hint}"


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def write_own(folder: Path, model: Path) -> Path:
    config = write_run(
        folder,
        model,
        context={"text": None, "from_rows": True},
        rollout={"samples_per_prompt": 2, "batch_size": 4, "stop": []},
        learner={"steps": 3, "micro_batch_tokens": 256},
        eval={"every": 0},
    )
    text = config.read_text().replace(
        "data:", f"data:\n  columns: {{messages: prompt}}\n  teacher_template: '{TEMPLATE}'"
    )
    config.write_text(text)
    for name, words in (("train", WORDS[:8]), ("valid", WORDS[4:8]), ("eval", WORDS[8:])):
        rows = [
            {
                "id": word,
                "prompt": [{"role": "system", "content": SYSTEM}, {"role": "user", "content": f"One {word}, two"}],
                "hint": f"{word}s" * (1 + number % 3),
                "answer": f"{word}s",
            }
            for number, word in enumerate(words)
        ]
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return config


def teacher_logprobs(model: Any, tokenizer: Any, row: dict[str, Any], ids: list[int]) -> list[float]:
    """By one plain forward pass over the teacher's chat and the answer."""
    system, turn = row["prompt"]
    chat = [system, {**turn, "content": TEMPLATE.format(prompt=turn["content"], hint=row["hint"])}]
    return logprobs(model, tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False), ids)


def logprobs(model: Any, prompt: list[int], ids: list[int]) -> list[float]:
    """Of `ids` after `prompt`."""
    with torch.no_grad():
        values = model(torch.tensor([[*prompt, *ids]])).logits[0].float().log_softmax(-1)
    return [float(values[len(prompt) - 1 + t, token]) for t, token in enumerate(ids)]


def test_every_answer_is_scored_under_the_chat_of_its_row(
    tiny_model: Path, tmp_path: Path, shared_cluster: dict[str, str]
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    config, run = write_own(tmp_path, tiny_model), tmp_path / "runs/tiny"
    with started_run(config, environment=shared_cluster) as process:
        finish(process)
    rows = {row["id"]: row for row in map(json.loads, (tmp_path / "train.jsonl").read_text().splitlines())}
    model, tokenizer = AutoModelForCausalLM.from_pretrained(tiny_model), AutoTokenizer.from_pretrained(tiny_model)
    records = [json.loads(line) for line in (run / "tokens.jsonl").read_text().splitlines()]
    assert len(records) == 6
    for record in records:
        expected = teacher_logprobs(model.eval(), tokenizer, rows[record["row"]], record["ids"])
        np.testing.assert_allclose(record["teacher_logprobs"], expected, atol=2e-3)
    texts = {
        line["context"]: line["text"] for line in map(json.loads, (run / "texts.jsonl").open()) if "context" in line
    }
    for record in records:
        assert rows[record["row"]]["hint"] in texts[record["context"]]
    audit = [json.loads(line) for line in (run / "audit.jsonl").read_text().splitlines()]
    named = {}
    for line in audit:
        assert len(line["trained"]) == len(line["contexts"]) == 8
        for sample, context in zip(line["trained"], line["contexts"], strict=True):
            assert named.setdefault(sample.split("/")[2], context) == context
    assert len(set(named.values())) == len(named) == 8
    assert [line["context/distinct"] for line in metric_lines(run)] == [4, 4, 4]
    samples = [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]
    assert {line["set"] for line in samples} >= {"base", "in_context", "final"}


def test_an_answer_is_scored_under_the_context_that_a_function_makes_of_it(
    tiny_model: Path, tmp_path: Path, shared_cluster: dict[str, str]
) -> None:
    """One row's answers are left out and one row's calls fail, within the bound."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    config = write_run(
        tmp_path,
        tiny_model,
        context={"text": None, "from_rollout": "tests.support.answer_hooks:by_row"},
        teacher={"max_failed_fraction": 0.25},
        rollout={"stop": []},
        learner={"steps": 2, "micro_batch_tokens": 256},
        run={"token_samples": 8},
        eval={"every": 0},
    )
    hints = {word: f"about {word}" for word in WORDS} | {WORDS[0]: "drop", WORDS[1]: "fail"}
    for name in ("train", "eval"):
        rows = [{**row, "hint": hints[row["id"]]} for row in read(tmp_path / f"{name}.jsonl")]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with started_run(config, environment=shared_cluster) as process:
        printed = finish(process)
    assert "the accuracy with the context is not measured" in printed
    run = tmp_path / "runs/tiny"
    for line in read(run / "audit.jsonl"):
        assert [sample.split("/")[2] for sample in line["dropped"]] == [WORDS[0]]
        assert [sample.split("/")[2] for sample in line["failed"]] == [WORDS[1]]
        assert len(line["trained"]) == len(line["contexts"]) == len(set(line["contexts"])) == 6
    assert [line["context/dropped"] for line in metric_lines(run)] == [1, 1]
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(tiny_model).eval(),
        AutoTokenizer.from_pretrained(tiny_model),
    )
    records = read(run / "tokens.jsonl")
    assert len(records) == 12
    for record in records:
        ids = record["ids"]
        body = ids[:-1] if ids[-1] == tokenizer.eos_token_id else ids
        question = f"Q: {record['row']}\nA:"
        made = f"about {record['row']}: {question!r} was answered {tokenizer.decode(body)!r}"
        prompt = tokenizer(made, add_special_tokens=False)["input_ids"]
        prompt += tokenizer(question, add_special_tokens=False)["input_ids"]
        np.testing.assert_allclose(record["teacher_logprobs"], logprobs(model, prompt, ids), atol=2e-3)
