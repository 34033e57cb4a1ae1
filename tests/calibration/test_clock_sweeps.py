"""The clock forms on sweeps whose answer is known."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlgov.calibration.clock_sweeps import clock_power, clock_time, voltage_squared
from rlgov.calibration.fitting import Bound, solve

X = np.linspace(0.2, 1.0, 17)


@given(st.floats(0.4, 0.9), st.floats(0.1, 4.0))
def test_voltage_is_flat_below_the_knee_and_rises_above(knee: float, slope: float) -> None:
    squared = voltage_squared({"knee": knee, "slope": slope}, X)
    assert (squared[knee >= X] == 1.0).all()
    assert (np.diff(squared[knee < X]) > 0).all()


@settings(max_examples=15)
@given(st.floats(0.2, 1.0), st.floats(0.2, 1.0))
def test_time_of_a_sweep_is_recovered(memory: float, compute: float) -> None:
    truth = {"memory": memory, "compute": compute}
    measured = clock_time(truth, {"x": X})
    bounds = {name: Bound(0.5, 0.0, 3.0) for name in truth}
    found = solve(bounds, lambda p: np.log(clock_time(p, {"x": X}) / measured))
    assert found.values == pytest.approx(truth, rel=1e-3)


def test_power_of_a_sweep_is_recovered() -> None:
    truth = {"constant": 120.0, "busy": 110.0, "knee": 0.7, "slope": 1.5}
    measured = clock_power(truth, {"x": X})
    bounds = {
        "constant": Bound(90.0, 10.0, 200.0), "busy": Bound(150.0, 10.0, 300.0),
        "knee": Bound(0.6, 0.3, 0.95),
        "slope": Bound(1.0, 0.0, 6.0),
    }  # fmt: skip
    found = solve(bounds, lambda p: np.log(clock_power(p, {"x": X}) / measured))
    assert found.values == pytest.approx(truth, rel=0.02)


def test_what_a_sweep_does_not_tell_has_no_small_standard_error() -> None:
    # Nothing above the knee was measured: its place and the slope beyond are free.
    low = X[X < 0.6]
    truth = {"constant": 120.0, "busy": 110.0, "knee": 0.7, "slope": 1.5}
    measured = clock_power(truth, {"x": low})
    bounds = {name: Bound(v, 0.5 * v, 1.3 * v) for name, v in truth.items()}
    found = solve(bounds, lambda p: np.log(clock_power(p, {"x": low}) / measured))
    assert not found.identified("slope", bounds["slope"])
    assert found.identified("busy", bounds["busy"])
