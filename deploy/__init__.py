"""The ``opcd`` command line and what surrounds a run: submission, inspection, reports, simulation, images, manifests.

Imports `common` and the entry points of the other packages; no other package imports `deploy`.
"""
