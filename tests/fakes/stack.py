"""A serving stack over fake engines in a process of its own, which kills itself at a chosen moment.

``stack.py RUN STRATEGY MOMENT``: serves TP 2, then switches to TP 1 with requests in flight. MOMENT is a
step of the switch as the state file names it ("drain old"): the process dies by SIGKILL as soon as that step
has been written down, so before it is done. ``launched`` dies when an engine has been launched and its
process has not been written down yet. A MOMENT that never comes ends it with exit code 3.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
from pathlib import Path

import aiohttp

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # run by its path, from anywhere

from rlgov.clock import SystemClock
from rlgov.engine.control.schema import ConfigurationRequest
from rlgov.engine.gateway.settings import GatewaySettings
from rlgov.engine.stack import Stack
from rlgov.engine.stack_settings import StackSettings, Timing
from rlgov.engine.switch.feasibility import GpuRoom, ModelShape
from rlgov.engine.switch.journal import RunFolder, StackRecord
from rlgov.engine.switch.machine import Strategy

ENGINE = Path(__file__).with_name("engine.py")
NEVER_CAME = 3
QUICK = Timing(
    start_timeout_s=60.0,
    warm_up_timeout_s=60.0,
    sleep_timeout_s=60.0,
    drain_timeout_s=60.0,
    shutdown_timeout_s=60.0,
    sample_timeout_s=5.0,
    cap_timeout_s=10.0,
    watch_s=0.05,
    health_s=0.2,
    hung_after_s=60.0,
    probe_timeout_s=30.0,
    restart_first_s=0.1,
    poll_s=0.02,
)
"""Generous bounds for a loaded machine, short periods."""


def settings_for(run: Path, strategy: Strategy | None, *arguments: str) -> StackSettings:
    """TP 2 and TP 1 of the fake model."""
    return StackSettings(
        model="fake/model",
        command=(sys.executable, str(ENGINE)),
        run=run,
        tp_degrees=(2, 1),
        batch_caps=(32, 8, 2),
        gateway=GatewaySettings(port=0, hold_timeout_s=60.0),
        shape=ModelShape(),
        room=GpuRoom(),
        strategy=strategy,
        arguments=arguments,
        timing=QUICK,
    )


class _DeadlyFolder(RunFolder):
    """Writes a state, then kills its own process if it is the one waited for."""

    def __init__(self, path: Path, moment: str) -> None:
        super().__init__(path)
        self._moment = moment

    def save(self, record: StackRecord) -> None:
        if record.switch is not None and self._moment == "launched":
            known = {engine.spec.engine_id for engine in record.engines if engine.identity is None}
            if not known and self._announced(record):
                os.kill(os.getpid(), signal.SIGKILL)
        super().save(record)
        step = record.switch.state.step if record.switch is not None else None
        if str(step) == self._moment:
            os.kill(os.getpid(), signal.SIGKILL)

    def _announced(self, record: StackRecord) -> bool:
        """Whether the state on disk has an engine without a process that has one by now."""
        before = json.loads((self.path / "state.json").read_bytes())["engines"]
        waiting = {engine["spec"]["engine_id"] for engine in before if engine["identity"] is None}
        return any(engine.spec.engine_id in waiting for engine in record.engines)


async def _request(session: aiohttp.ClientSession, port: int) -> None:
    body = {"prompt": [1, 2, 3], "max_tokens": 120, "ignore_eos": True}
    with contextlib.suppress(aiohttp.ClientError):
        async with session.post(f"http://127.0.0.1:{port}/v1/completions", json=body) as answer:
            await answer.read()


async def _main(run: Path, strategy: Strategy, moment: str, *arguments: str) -> int:
    stack = Stack(settings_for(run, strategy, *arguments), SystemClock(), _DeadlyFolder(run, moment))
    await stack.start()
    async with aiohttp.ClientSession() as session:
        requests = [asyncio.create_task(_request(session, stack.port)) for _ in range(4)]
        await asyncio.sleep(0.2)
        await stack.configure(ConfigurationRequest(tp_degree=1))
        while stack.state().switching:  # noqa: ASYNC110  # the stack tells nobody when its state changes
            await asyncio.sleep(0.02)
        await asyncio.gather(*requests)
    await stack.close()
    return NEVER_CAME


if __name__ == "__main__":
    sys.exit(asyncio.run(_main(Path(sys.argv[1]), Strategy(sys.argv[2]), *sys.argv[3:])))
