"""The SM clock of a group of GPUs, held as one unit.

The lock of a GPU cannot be read back from NVML. What was there before is therefore taken to be *no lock*,
and restoring means to remove ours; application clocks, which a lock overrides, come back into force by that.
Where an operator does hold the GPUs at a clock of their own, they say so with ``restore_clock_mhz``.
"""

from __future__ import annotations

import atexit
import contextlib
import sys
from bisect import bisect_right
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Protocol

from rlgov.errors import HardwareError
from rlgov.hardware.claims import NoClaims
from rlgov.hardware.throttle import EXCUSING_REASONS, GPU_IDLE

if TYPE_CHECKING:
    from types import TracebackType
    from typing import Self

    from rlgov.clock import Clock
    from rlgov.hardware.claims import Claims

TOLERANCE_MHZ = 20
"""A measured clock this close to the asked one is the asked one; supported clocks lie 15 MHz apart."""

_POLL_S = 0.005


class Verdict(StrEnum):
    """What a measured clock says about a lock."""

    HELD = "held"  # the GPU runs at the clock
    EXCUSED = "excused"  # slower, and power, heat or sync boost explains it
    IDLE = "idle"  # slower, because it has nothing to do
    UNVERIFIED = "unverified"  # not (yet) in force, or changed by somebody else


@dataclass(frozen=True, slots=True)
class ClockState:
    """The clock of one GPU, as measured."""

    sm_clock_mhz: int
    throttle_reasons: frozenset[str]


@dataclass(frozen=True, slots=True)
class GpuCheck:
    """One GPU of a :class:`ClockCheck`."""

    uuid: str
    measured_mhz: int | None
    throttle_reasons: frozenset[str]
    verdict: Verdict


@dataclass(frozen=True, slots=True)
class ClockCheck:
    """Whether a lock is in force, by measurement. Vacuously so where there is no lock or no GPU."""

    asked_mhz: int | None  # None: nothing is locked
    gpus: tuple[GpuCheck, ...]
    since_lock_s: float | None = None  # measured time from the lock to this check

    @property
    def verified(self) -> bool:
        """Whether no GPU contradicts the lock."""
        return all(gpu.verdict is not Verdict.UNVERIFIED for gpu in self.gpus)


class ClockControl(Protocol):
    """Sets the SM clock of a group of GPUs."""

    @property
    def present(self) -> bool:
        """Whether clocks can be set here at all."""
        ...

    @property
    def supported_mhz(self) -> tuple[int, ...]:
        """SM clocks that every GPU of the group has, descending; empty where clocks cannot be set."""
        ...

    def lock(self, sm_clock_mhz: int) -> None:
        """Hold all GPUs at the highest supported clock at or below ``sm_clock_mhz``, or change none."""
        ...

    def renew(self) -> None:
        """Say that the lock is still wanted; call it every interval in which the clock does not change."""
        ...

    def restore(self) -> None:
        """Put back what was found before the first lock. Safe to call at any time, and twice."""
        ...

    def check(self) -> ClockCheck:
        """Compare the clocks measured now with the lock; does not wait."""
        ...


class ClockPort(Protocol):
    """What :class:`GroupClocks` needs of a driver; every call raises HardwareError when it fails."""

    def probe(self, uuid: str) -> None:
        """Raise unless the clocks of this GPU may be locked; changes nothing."""
        ...

    def set_lock(self, uuid: str, sm_clock_mhz: int) -> None:
        """Hold one GPU at a clock."""
        ...

    def reset_lock(self, uuid: str) -> None:
        """Remove the lock of one GPU; nothing to remove is no error."""
        ...

    def clock_state(self, uuid: str) -> ClockState:
        """Measure one GPU."""
        ...


def snap_clock(asked_mhz: int, supported_mhz: tuple[int, ...]) -> int:
    """The highest supported clock at or below the asked one.

    Args:
        asked_mhz: Clock asked for.
        supported_mhz: Supported clocks in any order.

    Raises:
        HardwareError: Every supported clock is higher; names the nearest.
    """
    ascending = sorted(supported_mhz)
    at = bisect_right(ascending, asked_mhz)
    if at == 0:
        nearest = ", ".join(str(clock) for clock in ascending[:3]) or "none"
        raise HardwareError(
            f"these GPUs have no SM clock at or below {asked_mhz} MHz; the nearest are {nearest} MHz: "
            "ask for one of them"
        )
    return ascending[at - 1]


