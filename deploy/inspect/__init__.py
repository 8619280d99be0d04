"""Looks at machines, rows and finished runs: doctor (on `machine`), dry run (`dry_run`), inspect (`inspection`), chat.

Imports `common` and `learner.preflight`.
"""
