from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlgov.errors import ConfigError, TraceError
from rlgov.workload.fit_synthesis import (
    fit_burstiness,
    fit_lengths,
    model_dispersion,
    model_empty_share,
    model_sample_dispersion,
)
from rlgov.workload.lengths import LengthComponent, LengthMixture
from rlgov.workload.measures import counts_per_window, dispersion, empty_share, rank_correlation
from rlgov.workload.readers import read_trace
from rlgov.workload.synthesis import (
    POISSON,
    SPECS,
    Burstiness,
    SynthesisSpec,
    day_shape,
    day_trace,
    synthesize,
)
from rlgov.workload.trace import Trace

ONE_LENGTH = LengthMixture((LengthComponent(1.0, np.log(100), 0.0, np.log(10), 0.0, 0.0, 10_000, 10_000),))
TRAIN_FRACTION = 0.7
FILES = {"conversation": "azure_conv_2023.csv", "code": "azure_code_2023.csv"}
QUANTILES = [0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99]


def train_span(shared_dir: Path, name: str) -> Trace:
    return read_trace(shared_dir / "data" / FILES[name]).split(TRAIN_FRACTION)[0]


def same(a: Trace, b: Trace) -> bool:
    return bool(
        np.array_equal(a.arrival_s, b.arrival_s)
        and np.array_equal(a.prompt_tokens, b.prompt_tokens)
        and np.array_equal(a.output_tokens, b.output_tokens)
    )


@pytest.mark.parametrize("name", SPECS)
def test_one_seed_gives_one_trace(name: str) -> None:
    spec = replace(SPECS[name], duration_s=300.0)
    first = synthesize(spec, np.random.default_rng(7))
    assert same(first, synthesize(spec, np.random.default_rng(7)))
    assert not same(first, synthesize(spec, np.random.default_rng(8)))


def test_the_lengths_do_not_move_the_arrivals() -> None:
    spec = replace(SPECS["conversation"], duration_s=300.0)
    other = replace(spec, lengths=ONE_LENGTH)
    a, b = (synthesize(s, np.random.default_rng(3)) for s in (spec, other))
    assert np.array_equal(a.arrival_s, b.arrival_s)
    assert set(b.prompt_tokens.tolist()) == {100}
    assert set(b.output_tokens.tolist()) == {10}


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    duration_s=st.floats(0.05, 200),
    rate_per_s=st.floats(0.01, 50),
    low=st.floats(0, 1),
    high=st.floats(0.01, 2),
    busy_share=st.floats(0.01, 1),
    quiet_ratio=st.floats(0, 1),
    memory_s=st.floats(0.01, 100),
    drift_std=st.floats(0, 1),
)
def test_every_usable_spec_gives_a_valid_trace(  # noqa: PLR0913, PLR0917  # one argument a drawn value
    seed: int,
    duration_s: float,
    rate_per_s: float,
    low: float,
    high: float,
    busy_share: float,
    quiet_ratio: float,
    memory_s: float,
    drift_std: float,
) -> None:
    burstiness = Burstiness(busy_share, quiet_ratio, memory_s, drift_std, 50.0)
    lengths = SPECS["code"].lengths
    spec = SynthesisSpec("s", lengths, burstiness, rate_per_s, duration_s, min(low, high), high)
    trace = synthesize(spec, np.random.default_rng(seed))  # Trace checks order, span and token counts
    assert trace.duration_s == duration_s
    if len(trace):
        assert trace.prompt_tokens.max() <= 7437
        assert trace.output_tokens.max() <= 1899


def test_without_bursts_arrivals_are_poisson() -> None:
    spec = SynthesisSpec("p", ONE_LENGTH, POISSON, rate_per_s=20.0, duration_s=5000.0)
    trace = synthesize(spec, np.random.default_rng(0))
    assert len(trace) == pytest.approx(100_000, rel=0.02)
    assert dispersion(trace, 1.0) == pytest.approx(1.0, abs=0.1)
    assert dispersion(trace, 10.0) == pytest.approx(1.0, abs=0.3)


