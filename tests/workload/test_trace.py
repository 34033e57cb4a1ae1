from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlgov.errors import TraceError
from rlgov.workload.trace import Trace


def make(arrivals: list[float], duration_s: float | None = None) -> Trace:
    n = len(arrivals)
    return Trace(
        "t",
        np.array(arrivals, dtype=np.float64),
        np.arange(1, n + 1, dtype=np.int64),
        np.full(n, 2, dtype=np.int64),
        np.zeros(n, dtype=np.int64),
        duration_s if duration_s is not None else (arrivals[-1] + 1 if arrivals else 1.0),
        ("a note",),
    )


sorted_arrivals = st.lists(st.floats(0, 1000), min_size=1, max_size=50).map(sorted)


@given(sorted_arrivals, st.floats(0.01, 0.99))
def test_a_split_loses_and_doubles_nothing(arrivals: list[float], fraction: float) -> None:
    trace = make(arrivals)
    train, test = trace.split(fraction)
    assert np.array_equal(np.concatenate([train.prompt_tokens, test.prompt_tokens]), trace.prompt_tokens)
    assert train.duration_s + test.duration_s == pytest.approx(trace.duration_s)


@given(sorted_arrivals, st.floats(0.1, 10))
def test_scaling_multiplies_the_rate_and_keeps_the_requests(arrivals: list[float], scale: float) -> None:
    trace = make(arrivals)
    scaled = trace.scaled(scale)
    assert scaled.mean_rate_per_s == pytest.approx(trace.mean_rate_per_s * scale)
    assert np.array_equal(scaled.prompt_tokens, trace.prompt_tokens)


def test_a_slice_counts_from_its_start_and_is_half_open() -> None:
    part = make([0.0, 1.0, 2.0, 3.0]).slice(1.0, 3.0)
    assert part.arrival_s.tolist() == [0.0, 1.0]
    assert part.prompt_tokens.tolist() == [2, 3]
    assert part.duration_s == 2.0
    assert part.notes == ("a note",)


@pytest.mark.parametrize(("from_s", "to_s"), [(2.0, 1.0), (-1.0, 1.0), (9.0, 10.0)])
def test_an_impossible_slice_is_refused(from_s: float, to_s: float) -> None:
    with pytest.raises(TraceError, match="cannot cut"):
        make([0.0, 1.0]).slice(from_s, to_s)


@pytest.mark.parametrize("scale", [0.0, -1.0, float("inf"), float("nan")])
def test_an_impossible_rate_scale_is_refused(scale: float) -> None:
    with pytest.raises(TraceError, match="rate scale"):
        make([0.0, 1.0]).scaled(scale)


def test_the_arrays_cannot_be_changed() -> None:
    with pytest.raises(ValueError, match="read-only"):
        make([0.0]).arrival_s[0] = 5.0


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"arrival_s": [1.0, 0.0]}, "sorted"),
        ({"arrival_s": [0.0, float("nan")]}, "finite"),
        ({"arrival_s": [0.0, 99.0]}, "0..duration_s"),
        ({"prompt_tokens": [0, 1]}, "prompt_tokens"),
        ({"output_tokens": [1, -1]}, "output_tokens"),
        ({"prefix_hit_tokens": [5, 0]}, "below prompt_tokens"),
        ({"prefix_hit_tokens": [-1, 0]}, "not be negative"),
        ({"output_tokens": [1]}, "differ in length"),
        ({"duration_s": float("inf")}, "duration_s"),
    ],
)
def test_impossible_values_are_refused(changes: dict[str, object], complaint: str) -> None:
    values: dict[str, object] = {
        "arrival_s": [0.0, 1.0],
        "prompt_tokens": [5, 5],
        "output_tokens": [5, 5],
        "prefix_hit_tokens": [0, 0],
        "duration_s": 2.0,
    } | changes
    with pytest.raises(TraceError, match=complaint):
        Trace(
            "t",
            np.array(values["arrival_s"], dtype=np.float64),
            np.array(values["prompt_tokens"], dtype=np.int64),
            np.array(values["output_tokens"], dtype=np.int64),
            np.array(values["prefix_hit_tokens"], dtype=np.int64),
            float(str(values["duration_s"])),
        )
