"""Code shared by all services: configuration, data, protocol, weight sync, evaluation, telemetry.

Imports no other package of the project, no Ray, vLLM or DeepSpeed, and torch only inside functions, so that every
process can import it within a second.
"""
