"""The GPUs of a deployment, opened: meter, clocks and events, or their stand-ins with the reason."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from rlgov.errors import HardwareError
from rlgov.hardware.backends import ClockBackend, ClockKind, open_clocks
from rlgov.hardware.events import XidEvents
from rlgov.hardware.gpus import Gpu, common_clocks_mhz, list_gpus, select_gpus
from rlgov.hardware.meter import NvmlMeter
from rlgov.hardware.null import NullClocks, NullEvents, NullMeter
from rlgov.hardware.nvml import NvmlSession

if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import TracebackType
    from typing import Self

    from rlgov.clock import Clock
    from rlgov.hardware.clocks import ClockControl
    from rlgov.hardware.events import EventSource
    from rlgov.hardware.meter import Meter


@runtime_checkable
class Closable(Protocol):
    """Clocks that hold a connection."""

    def close(self) -> None:
        """End it."""
        ...


@dataclass(frozen=True, slots=True)
class Hardware:
    """What there is to read and to set. Close it, or use it in a ``with``: that restores the clocks."""

    meter: Meter
    clocks: ClockControl
    events: EventSource
    gpus: tuple[Gpu, ...]
    note: str = ""  # why something is a stand-in
    session: NvmlSession | None = None
    clocks_by: ClockKind = ClockKind.NONE

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Restore the clocks, then let go of the driver. Raises HardwareError if a clock stays locked."""
        try:
            self.clocks.restore()
        finally:
            if isinstance(self.clocks, Closable):
                self.clocks.close()
            self.events.close()
            if self.session is not None:
                self.session.close()


def open_hardware(
    uuids: Sequence[str] | None,
    clock: Clock,
    *,
    restore_clock_mhz: int | None = None,
    require_clocks: bool = False,
    backend: ClockBackend | None = None,
) -> Hardware:
    """Open GPUs by UUID.

    Args:
        uuids: The GPUs of the deployment; None for all of this machine; empty for none.
        clock: Dates readings, paces attempts.
        restore_clock_mhz: Clock an operator holds these GPUs at, restored in place of "no lock".
        require_clocks: Raise, with the reason, where clocks cannot be set.
        backend: Who sets the clocks; by default this process.

    Returns:
        Hardware with stand-ins, and the reason in its note, for what this machine does not have. No
        permission to set clocks is not noticed here but by ``clocks.lock``, or by ``clocks.probe``.

    Raises:
        HardwareError: A UUID is not there, a GPU does not answer, or clocks are required and cannot be set.
    """
    if uuids is not None and not uuids:
        return _without("no GPUs are allotted", clock, require_clocks=require_clocks)
    try:
        session = NvmlSession(clock)
    except HardwareError as error:
        if uuids is not None:
            raise  # GPUs were named, so they are meant to be there
        return _without(str(error), clock, require_clocks=require_clocks)
    try:
        gpus = select_gpus(list_gpus(session), uuids)
        if not gpus:
            session.close()
            return _without("NVML shows no GPU", clock, require_clocks=require_clocks)
        return _with(
            session, gpus, clock, restore_clock_mhz, backend or ClockBackend(), require_clocks=require_clocks
        )
    except BaseException:
        session.close()
        raise


def _with(
    session: NvmlSession,
    gpus: tuple[Gpu, ...],
    clock: Clock,
    restore_clock_mhz: int | None,
    backend: ClockBackend,
    *,
    require_clocks: bool,
) -> Hardware:
    notes = [gpu.clock_refusal for gpu in gpus if gpu.clock_refusal]
    if not notes and not common_clocks_mhz(gpus):
        notes = ["these GPUs have no SM clock in common: name GPUs of one kind"]
    if notes and require_clocks:
        raise HardwareError("; ".join(notes))
    uuids = tuple(gpu.uuid for gpu in gpus)
    clocks: ClockControl = NullClocks()
    if not notes:
        try:
            clocks = open_clocks(backend, session, gpus, clock, restore_clock_mhz)
        except HardwareError as error:
            if require_clocks or backend.kind is ClockKind.DIRECT:
                raise
            notes.append(str(error))
    events: EventSource
    try:
        events = XidEvents(session, uuids, clock)
    except HardwareError as error:
        notes.append(str(error))
        events = NullEvents()
    kind = backend.kind if clocks.present else ClockKind.NONE
    return Hardware(NvmlMeter(session, uuids, clock), clocks, events, gpus, "; ".join(notes), session, kind)


def _without(note: str, clock: Clock, *, require_clocks: bool) -> Hardware:
    if require_clocks:
        raise HardwareError(f"clocks cannot be set: {note}")
    return Hardware(NullMeter(clock), NullClocks(), NullEvents(), (), note)
