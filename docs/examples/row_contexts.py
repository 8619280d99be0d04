"""Give each row of the demo different worked examples: write `train.jsonl`, `valid.jsonl` and `eval.jsonl`.

    python docs/examples/row_contexts.py rows
    opcd train deploy/configs/demo.yaml run.name=rows context.file=null context.from_rows=true \\
        data.train=rows/train.jsonl data.valid=rows/valid.jsonl data.eval=rows/eval.jsonl

The examples are four other rows of the training set, another four for every row.
"""

import json
import random
import sys
from pathlib import Path

DEMO = Path(__file__).parents[2] / "deploy/configs/demo"


def write(folder: Path, examples: int = 4) -> None:
    known = read("train")
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("train", "valid", "eval"):
        with (folder / f"{name}.jsonl").open("w", encoding="utf-8") as stream:
            for row in read(name):
                others = [one for one in known if one["answer"] != row["answer"]]
                shown = random.Random(row["id"]).sample(others, examples)
                context = "".join(f"{one['prompt']} {one['answer']}\n" for one in shown)
                stream.write(json.dumps({**row, "context": context}) + "\n")


def read(name: str) -> list[dict[str, str]]:
    with (DEMO / f"{name}.jsonl").open(encoding="utf-8") as stream:
        return [json.loads(line) for line in stream]


if __name__ == "__main__":
    write(Path(sys.argv[1]))
