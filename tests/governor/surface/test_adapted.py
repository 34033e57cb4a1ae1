"""What adaptation finds is on the metrics page and on /status; test_grafana.py has the dashboard."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

from rlgov.governor.exposition import PREFIX
from rlgov.governor.records import Adapted, Condition, Drift, Severity, Tick
from rlgov.governor.surface import Surface
from rlgov.records import Configuration

FOUND = (
    Drift(Configuration(1380, 128, 4), 40, 1.3, 0.95),
    Drift(Configuration(1980, 256, 4), 64, 1.02, 1.01),
)
ADAPTED = Adapted(1.11, 0.98, 104, FOUND, FOUND[:1], 0.2)


def samples(surface: Surface) -> dict[tuple[str, str], float]:
    page = surface.metrics().decode()
    return {
        (sample.name.removeprefix(PREFIX), sample.labels.get("quantity", "")): sample.value
        for family in text_string_to_metric_families(page)
        for sample in family.samples
    }


def test_factors_and_the_farthest_configuration_are_exported(
    surface: Surface, make_tick: Callable[..., Tick]
) -> None:
    surface.publish(make_tick(adapted=ADAPTED))
    found = samples(surface)
    assert found["profile_scale_ratio", "time"] == 1.11
    assert found["profile_scale_ratio", "power"] == 0.98
    assert found["profile_drift_ratio", "time"] == 1.3
    assert found["profile_drift_ratio", "power"] == 0.95
    assert found["profile_drift_limit_ratio", ""] == 0.2
    assert found["profile_windows", ""] == 104.0


def test_without_adaptation_or_before_it_knows_anything_nothing_is_made_up(
    surface: Surface, make_tick: Callable[..., Tick]
) -> None:
    surface.publish(make_tick())
    assert not [name for name, _ in samples(surface) if name.startswith("profile_")]
    surface.publish(make_tick(adapted=Adapted()))
    assert not [name for name, _ in samples(surface) if name == "profile_drift_ratio"]


def test_the_status_page_names_configuration_distance_and_remedy(
    surface: Surface, make_tick: Callable[..., Tick]
) -> None:
    drift = Condition("ProfileDrift", Severity.WARNING, 0.0, "at 1380 MHz", "rlgov characterize")
    surface.publish(make_tick(adapted=ADAPTED, conditions=(drift,)))
    told: dict[str, Any] = json.loads(json.dumps(surface.status()))
    (farthest,) = told["tick"]["adapted"]["drifting"]
    assert farthest["configuration"] == {"sm_clock_mhz": 1380, "batch_cap": 128, "tp_degree": 4}
    assert farthest["time"] == 1.3
    assert told["conditions"][0]["name"] == "ProfileDrift"
