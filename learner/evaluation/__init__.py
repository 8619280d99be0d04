"""Held-out evaluation of a run, its summary, and the process that writes the report.

May import common, learner.cluster, learner.data and learner.errors; not learner.loop.
"""
