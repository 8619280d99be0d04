"""Runs as jobs of a Ray cluster: `submit` describes the job, `files` and `wheel` what is uploaded, `cluster` sends it.

Imports `common` and `learner.cluster.placement`; only `cluster` imports ray.
"""
