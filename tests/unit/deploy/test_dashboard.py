"""The Grafana dashboard queries only exported metrics. Teachers and runs: tests/integration and tests/e2e."""

from __future__ import annotations

import importlib
import json
import re
from pathlib import Path

import pytest

from tests.support.dashboard import DASHBOARD, asked_of, missing, panels, queries, selectors

RAY_PANELS = ("default_dashboard_panels", "serve_dashboard_panels", "serve_deployment_dashboard_panels")


def test_every_query_reads_a_run_a_teacher_or_ray() -> None:
    known = ("opcd_run_", "opcd_teacher_", "ray_")
    assert len(queries()) > 40
    assert [name for query in queries() for name, _ in selectors(query) if not name.startswith(known)] == []
    assert all(asked_of(prefix) for prefix in known)


def test_ray_exports_every_queried_metric() -> None:
    """Compares with the queries of the dashboards that Ray ships."""
    exported: dict[str, set[str]] = {}
    for module in RAY_PANELS:
        panels = importlib.import_module(f"ray.dashboard.modules.metrics.dashboards.{module}")
        source = Path(str(panels.__file__)).read_text()
        for expr in re.findall(r"""expr=(?:'([^'\n]*)'|"([^"\n]*)")""", source):
            query = "".join(expr).replace("{global_filters}", "").replace("{{", "{").replace("}}", "}")
            for name, labels in selectors(re.sub(r",\s*}", "}", query)):
                exported.setdefault(name, set()).update(labels)
    assert len(exported) > 40
    assert missing(asked_of("ray_"), exported) == []


def test_a_query_of_a_missing_metric_is_found() -> None:
    exported = {"a_total": {"run"}, "b": {"le"}}
    assert missing(selectors("sum by (run) (rate(a_total[$__rate_interval])) / on () b"), exported) == []
    assert missing(selectors("sum by (runs) (rate(a_total[1m])) + b{x='1'} + c"), exported) == [
        "a_total: runs",
        "b: x",
        "c",
    ]
    assert missing(selectors('{__name__=~"a_.+", tenant="x"}'), exported) == ["a_.+: tenant"]
    with pytest.raises(ValueError, match=r"PromQL|parse|unexpected|invalid"):
        selectors("sum by (run rate(a[5m]))")


def test_variables_and_panels_are_consistent() -> None:
    known = {variable["name"] for variable in DASHBOARD["templating"]["list"]} | {"__rate_interval"}
    used = set(re.findall(r"\$\{?(\w+)", json.dumps(DASHBOARD)))
    assert used <= known
    ids = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(set(ids)) == len(ids)
    taken: set[tuple[int, int]] = set()
    for panel in DASHBOARD["panels"]:
        box = panel["gridPos"]
        cells = {(box["x"] + i, box["y"] + j) for i in range(box["w"]) for j in range(box["h"])}
        assert not cells & taken
        assert max(x for x, _ in cells) < 24
        taken |= cells
    for panel in panels():
        assert panel["title"]
        assert [target["refId"] for target in panel["targets"]] == [chr(65 + n) for n in range(len(panel["targets"]))]
