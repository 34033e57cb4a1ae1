"""After a crash of rlgov: of the engines it left, one serves on and every other one is stopped."""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING

from rlgov.engine.fleet import Engine, Fleet, Phase
from rlgov.engine.serving import EXPECTED_FAILURES
from rlgov.engine.switch.leftovers import kill_leftovers
from rlgov.engine.switch.recovery import recover

if TYPE_CHECKING:
    from rlgov.engine.stack_settings import Timing
    from rlgov.engine.switch.journal import StackRecord

LOG = logging.getLogger(__name__)


async def take_over(record: StackRecord, fleet: Fleet, timing: Timing) -> Engine | None:
    """Adopt what lives of an earlier run.

    Args:
        record: What that run wrote last.
        fleet: Gets the engines that stay.
        timing: Bounds how long an engine may take to show that it serves.

    Returns:
        The engine that serves on; None if none of them does.
    """
    adopted = {}
    for old in record.engines:
        engine = fleet.adopt(old)
        if engine is None:
            kill_leftovers(old.spec)  # workers outlive an API server that was killed
        else:
            adopted[engine.engine_id] = engine
    usable = {name for name, engine in adopted.items() if fleet.compatible(engine.spec)}
    decided = recover(record, frozenset(adopted), usable)
    LOG.warning("an earlier run left %d engines: %s", len(adopted), decided)
    kept: Engine | None = None
    for name in decided.candidates:
        engine = adopted[name]
        if kept is None and await _fit(engine, fleet, timing):
            kept = engine
        elif kept is None or not await _sleeps(engine, fleet):
            await fleet.stop(engine, grace_s=None if kept is not None else 0.0)
    for name in decided.stop:
        await fleet.stop(adopted[name])
    return kept


async def _fit(engine: Engine, fleet: Fleet, timing: Timing) -> bool:
    """Whether an adopted engine serves, woken if it slept."""
    served = engine.phase in {Phase.ACTIVE, Phase.DRAINING}
    try:
        # One that served before is up at once or not at all; another may still be loading its model.
        async with asyncio.timeout(timing.probe_timeout_s if served else timing.start_timeout_s):
            await fleet.ready(engine)
        if engine.plugin is not None and engine.plugin.asleep:
            await fleet.wake(engine)
        elif served:
            return await engine.running.probe(timing.probe_timeout_s)
        await fleet.warm_up(engine)
    except EXPECTED_FAILURES as error:
        LOG.warning("engine %s of an earlier run does not serve: %s", engine.engine_id, error)
        return False
    return True


async def _sleeps(engine: Engine, fleet: Fleet) -> bool:
    """Whether an adopted engine is asleep and may stay so."""
    if not fleet.pooled:
        return False
    try:
        await fleet.inspect(engine)
    except EXPECTED_FAILURES:
        return False
    if engine.plugin is None or not engine.plugin.asleep:
        return False
    fleet.set_phase(engine, Phase.ASLEEP)
    return True
