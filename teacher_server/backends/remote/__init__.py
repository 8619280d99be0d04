"""Backend that asks an inference server (``vllm serve``) for scores and runs no model.

May import common and teacher_server.backends.{base,rows}; needs neither torch nor vLLM.
"""
