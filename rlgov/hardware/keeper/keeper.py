"""The lease machine with its hands: carries out effects on driver, files and claims, answers requests."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Protocol, TypeVar

from rlgov.errors import HardwareError
from rlgov.hardware.keeper.machine import LeaseMachine
from rlgov.hardware.keeper.protocol import (
    ProtocolError,
    Request,
    parse_request,
    put_checked,
    put_lease,
    put_state,
    refusal_line,
    result_line,
)
from rlgov.hardware.keeper.values import (
    Claim,
    Code,
    Failure,
    Forget,
    Inspect,
    Measure,
    Note,
    Refused,
    ResetLock,
    Save,
    SetLock,
    Unclaim,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from rlgov.clock import Clock
    from rlgov.hardware.claims import Claims
    from rlgov.hardware.clocks import ClockState
    from rlgov.hardware.keeper.values import (
        Effect,
        KeeperSettings,
        KeeperState,
        Offer,
        Outcome,
        Peer,
        SavedLock,
        Steps,
    )

    Result = TypeVar("Result")

_BY_ADMINISTRATOR = "an administrator restored all clocks"


class KeeperDriver(Protocol):
    """What the keeper needs of a driver; every call raises HardwareError when it fails."""

    def offers(self) -> tuple[Offer, ...]:
        """The GPUs, each with the reason why its clock must not be set, if there is one."""
        ...

    def inspect(self, uuid: str) -> None:
        """Raise if the clock of this GPU must not be set now."""
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


class Saves(Protocol):
    """Where locks are saved; calls raise OSError when they fail."""

    def save(self, lock: SavedLock) -> None:
        """Keep this in place of what was kept of that GPU."""
        ...

    def forget(self, uuid: str) -> None:
        """Nothing is to be restored on this GPU."""
        ...

    def load(self, otherwise_mhz: int | None) -> tuple[SavedLock, ...]:
        """Everything that is kept."""
        ...


class Keeper:
    """Lends out clocks, and takes them back. Not safe to share between threads.

    Args:
        driver: The GPUs.
        saves: Survives the keeper.
        claims: Keep other processes off a GPU that is leased.
        settings: The administrator's.
        clock: Its monotonic time should run while the host is suspended.
        say: Told what an administrator should know.
    """

    def __init__(
        self,
        driver: KeeperDriver,
        saves: Saves,
        claims: Claims,
        settings: KeeperSettings,
        clock: Clock,
        *,
        say: Callable[[Note], None],
    ) -> None:
        self._driver = driver
        self._saves = saves
        self._claims = claims
        self._settings = settings
        self._clock = clock
        self._say = say
        self._machine = LeaseMachine(driver.offers(), settings)

    @property
    def restoring(self) -> tuple[str, ...]:
        """GPUs that are not yet as they were found."""
        return self._machine.restoring

    def recover(self, patience_s: float) -> bool:
        """Restore what an earlier keeper left locked.

        Args:
            patience_s: Longest time to spend; what is open then is tried again by :meth:`tick`.

        Returns:
            Whether nothing is open.
        """
        saved = self._saves.load(self._settings.restore_clock_mhz)
        self._carry_out(self._machine.recover(saved, self._clock.monotonic_s()))
        return self._until_restored(patience_s)

    def stop(self, patience_s: float) -> bool:
        """Lease nothing any more and restore everything; as :meth:`recover`."""
        self._carry_out(self._machine.stop(self._clock.monotonic_s()))
        return self._until_restored(patience_s)

    def tick(self) -> None:
        """Do what time has made due."""
        self._carry_out(self._machine.tick(self._clock.monotonic_s()))

    def due_in_s(self) -> float:
        """Until :meth:`tick` has something to do; infinite if nothing is out."""
        return max(0.0, self._machine.deadline_s() - self._clock.monotonic_s())

    def state(self) -> KeeperState:
        """An account of everything."""
        return self._machine.state(self._clock.monotonic_s())

    def holds(self, client: int) -> bool:
        """Whether a client has a lease."""
        return self._machine.holds(client)

    def gone(self, client: int) -> None:
        """A client's connection ended."""
        self._carry_out(self._machine.disconnect(client, self._clock.monotonic_s()))

    def answer(self, client: int, peer: Peer, line: bytes) -> tuple[bytes, bool]:
        """Do what a line asks.

        Returns:
            The answer, and whether the client makes sense so far: the connection of one that does not should
            be closed.
        """
        try:
            request = parse_request(line)
        except ProtocolError as error:
            return refusal_line(0, error.code, str(error)), False
        try:
            result = self._do(request, client, peer)
        except Refused as no:
            return refusal_line(request.number, no.code, no.message, no.gpus), True
        return result_line(request.number, result), True

    def _do(self, request: Request, client: int, peer: Peer) -> Mapping[str, object]:
        machine, now_s = self._machine, self._clock.monotonic_s()
        result: Mapping[str, object]
        match request.do:
            case "lock":
                wish = machine.lock(
                    client, peer, request.gpus, request.sm_clock_mhz, request.ttl_s, now_s=now_s
                )
                result = put_lease(self._carry_out(wish))
            case "renew":
                result = put_lease(machine.renew(client, now_s))
            case "check":
                result = put_checked(self._carry_out(machine.check(client, now_s)))
            case "release":
                result = {"open": self._carry_out(machine.release(client, now_s))}
            case "describe":
                result = {
                    "supported_mhz": machine.offered_mhz(request.gpus),
                    "longest_lease_s": self._settings.longest_lease_s,
                    "write_interval_s": self._settings.write_interval_s,
                }
            case "rearm":
                named = ", ".join(request.gpus) or "all GPUs"
                self._say(Note(f"process {peer.pid} of user {peer.uid} re-arms {named}"))
                result = {"rearmed": self._carry_out(machine.rearm(request.gpus))}
            case "restore_all":
                if peer.uid not in {0, os.geteuid()}:
                    raise Refused(Code.NOT_ALLOWED, "only root and the keeper's own user may do that")
                self._carry_out(machine.restore_all(_BY_ADMINISTRATOR, now_s))
                result = {"open": machine.restoring}
            case _:
                result = put_state(machine.state(now_s))
        return result

    def _until_restored(self, patience_s: float) -> bool:
        deadline_s = self._clock.monotonic_s() + patience_s
        while self._machine.restoring and (left_s := deadline_s - self._clock.monotonic_s()) > 0:
            self._clock.sleep_s(min(self.due_in_s(), left_s))
            self.tick()
        return not self._machine.restoring

    def _carry_out(self, steps: Steps[Result]) -> Result:
        outcome: Outcome = None
        while True:
            try:
                effect = steps.send(outcome)
            except StopIteration as done:
                result: Result = done.value
                return result
            outcome = self._perform(effect)

    def _perform(self, effect: Effect) -> Outcome:
        try:
            return self._try(effect)
        except HardwareError as error:
            return Failure(str(error), getattr(error, "code", ""))
        except OSError as error:
            return Failure(f"what is locked could not be saved: {error}")

    def _try(self, effect: Effect) -> ClockState | None:
        match effect:
            case Measure(uuid):
                return self._driver.clock_state(uuid)
            case SetLock(uuid, sm_clock_mhz):
                self._driver.set_lock(uuid, sm_clock_mhz)
            case ResetLock(uuid):
                self._driver.reset_lock(uuid)
            case Save(lock):
                self._saves.save(lock)
            case Forget(uuid):
                self._saves.forget(uuid)
            case Claim(uuid):
                self._claims.take(uuid)
            case Unclaim(uuid):
                self._claims.give_up(uuid)
            case Inspect(uuid):
                self._driver.inspect(uuid)
            case Note():
                self._say(effect)
        return None
