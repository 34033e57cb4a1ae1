"""Control intervals in real time, on a fixed grid: whatever an interval's work takes, no drift adds up."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from rlgov.errors import ConfigError

if TYPE_CHECKING:
    from rlgov.clock import Clock


class Pacer:
    """Waits for the ends of control intervals.

    The ends lie at ``start + k * interval``. Work that overruns its interval makes that interval longer, not
    the grid: the next one ends at the first grid point that leaves it at least half an interval.

    Args:
        clock: Tells the time and waits.
        interval_s: Length of an interval.
    """

    def __init__(self, clock: Clock, interval_s: float) -> None:
        if not (interval_s > 0 and math.isfinite(interval_s)):
            msg = f"interval_s must be above 0 seconds, got {interval_s}"
            raise ConfigError(msg)
        self._clock = clock
        self._interval_s = interval_s
        self._origin_s = clock.monotonic_s()
        self._passed = 0  # grid points up to the end of the last interval
        self.overruns = 0
        """Intervals whose work took longer than they had."""

    @property
    def deadline_s(self) -> float:
        """When the interval in progress ends (monotonic seconds)."""
        return self._origin_s + (self._passed + 1) * self._interval_s

    def start(self) -> None:
        """The first interval begins now."""
        self._origin_s = self._clock.monotonic_s()
        self._passed = 0
        self.overruns = 0

    def wait(self) -> None:
        """Return at the end of the interval in progress, at once when it has passed."""
        left_s = self.deadline_s - self._clock.monotonic_s()
        if left_s >= 0:
            self._clock.sleep_s(left_s)
            self._passed += 1
            return
        self.overruns += 1
        now = (self._clock.monotonic_s() - self._origin_s) / self._interval_s
        self._passed = max(math.ceil(now - 0.5), self._passed + 1)
