"""Student rollouts: vLLM engines in Ray actors, and the evaluation that runs on them.

``engine.py`` computes (no Ray), ``actor.py`` runs it. Imports ``common`` only.
"""
