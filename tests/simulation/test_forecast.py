"""What the forecast expects of a window, against what the simulator takes for it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from rlgov.errors import ConfigError
from rlgov.records import Window
from rlgov.simulation.batch import SimulationBatch
from rlgov.simulation.forecast import UNSTATED_ERROR, Forecast, stated_error
from rlgov.simulation.physics import build_tables
from rlgov.simulation.profile import load_profile
from rlgov.workload.synthesis import SPECS, synthesize

PROFILE = load_profile("h100-qwen3-32b")
LIMITS = PROFILE.limits()
TABLES = build_tables(PROFILE)
FORECAST = Forecast(TABLES, LIMITS)


def simulated(workload: str, rate_scale: float, index: tuple[int, int, int]) -> list[Window]:
    spec = SPECS[workload]
    spec = replace(spec, rate_per_s=spec.rate_per_s * rate_scale, duration_s=200.0)
    trace = synthesize(spec, np.random.default_rng(1))
    batch = SimulationBatch(LIMITS, 1, TABLES, capacity=len(trace))
    batch.load(0, trace, TABLES, LIMITS.service_level, index)
    asked = np.array([index], dtype=np.int64)
    return [Window.from_row(batch.advance(asked)[0].copy()) for _ in range(180)]


@pytest.mark.parametrize("workload", ["conversation", "code"])
@pytest.mark.parametrize("index", [(0, 0, 0), (3, 0, 0), (6, 0, 0), (0, 0, 1)])
def test_energy_is_the_simulator_s_within_a_few_per_cent(workload: str, index: tuple[int, int, int]) -> None:
    windows = simulated(workload, 0.5, index)
    held = LIMITS.configuration(index)
    measured_j = sum(window.energy_j or 0.0 for window in windows)
    expected = [FORECAST.expect(window, held) for window in windows]
    assert sum(each.energy_j for each in expected) == pytest.approx(measured_j, rel=0.04)
    seen = [(w, e) for w, e in zip(windows, expected, strict=True) if w.itl_mean_s]
    tokens = [w.output_tokens for w, _ in seen]
    measured_s = np.average([w.itl_mean_s or 0.0 for w, _ in seen], weights=tokens)
    assert np.average([e.itl_s for _, e in seen], weights=tokens) == pytest.approx(measured_s, rel=0.1)


@pytest.mark.parametrize("index", [(3, 0, 0), (6, 0, 0), (0, 0, 1)])
def test_what_the_fastest_would_have_taken_is_known_from_elsewhere(index: tuple[int, int, int]) -> None:
    truth_j = sum(window.energy_j or 0.0 for window in simulated("conversation", 0.5, (0, 0, 0)))
    windows = simulated("conversation", 0.5, index)
    told_j = sum(FORECAST.expect(window, LIMITS.fastest).energy_j for window in windows)
    assert told_j == pytest.approx(truth_j, rel=0.06)


def test_nothing_to_do_takes_what_idle_gpus_take() -> None:
    idle = replace(
        simulated("conversation", 0.5, (0, 0, 0))[0], arrivals=0.0, output_tokens=0.0, prefill_tokens=0.0
    )
    expected = FORECAST.expect(idle, LIMITS.configuration((6, 0, 0)))
    clock = int(np.searchsorted(TABLES.grid_clocks_mhz, LIMITS.sm_clocks_mhz[6]))
    assert expected.power_w == pytest.approx(4 * float(TABLES.idle_w[clock]))
    assert not expected.saturated


def test_more_than_a_configuration_carries_is_said() -> None:
    busy = replace(
        simulated("conversation", 0.5, (0, 0, 0))[-1], output_tokens=50_000.0, prefill_tokens=50_000.0
    )
    assert FORECAST.expect(busy, LIMITS.configuration((11, 5, 2))).saturated
    finite = [FORECAST.expect(busy, LIMITS.configuration((c, 0, 0))).power_w for c in range(12)]
    assert all(0 < power_w <= 4 * LIMITS.tdp_w * 1.01 for power_w in finite)


def test_tables_of_another_deployment_are_refused() -> None:
    with pytest.raises(ConfigError, match="one profile"):
        Forecast(build_tables(load_profile("h100-qwen3-8b")), LIMITS)


def test_the_error_a_profile_states_is_its_worst_and_never_nothing() -> None:
    assert stated_error(PROFILE) == pytest.approx(0.095)
    assert 0 < UNSTATED_ERROR < 1
