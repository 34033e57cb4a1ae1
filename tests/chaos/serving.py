"""A serving stack's control socket over the toy world of tests/fakes/world.py, in real time, in a thread."""

from __future__ import annotations

import asyncio
import threading
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

from rlgov.clock import SystemClock
from rlgov.engine.control.server import ControlServer
from rlgov.errors import EngineError
from tests.fakes.world import FakeStack, World

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from rlgov.clock import VirtualClock
    from rlgov.engine.control.schema import ConfigurationRequest
    from rlgov.engine.samples import EngineIterations, StackInterval, StackLimits, StackState

START_S = 60.0


class Target:
    """Speaks for a world; ``gone`` makes every call fail.

    Args:
        world: The toy.
        uuids: GPUs the stack says it was given.
    """

    def __init__(self, world: World, uuids: Sequence[str]) -> None:
        self.world = world
        self.gone = False
        self._stack = FakeStack(world)
        self._uuids = tuple(uuids)

    def limits(self) -> StackLimits:
        self._check()
        return replace(self._stack.limits(), gpu_uuids=self._uuids)

    def state(self) -> StackState:
        self._check()
        return self._stack.state()

    async def interval(self, after: int) -> StackInterval:
        self._check()
        return self._stack.interval(after)

    async def iterations(self, after: int, engine_id: str) -> EngineIterations:
        raise EngineError(f"no iterations after {after} of {engine_id} in a toy")

    async def configure(self, request: ConfigurationRequest) -> StackState:
        self._check()
        return self._stack.configure(
            batch_cap=request.batch_cap, tp_degree=request.tp_degree, lease_s=request.lease_s
        )

    def _check(self) -> None:
        if self.gone:
            raise EngineError("a test says that the stack does not answer")


@contextmanager
def serving(socket: Path, uuids: Sequence[str], seed: int = 0) -> Iterator[Target]:
    """A stack that answers at a socket while the block runs."""
    clock: Any = SystemClock()  # the toy asks a clock for no more than the time
    target = Target(World(seed=seed, clock=cast("VirtualClock", clock)), uuids)
    loop = asyncio.new_event_loop()
    started, ended = threading.Event(), asyncio.Event()

    async def serve() -> None:
        server = ControlServer(target, socket)
        await server.start()
        started.set()
        try:
            await ended.wait()
        finally:
            await server.close()

    thread = threading.Thread(target=loop.run_until_complete, args=(serve(),), name="stack")
    thread.start()
    try:
        if not started.wait(START_S):
            raise AssertionError("the toy's control socket did not open")
        yield target
    finally:
        loop.call_soon_threadsafe(ended.set)
        thread.join()
        loop.close()
