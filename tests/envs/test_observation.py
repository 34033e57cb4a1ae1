from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray

from rlgov.envs.observation import FEATURES, HIGH, LOW, ObservationEncoder, observation_table
from rlgov.errors import ConfigError
from rlgov.records import WINDOW_FIELDS, Column, Limits, Window

SLO = np.array([[1.0, 0.075]])
COLUMN_OF = {f.name: i for i, f in enumerate(FEATURES)}
ROWS = hnp.arrays(
    np.float64, st.tuples(st.just(3), st.just(len(WINDOW_FIELDS))), elements=st.floats(width=64)
)


def one(window: Window) -> NDArray[np.float64]:
    return window.to_row()[None, :]


def seen(encoder: ObservationEncoder, window: Window, feature: str) -> float:
    return float(encoder.encode(one(window), SLO)[0, COLUMN_OF[feature]])


def test_feature_names_are_unique_and_bounds_are_proper() -> None:
    assert len(COLUMN_OF) == len(FEATURES)
    assert all(f.low < f.high and np.isfinite([f.low, f.high]).all() for f in FEATURES)


def test_the_table_has_a_line_for_every_feature() -> None:
    lines = observation_table().splitlines()
    assert len(lines) == len(FEATURES) + 2
    assert all(f"`{f.name}`" in line for f, line in zip(FEATURES, lines[2:], strict=True))


@given(st.lists(ROWS, min_size=1, max_size=3))
def test_whatever_the_rows_hold_observations_stay_finite_and_within_bounds(
    limits: Limits, sequence: list[NDArray[np.float64]]
) -> None:
    encoder = ObservationEncoder(limits, 3)
    for rows in sequence:
        observation = encoder.encode(rows, np.repeat(SLO, 3, axis=0))
        assert observation.dtype == np.float32
        assert np.isfinite(observation).all()
        assert ((observation >= LOW) & (observation <= HIGH)).all()


def test_a_row_alone_and_among_others_gives_the_same_observation(limits: Limits, calm: Window) -> None:
    rng = np.random.default_rng(7)
    together = ObservationEncoder(limits, 5)
    alone = ObservationEncoder(limits, 1)
    levels = rng.uniform(0.5, 2.0, (5, 2)) * SLO
    for _ in range(20):
        rows = np.repeat(one(calm), 5, axis=0) * rng.uniform(0.0, 2.0, (5, len(WINDOW_FIELDS)))
        many = together.encode(rows, levels)
        assert np.array_equal(alone.encode(rows[3:4], levels[3:4])[0], many[3])


def test_averages_start_without_bias_and_the_fast_one_leads(limits: Limits, calm: Window) -> None:
    encoder = ObservationEncoder(limits, 1)
    first = encoder.encode(one(calm), SLO)[0]
    names = ("arrivals_fast", "arrivals_slow", "arrivals_very_slow")
    assert len({float(first[COLUMN_OF[n]]) for n in names}) == 1
    assert first[COLUMN_OF["arrivals_fast"]] == pytest.approx(np.log1p(calm.arrivals / 0.1) - 3.0)
    for _ in range(60):
        encoder.encode(one(calm), SLO)
    after = encoder.encode(one(replace(calm, arrivals=40.0)), SLO)[0]
    fast, slow, very_slow = (after[COLUMN_OF[n]] for n in names)
    assert fast > slow > very_slow > first[COLUMN_OF["arrivals_very_slow"]]


def test_rates_do_not_depend_on_the_length_of_a_window(limits: Limits, calm: Window) -> None:
    assert calm.energy_j is not None
    longer = replace(calm, duration_s=2.0, arrivals=8.0, energy_j=2 * calm.energy_j)
    for feature in ("arrivals_fast", "power"):
        short = seen(ObservationEncoder(limits, 1), calm, feature)
        assert seen(ObservationEncoder(limits, 1), longer, feature) == pytest.approx(short)


def test_latencies_are_relative_to_the_slo_of_the_row(limits: Limits, calm: Window) -> None:
    encoder = ObservationEncoder(limits, 2)
    rows = np.repeat(one(calm), 2, axis=0)
    observation = encoder.encode(rows, np.array([[1.0, 0.075], [0.5, 0.15]]))
    assert observation[1, COLUMN_OF["ttft_p99"]] == pytest.approx(2 * observation[0, COLUMN_OF["ttft_p99"]])
    assert observation[1, COLUMN_OF["itl_mean"]] == pytest.approx(observation[0, COLUMN_OF["itl_mean"]] / 2)


