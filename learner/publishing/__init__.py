"""Sending end of a weight sync.

Runs on learner rank 0; imports torch and common, no other room of learner/.
"""
