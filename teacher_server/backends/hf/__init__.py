"""Backend that runs a Hugging Face model with packed forward passes over shared context caches.

May import common and teacher_server.backends.base.
"""
