"""Environments that the student plays in, and episodes as training samples.

`base` is the interface, `registry` makes an environment by name. Imports `common` and `rollout_workers.engine`.
"""
