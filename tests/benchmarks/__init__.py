"""Measurements with a target: ``bench_NAME.py`` each with ``run() -> dict[str, Measurement]``; `make bench`."""
