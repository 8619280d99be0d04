"""Output of a run: metric and sample files, sinks, the trace, step times.

Imports common.config only; importable without torch, Ray or vLLM.
"""
