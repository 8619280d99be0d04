"""Runs the documentation's examples as a user does: each in a separate process, on a tiny model."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from common.config.loader import dump_config
from common.config.model import TeacherConfig
from deploy.cli.main import app
from teacher_server.http.auth import Authenticator
from teacher_server.http.serve import build_service, start_in_thread
from tests.support.configs import config_of
from tests.support.paths import ROOT

EXAMPLES = ROOT / "docs/examples"


def run(name: str, *arguments: str | Path) -> str:
    """Output of an example; it must load no engine."""
    code = (
        "import runpy, sys\n"
        f"sys.argv = {[name, *map(str, arguments)]!r}\n"
        f"runpy.run_path({str(EXAMPLES / name)!r}, run_name='__main__')\n"
        "loaded = {'deepspeed', 'vllm', 'ray'} & set(sys.modules)\n"
        "assert not loaded, loaded\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(EXAMPLES), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_answers_are_scored_by_a_shared_teacher(tiny_model: Path) -> None:
    """The printed value is the reverse KL by definition: the top 64 and one bucket for the rest, no context."""
    config = TeacherConfig(model=str(tiny_model), threads=1)
    server = start_in_thread(build_service(config), config, Authenticator())
    try:
        printed = run("score_trajectories.py", tiny_model, server.url).splitlines()
    finally:
        server.stop()
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)

    def logprobs(prompt: str, answer: str) -> torch.Tensor:
        ids = [tokenizer.encode(text, add_special_tokens=False) for text in (prompt, answer)]
        with torch.no_grad():
            return model(torch.tensor([ids[0] + ids[1]])).logits[0, len(ids[0]) - 1 : -1].double().log_softmax(-1)

    context = "Q: cat\nA: cats\nQ: box\nA: boxes\n"
    for line, (prompt, answer) in zip(printed, (("Q: dog\nA:", " dogs\n"), ("Q: bus\nA:", " buses\n")), strict=True):
        p, q = logprobs(prompt, answer).exp(), logprobs(context + prompt, answer).exp()
        inside = p.topk(64).indices
        top_p, top_q = p.gather(-1, inside), q.gather(-1, inside)
        rest_p, rest_q = 1 - top_p.sum(-1), 1 - top_q.sum(-1)
        kl = (top_p * (top_p / top_q).log()).sum(-1) + rest_p * (rest_p / rest_q).log()
        assert kl.mean() > 0.1
        assert float(line.rsplit(" ", 1)[1]) == pytest.approx(kl.mean().item(), rel=5e-3)  # values travel as f16


def test_a_style_is_measured_by_what_the_context_explains(tiny_model: Path, tmp_path: Path) -> None:
    """Against whole forward passes: mean log-prob of the answer after context and prompt, minus after the prompt."""
    context, prompt = "Q: cat\nA: cats\n", "Q: dog\nA:"
    (tmp_path / "eval.jsonl").write_text('{"id": "a", "prompt": "Q: dog\\nA:", "answer": "x"}\n')
    config = config_of(
        student={"model": str(tiny_model)},
        context={"text": context},
        data={"train": "t", "eval": str(tmp_path / "eval.jsonl")},
    )
    (tmp_path / "config.yaml").write_text(dump_config(config))
    answers = {"base": " hound", "in_context": " dogs", "final": " dogs", "valid": " left out"}
    lines = [json.dumps({"set": name, "id": "a", "answer": answer}) for name, answer in answers.items()]
    (tmp_path / "samples.jsonl").write_text("\n".join(lines))
    printed = run("style_win_rate.py", tmp_path).splitlines()

    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)

    def mean(lead: str, answer: str) -> float:
        ids, tail = tokenizer(lead)["input_ids"], tokenizer(answer)["input_ids"]
        with torch.no_grad():
            loss = model(torch.tensor([ids + tail]), labels=torch.tensor([[-100] * len(ids) + tail])).loss
        return -float(loss)

    carried = {name: mean(context + prompt, one) - mean(prompt, one) for name, one in answers.items()}
    assert abs(carried["base"] - carried["in_context"]) > 0.01
    base_wins = float(carried["base"] >= carried["in_context"])
    for line, (name, rate) in zip(printed, (("base", base_wins), ("in_context", 1.0), ("final", 1.0)), strict=True):
        assert float(re.findall(r"[+-]\d+\.\d+", line)[0]) == pytest.approx(carried[name], abs=1e-4)
        assert f"win rate {rate:.3f}   n = 1" in line


def test_the_loss_trains_in_a_plain_loop(tiny_model: Path) -> None:
    printed = run("train_with_the_loss.py", tiny_model, 8).splitlines()
    kl = [float(line.rsplit(" ", 1)[1]) for line in printed]
    assert len(kl) == 8
    assert kl[0] > 0.5
    assert kl[-1] < kl[0] / 2


def test_a_task_of_ones_own_is_played_and_read_by_a_run(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    printed = run("own_task.py", tmp_path / "train.jsonl")
    assert printed.splitlines()[-1] == "return 1.0"
    assert len((tmp_path / "train.jsonl").read_text().splitlines()) == 8
    (tmp_path / "eval.jsonl").write_text('{"id": "a", "prompt": "Half of 20?", "answer": "10"}\n')
    (tmp_path / "run.yaml").write_text(
        f"run: {{name: own}}\nstudent: {{model: {tiny_model}}}\ncontext: {{text: Halve the range.}}\n"
        f"data: {{train: {tmp_path}/train.jsonl, eval: {tmp_path}/eval.jsonl}}\n"
        "eval: {grader: 'own_task:close_enough'}\n"
    )
    monkeypatch.syspath_prepend(str(EXAMPLES))
    result = CliRunner().invoke(app, ["train", str(tmp_path / "run.yaml"), "--dry-run"])
    assert result.exit_code == 0, result.output
    assert "8 train" in result.stdout
    from common.evaluation.graders import make_grader

    grade = make_grader("own_task:close_enough")
    assert [grade(answer, "20") for answer in ("20", "18", "17.9", "many")] == [True, True, False, False]
