"""Dashboard and alerts ask only for what somebody exports."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from rlgov.engine.gateway.metrics import GatewayMetrics
from rlgov.engine.gateway.metrics import _Present as Present
from rlgov.engine.samples import Outcome, RequestRecord
from rlgov.engine.telemetry.names import FAMILIES, Kind, sample_names
from rlgov.governor.assets import deployment_files
from rlgov.governor.exposition import PREFIX
from rlgov.governor.records import Adapted, Condition, Drift, Tick
from rlgov.governor.surface import Surface
from rlgov.records import Configuration

MakeTick = Callable[..., Tick]

DCGM = {"DCGM_FI_DEV_SM_CLOCK"}  # of NVIDIA's exporter, where it runs
NAME = re.compile(r"(?<![\w:$\"{.])((?:rlgov_|vllm:|process_|DCGM_)[A-Za-z0-9_:]+)")
BRACKETS = {")": "(", "]": "[", "}": "{"}


@pytest.fixture(scope="module")
def dashboard() -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads(deployment_files("grafana")["rlgov-dashboard.json"])
    return loaded


@pytest.fixture(scope="module")
def rules() -> list[dict[str, Any]]:
    document = yaml.safe_load(deployment_files("grafana")["rlgov-alerts.yaml"])
    return [rule for group in document["groups"] for rule in group["rules"]]


@pytest.fixture
def exported(surface: Surface, make_tick: MakeTick, make_condition: Callable[..., Condition]) -> set[str]:
    """Names of every sample of governor and gateway, and of every vLLM that is known."""
    slower = Configuration(1500, 256, 4)
    adapted = Adapted(configurations=(Drift(slower, 100, 1.1, 0.9),))
    held = (make_condition(),)
    for _ in range(2):
        tick = make_tick(acting=True, seen={"sm_clock_mhz": 1500.0}, conditions=held, adapted=adapted)
        surface.publish(tick)
    names = _samples(surface.metrics()) | DCGM

    async def gateway() -> bytes:
        metrics = GatewayMetrics(lambda: dict.fromkeys((*Present._GAUGES, *Present._COUNTERS), 0.0))
        metrics.observe(RequestRecord("a", 0.0, Outcome.SERVED, 0.0, 0.1, 0.9, 1.0, 10, 5))
        return metrics.page(None)

    names |= _samples(asyncio.run(gateway()))
    for family in FAMILIES:
        suffix = "_total" if family.kind is Kind.COUNTER else ""
        known = {name for spelling in family.spellings for name in sample_names(family, spelling)}
        names |= {name for name in known if name.startswith("vllm:") and name.endswith(suffix)}
    return names


def _samples(page: bytes) -> set[str]:
    families = text_string_to_metric_families(page.decode())
    return {sample.name for family in families for sample in family.samples}


def _expressions(dashboard: dict[str, Any]) -> Iterator[tuple[str, str]]:
    for panel in dashboard["panels"]:
        for target in panel.get("targets", []):
            yield panel["title"], target["expr"]


def test_every_metric_of_every_panel_is_exported(dashboard: dict[str, Any], exported: set[str]) -> None:
    asked = {name for _, expression in _expressions(dashboard) for name in NAME.findall(expression)}
    assert len(asked) > 40
    assert asked - exported == set()


def test_every_metric_of_every_alert_is_exported(rules: list[dict[str, Any]], exported: set[str]) -> None:
    asked = {name for rule in rules for name in NAME.findall(rule["expr"])}
    assert asked
    assert asked - exported == set()


def test_a_metric_that_is_not_exported_would_be_found(exported: set[str]) -> None:
    assert set(NAME.findall("sum(rate(rlgov_governor_nonsense_total[5m])) / vllm:nonsense")) == {
        "rlgov_governor_nonsense_total",
        "vllm:nonsense",
    }
    assert "rlgov_governor_nonsense_total" not in exported
    assert "vllm:nonsense" not in exported


def test_everything_worth_seeing_is_on_the_dashboard(dashboard: dict[str, Any], exported: set[str]) -> None:
    """A gauge or counter of the governor that no panel shows was forgotten, or is for machines."""
    asked = {name for _, expression in _expressions(dashboard) for name in NAME.findall(expression)}
    ours = {re.sub(r"_(bucket|count|sum)$", "", name) for name in exported if name.startswith(PREFIX)}
    ours = {name for name in ours if not name.endswith("_created")}
    shown = {re.sub(r"_bucket$", "", name) for name in asked}
    for_machines = {
        "commands_total",
        "http_requests_total",
        "interval_seconds",
        "last_tick_timestamp_seconds",
        "metered_seconds_total",
        "prefill_tokens_total",
        "profile_windows",
        "prompt_tokens_total",
        "start_time_seconds",
        "tensorboard_dropped_total",
        "ticks_total",
    }
    assert ours - shown <= {PREFIX + name for name in for_machines}


def test_labels_in_expressions_exist(
    dashboard: dict[str, Any], surface: Surface, make_tick: MakeTick
) -> None:
    surface.publish(make_tick())
    labels: dict[str, set[str]] = {}
    for family in text_string_to_metric_families(surface.metrics().decode()):
        for sample in family.samples:
            labels.setdefault(sample.name, set()).update(sample.labels)
    for title, expression in _expressions(dashboard):
        for name, selectors in re.findall(r"(rlgov_governor_\w+)\{([^}]*)\}", expression):
            given = set(re.findall(r"(\w+)\s*=~?", selectors))
            assert given <= labels.get(name, set()) | {"instance", "basis"}, title
        legend = expression.partition("by (")[2].partition(")")[0]
        assert legend in {"", "reason", "basis", "le"}, title


def test_expressions_are_balanced(dashboard: dict[str, Any], rules: list[dict[str, Any]]) -> None:
    for expression in [*(e for _, e in _expressions(dashboard)), *(rule["expr"] for rule in rules)]:
        stack: list[str] = []
        for letter in re.sub(r'"[^"]*"', "", expression):
            if letter in BRACKETS.values():
                stack.append(letter)
            elif letter in BRACKETS:
                assert stack.pop() == BRACKETS[letter], expression
        assert stack == [], expression


def test_panels_have_ids_places_and_a_datasource(dashboard: dict[str, Any]) -> None:
    ids = [panel["id"] for panel in dashboard["panels"]]
    assert len(ids) == len(set(ids))
    variables = {variable["name"]: variable for variable in dashboard["templating"]["list"]}
    assert variables["datasource"]["type"] == "datasource"
    assert variables["datasource"]["query"] == "prometheus"
    used = set(re.findall(r"\$\{?(\w+)", json.dumps(dashboard["panels"])))
    assert {name for name in used if not name.startswith("__")} <= set(variables)
    taken: set[tuple[int, int]] = set()
    for panel in dashboard["panels"]:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24
        cells = {(place["x"] + x, place["y"] + y) for x in range(place["w"]) for y in range(place["h"])}
        assert not cells & taken, panel["title"]
        taken |= cells
        if panel["type"] != "row":
            assert panel["targets"], panel["title"]
            sources = [panel["datasource"], *(target["datasource"] for target in panel["targets"])]
            assert all(source == {"type": "prometheus", "uid": "${datasource}"} for source in sources)
            letters = [target["refId"] for target in panel["targets"]]
            assert len(letters) == len(set(letters))


def test_what_the_issue_asks_for_has_a_row(dashboard: dict[str, Any]) -> None:
    rows = " ".join(panel["title"] for panel in dashboard["panels"] if panel["type"] == "row").lower()
    for part in ("energy", "configuration", "latency", "interventions", "conditions", "keeper", "drift"):
        assert part in rows


def test_alerts_say_what_to_do(rules: list[dict[str, Any]]) -> None:
    names = [rule["alert"] for rule in rules]
    assert len(names) == len(set(names))
    for rule in rules:
        assert rule["for"]
        assert rule["labels"]["severity"] in {"info", "warning", "critical"}
        assert len(rule["annotations"]["description"]) > 20
