"""Data of a run: rows rendered as prompts, contexts, samples by number, stored answers of the teacher.

May import common, learner.errors and rollout_workers.environments.
"""
