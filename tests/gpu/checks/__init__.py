"""The checks in the order in which they run, and their limits in seconds.

A check is a generator of figures that takes a `tests.gpu.place.Place`. Those without vLLM take at most 8 minutes
in all. This module imports the standard library only.
"""

from __future__ import annotations

from tests.gpu.runner import Check


def _check(name: str, limit_s: float, about: str, *needs: str, gpus: int = 0, module: str = "") -> Check:
    return Check(name, f"tests.gpu.checks.{module or name}:{name}", limit_s, about, needs, gpus)


TRANSFORMERS = ("transformers", "pydantic")
HTTP = (*TRANSFORMERS, "fastapi", "uvicorn", "httpx", "accelerate")
DEEPSPEED = (*TRANSFORMERS, "deepspeed")

CHECKS = (
    _check("attention", 25, "attention with log-sum-exp, and over shared prefixes", *TRANSFORMERS),
    _check("teacher", 70, "the transformers backend under a 16K context", *TRANSFORMERS),
    _check("http", 40, "the HTTP server around it", *HTTP, module="teacher"),
    _check("head", 35, "the chunked output layer of an 8B model", *TRANSFORMERS),
    _check("packing", 35, "packed rows against padded ones", *TRANSFORMERS, module="layouts"),
    _check("precision", 40, "log-probs by every path, float32 and bfloat16 heads", *TRANSFORMERS),
    _check("learner", 80, "DeepSpeed stages 2 and 3, offload, checkpointing, packing", *DEEPSPEED),
    _check("resume", 30, "a saved state continues to the bit", *DEEPSPEED, module="learner"),
    _check("memory", 30, "memory given back after a step", *DEEPSPEED),
    _check("nccl", 20, "an nccl group of one, aborted", *TRANSFORMERS, module="sync"),
    _check("ipc", 30, "processes of one GPU, one of them killed", *TRANSFORMERS, module="sync"),
    _check("weights", 45, "a ZeRO-3 learner's weights into a live teacher", *DEEPSPEED, module="sync"),
    _check("nccl2", 60, "nccl between GPUs, one process killed", *TRANSFORMERS, gpus=2, module="sync"),
    _check("engine", 120, "an eager vLLM engine", "vllm", gpus=1, module="vllm"),
    _check("graphs", 180, "CUDA graphs", "vllm", gpus=1, module="vllm"),
    _check("v2", 180, "vLLM as the teacher, given ids", "vllm", gpus=1, module="vllm"),
    _check("remote", 240, "vllm serve as the teacher's endpoint", "vllm", gpus=1, module="vllm"),
    _check("tp2", 180, "an engine on two GPUs", "vllm", gpus=2, module="vllm"),
    _check("demo", 600, "the demo in bfloat16, whole", "vllm", "ray", gpus=1),
)
