from __future__ import annotations

import math
import re
from collections.abc import Callable

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

from rlgov.governor.exposition import MOST_VALUES, OTHER, PREFIX
from rlgov.governor.health import NOT_READY
from rlgov.governor.records import CONDITIONS, Condition, Governed, Mode, Severity, Tick
from rlgov.governor.surface import Surface
from rlgov.records import Configuration, Decision

MakeTick = Callable[..., Tick]
Labels = frozenset[tuple[str, str]]

BASE_UNITS = ("seconds", "joules", "watts", "hertz", "ratio", "bytes", "info", "total")


def read(surface: Surface) -> dict[tuple[str, Labels], float]:
    """Every sample of the page, by Prometheus' own parser."""
    page = surface.metrics().decode()
    samples = [s for family in text_string_to_metric_families(page) for s in family.samples]
    found = {(sample.name, frozenset(sample.labels.items())): sample.value for sample in samples}
    assert len(found) == len(samples)
    return found


def value(surface: Surface, name: str, **labels: str) -> float | None:
    return read(surface).get((PREFIX + name, frozenset(labels.items())))


def test_before_the_first_tick_nothing_is_made_up(surface: Surface) -> None:
    names = {name for name, _ in read(surface)}
    assert PREFIX + "info" in names
    assert PREFIX + "power_watts" not in names
    assert PREFIX + "sm_clock_hertz" not in names
    assert value(surface, "ready") == 0.0
    assert value(surface, "alive") == 1.0


def test_window_and_decision_are_shown_in_base_units(surface: Surface, make_tick: MakeTick) -> None:
    surface.publish(make_tick())
    assert value(surface, "power_watts") == 2000.0
    assert value(surface, "sm_clock_hertz", stage="in_force") == 1980e6
    assert value(surface, "sm_clock_hertz", stage="applied") == 1500e6
    assert value(surface, "batch_cap", stage="asked") == 256.0
    assert value(surface, "tp_degree", stage="in_force") == 4.0
    assert value(surface, "ttft_seconds", percentile="99") == 0.4
    assert value(surface, "slo_seconds", objective="tpot") == 0.075
    assert value(surface, "lease_seconds") == 2.5
    assert value(surface, "actuation_failures_total", kind="lock") == 2.0
    assert value(surface, "reward", term="energy") == -0.5
    assert value(surface, "predicted_power_watts", configuration="decided") == 1500.0
    assert value(surface, "mode", mode="shadow") == 1.0
    assert value(surface, "mode", mode="active") == 0.0


def test_what_was_not_measured_has_no_sample(surface: Surface, make_tick: MakeTick) -> None:
    surface.publish(make_tick(seen={"energy_j": None, "ttft_p99_s": None}, ood_score=None, prediction=None))
    assert value(surface, "power_watts") is None
    assert value(surface, "ttft_seconds", percentile="99") is None
    assert value(surface, "ttft_seconds", percentile="50") == 0.1
    assert value(surface, "ood_score") is None
    assert value(surface, "energy_joules_total") == 0.0  # a total of what was measured


def test_a_blind_window_shows_no_stale_state_and_is_counted(surface: Surface, make_tick: MakeTick) -> None:
    surface.publish(make_tick())
    surface.publish(make_tick(seen={"blind": 1.0, "energy_j": None, "arrivals": 77.0}))
    assert value(surface, "requests_running") is None
    assert value(surface, "sm_clock_hertz", stage="in_force") is None
    assert value(surface, "blind_windows_total") == 1.0
    assert value(surface, "requests_arrived_total") == 4.0  # nothing of a blind window is counted


def test_every_condition_is_there_as_zero_or_one(
    surface: Surface, make_tick: MakeTick, make_condition: Callable[..., Condition]
) -> None:
    surface.publish(make_tick(conditions=(make_condition("Tripped", Severity.CRITICAL),)))
    for name in CONDITIONS:
        assert value(surface, "condition", condition=name) == float(name == "Tripped")
    assert value(surface, "conditions", severity="critical") == 1.0
    assert value(surface, "conditions", severity="warning") == 0.0


def test_a_condition_that_came_and_went_is_counted_once(
    surface: Surface, make_tick: MakeTick, make_condition: Callable[..., Condition]
) -> None:
    held = (make_condition("Blind"),)
    for conditions in (held, held, (), held, ()):
        surface.publish(make_tick(conditions=conditions))
    assert value(surface, "condition", condition="Blind") == 0.0
    assert value(surface, "conditions_raised_total", condition="Blind") == 2.0


def test_gpus_are_labelled_as_dcgm_labels_them(surface: Surface) -> None:
    (first, second) = sorted(
        dict(labels)["UUID"] for name, labels in read(surface) if name == PREFIX + "gpu_info"
    )
    assert (first, second) == ("GPU-aaaa", "GPU-bbbb")
    labels = next(dict(labels) for name, labels in read(surface) if name == PREFIX + "gpu_info")
    assert set(labels) == {"UUID", "modelName", "Hostname"}


