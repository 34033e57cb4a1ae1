from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlgov.clock import VirtualClock
from rlgov.deployments.pacing import Pacer
from rlgov.errors import ConfigError

INTERVAL_S = 1.0


def paced(works_s: list[float], clock: VirtualClock) -> tuple[Pacer, list[float]]:
    """Ends of the intervals after work of these durations, from the first one's begin."""
    pacer = Pacer(clock, INTERVAL_S)
    pacer.start()
    begin_s = clock.monotonic_s()
    ends = []
    for work_s in works_s:
        clock.advance_s(work_s)
        pacer.wait()
        ends.append(clock.monotonic_s() - begin_s)
    return pacer, ends


def test_a_thousand_intervals_do_not_drift() -> None:
    clock = VirtualClock(monotonic_s=12_345.678)
    pacer, ends = paced([0.137 + 0.0001 * k % 0.5 for k in range(1000)], clock)
    assert ends == pytest.approx([k + 1.0 for k in range(1000)], abs=1e-6)
    assert pacer.overruns == 0


def test_an_overrun_ends_its_interval_late_and_the_grid_stays() -> None:
    pacer, ends = paced([0.1, 1.3, 0.1, 0.1], VirtualClock())
    assert ends == pytest.approx([1.0, 2.3, 3.0, 4.0])
    assert pacer.overruns == 1


def test_an_interval_too_short_to_measure_is_joined_with_the_next() -> None:
    _, ends = paced([1.7, 0.1, 0.1], VirtualClock())
    assert ends == pytest.approx([1.7, 3.0, 4.0])


def test_a_long_stall_is_not_caught_up_with() -> None:
    pacer, ends = paced([100.2, 0.1, 0.1], VirtualClock())
    assert ends == pytest.approx([100.2, 101.0, 102.0])
    assert pacer.overruns == 1


@given(st.lists(st.floats(0.0, 5.0), min_size=1, max_size=30))
def test_intervals_end_on_the_grid_or_late_and_leave_half_an_interval(works_s: list[float]) -> None:
    pacer, ends = paced(works_s, VirtualClock())
    begins = [0.0, *ends]
    late = 0
    for begin_s, end_s, work_s in zip(begins, ends, works_s, strict=False):
        on_grid = abs(end_s - round(end_s)) < 1e-6
        assert on_grid or end_s == pytest.approx(begin_s + work_s)
        assert end_s - begin_s >= min(0.5, INTERVAL_S) - 1e-6
        late += not on_grid
    assert pacer.overruns >= late
    assert pacer.deadline_s >= ends[-1] + 0.5 - 1e-6


def test_wall_time_does_not_matter() -> None:
    clock = VirtualClock()
    pacer = Pacer(clock, INTERVAL_S)
    pacer.start()
    clock.step_wall_s(-3600.0)
    pacer.wait()
    assert clock.monotonic_s() == INTERVAL_S


@pytest.mark.parametrize("interval_s", [0.0, -1.0, float("nan"), float("inf")])
def test_an_interval_must_be_positive(interval_s: float) -> None:
    with pytest.raises(ConfigError, match="above 0"):
        Pacer(VirtualClock(), interval_s)
