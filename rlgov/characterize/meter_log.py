"""A meter that remembers: what the GPUs of one engine used between two of its readings."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from rlgov.hardware.throttle import LIMITING_REASONS

if TYPE_CHECKING:
    from collections.abc import Collection

    from rlgov.deployments.live_open import GpuGroup
    from rlgov.hardware.clocks import ClockControl
    from rlgov.hardware.meter import Meter, MeterReading

_KEPT: Final = 20_000  # readings; hours


@dataclass(frozen=True, slots=True)
class MeteredSpan:
    """The GPUs of an engine over a span."""

    energy_j: float | None  # None when it is not known of every one
    gpus: int
    throttle_reasons: frozenset[str]


class LoggedGpus:
    """GPUs whose readings are kept; it is meter and group in one.

    Args:
        group: The GPUs; taken over.
    """

    def __init__(self, group: GpuGroup) -> None:
        self._group = group
        self._readings: list[MeterReading] = []

    @property
    def meter(self) -> Meter:
        """Reads them, and remembers."""
        return self

    @property
    def clocks(self) -> ClockControl:
        """Sets their SM clock."""
        return self._group.clocks

    def close(self) -> None:
        """Restore the clocks and let go of them."""
        self._group.close()

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the GPUs, where the group tells them."""
        return tuple(gpu.name for gpu in getattr(self._group, "gpus", ()))

    @property
    def present(self) -> bool:
        """Whether there is anything to read."""
        return self._group.meter.present

    def read(self) -> MeterReading:
        """Read every GPU now."""
        reading = self._group.meter.read()
        self._readings.append(reading)
        del self._readings[:-_KEPT]
        return reading

    def between(self, begin_s: float, end_s: float, uuids: Collection[str]) -> MeteredSpan:
        """What ``uuids`` used from the reading nearest to ``begin_s`` to that nearest to ``end_s``.

        Windows are read together with the meter, so the nearest reading is the window's own. Where none of
        ``uuids`` is metered, as on a machine whose engines do not tell their GPUs, it is of all GPUs.
        The energy is scaled to the span, because a reading is some milliseconds off.
        """
        if not self._readings or not self._readings[-1].gpus:
            return MeteredSpan(None, 0, frozenset())
        first = min(range(len(self._readings)), key=lambda i: abs(self._readings[i].at_s - begin_s))
        last = min(range(len(self._readings)), key=lambda i: abs(self._readings[i].at_s - end_s))
        held = self._readings[first : last + 1]
        known = {gpu.uuid for gpu in held[-1].gpus}
        wanted = known & set(uuids) or known
        reasons = {
            reason for reading in held for gpu in reading.gpus if gpu.uuid in wanted
            for reason in gpu.throttle_reasons & LIMITING_REASONS
        }  # fmt: skip
        return MeteredSpan(_energy_j(held, wanted, end_s - begin_s), len(wanted), frozenset(reasons))


def _energy_j(held: list[MeterReading], wanted: Collection[str], span_s: float) -> float | None:
    metered_s = held[-1].at_s - held[0].at_s
    counters = [{gpu.uuid: gpu for gpu in reading.gpus} for reading in held]
    total_j = 0.0
    for uuid in sorted(wanted):
        gpus = [counter.get(uuid) for counter in counters]
        if any(gpu is None or gpu.reset for gpu in gpus[1:]) or gpus[0] is None or gpus[-1] is None:
            return None
        start_j, end_j = gpus[0].energy_j, gpus[-1].energy_j
        if start_j is None or end_j is None or end_j < start_j:
            return None
        total_j += end_j - start_j
    return total_j * span_s / metered_s if metered_s > 0 else None
