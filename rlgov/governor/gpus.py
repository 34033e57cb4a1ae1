"""The governed GPUs: who meters them, and who sets their clocks once it comes to that."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from rlgov.errors import HardwareError
from rlgov.hardware.backends import ClockBackend, ClockKind, lease_s, open_clocks
from rlgov.hardware.clocks import ClockCheck
from rlgov.hardware.gpus import common_clocks_mhz
from rlgov.hardware.hardware import open_hardware
from rlgov.hardware.keeper.client import KeeperClocks
from rlgov.hardware.null import NullClocks

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from rlgov.clock import Clock
    from rlgov.governor.settings import GovernSettings
    from rlgov.hardware.clocks import ClockControl
    from rlgov.hardware.events import EventSource
    from rlgov.hardware.gpus import Gpu
    from rlgov.hardware.hardware import Hardware
    from rlgov.hardware.meter import Meter

AUTO: Final = ("auto",)
NONE: Final = ("none",)


class LeasedClocks:
    """Clocks of a keeper, looked for when the first lock is wanted, and again when it was not there.

    The keeper offers clocks within its administrator's bounds. Here all clocks of the cards count as offered,
    because a policy is made for its axis: what lies outside the bounds is brought to the nearest inside, by
    the keeper, and shows as the clock in force.

    Args:
        connect: Connects to the keeper; raises HardwareError.
        supported_mhz: SM clocks of the cards, descending.
    """

    def __init__(self, connect: Callable[[], KeeperClocks], supported_mhz: tuple[int, ...]) -> None:
        self._connect = connect
        self._supported_mhz = supported_mhz
        self._inner: KeeperClocks | None = None

    @property
    def present(self) -> bool:
        """True: they can be set as soon as the keeper is there."""
        return True

    @property
    def supported_mhz(self) -> tuple[int, ...]:
        """SM clocks of the cards, descending."""
        return self._supported_mhz

    @property
    def lease_left_s(self) -> float | None:
        """Until the keeper restores without a further word; None: nothing is leased."""
        return None if self._inner is None else self._inner.lease_left_s

    def lock(self, sm_clock_mhz: int) -> None:
        """Hold all GPUs at a clock. Raises HardwareError."""
        if self._inner is None:
            self._inner = self._connect()
        self._inner.lock(sm_clock_mhz)

    def renew(self) -> None:
        """Say that the lock is still wanted. Raises HardwareError."""
        if self._inner is not None:
            self._inner.renew()

    def restore(self) -> None:
        """Give the clocks back; safe to call at any time, and twice. Raises HardwareError."""
        if self._inner is not None:
            self._inner.restore()

    def check(self) -> ClockCheck:
        """What the keeper measures now."""
        return ClockCheck(None, ()) if self._inner is None else self._inner.check()

    def rearm(self) -> None:
        """Have the group leased again after somebody else's change. Raises HardwareError."""
        if self._inner is not None:
            self._inner.rearm()

    def close(self) -> None:
        """End the connection; the keeper restores what is leased."""
        if self._inner is not None:
            self._inner.close()
            self._inner = None


@dataclass(frozen=True, slots=True)
class GovernedGpus:
    """Meter, clocks and faults of the group. Close it: that restores the clocks."""

    hardware: Hardware
    clocks: ClockControl
    kind: ClockKind
    note: str  # why clocks cannot be set; empty when they can

    @property
    def meter(self) -> Meter:
        """Reads the group."""
        return self.hardware.meter

    @property
    def events(self) -> EventSource:
        """Faults of its GPUs."""
        return self.hardware.events

    @property
    def gpus(self) -> tuple[Gpu, ...]:
        """The group; empty on a machine without GPUs."""
        return self.hardware.gpus

    def close(self) -> None:
        """Restore the clocks, then let go of the driver. Raises HardwareError if a clock stays locked."""
        try:
            self.clocks.restore()
        finally:
            close = getattr(self.clocks, "close", None)
            if close is not None:
                close()
            self.hardware.close()


def open_group(
    settings: GovernSettings, allotted: Sequence[str] | None, interval_s: float, clock: Clock
) -> GovernedGpus:
    """Open the GPUs of a deployment; nothing is set, and no right is needed yet.

    Args:
        settings: Which GPUs, and who sets their clocks.
        allotted: What ``auto`` stands for: UUIDs, or None for all of this machine.
        interval_s: Of the control loop, for leases.
        clock: Dates readings.

    Raises:
        HardwareError: A GPU is not there or does not answer.
    """
    uuids: Sequence[str] | None = allotted if settings.gpus == AUTO else settings.gpus
    if settings.gpus == NONE:
        uuids = ()
    kind = _kind(settings)
    hardware = open_hardware(uuids, clock, backend=ClockBackend(ClockKind.NONE))
    try:
        return _with_clocks(hardware, kind, settings, interval_s, clock)
    except BaseException:
        hardware.close()
        raise


def _kind(settings: GovernSettings) -> ClockKind:
    if settings.clocks == "auto":
        return ClockKind.KEEPER if settings.keeper_socket.exists() else ClockKind.DIRECT
    return ClockKind(settings.clocks)


def _with_clocks(
    hardware: Hardware, kind: ClockKind, settings: GovernSettings, interval_s: float, clock: Clock
) -> GovernedGpus:
    gpus = hardware.gpus
    refusals = [gpu.clock_refusal for gpu in gpus if gpu.clock_refusal]
    supported_mhz = common_clocks_mhz(gpus) if gpus else ()
    if kind is ClockKind.NONE:
        note = "--clocks none"
    elif hardware.session is None:
        note = hardware.note
    elif refusals:
        note = "; ".join(refusals)
    elif not supported_mhz:
        note = "these GPUs have no SM clock in common: name GPUs of one kind"
    else:
        backend = ClockBackend(kind, settings.keeper_socket, settings.zeusd_socket, lease_s(interval_s))
        if kind is ClockKind.KEEPER:
            uuids = tuple(gpu.uuid for gpu in gpus)

            def connect() -> KeeperClocks:
                return KeeperClocks(
                    backend.keeper_socket, uuids, clock, ttl_s=backend.ttl_s, timeout_s=interval_s
                )

            return GovernedGpus(hardware, LeasedClocks(connect, supported_mhz), kind, "")
        try:
            clocks = open_clocks(backend, hardware.session, gpus, clock, None)
        except HardwareError as error:
            note = str(error)
        else:
            return GovernedGpus(hardware, clocks, kind, "")
    return GovernedGpus(hardware, NullClocks(), ClockKind.NONE, note)
