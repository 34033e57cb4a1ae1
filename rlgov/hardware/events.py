"""Xid events: the driver's word that something is wrong with a GPU."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from rlgov.errors import HardwareError
from rlgov.hardware.nvml import NvmlError

if TYPE_CHECKING:
    from rlgov.clock import Clock
    from rlgov.hardware.nvml import NvmlSession

_XID_CRITICAL = 0x8  # nvmlEventTypeXidCriticalError
_MOST_AT_ONCE = 64  # a GPU that floods us with events must not hold up the control loop

# Xids after which the GPU itself is not to be trusted, with what to do. All others are the application's.
_FATAL = {
    48: "uncorrectable memory error: take the GPU's work away, reset it",
    62: "the GPU's internal controller halted: reset the GPU",
    63: "a memory row is being retired or remapped: reset the GPU when it is free",
    64: "a memory row could not be retired or remapped: reset the GPU, have it serviced if it recurs",
    74: "NVLink error: take the work of the whole group away, check the links",
    79: "the GPU fell off the bus: reboot the node, have the GPU serviced if it recurs",
    95: "memory error that could not be contained: take the GPU's work away, reset it",
    119: "the GPU's system processor does not answer: reset the GPU",
    120: "the GPU's system processor failed: reset the GPU",
}


@dataclass(frozen=True, slots=True)
class XidEvent:
    """One event. ``uuid`` is None when it cannot be told which GPU it is of."""

    at_s: float  # monotonic clock, when it was read
    uuid: str | None
    xid: int

    @property
    def fatal(self) -> bool:
        """Whether the GPU, and so its whole group, must no longer be governed."""
        return self.xid in _FATAL

    @property
    def advice(self) -> str:
        """What it means and what to do."""
        return _FATAL.get(
            self.xid, "an application's fault in all likelihood: see dmesg and the engine's log"
        )


class EventSource(Protocol):
    """Where faults of GPUs are learnt from."""

    def poll(self) -> tuple[XidEvent, ...]:
        """Events since the last call; does not wait."""
        ...

    def close(self) -> None:
        """Stop listening."""
        ...


class XidEvents:
    """Listens for Xid events of a group of GPUs, without a thread.

    Args:
        session: NVML.
        uuids: The GPUs.
        clock: Dates the events.

    Raises:
        HardwareError: None of the GPUs reports Xid events.
    """

    def __init__(self, session: NvmlSession, uuids: tuple[str, ...], clock: Clock) -> None:
        self._session = session
        self._uuids = uuids
        self._clock = clock
        self._open = False
        self._listen()

    def poll(self) -> tuple[XidEvent, ...]:
        """Events since the last call; does not wait. Raises HardwareError when the driver cannot be asked."""
        if self._generation != self._session.generation:
            self._open = False  # the old set went with the driver
            self._listen()
        events: list[XidEvent] = []
        while len(events) < _MOST_AT_ONCE:
            try:
                data = self._session.call("nvmlEventSetWait", self._set, 0, attempts=1)
            except NvmlError as error:
                if error.code == "TIMEOUT":  # nothing more has happened
                    break
                if error.code != "GPU_IS_LOST":
                    raise
                # Some GPU of the set is gone. Which one, its next reading tells.
                events.append(XidEvent(self._clock.monotonic_s(), None, 79))
                break
            events.append(
                XidEvent(self._clock.monotonic_s(), self._session.uuid_of(data.device), int(data.eventData))
            )
        return tuple(events)

    def _listen(self) -> None:
        self._set = self._session.call("nvmlEventSetCreate")
        self._generation = self._session.generation
        self._open = True
        watched = 0
        for uuid in self._uuids:
            try:
                self._session.call("nvmlDeviceRegisterEvents", _XID_CRITICAL, self._set, uuid=uuid)
            except NvmlError:
                continue  # counted by the session; the others are still worth listening to
            watched += 1
        if not watched:
            self.close()
            raise HardwareError("no GPU of this group reports Xid events; watch dmesg for them instead")

    def close(self) -> None:
        """Stop listening; a second call does nothing."""
        if self._open and self._generation == self._session.generation:
            self._open = False
            try:
                self._session.call("nvmlEventSetFree", self._set, attempts=1)
            except NvmlError:
                return  # counted by the session; the set ends with it
