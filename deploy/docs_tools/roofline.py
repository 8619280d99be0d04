"""Writes the lower bounds of a step in ``docs/cluster.md``: ``python -m deploy.docs_tools.roofline [--check]``.

A stage takes at least its floating-point operations over the GPUs' rate, and its bytes over the memory's or the
network's. Nothing here was measured.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass

from common.sizing.model_size import ModelSize
from deploy.docs_tools.pages import with_table, write_or_check
from deploy.docs_tools.sizes import PAGE, QWEN3, qwen3

BEGIN, END = "<!-- roofline: written by `python -m deploy.docs_tools.roofline` -->\n", "<!-- end of roofline -->\n"

FLOPS = 989e12
"""Dense bfloat16 operations a second of an H100 SXM, by its data sheet."""
MEMORY = 3.35e12
"""Bytes a second of its memory."""
CAPACITY = 72e9
"""Bytes of its memory that an engine gets: 0.9 of 80 GB."""
NVLINK, HOST, NETWORK = 450e9, 64e9, 50e9
"""Bytes a second in one direction: between GPUs of a node, to host memory (PCIe 5), one 400 Gbit/s port."""

ANSWERS, PROMPT, RESPONSE, CONTEXT = 512, 512, 1024, 2048
"""Answers of a step; tokens of a prompt, of an answer and of the context that all rows share."""
TOKENS = ANSWERS * (PROMPT + RESPONSE)
BYTES = 2
"""Size of a bfloat16 number."""


@dataclass(frozen=True)
class Layout:
    """Models by name in `QWEN3`, and GPUs of each service."""

    student: str
    teacher: str
    workers: int
    teachers: int
    ranks: int

    @property
    def title(self) -> str:
        """Heading of its column."""
        return f"{self.teacher} → {self.student} on {self.workers} + {self.teachers} + {self.ranks} GPUs"


LAYOUTS = (Layout("8B", "8B", 2, 2, 4), Layout("8B", "32B", 2, 2, 4), Layout("8B", "32B", 8, 16, 8))
"""Two layouts of one node with eight GPUs, and one of four nodes."""


def multiplied(name: str) -> int:
    """Weights that a token is multiplied with: all but an input table that is no output layer."""
    model = qwen3(name)
    return model.parameters - (0 if QWEN3[name]["tied"] else model.vocabulary * model.hidden)


def forward_flops(name: str, tokens: int, keys: float) -> float:
    """Operations of a forward pass of `tokens` tokens that each attend to `keys` keys on average."""
    model = qwen3(name)
    return tokens * (2 * multiplied(name) + 4 * model.layers * model.query * keys)


def concurrent(layout: Layout) -> float:
    """Answers that a worker generates at a time: its share, or what its memory holds at full length."""
    model = qwen3(layout.student)
    room = CAPACITY - BYTES * model.parameters
    return min(ANSWERS / layout.workers, room / model.context_bytes(PROMPT + RESPONSE, BYTES))


def rollout_s(layout: Layout) -> float:
    """Prefill, then a pass through weights and cached keys for each token of the answers that run at a time."""
    model, batch, share = qwen3(layout.student), concurrent(layout), ANSWERS / layout.workers
    read = BYTES * multiplied(layout.student) + batch * model.context_bytes(PROMPT + RESPONSE // 2, BYTES)
    compute = forward_flops(layout.student, 1, PROMPT + RESPONSE / 2) * batch
    prefill = forward_flops(layout.student, PROMPT, PROMPT / 2) * share / FLOPS
    return prefill + share / batch * RESPONSE * max(read / MEMORY, compute / FLOPS)


def score_s(layout: Layout, context: int = CONTEXT) -> float:
    """Prompts and answers under the context, whose keys and values are in the teacher's memory."""
    return forward_flops(layout.teacher, TOKENS, context + (PROMPT + RESPONSE) / 2) / (FLOPS * layout.teachers)


def score_without_store_s(layout: Layout) -> float:
    """The same if every sequence computes the context again."""
    again = forward_flops(layout.teacher, ANSWERS * CONTEXT, CONTEXT / 2) / (FLOPS * layout.teachers)
    return score_s(layout) + again


def train_s(layout: Layout) -> float:
    """Forward, forward again (checkpointing) and backward (twice a forward)."""
    return 4 * forward_flops(layout.student, TOKENS, (PROMPT + RESPONSE) / 2) / (FLOPS * layout.ranks)


def optimiser_s(layout: Layout) -> float:
    """30 bytes a weight: master weight and two moments read and written in float32, gradient read, weight written."""
    return 30 * qwen3(layout.student).parameters / layout.ranks / MEMORY


def sync_s(model: ModelSize, rate: float) -> float:
    """All weights once through one link: a broadcast from rank 0."""
    return BYTES * model.parameters / rate


def table() -> str:
    """The table as Markdown, seconds."""
    lines = [f"| seconds | {' | '.join(one.title for one in LAYOUTS)} |", "|---|" + "---|" * len(LAYOUTS)]
    rows = {
        "rollout: memory of the workers": rollout_s,
        "scoring, context stored: FLOPs of the teacher": score_s,
        "scoring, context computed for each answer": score_without_store_s,
        "training: FLOPs of the ranks": train_s,
        "optimiser: memory of the ranks": optimiser_s,
        "sync from rank 0 over NVLink": lambda one: sync_s(qwen3(one.student), NVLINK),
        "sync from rank 0 over one network port": lambda one: sync_s(qwen3(one.student), NETWORK),
        "sync through host memory (`gloo`): down and up": lambda one: 2 * sync_s(qwen3(one.student), HOST),
    }
    lines += [f"| {name} | {' | '.join(f'{bound(one):.2g}' for one in LAYOUTS)} |" for name, bound in rows.items()]
    return "\n".join(lines) + "\n"


def page() -> str:
    """The page with a current table."""
    return with_table(PAGE.read_text(encoding="utf-8"), BEGIN, END, table())


def main(arguments: list[str]) -> int:
    """Write or check the page."""
    return write_or_check(PAGE, page(), arguments, command="python -m deploy.docs_tools.roofline")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
