"""Messages that cross a process boundary, their binary form, and the interface to a teacher.

Imports nothing of the project outside this folder.
"""
