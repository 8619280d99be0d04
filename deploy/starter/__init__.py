"""The configuration that `opcd init` writes: settings that fit the given model, context and rows, and their text.

Imports `common`, and transformers inside functions.
"""
