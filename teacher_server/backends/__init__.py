"""Backends that compute scores: the interface (``base``), and one folder for each way to run a model.

May import common. ``wire_size`` serves the client and the HTTP server too.
"""
