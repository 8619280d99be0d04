"""Rows, contexts and tokenizers of a run, rendered into the token sequences of student and teacher.

Imports `common.config` and `common.protocol` only.
"""
