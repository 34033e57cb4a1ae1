"""What each step of a switch does to engines and gateway."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Protocol

from rlgov.engine.fleet import Engine, Fleet, Phase
from rlgov.engine.switch.machine import Action, Role, Step, Switch
from rlgov.errors import EngineError

if TYPE_CHECKING:
    from collections.abc import Callable


class Traffic(Protocol):
    """Who takes new requests: the stack."""

    def route(self, engine: Engine | None) -> None:
        """New requests go there; None holds them."""
        ...

    def lost(self, engine: Engine) -> None:
        """An engine died: nothing goes there any more."""
        ...

    async def apply_cap(self, engine: Engine) -> None:
        """Put the cap in force on an engine."""
        ...

    def in_flight(self, engine: Engine) -> int:
        """Requests dispatched to it and not finished."""
        ...


class SwitchHands:
    """Carries out the steps of one switch.

    Args:
        fleet: The engines.
        traffic: The gateway and the cap.
        old: The engine that serves.
        degrees: Of the old and of the new engine.
        new: The new degree's engine, if it exists and is asleep.
        note: Writes the switch down.
    """

    def __init__(
        self,
        fleet: Fleet,
        traffic: Traffic,
        *,
        old: Engine,
        degrees: tuple[int, int],
        new: Engine | None,
        note: Callable[[Switch], None],
    ) -> None:
        self._fleet = fleet
        self._traffic = traffic
        self._engines: dict[Role, Engine | None] = {Role.OLD: old, Role.NEW: new}
        self._degrees = {Role.OLD: degrees[0], Role.NEW: degrees[1]}
        self._note = note
        self._act = {
            Action.HOLD: self._hold,
            Action.LAUNCH: self._launch,
            Action.READY: self._ready,
            Action.WAKE: self._wake,
            Action.WARM_UP: self._warm_up,
            Action.CAP: self._cap,
            Action.ROUTE: self._route,
            Action.DRAIN: self._drain,
            Action.SLEEP: self._sleep,
            Action.STOP: self._stop,
        }

    def engine_id(self, role: Role) -> str | None:
        """Of the engine in a role now."""
        engine = self._engines[role]
        return engine.engine_id if engine is not None else None

    def note(self, switch: Switch) -> None:
        """Write the switch down before its step is done."""
        self._note(switch)

    def died(self, role: Role) -> str | None:
        """Why an engine is gone; None while it lives or was not launched yet."""
        engine = self._engines[role]
        return engine.obituary() if engine is not None else None

    async def bury(self, role: Role) -> None:
        """Clear away what an engine that died left behind."""
        engine = self._engines[role]
        if engine is not None:
            self._traffic.lost(engine)
            await self._fleet.stop(engine, grace_s=0.0)
            self._engines[role] = None

    async def perform(self, step: Step) -> None:
        """Do one step. Raises RlgovError where it cannot be done."""
        try:
            await self._act[step.action](step.role)
        except TimeoutError:
            raise EngineError("took longer than its bound; the timeouts of rlgov serve set it") from None

    def _engine(self, role: Role) -> Engine:
        engine = self._engines[role]
        if engine is None:
            raise EngineError(f"there is no {role} engine")
        return engine

    async def _hold(self, _role: Role) -> None:
        self._traffic.route(None)

    async def _launch(self, role: Role) -> None:
        self._engines[role] = None
        self._engines[role] = await self._fleet.launch(self._degrees[role])

    async def _ready(self, role: Role) -> None:
        await self._fleet.ready(self._engine(role))

    async def _wake(self, role: Role) -> None:
        await self._fleet.wake(self._engine(role))

    async def _warm_up(self, role: Role) -> None:
        await self._fleet.warm_up(self._engine(role))

    async def _cap(self, role: Role) -> None:
        await self._traffic.apply_cap(self._engine(role))

    async def _route(self, role: Role) -> None:
        engine = self._engine(role)
        other = self._engines[Role.OLD if role is Role.NEW else Role.NEW]
        self._traffic.route(engine)
        if other is not None and other.phase is Phase.ACTIVE:
            self._fleet.set_phase(other, Phase.DRAINING)
        # The cap may have been changed since it was put in force on the new engine.
        await self._traffic.apply_cap(engine)

    async def _drain(self, role: Role) -> None:
        engine = self._engine(role)
        await self._fleet.drain(engine, lambda: self._traffic.in_flight(engine))

    async def _sleep(self, role: Role) -> None:
        await self._fleet.sleep(self._engine(role))

    async def _stop(self, role: Role) -> None:
        engine = self._engines[role]
        if engine is not None:
            # A shutdown that has begun is not broken off halfway: it would leave half an engine.
            await asyncio.shield(self._fleet.stop(engine))
            self._engines[role] = None
