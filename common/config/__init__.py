"""The typed configuration of a run: sections, rules between sections, and the YAML loader.

Imports nothing of the project outside this folder.
"""