def test_nothing_measured_is_flagged_and_is_not_zero_latency(limits: Limits, calm: Window) -> None:
    nothing = replace(calm, ttft_p50_s=None, ttft_p99_s=None, itl_mean_s=None)
    observation = ObservationEncoder(limits, 1).encode(one(nothing), SLO)[0]
    assert observation[COLUMN_OF["no_first_token"]] == 1.0
    assert observation[COLUMN_OF["no_token_gap"]] == 1.0
    assert observation[COLUMN_OF["no_finish"]] == 0.0
    assert observation[COLUMN_OF["ttft_p99"]] == 0.0


def test_a_blind_window_repeats_the_last_observation_and_leaves_the_averages(
    limits: Limits, calm: Window
) -> None:
    encoder, undisturbed = ObservationEncoder(limits, 1), ObservationEncoder(limits, 1)
    before = encoder.encode(one(calm), SLO)
    undisturbed.encode(one(calm), SLO)
    absurd = np.full((1, len(WINDOW_FIELDS)), 1e9)
    assert np.array_equal(encoder.encode(absurd, SLO), before)  # its blind column is not 0
    next_window = one(replace(calm, arrivals=9.0))
    assert np.array_equal(encoder.encode(next_window, SLO), undisturbed.encode(next_window, SLO))


def test_a_window_without_energy_counts_as_blind(limits: Limits, calm: Window) -> None:
    encoder = ObservationEncoder(limits, 1)
    before = encoder.encode(one(calm), SLO)
    assert np.array_equal(encoder.encode(one(replace(calm, energy_j=None, arrivals=9.0)), SLO), before)


def test_refused_tp_degrees_do_not_show(limits: Limits, calm: Window) -> None:
    plain, refused = (
        ObservationEncoder(limits, 1).encode(one(replace(calm, tp_refused=bits)), SLO) for bits in (0.0, 6.0)
    )
    assert np.array_equal(plain, refused)


def test_an_idle_window_is_not_a_blind_one(limits: Limits, calm: Window) -> None:
    encoder = ObservationEncoder(limits, 1)
    encoder.encode(one(calm), SLO)
    idle = replace(calm, arrivals=0.0, running=0.0, running_mean=0.0, busy_fraction=0.0)
    observation = encoder.encode(one(idle), SLO)[0]
    assert observation[COLUMN_OF["busy"]] == 0.0
    assert observation[COLUMN_OF["running"]] == LOW[COLUMN_OF["running"]]


def test_tp_recency_falls_at_a_switch_and_recovers(limits: Limits, calm: Window) -> None:
    encoder = ObservationEncoder(limits, 1)
    assert seen(encoder, calm, "tp_recency") == 1.0
    assert seen(encoder, replace(calm, switching=1.0), "tp_recency") == 0.0
    moved = replace(calm, tp_degree=2.0)
    assert seen(encoder, moved, "tp_recency") == 0.0
    recovering = [seen(encoder, moved, "tp_recency") for _ in range(120)]
    assert recovering == sorted(recovering)
    assert recovering[-1] == pytest.approx(0.5)
    assert seen(encoder, moved, "tp_is_2") == 1.0


def test_reset_forgets_only_the_rows_named(limits: Limits, calm: Window) -> None:
    encoder = ObservationEncoder(limits, 2)
    busy = np.repeat(one(replace(calm, arrivals=50.0)), 2, axis=0)
    quiet = np.repeat(one(calm), 2, axis=0)
    levels = np.repeat(SLO, 2, axis=0)
    encoder.encode(busy, levels)
    encoder.reset(np.array([True, False]))
    observation = encoder.encode(quiet, levels)
    fresh = ObservationEncoder(limits, 1).encode(one(calm), SLO)
    assert np.array_equal(observation[0], fresh[0])
    assert observation[1, COLUMN_OF["arrivals_slow"]] > observation[0, COLUMN_OF["arrivals_slow"]]


def test_an_observation_handed_out_is_never_written_again(limits: Limits, calm: Window) -> None:
    encoder = ObservationEncoder(limits, 1)
    first = encoder.encode(one(calm), SLO)
    kept = first.copy()
    encoder.encode(one(replace(calm, arrivals=99.0, running=200.0)), SLO)
    assert np.array_equal(first, kept)


def test_miss_share_counts_misses_per_arrival(limits: Limits, calm: Window) -> None:
    value = seen(ObservationEncoder(limits, 1), replace(calm, arrivals=100.0, misses=1.0), "miss_share_slow")
    assert value == pytest.approx(np.log1p(1.0), rel=1e-4)


def test_rows_of_another_shape_are_refused(limits: Limits) -> None:
    with pytest.raises(ConfigError, match="shape"):
        ObservationEncoder(limits, 2).encode(np.zeros((1, len(Column))), SLO)
