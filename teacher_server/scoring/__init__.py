"""Scoring without HTTP: contexts, checks, the fair queue, batches and metrics of one model.

Imports ``common`` and ``teacher_server.backends.base`` only: no backend, no HTTP.
"""
