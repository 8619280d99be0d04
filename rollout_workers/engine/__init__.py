"""The student as a vLLM engine: token ids in, token ids and log-probs out.

Imports common and the plugin; vLLM is imported inside functions, Ray never.
"""
