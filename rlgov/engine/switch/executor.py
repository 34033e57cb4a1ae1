"""Carries a switch out: one step after the other, written down before it is done."""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING, Protocol

from rlgov.engine.switch.machine import Died, Done, Event, Failed, Life, Role, Step, Switch, advance
from rlgov.errors import RlgovError

if TYPE_CHECKING:
    from collections.abc import Callable

LOG = logging.getLogger(__name__)
POLL_S = 0.1


class Hands(Protocol):
    """What a switch does to the world."""

    async def perform(self, step: Step) -> None:
        """Do one step. Raises RlgovError with the reason when it cannot be done."""
        ...

    def died(self, role: Role) -> str | None:
        """Why an engine is gone; None while it lives, and before it was launched."""
        ...

    async def bury(self, role: Role) -> None:
        """Clear away what an engine that died left behind; nothing is routed to it afterwards."""
        ...

    def note(self, switch: Switch) -> None:
        """Write down that ``switch.step`` is about to be done. Raises OSError where that fails."""
        ...


async def carry_out(switch: Switch, hands: Hands, *, poll_s: float = POLL_S) -> Switch:
    """Do every step of a switch.

    Args:
        switch: At its first step.
        hands: What does the steps.
        poll_s: How often to look whether an engine died during a step.

    Returns:
        The switch with its outcome.

    Raises:
        OSError: The first step could not be written down: nothing was done.
    """
    hands.note(switch)
    while switch.step is not None:
        LOG.info("switch: %s", switch.step)
        event = await _happening(switch, hands, poll_s)
        if not isinstance(event, Done):
            LOG.warning("switch: %s: %s", switch.step, event.reason)
        if isinstance(event, Died):
            await hands.bury(event.role)
        switch = advance(switch, event)
        # A folder that fills up halfway must not stop a switch halfway: what lives can still be found.
        _noted(hands.note, switch)
    return switch


async def _happening(switch: Switch, hands: Hands, poll_s: float) -> Event:
    step = switch.steps[0]
    task = asyncio.ensure_future(hands.perform(step))
    try:
        while True:
            await asyncio.wait({task}, timeout=poll_s)
            if task.done():
                return _result(task)
            for role in Role:
                reason = hands.died(role) if switch.life(role) not in {Life.ABSENT, Life.STOPPING} else None
                if reason is not None:
                    return Died(role, reason)
    finally:
        if not task.done():
            task.cancel()
            await asyncio.wait({task})


def _result(task: asyncio.Task[None]) -> Event:
    error = task.exception()
    if error is None:
        return Done()
    if not isinstance(error, RlgovError | OSError | TimeoutError):
        # A mistake of ours: the switch is taken back like after any failure, and the log has the trace.
        LOG.error("switch step failed unexpectedly", exc_info=error)
    return Failed(str(error) or type(error).__name__)


def _noted(note: Callable[[Switch], None], switch: Switch) -> None:
    try:
        note(switch)
    except OSError:
        LOG.exception("the switch cannot be written down; free some space in the run folder")
