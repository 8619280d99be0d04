"""Compares the Grafana dashboard's queries, read by a PromQL parser, with the exported metrics."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import promql_parser as promql
from prometheus_client.parser import text_string_to_metric_families

from tests.support.paths import ROOT

DASHBOARD = json.loads((ROOT / "deploy/dashboards/opcd.json").read_text())
TARGET_LABELS = {"instance", "job"}
"""Labels that Prometheus adds to every series."""

Selector = tuple[str, frozenset[str]]
"""(metric name or pattern, queried labels)."""


def panels() -> list[dict[str, Any]]:
    return [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]


def queries() -> list[str]:
    return [target["expr"] for panel in panels() for target in panel["targets"]]


def selectors(query: str) -> list[Selector]:
    """Every vector that a query reads. Raises ValueError for invalid PromQL."""
    query = re.sub(r"\$__(rate_)?interval", "5m", query)
    return list(_walk(promql.parse(query), frozenset()))


def _walk(node: Any, grouped: frozenset[str]) -> Iterator[Selector]:
    match node:
        case promql.VectorSelector():
            matchers = node.matchers.matchers
            names = [matcher.value for matcher in matchers if matcher.name == "__name__"]
            labels = {matcher.name for matcher in matchers} - {"__name__"}
            yield (node.name or names[0], frozenset(labels) | grouped)
        case promql.MatrixSelector():
            yield from _walk(node.vector_selector, grouped)
        case promql.AggregateExpr():
            by = node.modifier.labels if node.modifier is not None else []
            yield from _walk(node.expr, grouped | frozenset(by))
        case promql.Call():
            for argument in node.args:
                yield from _walk(argument, grouped)
        case promql.BinaryExpr():
            yield from _walk(node.lhs, grouped)
            yield from _walk(node.rhs, grouped)
        case promql.ParenExpr() | promql.SubqueryExpr() | promql.UnaryExpr():
            yield from _walk(node.expr, grouped)
        case promql.NumberLiteral() | promql.StringLiteral():
            return
        case _:
            raise TypeError(f"unsupported PromQL node: {type(node).__name__}")


def missing(queried: list[Selector], exported: dict[str, set[str]]) -> list[str]:
    """Names and labels that are queried but not exported."""
    found = []
    for name, labels in queried:
        matching = [known for known in exported if re.fullmatch(name, known)]
        if not matching:
            found.append(name)
        found += [
            f"{name}: {label}" for known in matching for label in sorted(labels - exported[known] - TARGET_LABELS)
        ]
    return found


def exported_by(text: str) -> dict[str, set[str]]:
    """Labels by series name of a Prometheus text exposition."""
    found: dict[str, set[str]] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            found.setdefault(sample.name, set()).update(sample.labels)
    return found


def asked_of(prefix: str) -> list[Selector]:
    return [selector for query in queries() for selector in selectors(query) if selector[0].startswith(prefix)]
