"""Comparison of methods: plans its runs, trains them one after another, writes table and picture.

Imports ``common`` and ``deploy.report``; runs are processes of ``learner.train``.
"""
