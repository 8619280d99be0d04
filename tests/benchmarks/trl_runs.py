"""TRL's ``SDFTTrainer`` on the prompts and lengths of `e2e_runs`: ``python -m tests.benchmarks.trl_runs SPEC OUT``.

In a process of its own, with as much in its favour as its options allow: no gradient checkpointing, no dropout, no
importance ratio, answers of one forward pass at a time, nothing cut.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tests.benchmarks.e2e_runs import BATCH, LEARNING_RATE, MODEL, ROOT, TOP_K, folder_for
from tests.benchmarks.figures import THREADS

VERSION = "1.16.0"


@dataclass(frozen=True)
class TrlSpec:
    """One training. ``newline_ends``: an answer ends with its line, as the demo's. ``check_every``: steps between
    greedy answers to ``checked`` (prompt, answer), whose time is not counted.
    """

    prompts: list[str]
    context: str
    answer_tokens: int
    steps: int
    micro_batch: int
    lr: float = LEARNING_RATE
    seed: int = 0
    newline_ends: bool = False
    check_every: int = 0
    checked: tuple[tuple[str, str], ...] = ()
    enough: float = 1.0
    """Accuracy at which it ends early."""


@dataclass(frozen=True)
class TrlRun:
    """Seconds and response tokens of an answer by step; accuracies by step, where there were checks."""

    step_s: list[float]
    mean_tokens: list[float]
    accuracy: dict[int, float]


def trl_run(spec: TrlSpec) -> TrlRun:
    """Train in a new process. Raises RuntimeError where TRL is not installed (``pip install '.[bench]'``)."""
    if importlib.util.find_spec("trl") is None:
        raise RuntimeError("TRL is not installed: pip install --no-deps trl==" + VERSION)
    with folder_for(f"trl-{len(spec.context)}-{spec.seed}") as folder:
        (folder / "spec.json").write_text(json.dumps(asdict(spec)))
        command = [sys.executable, "-m", "tests.benchmarks.trl_runs", str(folder / "spec.json"), str(folder / "out")]
        environment = {**os.environ, "OMP_NUM_THREADS": str(THREADS), "TRL_EXPERIMENTAL_SILENCE": "1"}
        subprocess.run(command, cwd=ROOT, check=True, env=environment)
        found = json.loads((folder / "out").read_text())
    return TrlRun(
        found["step_s"], found["mean_tokens"], {int(step): value for step, value in found["accuracy"].items()}
    )


def run_here(spec: TrlSpec, folder: Path) -> TrlRun:
    """Train in this process."""
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl.experimental.sdft import SDFTConfig, SDFTTrainer

    torch.set_num_threads(THREADS)
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    if spec.newline_ends:
        tokenizer.eos_token = "Ċ"  # how a byte-level vocabulary writes a newline
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    settings = SDFTConfig(
        output_dir=str(folder / "trl"),
        max_steps=spec.steps,
        per_device_train_batch_size=spec.micro_batch,
        gradient_accumulation_steps=BATCH // spec.micro_batch,
        num_generations=1,
        max_prompt_length=None,
        max_completion_length=spec.answer_tokens,
        temperature=1.0,
        teacher_model_kind="base",
        teacher_prompt_template="{privileged_context}{prompt}",
        distillation_mode="topk_logits",
        distillation_topk=TOP_K,
        distillation_alpha=1.0,  # reverse
        distillation_add_tail=True,
        distillation_is_clip=None,
        learning_rate=spec.lr,
        lr_scheduler_type="constant",
        warmup_steps=0,
        weight_decay=0.01,
        max_grad_norm=1.0,
        seed=spec.seed,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        save_strategy="no",
        logging_steps=1,
        report_to="none",
        disable_tqdm=True,
    )
    found = TrlRun([], [], {})

    class Clock(TrainerCallback):
        began = 0.0

        def on_train_begin(self, *_: Any, **__: Any) -> None:
            Clock.began = time.perf_counter()

        def on_step_end(self, args: Any, state: Any, control: Any, **__: Any) -> Any:
            found.step_s.append(time.perf_counter() - Clock.began)
            if spec.check_every and state.global_step % spec.check_every == 0:
                found.accuracy[state.global_step] = accuracy(model, tokenizer, spec)
                control.should_training_stop = found.accuracy[state.global_step] >= spec.enough
            Clock.began = time.perf_counter()
            return control

        def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any], **__: Any) -> None:
            if "completions/mean_length" in logs:
                found.mean_tokens.append(float(logs["completions/mean_length"]))

    rows = [{"prompt": prompt, "privileged_context": spec.context} for prompt in spec.prompts]
    trainer = SDFTTrainer(
        model=model,
        args=settings,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        callbacks=[Clock()],
    )
    trainer.train()
    return found


def accuracy(model: Any, tokenizer: Any, spec: TrlSpec) -> float:
    """Share of `checked` whose greedy answer, without the context, is the right one."""
    import torch

    was_training = model.training
    model.eval()
    right = 0
    with torch.no_grad():
        for start in range(0, len(spec.checked), 32):
            part = spec.checked[start : start + 32]
            batch = tokenizer([prompt for prompt, _ in part], return_tensors="pt", padding=True, padding_side="left")
            answers = model.generate(
                **batch, max_new_tokens=spec.answer_tokens, do_sample=False, eos_token_id=tokenizer.eos_token_id
            )[:, batch["input_ids"].shape[1] :]
            texts = tokenizer.batch_decode(answers, skip_special_tokens=True)
            right += sum(
                text.split("\n")[0].strip() == answer.strip() for text, (_, answer) in zip(texts, part, strict=True)
            )
    model.train(was_training)
    return right / len(spec.checked)


if __name__ == "__main__":
    spec_path, out_path = Path(sys.argv[1]), Path(sys.argv[2])
    read = json.loads(spec_path.read_text())
    read["checked"] = tuple((prompt, answer) for prompt, answer in read["checked"])
    result = run_here(TrlSpec(**read), out_path.parent)
    out_path.write_text(json.dumps(asdict(result)))
