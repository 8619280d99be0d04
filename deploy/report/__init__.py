"""HTML reports from run folders: ``report.html`` of one run, or a comparison of several.

Imports ``common.config`` and ``common.telemetry`` and light packages only (jinja2, yaml), never torch or an engine.
"""
