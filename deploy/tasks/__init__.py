"""Models and rows of `opcd prepare`: one module for each task, `small_training`, `folders`, and `gguf` for SmolLM2;
`coach` for a paper preset.

Imports `common.telemetry`; torch and transformers inside functions.
"""
