"""How strongly answers carry a context whose effect no grader sees: python style_win_rate.py RUN.

RUN is the folder of a finished run (`runs/NAME`). The initial student scores each held-out answer of ``samples.jsonl``
with the context and without it; the difference, in nats per token, is how much more the context explains the answer.
Prints the mean for each set, and its win rate: the share of rows whose answer carries the context at least as strongly
as the answer that the initial student gave with the context in its prompt.
"""

import json
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from common.config.loader import load_config
from common.data.rendering import Renderer, teacher_sequence
from common.data.rows import read_rows

SETS = {"base": "without context, before", "in_context": "with context", "final": "without context, after"}


def main(folder: str) -> None:
    config = load_config(Path(folder) / "config.yaml")
    tokenizer = AutoTokenizer.from_pretrained(config.student.model)
    model = AutoModelForCausalLM.from_pretrained(config.student.model, dtype=torch.float32)
    renderer = Renderer(tokenizer, config.context.read(), config.student, config.context.placement)
    prompts = {row.id: renderer.render(row) for row in read_rows(config.data.eval, config.data)}

    def mean_logprob(prompt_ids: list[int], answer_ids: list[int]) -> float:
        ids = torch.tensor([prompt_ids + answer_ids])
        with torch.no_grad():
            logprobs = model(ids).logits[0, len(prompt_ids) - 1 : -1].log_softmax(-1)
        return float(logprobs.gather(-1, ids[0, len(prompt_ids) :, None]).mean())

    carried: dict[str, dict[str, float]] = {name: {} for name in SETS}
    for line in (Path(folder) / "samples.jsonl").read_text(encoding="utf-8").splitlines():
        sample = json.loads(line)
        answer_ids = tokenizer.encode(sample["answer"], add_special_tokens=False)
        if sample["set"] in SETS and answer_ids:
            prompt = prompts[sample["id"]]
            with_context = mean_logprob(teacher_sequence(prompt, renderer.contexts), answer_ids)
            without = mean_logprob(prompt.student_ids.tolist(), answer_ids)
            carried[sample["set"]][sample["id"]] = with_context - without
    for name, title in SETS.items():
        rows = carried[name].keys() & carried["in_context"].keys()
        if rows:
            wins = sum(carried[name][row] >= carried["in_context"][row] for row in rows) / len(rows)
            mean = sum(carried[name][row] for row in rows) / len(rows)
            print(f"{title:<26}{mean:+.4f} nats a token   win rate {wins:.3f}   n = {len(rows)}")


if __name__ == "__main__":
    main(sys.argv[1])