def test_decisions_are_counted_by_reason_and_who_decided(surface: Surface, make_tick: MakeTick) -> None:
    surface.publish(make_tick())
    surface.publish(make_tick(reason="SLO_OVERRIDE", acting=True, mode=Mode.ACTIVE))
    surface.publish(make_tick(reason="OOD", baseline=True))
    assert value(surface, "decisions_total", reason="POLICY", by="policy", acting="no") == 1.0
    assert value(surface, "decisions_total", reason="SLO_OVERRIDE", by="policy", acting="yes") == 1.0
    assert value(surface, "decisions_total", reason="OOD", by="baseline", acting="no") == 1.0
    assert value(surface, "decision_duration_seconds_count") == 3.0


def test_reasons_without_end_do_not_grow_the_page(surface: Surface, make_tick: MakeTick) -> None:
    for number in range(5 * MOST_VALUES):
        surface.publish(make_tick(reason=f"REASON_{number}"))
    reasons = {dict(labels)["reason"] for name, labels in read(surface) if name == f"{PREFIX}decisions_total"}
    assert len(reasons) == MOST_VALUES + 1
    assert OTHER in reasons


def test_shadow_saving_is_what_the_decisions_would_have_used(surface: Surface, make_tick: MakeTick) -> None:
    for _ in range(3):  # the first decision is compared with the second window
        surface.publish(make_tick())
    assert value(surface, "fastest_energy_joules_total", basis="shadow") == 4000.0  # measured
    assert value(surface, "chosen_energy_joules_total", basis="shadow") == 3000.0  # at 1500 of 2000 J
    assert value(surface, "fastest_energy_joules_total", basis="active") == 0.0


def test_active_saving_is_what_the_fastest_would_have_used(surface: Surface, make_tick: MakeTick) -> None:
    seen = {"sm_clock_mhz": 1500.0, "energy_j": 1650.0}
    for _ in range(2):
        surface.publish(make_tick(acting=True, mode=Mode.ACTIVE, seen=seen))
    assert value(surface, "chosen_energy_joules_total", basis="active") == 1650.0  # measured
    assert value(surface, "fastest_energy_joules_total", basis="active") == pytest.approx(2200.0)
    assert value(surface, "residual_ratio", quantity="power") == pytest.approx(1.1)
    assert value(surface, "residual_ratio", quantity="itl") == pytest.approx(0.025 / 0.03)


@pytest.mark.parametrize(
    "seen",
    [
        {"sm_clock_mhz": 1000.0},  # somebody else's lock
        {"switching": 1.0},
        {"energy_j": None},
        {"energy_j": math.nan},
        {"sm_clock_mhz": math.nan},
        {"blind": 1.0},
    ],
)
def test_what_cannot_be_compared_is_left_out(
    surface: Surface, make_tick: MakeTick, seen: dict[str, float | None]
) -> None:
    surface.publish(make_tick(seen=seen))
    surface.publish(make_tick(seen=seen))
    for basis in ("active", "shadow"):
        assert value(surface, "fastest_energy_joules_total", basis=basis) == 0.0


def test_names_keep_to_prometheus_rules(surface: Surface, make_tick: MakeTick) -> None:
    surface.publish(make_tick())
    families = list(text_string_to_metric_families(surface.metrics().decode()))
    for family in families:
        for sample in family.samples:
            assert sample.name.startswith((PREFIX, "process_"))
            assert not re.search(r"_(s|ms|mhz|w|j|percent)(_|$)", sample.name), sample.name
        if family.type == "counter":
            assert all(sample.name.endswith("_total") for sample in family.samples), family.name
            assert not family.name.endswith("_total")
        assert family.documentation
    assert {family.name for family in families} >= {"process_resident_memory_bytes"}


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    number=st.floats(allow_nan=True, allow_infinity=True),
    energy=st.one_of(st.none(), st.floats(allow_nan=True, allow_infinity=True)),
    text=st.text(max_size=40),
)
def test_no_tick_breaks_the_page_or_lets_a_total_fall(
    surface: Surface, make_tick: MakeTick, number: float, energy: float | None, text: str
) -> None:
    before = {key: total for key, total in read(surface).items() if key[0].endswith("_total")}
    decision = Decision(0.0, Configuration(1, 1, 1), Configuration(1, 1, 1), text)
    surface.publish(
        make_tick(
            seen={"arrivals": number, "energy_j": energy, "duration_s": number, "sm_clock_mhz": number},
            reason=text,
            decision=decision,
            decision_duration_s=number,
            ood_score=number,
            conditions=(Condition(text, Severity.INFO, number, text, text),),
            reward_terms={text: number},
        )
    )
    after = read(surface)
    for key, total in before.items():
        if not key[0].endswith(("actuation_failures_total", "overruns_total")):
            assert after[key] >= total, key
    assert surface.status()["tick"] is not None


def test_target_and_versions_are_on_the_page(surface: Surface, governed: Governed) -> None:
    labels = next(dict(labels) for name, labels in read(surface) if name == PREFIX + "info")
    assert labels["policy_digest"] == governed.policy_digest
    assert labels["version"] == "1.2.3"
    assert labels["target"] == "control.sock"


def test_what_keeps_it_from_being_ready_are_conditions_there_are() -> None:
    assert set(CONDITIONS) >= NOT_READY
