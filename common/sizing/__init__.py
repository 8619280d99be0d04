"""Bytes that each process of a run needs, by arithmetic on the configuration and the models' headers.

Imports common.config only; loads no weights and no torch.
"""
