"""The learner: the divergence, DeepSpeed ranks that minimise it, and the loop that ties the services together.

``losses.py`` is pure torch. Only ``services.py`` knows the other services; everything else imports ``common`` only.
"""
