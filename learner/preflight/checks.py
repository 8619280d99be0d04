"""The list of checks, and `preflight`, which runs them in order.

A new check is a function that yields findings (`learner.preflight.report`) and one line in a list below.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator

from common.config.model import Config, ConfigError
from common.data.rows import DataError
from learner.data.inputs import Inputs, read_sources, render_inputs
from learner.preflight.engines import check_engines
from learner.preflight.families import check_families
from learner.preflight.machine import check_devices, check_files, check_folders, check_packages, check_ports, check_ray
from learner.preflight.models import check_hub, check_models, check_student_limits, is_on_this_machine
from learner.preflight.needs import check_needs
from learner.preflight.report import Finding, Report, error, warning
from learner.preflight.rows import (
    check_bos,
    check_follow_ups,
    check_lengths,
    check_token_ids,
    check_tokenizers,
    check_top_k,
    input_warnings,
)
from learner.preflight.summary import count_rows, summarize, unused_columns

CONFIG_CHECKS: tuple[Callable[[Config], Iterator[Finding]], ...] = (
    check_models,
    check_student_limits,
    check_ray,
    check_families,
    check_engines,
    check_packages,
    check_devices,
    check_folders,
    check_files,
    check_ports,
)
"""Checks of the configuration and this machine; all run, whatever the others find."""
INPUT_CHECKS: tuple[Callable[[Config, Inputs], Iterator[Finding]], ...] = (
    check_lengths,
    check_token_ids,
    check_follow_ups,
    check_tokenizers,
    check_top_k,
    check_bos,
    input_warnings,
    summarize,
    check_needs,
)
"""Checks of the rendered rows; they run if the configuration has no error."""


def preflight(config: Config, *, offline: bool = False, every_row: bool = True) -> Report:
    """Run all checks. Errors are in the report: nothing is raised for a fault of the user's.

    Without `every_row` rows with their own contexts are checked in part (`learner.data.prompts.rows_to_check`).
    `offline` asks no hub: a model or data set that is not on this machine stays unchecked, with a warning for a model.
    """
    if offline:
        os.environ.setdefault("HF_HUB_OFFLINE", "1")  # takes effect if set before huggingface_hub is imported
    report = Report()
    sources = None
    try:
        sources = read_sources(config)
        report.findings += [count_rows(sources), *unused_columns(sources)]
    except (ConfigError, DataError) as fault:
        report.findings += map(error, str(fault).splitlines())
    for check in CONFIG_CHECKS if offline else (*CONFIG_CHECKS, check_hub):
        report.findings += _found(check(config))
    if report.texts("error") or sources is None:
        return report
    if offline and not is_on_this_machine(config.student.model):
        report.findings.append(warning(f"rows are not rendered: {config.student.model} is not on this machine"))
        return report
    try:
        report.inputs = render_inputs(config, sources, every_row=every_row)
    except (ConfigError, DataError) as fault:
        report.findings += map(error, str(fault).splitlines())
        return report
    for with_inputs in INPUT_CHECKS:
        report.findings += _found(with_inputs(config, report.inputs))
    return report


def _found(findings: Iterator[Finding]) -> Iterator[Finding]:
    """Yield a check's findings; a ConfigError that ends the check is an error like the others."""
    try:
        yield from findings
    except ConfigError as fault:
        yield from map(error, str(fault).splitlines())
