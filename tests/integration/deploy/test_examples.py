"""Runs the documentation's examples as a user does: each in a separate process, on a tiny model."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from common.config.loader import dump_config
from common.config.model import TeacherConfig
from common.data.answer_hook import load_answer_hook
from deploy.cli.main import app
from teacher_server.http.auth import Authenticator
from teacher_server.http.serve import build_service, start_in_thread
from tests.support.configs import config_of
from tests.support.paths import ROOT
from tests.support.tiny import TOOL_TEMPLATE

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


def dry_run(tmp_path: Path, model: Path, settings: dict[str, Any]) -> str:
    """Output of a dry run that must pass."""
    (tmp_path / "run.yaml").write_text(
        yaml.safe_dump({"run": {"name": "own"}, "student": {"model": str(model)}, **settings})
    )
    result = CliRunner().invoke(app, ["train", str(tmp_path / "run.yaml"), "--dry-run"])
    assert result.exit_code == 0, result.output
    return str(result.output)


def test_a_calculator_is_a_tool(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    (model / "chat_template.jinja").write_text(TOOL_TEMPLATE)
    run("calculator.py", tmp_path / "train.jsonl", "8")
    monkeypatch.syspath_prepend(str(EXAMPLES))
    settings = {
        "context": {"text": "Compute with the calculator."},
        "data": {"train": str(tmp_path / "train.jsonl")},
        "environment": {"sample_format": "conversation", "max_turns": 12},
    }
    assert "8 train" in dry_run(tmp_path, model, settings)


async def test_a_coach_is_asked_and_a_reference_follows_a_mistake(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The endpoint is a stand-in that takes what an OpenAI-compatible server takes."""
    asked: list[dict[str, Any]] = []

    class Endpoint(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            assert self.path == "/v1/chat/completions"
            asked.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            body = json.dumps({"choices": [{"message": {"content": " Count again. "}}]}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *arguments: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Endpoint)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.setenv("COACH_URL", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("COACH_MODEL", "coach")
    row = {"answer": "84"}
    advice = load_answer_hook("coach:advice")
    assert await advice(row, "12 times 7?", "82") == "Count again."
    assert "Question: 12 times 7?\n\nAnswer: 82" in asked[0]["messages"][0]["content"]
    server.shutdown()
    reference = load_answer_hook("coach:reference_after_a_mistake")
    assert await reference(row, "12 times 7?", "It is 84.") is None
    assert "answered: 82\nThat is wrong. The right answer is: 84" in str(await reference(row, "12 times 7?", "82"))
    (tmp_path / "train.jsonl").write_text('{"id": "a", "prompt": "12 times 7?", "answer": "84"}\n')
    context = {"from_rollout": "coach:reference_after_a_mistake"}
    assert "of the answers" in dry_run(
        tmp_path, tiny_model, {"context": context, "data": {"train": str(tmp_path / "train.jsonl")}}
    )
