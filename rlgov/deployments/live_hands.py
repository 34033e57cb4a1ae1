"""What a live deployment moves: clock, batch cap and TP degree; and how all of it is given back."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rlgov.errors import RlgovError
from rlgov.hardware.clocks import ClockCheck
from rlgov.records import Configuration

if TYPE_CHECKING:
    from rlgov.deployments.live_parts import LiveSettings, LiveStatus, Stack
    from rlgov.engine.samples import StackState
    from rlgov.hardware.clocks import ClockControl
    from rlgov.records import Limits

_ATTEMPTS = 2  # an interrupted exchange spoils the connection; the next one opens another


class Hands:
    """Carries configurations out under leases, or lets go. Nothing raises: what failed is in the status.

    Args:
        stack: Takes batch caps and TP degrees.
        clocks: Takes SM clocks.
        limits: What may be asked for.
        settings: How long leases last.
        status: Where failures are counted.
        acting: Whether anything is moved.
    """

    def __init__(
        self,
        stack: Stack,
        clocks: ClockControl,
        limits: Limits,
        settings: LiveSettings,
        status: LiveStatus,
        *,
        acting: bool = True,
    ) -> None:
        self._stack = stack
        self._clocks = clocks
        self._limits = limits
        self._settings = settings
        self._status = status
        self._acting = acting
        self._cap_moved = False
        self._clocks_moved = False
        self._asked_mhz: int | None = None  # of the last lock that went well

    @property
    def acting(self) -> bool:
        """Whether configurations are carried out."""
        return self._acting

    @property
    def holding(self) -> bool:
        """Whether something has still to be given back."""
        return self._cap_moved or self._clocks_moved

    def set_acting(self, acting: bool) -> None:  # noqa: FBT001  # a switch
        """Begin to act, or stop and give everything back at once; what fails is tried again by each tick."""
        self._acting = acting
        if not acting:
            self.give_back()

    def act(self, asked: Configuration, state: StackState | None, check: ClockCheck) -> StackState | None:
        """Carry a configuration out; a setting between two offered ones counts as the faster of them.

        Args:
            asked: The configuration.
            state: The stack as it was last seen; None when it was not.
            check: The lock as it was last seen.

        Returns:
            The stack afterwards, or ``state`` where it did not answer.
        """
        status = self._status
        if not self._acting:
            if self.holding:
                self.give_back()
            return state
        asked = self._faster(asked)
        if self._clocks.present:
            self._hold_clock(asked.sm_clock_mhz, locked=check.asked_mhz is not None)
        self._cap_moved = True
        try:
            return self._stack.configure(
                batch_cap=asked.batch_cap,
                tp_degree=self._switch_to(asked.tp_degree, state),
                lease_s=self._settings.lease_intervals * self._limits.interval_s,
            )
        except RlgovError as error:
            status.failed("stack", error)
            return state

    def lock(self, sm_clock_mhz: int) -> None:
        """Lock the clocks. Raises HardwareError where that fails."""
        self._clocks_moved = True
        self._clocks.lock(sm_clock_mhz)
        self._asked_mhz = sm_clock_mhz

    def move(self, *, batch_cap: int, tp_degree: int | None, lease_s: float) -> StackState:
        """Move the stack. Raises an RlgovError where that fails."""
        self._cap_moved = True
        return self._stack.configure(batch_cap=batch_cap, tp_degree=tp_degree, lease_s=lease_s)

    def check(self) -> ClockCheck:
        """Whether the lock is in force, by measurement; as if nothing was locked where nobody can tell."""
        try:
            return self._clocks.check()
        except RlgovError as error:
            self._status.clock_failed(error)
            return ClockCheck(None, ())

    def give_back(self) -> None:
        """Clocks as they were found, the largest batch cap; the TP degree stays."""
        if self._clocks_moved:
            try:
                self.restore_clocks()
            except RlgovError as error:
                self._status.clock_failed(error)
        self.open_cap()

    def restore_clocks(self) -> None:
        """Put back what was found before the first lock. Raises HardwareError where that fails."""
        self._asked_mhz = None
        self._clocks.restore()
        self._clocks_moved = False

    def open_cap(self) -> None:
        """The largest batch cap; does nothing where none was set."""
        if not self._cap_moved:
            return
        for _ in range(_ATTEMPTS):
            try:
                self._stack.configure(batch_cap=self._limits.batch_caps[0], lease_s=None)
            except RlgovError as error:  # no reason to fail: the lease lets go of it
                self._status.last_problem = f"the batch cap falls open by its lease only: {error}"
            else:
                self._cap_moved = False
                return

    def _hold_clock(self, sm_clock_mhz: int, *, locked: bool) -> None:
        """Lock, or renew the lease of a lock that is in force."""
        self._status.clock_error = None
        try:
            # What is in force may differ from what was asked for: an administrator may have set a floor.
            if locked and self._asked_mhz == sm_clock_mhz:
                self._clocks.renew()
            else:
                self.lock(sm_clock_mhz)
        except RlgovError as error:
            self._asked_mhz = None
            self._status.clock_failed(error)
        else:
            self._status.clock_failures_in_a_row = 0

    def _switch_to(self, tp_degree: int, state: StackState | None) -> int | None:
        if state is None or state.switching or tp_degree == state.tp_degree:
            return None
        return None if tp_degree in self._status.tp_refused else tp_degree

    def _faster(self, asked: Configuration) -> Configuration:
        def at_least(axis: tuple[int, ...], value: int) -> int:
            return min((offered for offered in axis if offered >= value), default=axis[0])

        limits = self._limits
        return Configuration(
            at_least(limits.sm_clocks_mhz, asked.sm_clock_mhz),
            at_least(limits.batch_caps, asked.batch_cap),
            at_least(limits.tp_degrees, asked.tp_degree),
        )
