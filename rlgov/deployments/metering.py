"""What two meter readings say about the time between them. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from rlgov.hardware.meter import energy_between
from rlgov.hardware.throttle import LIMITING_REASONS

if TYPE_CHECKING:
    from rlgov.hardware.meter import MeterReading


@dataclass(frozen=True, slots=True)
class Metered:
    """The GPUs between two readings."""

    energy_j: float | None  # of all GPUs; None when it is not known of every one
    sm_clock_mhz: float | None  # mean over GPUs and both readings; None when no GPU tells
    throttled_fraction: float  # share of GPUs and readings at which power or heat held the clock down


NOT_METERED = Metered(None, None, 0.0)


def metered_between(before: MeterReading | None, after: MeterReading | None) -> Metered:
    """Energy, clock and throttling from one reading to the next one.

    Clock and reasons are told for the moment of a reading only, so the two ends stand for what lies between.
    """
    if after is None:
        return NOT_METERED
    ends = [*(before.gpus if before is not None else ()), *after.gpus]
    clocks = [gpu.sm_clock_mhz for gpu in ends if gpu.sm_clock_mhz is not None]
    limited = sum(bool(gpu.throttle_reasons & LIMITING_REASONS) for gpu in ends)
    return Metered(
        energy_j=None if before is None else energy_between(before, after),
        sm_clock_mhz=sum(clocks) / len(clocks) if clocks else None,
        throttled_fraction=limited / len(ends) if ends else 0.0,
    )
