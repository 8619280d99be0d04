"""Grading of answers, and the figures of an evaluation with their intervals. Pure: no model runs here.

Imports `common.config` and `common.protocol` only.
"""
