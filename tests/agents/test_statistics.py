"""Bootstrap intervals: they cover, they pair, and they do not invent spread."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlgov.agents.statistics import (
    Interval,
    attainment_interval,
    block_count,
    block_sums,
    difference_interval,
    mean_interval,
    quantile,
    saving_interval,
    total_interval,
)
from rlgov.errors import ConfigError


def rng() -> np.random.Generator:
    return np.random.default_rng(7)


def test_intervals_cover_the_true_mean_about_as_often_as_they_say() -> None:
    generator = rng()
    covered = 0
    for _ in range(100):
        interval = mean_interval(generator.exponential(2.0, 60), generator)
        assert interval is not None
        covered += interval.low <= 2.0 <= interval.high
    assert 85 <= covered <= 100


def test_the_same_generator_state_gives_the_same_interval() -> None:
    values = rng().normal(size=30)
    assert mean_interval(values, rng()) == mean_interval(values, rng())


def test_pairing_removes_what_two_policies_share() -> None:
    generator = rng()
    traffic = generator.uniform(100.0, 1000.0, 40)
    policy = 0.7 * traffic + generator.normal(0.0, 1.0, 40)
    saving = saving_interval(policy, traffic, rng())
    alone = total_interval(policy, rng())
    assert saving is not None
    assert alone is not None
    assert saving.low < 0.3 < saving.high
    assert saving.high - saving.low < 0.02
    assert (alone.high - alone.low) / float(np.sum(policy)) > 0.1


def test_difference_of_equal_samples_is_exactly_zero() -> None:
    values = rng().normal(size=12)
    assert difference_interval(values, values, rng()) == Interval(0.0, 0.0)


def test_no_misses_give_a_point_and_not_an_error() -> None:
    assert attainment_interval(np.zeros(10), np.arange(10.0) + 1, rng()) == Interval(1.0, 1.0)


def test_one_bad_block_widens_attainment_downwards_and_stays_within_bounds() -> None:
    misses = np.zeros(30)
    misses[4] = 20
    interval = attainment_interval(misses, np.full(30, 50.0), rng())
    assert interval is not None
    assert 0.9 < interval.low < 1 - 20 / 1500 <= interval.high <= 1.0


def test_too_few_samples_have_no_interval() -> None:
    assert mean_interval([1.0, 2.0, 3.0], rng()) is None


def test_unequal_lengths_and_missing_values_are_refused() -> None:
    with pytest.raises(ConfigError, match="equal length"):
        saving_interval(np.ones(5), np.ones(6), rng())
    with pytest.raises(ConfigError, match="not finite"):
        mean_interval([1.0, 2.0, 3.0, math.nan, 5.0], rng())


def test_block_sums_put_the_drain_into_the_last_block() -> None:
    sums = block_sums([0.0, 59.0, 60.0, 119.0, 500.0], [1.0, 2.0, 4.0, 8.0, 16.0], 120.0, 2)
    assert sums.tolist() == [3.0, 28.0]


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=60), st.floats(1, 4000))
def test_blocks_conserve_the_total(values: list[float], span_s: float) -> None:
    at_s = np.linspace(0, span_s * 1.2, len(values))
    sums = block_sums(at_s, values, span_s, block_count(span_s))
    assert math.isclose(math.fsum(sums), math.fsum(values), rel_tol=1e-9, abs_tol=1e-9)


@given(st.lists(st.floats(-1e9, 1e9), min_size=1, max_size=50), st.floats(0.0, 1.0))
def test_quantile_is_one_of_the_values_and_holds_its_share(values: list[float], fraction: float) -> None:
    chosen = quantile(values, fraction)
    assert chosen in values
    assert sum(v <= chosen for v in values) >= fraction * len(values) - 1e-6


def test_quantile_of_nothing_is_none() -> None:
    assert quantile([math.nan, math.inf], 0.5) is None
