"""The teacher: a FastAPI server that returns log-probabilities under a context, and its client.

``app.py`` serves, ``backends/`` compute, ``client.py`` is what others use. Imports ``common`` only.
"""