@pytest.mark.parametrize("name", ["conversation", "code"])
def test_the_generator_follows_its_closed_forms(name: str) -> None:
    spec = replace(SPECS[name], duration_s=100_000.0, lengths=ONE_LENGTH)
    trace = synthesize(spec, np.random.default_rng(1))
    assert trace.mean_rate_per_s == pytest.approx(spec.rate_per_s, rel=0.1)
    for window_s in (1.0, 10.0, 60.0):
        expected = model_dispersion(spec.burstiness, spec.rate_per_s, window_s)
        assert dispersion(trace, window_s) == pytest.approx(expected, rel=0.25)
    expected = model_empty_share(spec.burstiness, spec.rate_per_s, 0.5)
    assert empty_share(trace, 0.5) == pytest.approx(expected, rel=0.1, abs=0.01)


def test_a_day_swings_from_low_to_high() -> None:
    trace = day_trace(20.0, 3600.0, 0.1, 0.8, np.random.default_rng(0))
    rate_per_s = counts_per_window(trace, 120.0) / 120.0
    assert rate_per_s[[0, -1]] == pytest.approx([2.0, 2.0], rel=0.25)
    assert rate_per_s[13:17].mean() == pytest.approx(16.0, rel=0.1)
    assert rate_per_s.max() < 16.0 * 1.2
    assert rate_per_s.argmin() in {0, 1, 28, 29}


def test_the_phase_turns_the_day() -> None:
    trace = day_trace(20.0, 3600.0, 0.1, 0.8, np.random.default_rng(0), phase=0.5, lengths=ONE_LENGTH)
    rate_per_s = counts_per_window(trace, 120.0) / 120.0
    assert rate_per_s[0] > 5 * rate_per_s[15]


@given(st.floats(-10, 10))
def test_the_day_shape_stays_within_its_bounds_and_repeats(day: float) -> None:
    here, later = day_shape(np.array([day, day + 1]))
    assert -1e-9 <= here <= 1 + 1e-9
    assert here == pytest.approx(later, abs=1e-9)


def test_the_day_shape_reaches_both_ends() -> None:
    assert day_shape(np.array([0.0, 0.5])) == pytest.approx([0.0, 1.0])


def test_a_blend_mixes_the_requests_by_share() -> None:
    other = LengthMixture((replace(ONE_LENGTH.components[0], weight=7.0, prompt_log_mean=np.log(500)),))
    prompt, _ = ONE_LENGTH.blended(other, 0.25).sample(40_000, np.random.default_rng(0))
    assert (prompt == 500).mean() == pytest.approx(0.25, abs=0.01)
    assert ONE_LENGTH.blended(other, 0.0) == ONE_LENGTH


def test_lengths_carry_their_correlation() -> None:
    component = LengthComponent(1.0, 6.0, 0.5, 4.0, 0.5, 0.8, 10**6, 10**6)
    prompt, output = LengthMixture((component,)).sample(20_000, np.random.default_rng(0))
    assert np.corrcoef(np.log(prompt), np.log(output))[0, 1] == pytest.approx(0.8, abs=0.02)


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"rate_per_s": 0.0}, "rate_per_s"),
        ({"duration_s": float("inf")}, "duration_s"),
        ({"low": 0.9, "high": 0.8}, "low"),
        ({"low": 0.0, "high": 0.0}, "high above 0"),
        ({"cycles": 0.0}, "cycles"),
        ({"rate_per_s": 1e6, "duration_s": 1e6}, "more than"),
    ],
)
def test_an_impossible_spec_is_refused(changes: dict[str, float], complaint: str) -> None:
    values = {"rate_per_s": 5.0, "duration_s": 60.0} | changes
    with pytest.raises(ConfigError, match=complaint):
        SynthesisSpec("s", ONE_LENGTH, POISSON, **values)


@pytest.mark.parametrize(
    "changes",
    [
        {"busy_share": 0.0},
        {"quiet_ratio": 1.5},
        {"memory_s": 0.0},
        {"drift_std": -1.0},
        {"drift_memory_s": 0.0},
    ],
)
def test_impossible_bursts_are_refused(changes: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match="cannot be used"):
        Burstiness(**changes)


def test_a_mixture_needs_usable_components() -> None:
    with pytest.raises(ConfigError, match="at least one"):
        LengthMixture(())
    with pytest.raises(ConfigError, match="cannot be sampled"):
        replace(ONE_LENGTH.components[0], weight=0.0)


