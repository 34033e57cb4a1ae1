"""A serving stack over fake engines, and clients that count every token."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from rlgov.clock import SystemClock
from rlgov.engine.control.schema import ConfigurationRequest
from rlgov.engine.samples import EngineInfo, StackState
from rlgov.engine.stack import Stack
from rlgov.engine.stack_settings import StackSettings
from rlgov.engine.switch.machine import Strategy
from tests.fakes.stack import QUICK, settings_for

LONG_S = 60.0  # nothing here takes that long; a loaded machine may


def engine_processes(run: Path) -> set[int]:
    """Pids of the fake engines (not of their helpers) that a stack in this folder has started."""
    found = set()
    for folder in Path("/proc").iterdir():
        if not folder.name.isdigit():
            continue
        with suppress(OSError):
            output = str((folder / "fd" / "1").readlink())
            command = (folder / "cmdline").read_bytes()
            if output.startswith(f"{run.resolve()}/engine-") and b"engine.py" in command:
                found.add(int(folder.name))
    return found


def any_processes(run: Path) -> set[int]:
    """Pids of everything that still writes to an engine's log of this folder, helpers included."""
    found = set()
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            with suppress(OSError):
                if str((folder / "fd" / "1").readlink()).startswith(f"{run.resolve()}/engine-"):
                    found.add(int(folder.name))
    return found


@dataclass
class Load:
    """Clients in closed loops, each of which counts the tokens of each of its streams."""

    port: int
    tokens: int = 20
    results: Counter[str] = field(default_factory=Counter)
    oddities: list[str] = field(default_factory=list)

    async def stream(self, session: aiohttp.ClientSession, tokens: int) -> str:
        """One request: "served" only with every token and a finish reason."""
        body = {"prompt": [1, 2, 3], "max_tokens": tokens, "ignore_eos": True, "stream": True}
        seen, reason, done = 0, None, False
        try:
            async with session.post(f"http://127.0.0.1:{self.port}/v1/completions", json=body) as answer:
                if answer.status != 200:
                    return f"status {answer.status}"
                async for line in answer.content:
                    if not (event := line.strip()).startswith(b"data: "):
                        continue
                    if event == b"data: [DONE]":
                        done = True
                        continue
                    data = json.loads(event[6:])
                    if "error" in data:
                        return "error event"
                    for choice in data["choices"]:
                        seen += bool(choice["text"])
                        reason = choice["finish_reason"] or reason
        except aiohttp.ClientError:
            return "connection error"
        if (seen, reason, done) == (tokens, "length", True):
            return "served"
        self.oddities.append(f"{seen} tokens, {reason}, done {done}")
        return "odd"

    async def _loop(self, session: aiohttp.ClientSession, until: asyncio.Event) -> None:
        while not until.is_set():
            self.results[await self.stream(session, self.tokens)] += 1

    @asynccontextmanager
    async def running(self, clients: int = 12) -> AsyncIterator[None]:
        """Clients ask all the time while the body runs, and finish what they began."""
        until = asyncio.Event()
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
            loops = [asyncio.create_task(self._loop(session, until)) for _ in range(clients)]
            try:
                yield
            finally:
                until.set()
                await asyncio.gather(*loops)


@dataclass
class Bench:
    """A stack under test."""

    stack: Stack
    run: Path

    @property
    def state(self) -> StackState:
        return self.stack.state()

    @property
    def serving(self) -> EngineInfo:
        (engine,) = [engine for engine in self.state.engines if engine.phase == "active"]
        return engine

    def load(self, tokens: int = 20) -> Load:
        return Load(self.stack.port, tokens)

    async def ask(self, **wanted: Any) -> StackState:
        return await self.stack.configure(ConfigurationRequest(**wanted))

    async def until(self, true: Callable[[], bool]) -> None:
        """Wait for a condition that must come true."""
        async with asyncio.timeout(LONG_S):
            while not true():  # noqa: ASYNC110  # the stack tells nobody when its state changes
                await asyncio.sleep(0.01)

    async def switch(self, degree: int) -> dict[str, float | str]:
        """A whole switch; gives what is told about it."""
        assert (await self.ask(tp_degree=degree)).switching
        await self.until(lambda: not self.state.switching)
        return self.state.last_switch

    async def fault(self, engine: EngineInfo, **changes: Any) -> None:
        """Let a fake engine misbehave."""
        async with (
            aiohttp.ClientSession() as session,
            session.post(f"{engine.url}/fake/fault", json=changes) as answer,
        ):
            assert answer.status == 200

    async def request(self, tokens: int = 5) -> str:
        """One request through the gateway."""
        async with aiohttp.ClientSession() as session:
            return await self.load().stream(session, tokens)

    async def metrics(self) -> dict[str, float]:
        async with (
            aiohttp.ClientSession() as session,
            session.get(f"http://127.0.0.1:{self.stack.port}/metrics") as answer,
        ):
            page = await answer.text()
        lines = re.findall(r"^(rlgov_\S+) (\S+)$", page, re.MULTILINE)
        return {name: float(value) for name, value in lines}


class Processes:
    """Looks at the processes of stacks, and asks one request of a gateway."""

    engines = staticmethod(engine_processes)
    all = staticmethod(any_processes)

    @staticmethod
    async def request(port: int) -> str:
        async with aiohttp.ClientSession() as session:
            return await Load(port).stream(session, 5)

    @staticmethod
    def impatient(settings: StackSettings) -> StackSettings:
        """With little patience for an engine that does not answer."""
        return replace(settings, timing=replace(settings.timing, probe_timeout_s=1.0))


@pytest.fixture
def processes(tmp_path: Path) -> Iterator[Processes]:
    """Whatever of ``tmp_path / "run"`` still runs after the test is killed."""
    yield Processes()
    _kill_all(tmp_path / "run")


def _kill_all(run: Path) -> None:
    for pid in any_processes(run):
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


Run = Callable[..., None]


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Run]:
    """``bench(test, strategy, *arguments, plan=..., timing=..., **settings)``: runs ``test`` on a stack."""
    run = tmp_path / "run"

    def start(
        test: Callable[[Bench], Awaitable[None]],
        strategy: Strategy | None = None,
        *arguments: str,
        plan: dict[str, Any] | None = None,
        timing: dict[str, float] | None = None,
        **changes: Any,
    ) -> None:
        if plan is not None:
            path = tmp_path / "plan.json"
            path.write_text(json.dumps(plan), encoding="utf-8")
            arguments += ("--fake-plan", str(path))
        settings = replace(settings_for(run, strategy, *arguments), **changes)
        settings = replace(settings, timing=replace(QUICK, **(timing or {})))
        asyncio.run(_bench(test, settings))
        assert any_processes(run) == set(), "an engine was left behind"

    yield start
    _kill_all(run)


async def _bench(test: Callable[[Bench], Awaitable[None]], settings: StackSettings) -> None:
    stack = Stack(settings, SystemClock())
    try:
        await stack.start()
        await test(Bench(stack, settings.run))
    finally:
        await stack.close(grace_s=0.0)
