"""Programs that write the generated pages of the documentation: `docs` (configuration) and `licences`.

Imports `common.config`.
"""
