"""Weight sync: plan, handshake, transports and the receiving end; learner.publishing is the sending end.

Imports common.config only; torch is imported inside functions, vLLM never.
"""
