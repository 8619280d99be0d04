"""The teacher: a FastAPI server that returns log-probabilities under a context, and its client.

``http/`` serves, ``scoring/`` queues and batches, ``backends/`` run the model, ``client/`` is for callers, ``actor.py``
runs the server in Ray. Imports ``common`` only.
"""
