"""The one place that reads the time. Everything else is given a clock, so tests and replay can set it."""

from __future__ import annotations

import time
from typing import Protocol

from rlgov.errors import ConfigError

system_monotonic_s = time.monotonic
"""The machine's monotonic clock without an object around it, for the few lines where even that counts."""


class Clock(Protocol):
    """Monotonic time for control, wall time for logs only."""

    def monotonic_s(self) -> float:
        """Seconds since an arbitrary start; never goes back."""
        ...

    def wall_s(self) -> float:
        """Seconds since the epoch; may jump."""
        ...

    def sleep_s(self, duration_s: float) -> None:
        """Wait; returns at once when ``duration_s`` is not above 0."""
        ...


class SystemClock:
    """The machine's clocks."""

    def monotonic_s(self) -> float:
        """Seconds of the monotonic clock."""
        return time.monotonic()

    def wall_s(self) -> float:
        """Seconds since the epoch."""
        return time.time()

    def sleep_s(self, duration_s: float) -> None:
        """Wait; returns at once when ``duration_s`` is not above 0."""
        if duration_s > 0:
            time.sleep(duration_s)


class SuspendAwareClock(SystemClock):
    """As :class:`SystemClock`, but monotonic time also runs while the host is suspended.

    Sleeping does not count the suspension: wake up often enough where it matters.
    """

    def monotonic_s(self) -> float:
        """Seconds since the host started; of the plain monotonic clock where there is no such clock."""
        return time.clock_gettime(_BOOT_CLOCK)


_BOOT_CLOCK = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)


class VirtualClock:
    """A clock that stands still until it is moved; sleeping moves it.

    Args:
        monotonic_s: Where monotonic time begins.
        wall_s: Where wall time begins.
    """

    def __init__(self, monotonic_s: float = 0.0, wall_s: float = 0.0) -> None:
        self._monotonic_s = monotonic_s
        self._wall_s = wall_s

    def monotonic_s(self) -> float:
        """Seconds of virtual time."""
        return self._monotonic_s

    def wall_s(self) -> float:
        """Seconds of virtual wall time."""
        return self._wall_s

    def sleep_s(self, duration_s: float) -> None:
        """Move both clocks forward, without waiting."""
        if duration_s > 0:
            self._monotonic_s += duration_s
            self._wall_s += duration_s

    def step_wall_s(self, by_s: float) -> None:
        """Let wall time jump, as NTP may do; monotonic time does not notice."""
        self._wall_s += by_s

    def advance_s(self, by_s: float) -> None:
        """Move both clocks forward. Raises ConfigError for a negative step: monotonic time has none."""
        if by_s < 0:
            msg = f"monotonic time cannot go back by {-by_s} s; use step_wall_s for wall time"
            raise ConfigError(msg)
        self.sleep_s(by_s)