def judge_clock(
    asked_mhz: int,
    measured_mhz: int,
    throttle_reasons: frozenset[str],
    tolerance_mhz: int = TOLERANCE_MHZ,
) -> Verdict:
    """What a measured clock says about a lock at ``asked_mhz``.

    A clock above the lock is never excused: either the driver ignored the lock, or somebody else set it.
    """
    if abs(measured_mhz - asked_mhz) <= tolerance_mhz:
        return Verdict.HELD
    if measured_mhz > asked_mhz:
        return Verdict.UNVERIFIED
    if throttle_reasons & EXCUSING_REASONS:
        return Verdict.EXCUSED
    return Verdict.IDLE if GPU_IDLE in throttle_reasons else Verdict.UNVERIFIED


class GroupClocks:
    """The GPUs of one serving group at one clock: all of them, or none.

    A tensor-parallel group runs at the pace of its slowest GPU, so a lock that only some of them took costs
    time and saves little. ``lock`` sets every GPU, then asks each for its clock again, and on any failure
    puts all of them back to what was in force before; where even that fails, every lock is removed (clocks
    fail upwards). Whether the clock is *in force* shows only after the hardware has settled: see ``check``
    and ``settle``.

    Restores when used in a ``with``, and at the exit of the process. Neither happens on SIGKILL, nor on
    SIGTERM unless the process turns it into an exit.

    Args:
        port: The driver.
        uuids: The GPUs of the group.
        supported_mhz: SM clocks that all of them have.
        clock: For the time that settling takes.
        restore_clock_mhz: Clock an operator holds the GPUs at; None if they were not locked.
        claims: Keep other processes off these GPUs from the first lock to the restore.

    Raises:
        HardwareError: No GPU, no clock, or a ``restore_clock_mhz`` that is not supported.
    """

    def __init__(
        self,
        port: ClockPort,
        uuids: tuple[str, ...],
        supported_mhz: tuple[int, ...],
        clock: Clock,
        *,
        restore_clock_mhz: int | None = None,
        claims: Claims | None = None,
    ) -> None:
        if not uuids or not supported_mhz:
            raise HardwareError(
                f"cannot control clocks of GPUs {uuids} with common SM clocks {supported_mhz}: "
                "name GPUs of one kind"
            )
        if restore_clock_mhz is not None and restore_clock_mhz not in supported_mhz:
            raise HardwareError(
                f"--restore-clock {restore_clock_mhz} MHz is no SM clock of this group; "
                f"the nearest below is {snap_clock(restore_clock_mhz, supported_mhz)} MHz"
            )
        self._port = port
        self._uuids = uuids
        self._supported_mhz = tuple(sorted(set(supported_mhz), reverse=True))
        self._clock = clock
        self._restore_clock_mhz = restore_clock_mhz
        self._claims: Claims = NoClaims() if claims is None else claims
        self._probed = False
        self._touched = False  # something may differ from what was found
        self._locked_mhz: int | None = None  # in force on all GPUs; None: as found
        self._locked_at_s = 0.0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.restore()

    @property
    def present(self) -> bool:
        """True: there are GPUs whose clock can be set."""
        return True

    @property
    def supported_mhz(self) -> tuple[int, ...]:
        """SM clocks that every GPU of the group has, descending."""
        return self._supported_mhz

    @property
    def locked_mhz(self) -> int | None:
        """The clock all GPUs were set to; None while they are as they were found."""
        return self._locked_mhz

    def probe(self) -> None:
        """Raise HardwareError, with the remedy, unless every GPU's clocks may be locked; changes nothing."""
        for uuid in self._uuids:
            self._port.probe(uuid)
        self._probed = True

    def lock(self, sm_clock_mhz: int) -> None:
        """Hold all GPUs at the highest supported clock at or below ``sm_clock_mhz``, or change none.

        Raises:
            HardwareError: No such clock, no permission, another process sets it, or a GPU refused; then all
                GPUs are as before, or, where that failed too, as found; the message says which could not be
                reached.
        """
        wanted_mhz = snap_clock(sm_clock_mhz, self._supported_mhz)
        if not self._probed:
            self.probe()
        before_mhz = self._locked_mhz
        if not self._touched:
            self._claim()
            atexit.register(self._restore_at_exit)
        self._touched = True  # from here on an interruption at any point leaves something to restore
        try:
            for uuid in self._uuids:
                self._port.set_lock(uuid, wanted_mhz)
            for uuid in self._uuids:
                self._port.clock_state(uuid)
        except HardwareError as error:
            raise HardwareError(f"{error} [{self._roll_back(before_mhz)}]") from error
        except BaseException:  # an interruption, too, must not leave the group split
            self._roll_back(before_mhz)
            raise
        self._locked_mhz = wanted_mhz
        self._locked_at_s = self._clock.monotonic_s()

    def renew(self) -> None:
        """Does nothing: a lock of this process's own has no end but :meth:`restore`."""

    def restore(self) -> None:
        """Put back what was found before the first lock, on every GPU that answers.

        Raises:
            HardwareError: Some GPU did not answer; call again, or remove its lock by hand.
        """
        if not self._touched:
            return
        failures = self._apply(None)
        self._locked_mhz = None
        if failures:
            raise HardwareError(
                f"clocks could not be restored: {'; '.join(failures)}. Try again, or by hand as root: "
                f"nvidia-smi -i {','.join(self._uuids)} --reset-gpu-clocks"
            )
        self._touched = False
        self._unclaim()
        atexit.unregister(self._restore_at_exit)

    def check(self) -> ClockCheck:
        """Compare the clocks measured now with the lock; does not wait. An unreadable GPU is unverified."""
        asked_mhz = self._locked_mhz
        if asked_mhz is None:
            return ClockCheck(None, ())
        gpus = tuple(self._check_gpu(uuid, asked_mhz) for uuid in self._uuids)
        return ClockCheck(asked_mhz, gpus, self._clock.monotonic_s() - self._locked_at_s)

    def settle(self, timeout_s: float) -> ClockCheck:
        """Check until no GPU contradicts the lock, at most ``timeout_s``; ``since_lock_s`` tells how long."""
        deadline_s = self._clock.monotonic_s() + timeout_s
        while not (check := self.check()).verified and self._clock.monotonic_s() < deadline_s:
            self._clock.sleep_s(_POLL_S)
        return check

    def _claim(self) -> None:
        try:
            for uuid in self._uuids:
                self._claims.take(uuid)
        except HardwareError:
            self._unclaim()
            raise

    def _unclaim(self) -> None:
        for uuid in self._uuids:
            self._claims.give_up(uuid)

    def _check_gpu(self, uuid: str, asked_mhz: int) -> GpuCheck:
        try:
            state = self._port.clock_state(uuid)
        except HardwareError:
            return GpuCheck(uuid, None, frozenset(), Verdict.UNVERIFIED)
        verdict = judge_clock(asked_mhz, state.sm_clock_mhz, state.throttle_reasons)
        return GpuCheck(uuid, state.sm_clock_mhz, state.throttle_reasons, verdict)

    def _roll_back(self, before_mhz: int | None) -> str:
        """Put every GPU back to ``before_mhz`` (None: as found), else as found; say how that went."""
        self._locked_mhz = before_mhz
        failures = self._apply(before_mhz)
        if not failures:
            return f"all GPUs are back at {self._name(before_mhz)}"
        self._locked_mhz = None
        if before_mhz is not None:
            failures = self._apply(None)
        if not failures:
            return f"all GPUs are back at {self._name(None)}"
        return (
            f"could not be put back either: {'; '.join(failures)}; the other GPUs are at {self._name(None)}"
        )

    def _apply(self, sm_clock_mhz: int | None) -> list[str]:
        """Set every GPU, whatever happens to the others; the failures."""
        wanted_mhz = self._restore_clock_mhz if sm_clock_mhz is None else sm_clock_mhz
        failures = []
        for uuid in self._uuids:
            try:
                if wanted_mhz is None:
                    self._port.reset_lock(uuid)
                else:
                    self._port.set_lock(uuid, wanted_mhz)
            except HardwareError as error:
                failures.append(str(error))
        return failures

    def _name(self, sm_clock_mhz: int | None) -> str:
        if sm_clock_mhz is not None:
            return f"{sm_clock_mhz} MHz"
        return (
            "no lock" if self._restore_clock_mhz is None else f"the operator's {self._restore_clock_mhz} MHz"
        )

    def _restore_at_exit(self) -> None:
        try:
            self.restore()
        except HardwareError as error:
            with contextlib.suppress(OSError, ValueError):  # standard error may be closed by now
                sys.stderr.write(f"rlgov: {error}\n")
