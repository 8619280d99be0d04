"""``opcd serve``: vLLM's own server loads an export and says what transformers says of the trained weights."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import httpx
import torch

from learner.trainer.export import save_model
from learner.trainer.source_files import exported_files, read_source_files
from tests.support.processes import free_port


def trained(source: Path) -> torch.nn.Module:
    """The model of `source` after a change of all its weights."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(source)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.02 * torch.randn_like(parameter)
    return model.eval()


def test_an_export_is_served_with_its_log_probs(tiny_model: Path, tmp_path: Path) -> None:
    model, run = trained(tiny_model), tmp_path / "demo"
    state = {name: parameter.detach() for name, parameter in model.named_parameters()}
    (run / "checkpoint").mkdir(parents=True)
    save_model(run / "checkpoint", state, exported_files(read_source_files(str(tiny_model)), "float32"))
    port, ids = free_port(), list(range(5, 45))
    options = ["--port", str(port), "--max-model-len", "128", "--enforce-eager", "--max-num-seqs", "4"]
    command = [sys.executable, "-m", "deploy.cli.main", "serve", str(run), *options]
    log = tmp_path / "serve.log"
    with log.open("wb") as output, subprocess.Popen(command, stdout=output, stderr=output) as process:
        try:
            url = f"http://127.0.0.1:{port}"
            while process.poll() is None:
                try:
                    if httpx.get(f"{url}/health", trust_env=False).status_code == 200:
                        break
                except httpx.TransportError:
                    time.sleep(0.2)
            assert process.poll() is None, log.read_text()
            body = {"model": "demo", "prompt": ids, "max_tokens": 1, "prompt_logprobs": 0}
            answer = (
                httpx.post(f"{url}/v1/completions", json=body, timeout=60, trust_env=False).raise_for_status().json()
            )
        finally:
            process.terminate()
            process.wait(60)
    read = answer["choices"][0]["prompt_logprobs"][1:]
    served = [entry[str(token)]["logprob"] for token, entry in zip(ids[1:], read, strict=True)]
    with torch.no_grad():
        logprobs = model(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
    expected = logprobs.gather(-1, torch.tensor(ids[1:])[:, None]).squeeze(-1)
    torch.testing.assert_close(torch.tensor(served), expected, atol=2e-4, rtol=0)
