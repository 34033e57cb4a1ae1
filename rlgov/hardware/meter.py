"""What the GPUs used and at which clock they ran: values, and the protocol of who reads them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

ENERGY_RESOLUTION_S = 0.1
"""The energy counter moves about every 100 ms: the energy of an interval is uncertain by the power times this."""


@dataclass(frozen=True, slots=True)
class GpuReading:
    """One GPU at one moment. ``None``: the driver could not tell, never zero."""

    uuid: str
    energy_j: float | None  # counter since the driver was loaded; only differences mean something
    power_w: float | None  # instantaneous where the driver has it, else its own average
    sm_clock_mhz: int | None  # measured
    throttle_reasons: frozenset[str] = frozenset()  # names of rlgov.hardware.throttle
    reset: bool = False  # the energy counter went back since the reading before: the driver was loaded anew
    note: str = ""  # why something is missing


@dataclass(frozen=True, slots=True)
class MeterReading:
    """All GPUs of a group at ``at_s`` (monotonic clock); no GPUs when there is no meter."""

    at_s: float
    gpus: tuple[GpuReading, ...]


class Meter(Protocol):
    """Reads a group of GPUs."""

    @property
    def present(self) -> bool:
        """Whether there is anything to read."""
        ...

    def read(self) -> MeterReading:
        """Read every GPU now. A GPU that cannot be read gives ``None``, with a note; never raises for it."""
        ...


def energy_between(before: MeterReading, after: MeterReading) -> float | None:
    """Energy in joules of all GPUs from one reading to the **next** one of the same meter.

    ``None`` when it is not known of every GPU: no meter, a GPU that could not be read, another set of GPUs,
    or a counter that started anew. Resolution: see :data:`ENERGY_RESOLUTION_S`.
    """
    earlier = {gpu.uuid: gpu for gpu in before.gpus}
    if not earlier or earlier.keys() != {gpu.uuid for gpu in after.gpus}:
        return None
    total_j = 0.0
    for gpu in after.gpus:
        start_j = earlier[gpu.uuid].energy_j
        if gpu.reset or start_j is None or gpu.energy_j is None or gpu.energy_j < start_j:
            return None
        total_j += gpu.energy_j - start_j
    return total_j
