"""Checks before anything heavy starts: the same for ``opcd train``, its dry run and ``opcd inspect``.

`checks` lists them and runs them; each check is a function of the configuration (and the rendered inputs) that yields
findings and changes nothing. Starts no process.
"""
