"""How runs are started: the ``opcd`` command line, configurations and requirements."""
