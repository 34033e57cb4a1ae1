"""What the GPUs used and at which clock they ran: values, and the protocol of who reads them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from rlgov.hardware.nvml import NvmlError
from rlgov.hardware.throttle import reason_names

if TYPE_CHECKING:
    from rlgov.clock import Clock
    from rlgov.hardware.nvml import NvmlSession

ENERGY_RESOLUTION_S = 0.1
"""The energy counter moves about every 100 ms: an interval's energy is uncertain by the power times this."""


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


_FIELD_POWER_INSTANT = 186  # milliwatts, without the averaging of nvmlDeviceGetPowerUsage
_ABSENT = frozenset({"NOT_SUPPORTED", "FUNCTION_NOT_FOUND"})  # answers that will not change


class NvmlMeter:
    """Reads energy, power, clock and throttle reasons of a group of GPUs.

    Args:
        session: NVML.
        uuids: The GPUs.
        clock: Dates the readings.
    """

    def __init__(self, session: NvmlSession, uuids: tuple[str, ...], clock: Clock) -> None:
        self._session = session
        self._uuids = uuids
        self._clock = clock
        self._energy_j: dict[str, float] = {}  # of the reading before
        self._absent: set[tuple[str, str]] = set()  # what a GPU or its driver does not have: not asked again

    @property
    def present(self) -> bool:
        """True: there are GPUs to read."""
        return True

    def read(self) -> MeterReading:
        """Read every GPU now. A GPU that cannot be read gives ``None``, with a note."""
        at_s = self._clock.monotonic_s()
        return MeterReading(at_s, tuple(self._read_gpu(uuid) for uuid in self._uuids))

    def _read_gpu(self, uuid: str) -> GpuReading:
        notes: list[str] = []
        energy_mj = self._ask(notes, uuid, "nvmlDeviceGetTotalEnergyConsumption")
        energy_j = None if energy_mj is None else energy_mj / 1000
        # Kept over readings that fail, so that a counter that started anew meanwhile is still noticed.
        before_j = self._energy_j.get(uuid)
        reset = energy_j is not None and before_j is not None and energy_j < before_j
        if energy_j is not None:
            self._energy_j[uuid] = energy_j
        power_mw = self._instant_power_mw(uuid)
        if power_mw is None:
            power_mw = self._ask(notes, uuid, "nvmlDeviceGetPowerUsage")
        reasons = self._ask(notes, uuid, "nvmlDeviceGetCurrentClocksEventReasons")
        if reasons is None:  # the name in drivers before 535
            reasons = self._ask(notes, uuid, "nvmlDeviceGetCurrentClocksThrottleReasons")
        return GpuReading(
            uuid=uuid,
            energy_j=energy_j,
            power_w=None if power_mw is None else power_mw / 1000,
            sm_clock_mhz=self._ask(notes, uuid, "nvmlDeviceGetClockInfo", self._session.SM_CLOCK),
            throttle_reasons=frozenset() if reasons is None else reason_names(reasons),
            reset=reset,
            note="; ".join(dict.fromkeys(notes)),
        )

    def _instant_power_mw(self, uuid: str) -> int | None:
        if (uuid, "instant") in self._absent:
            return None
        try:
            (value,) = self._session.call("nvmlDeviceGetFieldValues", [_FIELD_POWER_INSTANT], uuid=uuid)
        except NvmlError as error:
            if error.code in _ABSENT:
                self._absent.add((uuid, "instant"))
            return None
        if value.nvmlReturn != 0:
            self._absent.add((uuid, "instant"))
            return None
        return int(value.value.uiVal)

    def _ask(self, notes: list[str], uuid: str, function: str, *arguments: int) -> int | None:
        if (uuid, function) in self._absent:
            return None
        try:
            return int(self._session.call(function, *arguments, uuid=uuid))
        except NvmlError as error:
            if error.code in _ABSENT:
                self._absent.add((uuid, function))
            notes.append(str(error))
            return None
