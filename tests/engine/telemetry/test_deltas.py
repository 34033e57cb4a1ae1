"""Differences of samples, resets, and what histograms say."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlgov.engine.samples import EngineSample, Histogram
from rlgov.engine.telemetry.deltas import difference, quantile, share_above
from rlgov.engine.telemetry.page import sample_from_page
from rlgov.engine.telemetry.progress import Progress
from rlgov.errors import ConfigError
from tests.fakes.measurements import sample
from tests.fakes.metrics_page import Seen, render

BOUNDS = (0.1, 0.5, 1.0, math.inf)


def page(at_s: float, started_s: float = 1000.0, **values: Any) -> EngineSample:
    return sample_from_page(
        render({"0": replace(Seen(), **values)}, started_s=started_s), at_s=at_s, engine_id="e"
    )


def histogram(*values: float, bounds: tuple[float, ...] = BOUNDS) -> Histogram:
    counts = tuple(float(sum(value <= bound for value in values)) for bound in bounds)
    return Histogram(bounds, counts, sum(values), float(len(values)))


def test_the_difference_is_what_happened_in_between() -> None:
    before = page(10.0)
    after = page(
        12.0,
        generated_tokens=1100,
        prompt_tokens=700,
        ended={"stop": 6, "length": 3, "abort": 3},
        ttft_s=(0.05, 0.3, 20.0, 0.3, 0.4),
        gap_s=(0.02, 0.03, 0.04, 9.0, 0.5, 1.5),
    )
    delta = difference(before, after)
    assert delta.reset == ""
    assert (delta.span_s, delta.generated_tokens, delta.prompt_tokens, delta.prefill_tokens) == (
        2,
        100,
        200,
        200,
    )
    assert (delta.finished, delta.failed, delta.token_gaps) == (2, 0, 2)
    assert delta.itl_mean_s == pytest.approx(1.0)
    assert delta.running_mean == pytest.approx(1.0)  # 2 s of gaps in 2 s
    assert delta.busy_fraction == pytest.approx(1.0)  # 2 iterations of a mean gap of 1 s
    assert delta.histograms["ttft_s"].count == 2
    assert (delta.arrived, delta.busy_s, delta.running_s) == (None, None, None)


def test_an_idle_engine_is_busy_for_no_time() -> None:
    delta = difference(page(1.0), page(2.0))
    assert (delta.itl_mean_s, delta.busy_fraction, delta.running_mean) == (None, 0, 0)


def test_what_the_engine_integrates_is_preferred() -> None:
    before = sample(1.0, busy_s=5.0, running_s=10.0, token_gaps=0.0, token_gap_s=0.0)
    after = sample(3.0, busy_s=6.0, running_s=16.0, token_gaps=4.0, token_gap_s=0.4)
    delta = difference(before, after)
    assert (delta.busy_fraction, delta.running_mean, delta.itl_mean_s) == (0.5, 3.0, 0.1)
    unknown = difference(
        replace(before, busy_s=None, running_s=None, token_gap_s=None, token_gaps=None),
        replace(after, busy_s=None, running_s=None, token_gap_s=None, token_gaps=None),
    )
    assert (unknown.busy_fraction, unknown.running_mean, unknown.itl_mean_s) == (None, None, None)


@pytest.mark.parametrize(
    ("after", "reason"),
    [
        (page(2.0, started_s=2000.0, generated_tokens=5000), "restarted"),  # counters higher than before
        (page(2.0, generated_tokens=10), "generated_tokens went back"),
        (page(2.0, ttft_s=(0.05, 0.3)), "histogram ttft_s"),
        (page(1.0), "not newer"),
        (page(0.5), "not newer"),
        (replace(page(2.0), source="plugin"), "source changed"),
        (replace(page(2.0), histograms={}), "vanished"),
    ],
)
def test_samples_that_are_no_pair_are_marked(after: EngineSample, reason: str) -> None:
    delta = difference(page(1.0), after)
    assert reason in delta.reset


def test_after_a_reset_the_delta_is_the_new_value() -> None:
    delta = difference(page(1.0), page(2.0, started_s=2.0, generated_tokens=30))
    assert delta.generated_tokens == 30
    assert delta.histograms["ttft_s"].count == 3


def test_other_buckets_are_a_reset() -> None:
    before = replace(page(1.0), histograms={"ttft_s": histogram(0.2)})
    after = replace(page(2.0), histograms={"ttft_s": histogram(0.2, 0.3, bounds=(0.2, math.inf))})
    assert "ttft_s" in difference(before, after).reset


@given(st.lists(st.lists(st.integers(0, 50), min_size=3, max_size=3), min_size=1, max_size=20))
@settings(deadline=None)
def test_differences_add_up(steps: list[list[int]]) -> None:
    totals = np.vstack([np.zeros(3, dtype=int), np.cumsum(steps, axis=0)])
    samples = [
        sample(float(i), generated_tokens=float(g), preemptions=float(p), finished=float(f))
        for i, (g, p, f) in enumerate(totals)
    ]
    deltas = [difference(a, b) for a, b in pairwise(samples)]
    assert not any(delta.reset for delta in deltas)
    assert sum(delta.generated_tokens for delta in deltas) == totals[-1][0]
    assert sum(delta.preemptions for delta in deltas) == totals[-1][1]
    assert sum(delta.finished for delta in deltas) == totals[-1][2]


# --------------------------------------------------------------------------- histograms


def test_quantiles_as_promql_reckons_them() -> None:
    known = histogram(0.05, 0.2, 0.3, 0.7)
    for q, value in ((0.0, 0.0), (0.25, 0.1), (0.5, 0.3), (0.75, 0.5), (1.0, 1.0)):
        found = quantile(known, q)
        assert found is not None
        assert found.value == pytest.approx(value)
        assert not found.at_least


def test_a_quantile_above_the_last_bound_is_a_lower_bound_and_says_so() -> None:
    assert quantile(histogram(0.2, 7.0, 8.0), 0.99) == (1.0, True)
    assert quantile(histogram(7.0, bounds=(math.inf,)), 0.5) == (0.0, True)


def test_without_observations_there_is_no_quantile() -> None:
    assert quantile(histogram(), 0.5) is None
    assert share_above(histogram(), 0.5) is None


@pytest.mark.parametrize(
    ("limit", "share"),
    [(0.0, 1.0), (0.1, 0.75), (0.3, 0.5), (0.5, 0.25), (0.75, 0.125 + 0.125), (1.0, 0.25), (99.0, 0.25)],
)
def test_the_share_above_a_limit_is_interpolated(limit: float, share: float) -> None:
    # one each in (0, 0.1], (0.1, 0.3), (0.3, 0.5) and above the last bound
    assert share_above(histogram(0.05, 0.2, 0.4, 30.0), limit) == pytest.approx(share)


@given(
    values=st.lists(st.floats(0.0, 0.99), min_size=1, max_size=200),
    q=st.floats(0.01, 0.99),
    limit=st.floats(0.0, 2.0),
)
@settings(deadline=None)
def test_a_histogram_errs_by_its_bucket_at_most(values: list[float], q: float, limit: float) -> None:
    bounds = (*np.linspace(0.05, 1.0, 20).tolist(), math.inf)
    known = histogram(*values, bounds=bounds)
    found = quantile(known, q)
    assert found is not None
    exact = float(np.quantile(values, q, method="inverted_cdf"))
    assert abs(found.value - exact) <= 0.05 + 1e-9
    share = share_above(known, limit)
    assert share is not None
    above = [sum(value > at for value in values) / len(values) for at in (limit - 0.05, limit + 0.05)]
    assert above[1] - 1e-9 <= share <= above[0] + 1e-9


# --------------------------------------------------------------------------- progress


def test_an_engine_with_work_and_frozen_counters_stalls() -> None:
    progress = Progress(after_samples=3)
    hung = [sample(float(i), waiting=2, generated_tokens=50.0) for i in range(5)]
    assert [progress.observe(one) for one in hung] == [False, False, False, True, True]
    assert not progress.observe(sample(6.0, waiting=2, generated_tokens=51.0))
    assert not progress.stalled


def test_an_idle_engine_does_not_stall_and_neither_does_a_long_prompt() -> None:
    progress = Progress(after_samples=1)
    assert not any(progress.observe(sample(float(i))) for i in range(5))
    chunks = [sample(float(i), running=1, iterations=float(i)) for i in range(5)]
    assert not any(progress.observe(one) for one in chunks)
    with pytest.raises(ConfigError, match="at least 1"):
        Progress(after_samples=0)
