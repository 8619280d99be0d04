"""HTTP server of the teacher: routes, keys, limits, replies, and the process around them.

Imports ``common``, ``teacher_server.scoring`` and ``teacher_server.backends``. Start with ``serve.py`` and ``app.py``.
"""
