from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlgov.engine.plugin.cap import Cap

caps = st.none() | st.integers(1, 64)
leases = st.none() | st.floats(0.001, 100)


def test_starts_open() -> None:
    cap = Cap(32)
    assert cap.in_force(0.0) == 32
    assert cap.expires_s == math.inf


def test_a_cap_without_a_lease_stays() -> None:
    cap = Cap(32)
    assert cap.ask(4, None, 0.0) == 4
    assert cap.in_force(1e9) == 4


def test_an_expired_lease_opens_the_cap_for_good() -> None:
    cap = Cap(32)
    cap.ask(4, 3.0, 10.0)
    assert cap.in_force(12.999) == 4
    assert cap.in_force(13.0) == 32
    assert cap.in_force(10.5) == 32  # even if a caller looked with an older time


def test_a_renewed_lease_runs_from_the_renewal() -> None:
    cap = Cap(32)
    cap.ask(4, 3.0, 0.0)
    cap.ask(4, 3.0, 2.0)
    assert cap.in_force(4.5) == 4
    assert cap.in_force(5.0) == 32


def test_a_cap_without_a_lease_replaces_one_with_a_lease() -> None:
    cap = Cap(32)
    cap.ask(4, 3.0, 0.0)
    cap.ask(8, None, 1.0)
    assert cap.in_force(100.0) == 8


def test_none_restores_the_maximum_and_needs_no_lease() -> None:
    cap = Cap(32)
    cap.ask(4, 3.0, 0.0)
    assert cap.ask(None, 3.0, 1.0) == 32
    assert cap.expires_s == math.inf


@pytest.mark.parametrize(
    ("batch_cap", "lease_s"), [(0, None), (-1, 1.0), (4, 0.0), (4, -1.0), (4, math.inf), (4, math.nan)]
)
def test_nonsense_is_refused_and_changes_nothing(batch_cap: int, lease_s: float | None) -> None:
    cap = Cap(32)
    cap.ask(8, 5.0, 0.0)
    with pytest.raises(ValueError, match=r"batch_cap|lease_s"):
        cap.ask(batch_cap, lease_s, 1.0)
    assert cap.in_force(4.9) == 8
    assert cap.in_force(5.0) == 32


def test_an_engine_that_admits_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="serves none"):
        Cap(0)


@settings(deadline=None)  # on a loaded machine one example may take long
@given(st.integers(1, 48), st.lists(st.tuples(st.floats(0, 10), caps, leases, st.booleans()), max_size=20))
def test_in_bounds_always_and_open_whenever_the_last_lease_is_over(
    maximum: int, events: list[tuple[float, int | None, float | None, bool]]
) -> None:
    cap, now_s = Cap(maximum), 0.0
    wanted, until_s = maximum, math.inf
    for wait_s, batch_cap, lease_s, asks in events:
        now_s += wait_s
        if asks:
            cap.ask(batch_cap, lease_s, now_s)
            wanted = maximum if batch_cap is None else min(batch_cap, maximum)
            until_s = math.inf if lease_s is None or batch_cap is None else now_s + lease_s
        assert cap.in_force(now_s) == (maximum if now_s >= until_s else wanted)
        assert 1 <= cap.value <= maximum
