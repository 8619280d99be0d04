"""Helpers that tests share: tiny models, oracles, servers, clusters, run folders.

Test modules import from here, never from each other.
"""
