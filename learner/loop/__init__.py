"""The driver: the life of a run, the training loop, staleness rules, weight publishing, gates and checkpoints.

No tensors. Imports `evaluation`, `cluster` and `data` of the learner; the trainer's report types only.
"""
