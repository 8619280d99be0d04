"""What computes the scores: one small interface (``base``), one folder-mate per way to run a model."""
