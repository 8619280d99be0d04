"""Looks at machines, rows and finished runs: doctor (on `machine`), dry run (`checks`), inspect (`inspection`), chat.

Imports `common` and `learner.data.inputs`.
"""
