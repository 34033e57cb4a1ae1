from __future__ import annotations

from dataclasses import fields
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlgov.errors import ConfigError
from rlgov.records import WINDOW_FIELDS, Column, Configuration, Limits, ServiceLevel, Window

NUMBERS = st.floats(allow_nan=False)
OPTIONAL = {f.name for f in fields(Window) if "None" in str(f.type)}
WINDOWS = st.builds(
    Window, **{name: st.none() | NUMBERS if name in OPTIONAL else NUMBERS for name in WINDOW_FIELDS}
)


def some_limits(**changes: Any) -> Limits:
    values: dict[str, Any] = {
        "sm_clocks_mhz": (1980, 1200),
        "batch_caps": (64, 8),
        "tp_degrees": (2, 1),
        "interval_s": 1.0,
        "service_level": ServiceLevel(1.0, 0.075),
        "allotted_gpus": 2,
        "tdp_w": 700.0,
        "kv_capacity_tokens": (1000, 400),
        "switch_s": (5.0, 5.0),
        "max_num_batched_tokens": 8192,
    }
    return Limits(**(values | changes))


@given(WINDOWS)
def test_a_window_survives_the_way_through_a_row_exactly(window: Window) -> None:
    assert Window.from_row(window.to_row()) == window


@given(WINDOWS)
def test_every_column_holds_the_field_of_its_name(window: Window) -> None:
    row = window.to_row()
    for name in WINDOW_FIELDS:
        value = getattr(window, name)
        cell = row[Column[name.upper()]]
        assert np.isnan(cell) if value is None else cell == value
    assert len(Column) == len(WINDOW_FIELDS) == row.shape[0]


def test_only_latencies_and_energy_may_be_missing() -> None:
    latencies = {"ttft_p50_s", "ttft_p99_s", "tpot_p50_s", "tpot_p99_s", "itl_mean_s"}
    assert latencies | {"energy_j"} == OPTIONAL


@given(st.integers(0, 1), st.integers(0, 1), st.integers(0, 1))
def test_index_inverts_configuration(clock: int, cap: int, tp: int) -> None:
    limits = some_limits()
    assert limits.index(limits.configuration((clock, cap, tp))) == (clock, cap, tp)


def test_index_zero_is_the_largest_of_each_axis() -> None:
    assert some_limits().fastest == Configuration(1980, 64, 2)


def test_a_setting_that_is_not_offered_is_named() -> None:
    with pytest.raises(ConfigError, match=r"1500.*not offered.*1980"):
        some_limits().index(Configuration(1500, 64, 2))


@pytest.mark.parametrize(
    "changes",
    [
        {"sm_clocks_mhz": (1200, 1980)},
        {"batch_caps": ()},
        {"batch_caps": (8, 8)},
        {"tp_degrees": (2, 0)},
        {"interval_s": 0.0},
        {"allotted_gpus": 1},
    ],
)
def test_limits_refuse_what_cannot_be(changes: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        some_limits(**changes)


def test_slo_scale_multiplies_both_limits() -> None:
    assert ServiceLevel(1.0, 0.08).scaled(0.5) == ServiceLevel(0.5, 0.04)


@pytest.mark.parametrize("level", [(0.0, 0.1), (1.0, -0.1), (float("nan"), 0.1)])
def test_an_slo_must_be_positive(level: tuple[float, float]) -> None:
    with pytest.raises(ConfigError, match="positive"):
        ServiceLevel(*level)
