# SPDX-License-Identifier: Apache-2.0
"""The Grafana dashboard of the examples: it is what its program makes, Grafana's library knows each
of its fields, and it shows every metric of this package and none that nobody exports."""

import json
import re
import runpy
from pathlib import Path
from typing import Any

import pytest

from vllm_nvium.engine.hooks import _source
from vllm_nvium.engine.stats import Metric
from vllm_nvium.nvium.stats import metrics as nvium_metrics
from vllm_nvium.via_sd.stats import metrics as via_sd_metrics

FOLDER = Path(__file__).parents[2] / "examples" / "dashboard"
DASHBOARD = json.loads((FOLDER / "vllm-nvium.json").read_text(encoding="utf-8"))
SUFFIXES = {"counter": ("_total",), "gauge": ("",), "histogram": ("_bucket", "_sum", "_count")}
# A metric, and the labels that follow it in a query.
SELECTOR = re.compile(r"(vllm:\w+)(?:\{([^}]*)\})?")


def panels() -> list[dict[str, Any]]:
    return [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]


def queries() -> list[str]:
    return [target["expr"] for panel in panels() for target in panel["targets"]]


def own_metrics() -> tuple[Metric, ...]:
    return nvium_metrics(3) + via_sd_metrics(16, may_be_paper=True)


def test_it_is_what_the_program_makes() -> None:
    pytest.importorskip("grafana_foundation_sdk")
    made = runpy.run_path(str(FOLDER / "make.py"))["build"]()
    assert made == (FOLDER / "vllm-nvium.json").read_text(encoding="utf-8")


def test_grafanas_library_knows_every_field() -> None:
    """What its models do not know, they drop; so what comes back is what was understood."""
    pytest.importorskip("grafana_foundation_sdk")
    from grafana_foundation_sdk.cog.encoder import JSONEncoder
    from grafana_foundation_sdk.cog.plugins import register_default_plugins
    from grafana_foundation_sdk.models.dashboard import Dashboard

    register_default_plugins()

    def understood(dashboard: dict[str, Any]) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(
            JSONEncoder().encode(Dashboard.from_json(json.loads(json.dumps(dashboard))))
        )
        return found

    assert understood(DASHBOARD) == DASHBOARD
    # That would have been seen.
    for wrong in (DASHBOARD | {"titel": "x"}, DASHBOARD | {"panels": [panels()[0] | {"units": 1}]}):
        assert understood(wrong) != wrong


def test_every_metric_has_a_panel() -> None:
    shown = {name for query in queries() for name, _ in SELECTOR.findall(query)}
    for metric in own_metrics():
        names = {f"vllm:{metric.name}{suffix}" for suffix in SUFFIXES[metric.kind]}
        assert names & shown, f"{metric.name} is on no panel"
        if metric.label:
            by = f"sum by ({metric.label}) (rate(vllm:{metric.name}"
            assert any(query.startswith(by) for query in queries()), metric.name


def test_every_query_is_of_metrics_that_are_exported() -> None:
    exported = {
        f"vllm:{metric.name}{suffix}"
        for metric in own_metrics()
        for suffix in SUFFIXES[metric.kind]
    }
    source = _source("vllm.v1.metrics.loggers")
    assert source is not None
    # vLLM's own, by the class that each is made of.
    for kind, name in re.findall(r"self\._(\w+)_cls\(\s*name=\"(vllm:\w+)\"", source):
        exported |= {name + suffix for suffix in SUFFIXES[kind]}
    texts = [*queries(), *(v["query"] for v in DASHBOARD["templating"]["list"])]
    found = [found for text in texts for found in SELECTOR.findall(text)]
    assert len(found) > 30
    assert sorted({name for name, _ in found} - exported) == []


def test_every_query_is_of_the_chosen_servers() -> None:
    kinds = {v["name"]: v["type"] for v in DASHBOARD["templating"]["list"]}
    assert kinds == {"datasource": "datasource", "model": "query"}
    for query in queries():
        assert all(labels == 'model_name=~"$model"' for _, labels in SELECTOR.findall(query)), query
        assert query.count("(") == query.count(")") and query.count("{") == query.count("}")
    assert {p["datasource"]["uid"] for p in panels()} == {"${datasource}"}
    assert {t["datasource"]["uid"] for p in panels() for t in p["targets"]} == {"${datasource}"}


def test_every_panel_says_what_it_shows_and_has_its_place() -> None:
    assert all(panel["title"] and panel["description"].endswith(".") for panel in panels())
    taken = set()
    for panel in DASHBOARD["panels"]:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24
        for x in range(place["x"], place["x"] + place["w"]):
            for y in range(place["y"], place["y"] + place["h"]):
                assert (x, y) not in taken, panel["title"]
                taken.add((x, y))
