from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlgov.config import LoadSettings
from rlgov.errors import TraceError
from rlgov.workload.load_plan import build_plan, trim
from rlgov.workload.trace import Trace

requests = st.lists(
    st.tuples(
        st.floats(0, 100, allow_subnormal=False),
        st.integers(1, 5000),
        st.integers(1, 3000),
        st.floats(0, 1, exclude_max=True),
    ),
    min_size=1,
    max_size=40,
)


def _trace(rows: list[tuple[float, int, int, float]]) -> Trace:
    rows = sorted(rows)
    prompt = np.array([row[1] for row in rows])
    return Trace(
        "t",
        np.array([row[0] for row in rows]),
        prompt,
        np.array([row[2] for row in rows]),
        (prompt * np.array([row[3] for row in rows])).astype(np.int64),
        100.0,
    )


def _settings(**changes: Any) -> LoadSettings:
    return LoadSettings(url="http://server", **changes)


@settings(deadline=None)
@given(requests, st.floats(0.01, 100), st.floats(0, 90), st.floats(0.1, 100))
def test_a_slice_sped_up_holds_its_requests_at_their_scaled_times(
    rows: list[tuple[float, int, int, float]], rate_scale: float, from_s: float, span_s: float
) -> None:
    trace = _trace(rows)
    to_s = min(from_s + span_s, 100.0)
    inside = np.flatnonzero((trace.arrival_s >= from_s) & (trace.arrival_s < to_s))
    wanted = _settings(from_s=from_s, to_s=to_s, rate_scale=rate_scale)
    if inside.size == 0:
        with pytest.raises(TraceError, match="no request"):
            build_plan(trace, wanted)
        return
    plan = build_plan(trace, wanted)
    assert plan.prompt_tokens.tolist() == trace.prompt_tokens[inside].tolist()
    assert plan.output_tokens.tolist() == trace.output_tokens[inside].tolist()
    assert plan.prefix_tokens.tolist() == trace.prefix_hit_tokens[inside].tolist()
    assert plan.at_s == pytest.approx((trace.arrival_s[inside] - from_s) / rate_scale)
    assert plan.trimmed == 0
    assert [request.index for request in plan] == list(range(len(plan)))


@settings(deadline=None)
@given(requests, st.floats(0.5, 120))
def test_a_duration_leaves_out_what_would_be_sent_later(
    rows: list[tuple[float, int, int, float]], duration_s: float
) -> None:
    trace = _trace(rows)
    count = int((trace.arrival_s < duration_s).sum()) if duration_s < 100 else len(trace)
    if count == 0:
        with pytest.raises(TraceError, match="no request"):
            build_plan(trace, _settings(duration_s=duration_s))
        return
    assert len(build_plan(trace, _settings(duration_s=duration_s))) == count
    # In a closed loop the recorded times are not used, so nothing is left out.
    assert len(build_plan(trace, _settings(duration_s=duration_s, concurrency=3))) == len(trace)


@settings(deadline=None)
@given(requests, st.integers(2, 6000))
def test_trimming_fits_every_request_and_changes_none_that_fits(
    rows: list[tuple[float, int, int, float]], limit: int
) -> None:
    trace = _trace(rows)
    plan = build_plan(trace, _settings(max_model_len=limit))
    assert (plan.prompt_tokens + plan.output_tokens <= limit).all()
    assert plan.prompt_tokens.min() >= 1
    assert plan.output_tokens.min() >= 1
    assert (plan.prefix_tokens < plan.prompt_tokens).all()
    fits = trace.prompt_tokens + trace.output_tokens <= limit
    assert plan.trimmed == np.count_nonzero(~fits)
    assert (plan.prompt_tokens[fits] == trace.prompt_tokens[fits]).all()
    assert (plan.output_tokens[fits] == trace.output_tokens[fits]).all()
    assert bool(plan.notes) == bool(plan.trimmed)


def test_trimming_shares_the_room() -> None:
    prompt, output, trimmed = trim(np.array([900, 90, 900]), np.array([900, 900, 20]), 100)
    assert prompt.tolist() == [50, 50, 80]
    assert output.tolist() == [50, 50, 20]
    assert trimmed == 3


def test_chat_says_that_its_lengths_are_approximate() -> None:
    plan = build_plan(_trace([(0.0, 5, 5, 0.5)]), _settings(api="chat"))
    assert any("approximate" in note for note in plan.notes)
