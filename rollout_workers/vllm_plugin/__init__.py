"""Receiving end of a weight sync inside vLLM's processes.

Imports common; only `weight_transfer` imports vLLM at module level.
"""
