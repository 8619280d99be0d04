"""A calculator as a tool: an environment whose turns are tool results. Rows name it ``calculator:Sums``.

The student may call the tool with what its chat template calls a tool call, here
``<tool_call>{"name": "calculator", "arguments": {"expression": "12 * 7"}}</tool_call>``. Any other answer is final.
"""

import ast
import json
import operator
import random
import re
import sys
from collections.abc import Mapping
from typing import Any

from rollout_workers.environments.base import EpisodeError, Step

OPERATORS: Mapping[type[ast.operator], Any] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
}
CALL = re.compile(r"<tool_call>\s*(\{.*?\})\s*</tool_call>", re.DOTALL)


class Sums:
    """Ask for the value of an expression. The episode of a seed is always the same."""

    tools = (
        {
            "type": "function",
            "function": {
                "name": "calculator",
                "description": "Compute an expression of whole numbers with +, - and *.",
                "parameters": {
                    "type": "object",
                    "properties": {"expression": {"type": "string"}},
                    "required": ["expression"],
                },
            },
        },
    )

    def __init__(self, terms: int = 3) -> None:
        self._terms = terms
        self._value: int | None = None

    async def reset(self, seed: int) -> str:
        rng = random.Random(seed)
        expression = str(rng.randint(10, 99))
        for _ in range(self._terms - 1):
            expression += f" {rng.choice('+-*')} {rng.randint(10, 99)}"
        self._value = compute(expression)
        return f"What is {expression}?"

    async def step(self, answer: str) -> Step:
        if self._value is None:
            raise EpisodeError("step was called before reset")
        if (found := CALL.search(answer)) is None:
            right = answer.strip().rstrip(".").endswith(str(self._value))
            self._value = None
            return Step("Right." if right else "Wrong.", float(right), done=True)
        result = call(found.group(1))
        return Step(result, 0.0, False, messages=({"role": "tool", "name": "calculator", "content": result},))


def call(text: str) -> str:
    """The tool's result, or what is wrong with the call."""
    try:
        return str(compute(json.loads(text)["arguments"]["expression"]))
    except (ValueError, KeyError, TypeError, SyntaxError, RecursionError) as error:
        return f"error: {type(error).__name__}"


def compute(expression: str) -> int:
    """The value of an expression of at most 200 characters. Raises ValueError for anything but numbers and + - *."""
    if len(expression) > 200:
        raise ValueError("too long")
    return _value(ast.parse(expression, mode="eval").body)


def _value(node: ast.expr) -> int:
    if isinstance(node, ast.Constant) and type(node.value) is int:
        return node.value
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return -_value(node.operand)
    if isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
        return int(OPERATORS[type(node.op)](_value(node.left), _value(node.right)))
    raise ValueError("only whole numbers, +, - and *")


def write_rows(path: str, rows: int) -> None:
    """Write rows for `data.train`, one episode each."""
    with open(path, "w", encoding="utf-8") as stream:
        for seed in range(rows):
            stream.write(json.dumps({"id": f"sum-{seed}", "environment": "calculator:Sums", "seed": seed}) + "\n")


if __name__ == "__main__":
    write_rows(sys.argv[1], rows=int(sys.argv[2]))