def test_rank_correlation_of_ties() -> None:
    x = np.array([1, 1, 2, 3])
    assert rank_correlation(x, x) == pytest.approx(1.0)
    assert rank_correlation(x, -x) == pytest.approx(-1.0)
    assert np.isnan(rank_correlation(x, np.ones(4, dtype=np.int64)))


def test_a_short_trace_is_not_fitted() -> None:
    trace = synthesize(replace(SPECS["conversation"], duration_s=60.0), np.random.default_rng(0))
    with pytest.raises(TraceError, match="too few to fit"):
        fit_lengths(trace)
    with pytest.raises(TraceError, match="too few to fit"):
        fit_burstiness(trace)


def test_a_fit_finds_the_bursts_that_made_the_trace() -> None:
    truth = Burstiness(0.25, 0.02, 4.0, 0.3, 120.0)
    spec = SynthesisSpec("known", ONE_LENGTH, truth, rate_per_s=5.0, duration_s=40_000.0)
    found = fit_burstiness(synthesize(spec, np.random.default_rng(0)))
    assert found.busy_share == pytest.approx(truth.busy_share, rel=0.25)
    assert found.memory_s == pytest.approx(truth.memory_s, rel=0.25)
    assert found.quiet_ratio < 0.1


@pytest.mark.parametrize("name", FILES)
def test_synthetic_lengths_match_the_trace(shared_dir: Path, name: str) -> None:
    real = train_span(shared_dir, name)
    prompt, output = SPECS[name].lengths.sample(200_000, np.random.default_rng(0))
    for drawn, measured in ((prompt, real.prompt_tokens), (output, real.output_tokens)):
        ratio = np.quantile(drawn, QUANTILES) / np.quantile(measured, QUANTILES)
        assert ratio == pytest.approx(np.ones(len(QUANTILES)), abs=0.16)
        assert drawn.mean() / measured.mean() == pytest.approx(1.0, abs=0.04)
    measured_correlation = rank_correlation(real.prompt_tokens, real.output_tokens)
    assert rank_correlation(prompt, output) == pytest.approx(measured_correlation, abs=0.03)


@pytest.mark.parametrize("name", FILES)
def test_synthetic_bursts_match_the_trace(shared_dir: Path, name: str) -> None:
    real = train_span(shared_dir, name)
    synthetic = [
        synthesize(
            replace(SPECS[name], duration_s=real.duration_s, lengths=ONE_LENGTH), np.random.default_rng(i)
        )
        for i in range(40)
    ]
    assert np.mean([t.mean_rate_per_s for t in synthetic]) == pytest.approx(real.mean_rate_per_s, rel=0.1)
    # One stretch of half an hour holds few drifts: compare with the mean of many such stretches.
    for window_s in (1.0, 10.0, 60.0):
        mean = np.mean([dispersion(t, window_s) for t in synthetic])
        assert mean == pytest.approx(dispersion(real, window_s), rel=0.3)
    assert np.mean([empty_share(t, 1.0) for t in synthetic]) == pytest.approx(
        empty_share(real, 1.0), abs=0.05
    )


@pytest.mark.parametrize("name", FILES)
def test_fitting_again_gives_the_committed_figures(shared_dir: Path, name: str) -> None:
    real = train_span(shared_dir, name)
    spec = SPECS[name]
    assert spec.rate_per_s == pytest.approx(real.mean_rate_per_s, rel=1e-4)
    again = fit_burstiness(real)
    for window_s in (1.0, 10.0, 60.0):
        fitted_again, committed = (
            model_sample_dispersion(model, real.mean_rate_per_s, window_s, real.duration_s)
            for model in (again, spec.burstiness)
        )
        assert committed == pytest.approx(fitted_again, rel=0.02)
        assert committed == pytest.approx(dispersion(real, window_s), rel=0.1)
    samples = [m.sample(200_000, np.random.default_rng(0)) for m in (spec.lengths, fit_lengths(real))]
    for committed_tokens, again_tokens in zip(*samples, strict=True):
        ratio = np.quantile(committed_tokens, QUANTILES) / np.quantile(again_tokens, QUANTILES)
        assert ratio == pytest.approx(np.ones(len(QUANTILES)), abs=0.03)
