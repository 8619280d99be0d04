"""Score your own answers with a shared teacher: python score_trajectories.py MODEL URL [KEY_FILE].

MODEL is the student, a folder or hub name; the teacher at URL must have the same tokenizer. Prints the reverse KL of
each answer, in nats per token, between the student without the context and the teacher with it.
"""

import asyncio
import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from common.protocol.schema import Context, ItemError, ScoreItem, as_ids, context_hash
from learner.trainer.losses import topk_divergence
from teacher_server.client import TeacherClient, read_key

CONTEXT = "Q: cat\nA: cats\nQ: box\nA: boxes\n"
ANSWERS = {"Q: dog\nA:": " dogs\n", "Q: bus\nA:": " buses\n"}
TOP_K = 64


async def main(model: str, url: str, key_file: str | None = None) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model)
    student = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    teacher = TeacherClient(url, run="example", timeout_s=60, api_key=read_key(key_file) if key_file else None)
    info = await teacher.info()

    # A context is sent once; later requests of all runs with this key name it by its hash.
    context_ids = as_ids(tokenizer.encode(CONTEXT, add_special_tokens=False))
    context = Context(context_hash(info.tokenizer_fingerprint, context_ids), context_ids)
    await teacher.put_context(context)

    # Trajectories of any engine will do: token ids, and for each position the ids that the teacher shall score.
    items, student_views = [], []
    for prompt, answer in ANSWERS.items():
        prompt_ids = tokenizer.encode(prompt, add_special_tokens=False)
        response_ids = tokenizer.encode(answer, add_special_tokens=False)
        with torch.no_grad():
            logits = student(torch.tensor([prompt_ids + response_ids])).logits[0, len(prompt_ids) - 1 : -1]
        topk = logits.log_softmax(-1).topk(TOP_K)
        student_views.append(topk.values)
        items.append(ScoreItem(context.hash, as_ids(prompt_ids), as_ids(response_ids), as_ids(topk.indices)))

    response = await teacher.score(items, "at_ids", temperature=1.0, k=0)
    await teacher.close()
    for prompt, values, score in zip(ANSWERS, student_views, response.results, strict=True):
        if isinstance(score, ItemError):
            raise SystemExit(f"{prompt!r} was not scored: {score.message}")
        kl = topk_divergence(
            values,
            torch.from_numpy(score.logprobs.astype("float32")),
            form="tail",
            teacher_tail=torch.from_numpy(score.tail_logprob),
        )
        print(f"{prompt!r} {kl.mean():.6f}")


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
