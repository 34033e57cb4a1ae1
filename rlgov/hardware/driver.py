"""Locked clocks through NVML: one GPU at a time, no policy."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rlgov.hardware.clocks import ClockState
from rlgov.hardware.nvml import NvmlError
from rlgov.hardware.throttle import reason_names

if TYPE_CHECKING:
    from rlgov.hardware.nvml import NvmlSession


class NvmlClockPort:
    """Implements :class:`rlgov.hardware.clocks.ClockPort`.

    A GPU is locked with both bounds at one clock, so that what was measured at a clock was measured at that
    clock; an idle GPU stays there as well.

    Args:
        session: NVML.
        bounds_mhz: Lowest and highest supported SM clock of each GPU.
    """

    def __init__(self, session: NvmlSession, bounds_mhz: dict[str, tuple[int, int]]) -> None:
        self._session = session
        self._bounds_mhz = bounds_mhz

    def probe(self, uuid: str) -> None:
        """Raise NvmlError unless the clocks of this GPU may be locked.

        Asks for a range whose ends are the wrong way round, which no driver can carry out: the answer is
        either that the range is wrong or that we may not. A driver that sorted the ends would allow the
        GPU's whole range, which is no limit. A wrong range may be found before missing rights are: then the
        first real lock tells.
        """
        low_mhz, high_mhz = self._bounds_mhz[uuid]
        if low_mhz == high_mhz:
            return  # there is no wrong way round; the first real lock tells
        try:
            self._session.call("nvmlDeviceSetGpuLockedClocks", high_mhz, low_mhz, uuid=uuid)
        except NvmlError as error:
            if error.code not in {"INVALID_ARGUMENT", "FREQ_NOT_SUPPORTED"}:
                raise

    def set_lock(self, uuid: str, sm_clock_mhz: int) -> None:
        """Hold one GPU at a clock. Raises NvmlError."""
        self._session.call("nvmlDeviceSetGpuLockedClocks", sm_clock_mhz, sm_clock_mhz, uuid=uuid)

    def reset_lock(self, uuid: str) -> None:
        """Remove the lock of one GPU. Raises NvmlError."""
        self._session.call("nvmlDeviceResetGpuLockedClocks", uuid=uuid)

    def clock_state(self, uuid: str) -> ClockState:
        """Measure one GPU. Raises NvmlError."""
        clock_mhz = int(self._session.call("nvmlDeviceGetClockInfo", self._session.SM_CLOCK, uuid=uuid))
        bits = self._session.optional("nvmlDeviceGetCurrentClocksEventReasons", uuid=uuid)
        if bits is None:  # the name in drivers before 535
            bits = self._session.optional("nvmlDeviceGetCurrentClocksThrottleReasons", uuid=uuid)
        return ClockState(clock_mhz, frozenset() if bits is None else reason_names(bits))
