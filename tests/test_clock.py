from __future__ import annotations

import pytest

from rlgov.clock import Clock, SuspendAwareClock, SystemClock, VirtualClock
from rlgov.errors import ConfigError


def test_virtual_time_moves_only_when_told() -> None:
    clock: Clock = VirtualClock(5.0, 100.0)
    assert (clock.monotonic_s(), clock.wall_s()) == (5.0, 100.0)
    clock.sleep_s(2.0)
    clock.sleep_s(-1.0)
    assert (clock.monotonic_s(), clock.wall_s()) == (7.0, 102.0)


def test_wall_time_may_jump_and_monotonic_time_may_not() -> None:
    clock = VirtualClock()
    clock.advance_s(3.0)
    clock.step_wall_s(-3600.0)
    assert (clock.monotonic_s(), clock.wall_s()) == (3.0, -3597.0)
    with pytest.raises(ConfigError, match="go back"):
        clock.advance_s(-1.0)


def test_the_system_clock_does_not_go_back() -> None:
    clock: Clock = SystemClock()
    before = clock.monotonic_s()
    clock.sleep_s(0.0)
    assert clock.monotonic_s() >= before
    assert clock.wall_s() > 1.6e9


def test_the_suspend_aware_clock_is_never_behind() -> None:
    clock: Clock = SuspendAwareClock()
    before_s = SystemClock().monotonic_s()  # stands still while the host is suspended
    assert clock.monotonic_s() >= before_s - 0.01
    again_s = clock.monotonic_s()
    assert clock.monotonic_s() >= again_s
