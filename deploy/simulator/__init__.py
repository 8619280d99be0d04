"""Simulates a run's steps from measured or assumed speeds, without engines, models or Ray.

Imports ``common``; ``simulate.py`` alone also imports the pure rules of the loop and of the rollout pool.
"""
