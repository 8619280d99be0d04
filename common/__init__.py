"""What every service shares: schema, wire form, configuration, prompt rendering, telemetry.

Imports no ray, vllm, deepspeed, and no torch at module level, so any process can import it in a second.
"""
