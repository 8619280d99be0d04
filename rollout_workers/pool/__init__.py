"""The pool of rollout workers on the driver's side: membership, replacement, choice of a worker.

Imports `common` and Ray; no engine, no torch.
"""
