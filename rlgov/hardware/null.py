"""Stand-ins for a machine without GPUs, or without the right to control them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rlgov.hardware.clocks import ClockCheck
from rlgov.hardware.meter import MeterReading

if TYPE_CHECKING:
    from rlgov.clock import Clock
    from rlgov.hardware.events import XidEvent


class NullMeter:
    """Reads nothing: energy is absent, not zero."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock

    @property
    def present(self) -> bool:
        """False: there is nothing to read."""
        return False

    def read(self) -> MeterReading:
        """A reading without GPUs."""
        return MeterReading(self._clock.monotonic_s(), ())


class NullClocks:
    """Sets nothing; who must know asks ``present``."""

    @property
    def present(self) -> bool:
        """False: no clock can be set here."""
        return False

    @property
    def supported_mhz(self) -> tuple[int, ...]:
        """No clock."""
        return ()

    def lock(self, sm_clock_mhz: int) -> None:
        """Does nothing."""

    def renew(self) -> None:
        """Does nothing: nothing is held."""

    def restore(self) -> None:
        """Does nothing: nothing was changed."""

    def check(self) -> ClockCheck:
        """Nothing is locked, so nothing contradicts it."""
        return ClockCheck(None, ())


class NullEvents:
    """Sees no fault."""

    def poll(self) -> tuple[XidEvent, ...]:
        """No event."""
        return ()

    def close(self) -> None:
        """Does nothing."""
