"""The loss in a plain torch loop, nothing distributed: python train_with_the_loss.py MODEL [STEPS].

Each step the student answers without the context, a frozen copy of it scores the answers with the context, and the
student learns to agree with the teacher on its own top k. Prints each step's divergence in nats per token. Runs on CPU.
"""

import copy
import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from common.models.logits import logit_transform
from learner.trainer.losses import topk_divergence
from learner.trainer.output_layer import ChunkView, OutputLayer

CONTEXT = "Q: cat\nA: cats\nQ: box\nA: boxes\n"
PROMPTS = ["Q: dog\nA:", "Q: sun\nA:", "Q: map\nA:", "Q: cup\nA:"]
ANSWER_TOKENS, TOP_K, LEARNING_RATE = 8, 64, 3e-3


def main(folder: str, steps: int = 10) -> None:
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    student = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    teacher = copy.deepcopy(student).eval()
    # Computes logits and their gradient 256 positions at a time, so no [tokens, vocabulary] tensor stays in memory.
    head = OutputLayer(student.get_output_embeddings(), logit_transform(student.config), chunk_tokens=256)
    optimizer = torch.optim.AdamW(student.parameters(), lr=LEARNING_RATE)
    context = tokenizer(CONTEXT, add_special_tokens=False, return_tensors="pt").input_ids

    for step in range(steps):
        total, tokens = 0.0, 0
        for text in PROMPTS:
            prompt = tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids
            with torch.no_grad():
                sampling = {"do_sample": True, "top_k": 0, "top_p": 1.0, "pad_token_id": tokenizer.pad_token_id}
                sequence = student.generate(prompt, max_new_tokens=ANSWER_TOKENS, **sampling)
                answer = sequence[:, prompt.shape[1] :]
                full = teacher(torch.cat([context, sequence], dim=1)).logits[0, -answer.shape[1] - 1 : -1]
                full = full.log_softmax(-1)
            hidden = student.base_model(sequence).last_hidden_state[0, -answer.shape[1] - 1 : -1]
            with torch.no_grad():
                ids = student.get_output_embeddings()(hidden).topk(TOP_K).indices
            teacher_logprobs = full.gather(-1, ids)
            teacher_tail = full.scatter(-1, ids, -torch.inf).logsumexp(-1)

            def divergence(chunk: ChunkView, q=teacher_logprobs, q_tail=teacher_tail) -> torch.Tensor:
                return topk_divergence(
                    chunk.logprobs,
                    q[chunk.rows],
                    form="tail",
                    student_tail=chunk.tail,
                    teacher_tail=q_tail[chunk.rows],
                ).sum()

            loss = head(hidden, ids, answer[0], loss=divergence)
            loss.backward()
            total, tokens = total + loss.item(), tokens + answer.numel()
        for parameter in student.parameters():  # sums over tokens become the mean over the step's tokens
            if parameter.grad is not None:
                parameter.grad /= tokens
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        print(f"step {step} kl {total / tokens:.4f}")


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:]))
