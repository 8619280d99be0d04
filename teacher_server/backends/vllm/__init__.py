"""Backend that scores with a vLLM engine in other processes.

May import common, teacher_server.backends.base and .hf; only engine.py and worker.py know vLLM's classes.
"""
