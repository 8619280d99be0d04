"""The small system-prompt configuration: the demo's rows as chat; no row is an example of the prompt."""

from __future__ import annotations

import re

import pytest

from common.config.loader import load_config
from common.data.rows import read_rows
from common.data.turns import read_turns
from tests.support.paths import ROOT

CONFIG = ROOT / "deploy/configs/system_prompt/small.yaml"


def test_no_row_is_among_the_examples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    config = load_config(CONFIG)
    examples = re.findall(
        r"Q: (\w+)\nA:<\|im_end\|>\n<\|im_start\|>assistant\n<answer>(\w+)</answer>", config.context.read()
    )
    assert len(examples) == 6
    turns = read_turns((CONFIG.parent / "turns.yaml").read_text())[1:]
    assert [(turns[i].content, turns[i + 1].content) for i in range(0, 12, 2)] == [
        (f"Q: {word}\nA:", f"<answer>{plural}</answer>") for word, plural in examples
    ]
    assert all(plural.startswith(word[:-1]) and plural.endswith("s") for word, plural in examples)
    rows = [row for source in (config.data.train, config.data.valid, config.data.eval) for row in read_rows(source)]
    assert len(rows) == 296
    assert not {f"Q: {word}\nA:" for word, _ in examples} & {str(row.prompt) for row in rows}
    assert (config.context.placement, config.eval.grader) == ("system", "answer_tag")
