"""A serving stack: engines behind one gateway, kept serving, moved between TP degrees, told what to do."""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING

from rlgov.engine.control.server import ControlServer
from rlgov.engine.fleet import READABLE, Fleet
from rlgov.engine.gateway.gateway import Gateway
from rlgov.engine.samples import EngineSample, StackInterval, StackLimits, StackState
from rlgov.engine.serving import Serving
from rlgov.engine.stack_metrics import StackCollector, Tally
from rlgov.engine.stack_settings import offer
from rlgov.engine.supervisor import Supervisor
from rlgov.engine.switch.feasibility import aligned
from rlgov.engine.switch.journal import RunFolder
from rlgov.errors import ConfigError, EngineError

if TYPE_CHECKING:
    from pathlib import Path

    from rlgov.clock import Clock
    from rlgov.engine.control.schema import ConfigurationRequest
    from rlgov.engine.samples import EngineIterations
    from rlgov.engine.stack_settings import StackSettings

LOG = logging.getLogger(__name__)


class Stack:
    """One deployment; it speaks for itself on the control socket.

    Order of use: :meth:`start`, then :meth:`close`.

    Args:
        settings: What to run.
        clock: For timing.
        folder: The run folder, if not the one of the settings.

    Raises:
        ConfigError: None of the TP degrees can be had, or not by the strategy asked for.
    """

    def __init__(self, settings: StackSettings, clock: Clock, folder: RunFolder | None = None) -> None:
        self._settings = settings
        self._clock = clock
        self._offer = offer(settings)
        self._folder = folder if folder is not None else RunFolder(settings.run)
        self._gateway = Gateway(settings.gateway, clock)
        self._fleet = Fleet(settings, self._offer, clock, self._write_down)
        self._serving = Serving(
            self._gateway, self._fleet, settings.max_num_seqs, settings.timing.cap_timeout_s, clock
        )
        tally = Tally()
        self._supervisor = Supervisor(
            settings,
            self._offer,
            fleet=self._fleet,
            serving=self._serving,
            folder=self._folder,
            tally=tally,
            clock=clock,
        )
        self._control = ControlServer(self, settings.control_path)
        self._gateway.add_metrics(StackCollector(self.state, tally))

    def _write_down(self) -> None:
        self._supervisor.write_down()

    @property
    def port(self) -> int:
        """Of the gateway, once it listens."""
        return self._gateway.port

    @property
    def control_path(self) -> Path:
        """Of the control socket."""
        return self._settings.control_path

    async def start(self) -> None:
        """Own the run folder, listen, and serve: with what an earlier run left, or with a new engine.

        Raises:
            ConfigError: The folder, a port or the socket cannot be had.
            EngineError: The first engine does not start.
        """
        self._folder.lock()
        try:
            record = self._folder.load()
            await self._gateway.start()
            await self._control.start()
            await self._supervisor.begin(record)
        except BaseException:
            await self.close(grace_s=0.0)
            raise

    async def close(self, grace_s: float | None = None) -> None:
        """Take no more requests, let those in flight finish, stop the engines; safe to call twice.

        Args:
            grace_s: For requests and engines; the shutdown timeout if not given.
        """
        await self._supervisor.end()
        engines = [*self._fleet.engines.values()]
        wait_s = self._settings.timing.shutdown_timeout_s if grace_s is None else grace_s
        hopeless = self._serving.routed is None and not any(map(self._serving.in_flight, engines))
        await self._gateway.close(0.0 if hopeless else wait_s)
        stops = (self._fleet.stop(engine, grace_s) for engine in engines)
        for ended in await asyncio.gather(*stops, return_exceptions=True):
            if isinstance(ended, BaseException):
                LOG.error("an engine could not be stopped: %s", ended)
        self._serving.routed = None
        await self._control.close()
        self._folder.unlock()

    # What the control socket asks.

    def limits(self) -> StackLimits:
        """What is offered."""
        settings, degrees = self._settings, self._offer.tp_degrees
        chosen = [settings.tp_degrees.index(degree) for degree in degrees]
        kv = [settings.kv_capacity_tokens[i] if settings.kv_capacity_tokens else 0 for i in chosen]
        switch = [settings.switch_s[i] if settings.switch_s else 0.0 for i in chosen]
        return StackLimits(
            model=settings.model,
            batch_caps=settings.batch_caps,
            tp_degrees=degrees,
            gpu_uuids=settings.gpu_uuids,
            allotted_gpus=settings.allotted_gpus,
            max_num_batched_tokens=settings.max_num_batched_tokens,
            kv_capacity_tokens=tuple(
                int(tokens) for tokens in aligned(degrees, self._fleet.kv_capacity_tokens, kv)
            ),
            switch_s=aligned(degrees, self._supervisor.switch_s, switch),
            strategy=str(self._supervisor.strategy),
        )

    def state(self) -> StackState:
        """What is in force."""
        supervisor, routed = self._supervisor, self._serving.routed
        return StackState(
            now_s=self._clock.monotonic_s(),
            tp_degree=routed.spec.tp_degree if routed is not None else supervisor.degree,
            batch_cap=self._serving.batch_cap,
            switching=supervisor.switching,
            ready=routed is not None,
            held=self._gateway.held,
            tp_refused=supervisor.refused(),
            engines=tuple(engine.info() for engine in self._fleet.engines.values()),
            last_switch=dict(supervisor.last_switch),
            conditions=dict(supervisor.conditions),
        )

    async def interval(self, after: int) -> StackInterval:
        """One reading of everything; engines that do not answer in time are named with the reason."""
        engines = [engine for engine in self._fleet.engines.values() if engine.phase in READABLE]
        readings = await asyncio.gather(*(self._fleet.read(engine) for engine in engines))
        samples = tuple(reading for reading in readings if isinstance(reading, EngineSample))
        unread = {
            engine.engine_id: reading
            for engine, reading in zip(engines, readings, strict=True)
            if isinstance(reading, str)
        }
        return StackInterval(self.state(), self._gateway.traffic(after), samples, unread)

    async def iterations(self, after: int, engine_id: str) -> EngineIterations:
        """Iterations of the engine that takes new requests; a cursor of another engine counts as 0.

        Raises:
            EngineError: No engine takes requests, or it has no plugin to tell.
        """
        routed = self._serving.routed
        if routed is None:
            raise EngineError("no engine takes requests now; ask again when the stack is ready")
        return await routed.running.iterations(after if routed.engine_id == engine_id else 0)

    async def configure(self, request: ConfigurationRequest) -> StackState:
        """Put a cap in force, begin a switch, or both.

        Raises:
            ConfigError: The TP degree is not offered.
        """
        degree = request.tp_degree
        if degree is not None and degree not in self._offer.tp_degrees:
            reason = self._offer.infeasible.get(degree, f"TP degrees are {self._offer.tp_degrees}")
            raise ConfigError(f"TP degree {degree} is not offered: {reason}")
        if request.batch_cap is not None:
            await self._serving.ask_cap(request.batch_cap, request.lease_s)
        if degree is not None:
            self._supervisor.want(degree)
        return self.state()
