"""The ``opcd`` command line: `main` registers the commands, one module for each or for a few.

Modules import heavy packages inside their functions. ``opcd_start`` is the program that runs it.
"""
