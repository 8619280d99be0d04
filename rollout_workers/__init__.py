"""Student rollouts: Ray actors (`actor.py`) around vLLM engines (`engine/`), and the driver's `pool/` of them.

Imports `common` only. Inside, `actor` may import every room, `environments` the engine, `engine` the plugin.
"""
