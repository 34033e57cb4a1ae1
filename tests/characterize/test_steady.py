from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from rlgov.characterize.steady import find_span, is_steady, warm_up_windows
from rlgov.records import Window

FIELDS: dict[str, float | None] = dict.fromkeys(Window.__dataclass_fields__, 0.0)
BASE = Window(**FIELDS)  # type: ignore[arg-type]  # every field is a number


def window(at: int, *, tokens: float = 100.0, running: float = 8.0, waiting: float = 0.0) -> Window:
    return replace(
        BASE, start_s=float(at), duration_s=1.0, output_tokens=tokens, running_mean=running, waiting=waiting,
        arrivals=2.0, served=2.0, energy_j=None,
    )  # fmt: skip


def noise(seed: int, n: int) -> NDArray[np.float64]:
    return np.random.default_rng(seed).normal(size=n)


@settings(deadline=None, max_examples=100)
@given(st.integers(4, 200), st.floats(0.001, 1e6), st.integers(0, 999))
def test_a_level_with_little_noise_is_steady_at_every_scale(n: int, scale: float, seed: int) -> None:
    assert is_steady(scale * (1 + 0.005 * noise(seed, n)))


@settings(deadline=None, max_examples=100)
@given(st.integers(20, 200), st.floats(0.25, 3.0), st.integers(0, 999), st.booleans())
def test_a_drift_is_never_steady(n: int, growth: float, seed: int, falls: bool) -> None:  # noqa: FBT001  # hypothesis gives it
    drift = np.linspace(1.0, 1.0 + growth, n)
    signal = (drift[::-1] if falls else drift) + 0.01 * noise(seed, n)
    assert not is_steady(signal)


@settings(deadline=None, max_examples=50)
@given(st.integers(4, 100), st.integers(0, 99))
def test_the_verdict_depends_on_neither_scale_nor_direction_of_time(n: int, seed: int) -> None:
    # An even number of blocks of equal size: time can be turned around.
    signal = 5 + np.cumsum(noise(seed, 10 * n)) * 0.05
    assert is_steady(signal) == is_steady(signal[::-1]) == is_steady(signal * 1e3)


def test_noise_of_few_requests_is_no_drift() -> None:
    told = [is_steady(np.random.default_rng(seed).poisson(0.5, 60).astype(np.float64)) for seed in range(200)]
    assert sum(told) > 180


@pytest.mark.parametrize("bad", [np.array([1.0, 1.0, 1.0]), np.array([1.0, np.nan, 1.0, 1.0, 1.0])])
def test_too_few_or_missing_values_are_not_steady(bad: NDArray[np.float64]) -> None:
    assert not is_steady(bad)


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 30), st.integers(4, 30), st.integers(0, 90), st.integers(0, 60))
def test_a_span_lies_after_the_warm_up_and_in_what_there_is(
    warm_up: int, measured: int, there: int, ramp: int
) -> None:
    windows = [window(i, tokens=100.0 * min((i + 1) / (ramp + 1), 1.0)) for i in range(there)]
    span = find_span(windows, warm_up, measured)
    assert min(warm_up, there) <= span.begin <= span.end <= there
    if there >= warm_up + measured:
        assert span.end - span.begin == measured
        if there >= max(ramp, warm_up) + measured:
            assert span.steady
    else:
        assert not span.steady


def test_the_earliest_steady_span_is_taken() -> None:
    windows = [window(i, tokens=100.0 if i >= 20 else 5.0 * i) for i in range(80)]
    span = find_span(windows, 5, 40)
    assert span.steady
    assert 13 <= span.begin <= 21  # within the tolerance of the rule, not long after


@pytest.mark.parametrize(
    "trouble",
    [
        {"blind": 1.0},
        {"switching": 1.0},
        {"waiting": 500.0},
        {"output_tokens": 3000.0},
        {"arrivals": 400.0},
        {"energy_j": 1.0},
    ],
)
def test_one_window_that_saw_something_else_spoils_a_span(trouble: dict[str, float]) -> None:
    fine = [window(i) for i in range(20)]
    spoilt = [*fine]
    spoilt[3] = replace(fine[3], **trouble)
    assert find_span(fine, 0, 20).steady
    if trouble == {"energy_j": 1.0}:  # energy known of one window only: it is no signal then
        assert find_span(spoilt, 0, 20).steady
    elif "waiting" in trouble or "output_tokens" in trouble:  # once only: noise, by the rule
        assert find_span([*fine[:10], *(replace(w, **trouble) for w in fine[10:])], 0, 20).steady is False
    else:
        assert not find_span(spoilt, 0, 20).steady


def test_a_queue_that_is_long_and_grows_is_not_steady() -> None:
    windows = [replace(window(i, waiting=1000.0 + i), arrivals=3.0) for i in range(60)]
    assert not find_span(windows, 0, 60).steady


def test_a_closed_loop_is_warm_when_every_user_was_answered() -> None:
    windows = [window(i) for i in range(10)]  # two answers a window
    assert warm_up_windows(windows, 3, None) == 3
    assert warm_up_windows(windows, 3, 4) == 3
    assert warm_up_windows(windows, 3, 12) == 6
    assert warm_up_windows(windows, 3, 50) == 11
