"""rlgov dies by SIGKILL in the middle of a switch: whenever it was, one engine serves on, and only one."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from rlgov.clock import SystemClock
from rlgov.engine.samples import StackState
from rlgov.engine.stack import Stack
from rlgov.engine.switch.machine import Action, Role, Step, Strategy, plan
from rlgov.errors import ConfigError
from tests.fakes.stack import settings_for

DRIVER = Path(__file__).resolve().parents[2] / "fakes" / "stack.py"


def _steps(strategy: Strategy) -> list[str]:
    return [str(step) for step in plan(strategy, asleep=strategy is Strategy.SLEEP).steps]


MOMENTS = [(strategy, moment) for strategy in Strategy for moment in _steps(strategy)]
MOMENTS += [(Strategy.SIDE_BY_SIDE, "launched"), (Strategy.RESTART, "launched")]
ROLL_BACK = [
    (Strategy.SIDE_BY_SIDE, Step(Action.STOP, Role.NEW)),
    (Strategy.RESTART, Step(Action.LAUNCH, Role.OLD)),
    (Strategy.RESTART, Step(Action.ROUTE, Role.OLD)),
]


def _kill_at(run: Path, strategy: Strategy, moment: str, *arguments: str) -> None:
    command = [sys.executable, str(DRIVER), str(run), strategy, moment, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr


async def _serve_again(run: Path, strategy: Strategy, processes: Any) -> StackState:
    """Start a stack in the folder of the one that died, and use it."""
    stack = Stack(settings_for(run, strategy), SystemClock())
    try:
        await stack.start()
        state = stack.state()
        active = [engine for engine in state.engines if engine.phase == "active"]
        assert len(active) == 1
        assert {engine.phase for engine in state.engines} <= {"active", "asleep"}
        assert processes.engines(run) == {engine.pid for engine in state.engines}
        assert await processes.request(stack.port) == "served"
        return state
    finally:
        await stack.close(grace_s=0.0)


@pytest.mark.parametrize(("strategy", "moment"), MOMENTS, ids=lambda value: str(value).replace(" ", "-"))
def test_a_crash_at_any_step_leaves_exactly_one_engine_serving(
    tmp_path: Path, processes: Any, strategy: Strategy, moment: str
) -> None:
    run = tmp_path / "run"
    _kill_at(run, strategy, moment)
    left = processes.engines(run)
    state = asyncio.run(_serve_again(run, strategy, processes))
    (active,) = [engine for engine in state.engines if engine.phase == "active"]
    if (strategy, moment) == (Strategy.RESTART, "launch new"):
        assert not left  # the one moment at which there is no engine
        assert active.tp_degree == 2
    else:
        assert active.pid in left, "an engine that lived was not taken over"
    if strategy is Strategy.SIDE_BY_SIDE:
        moved = moment in {"drain old", "stop old"}
        assert active.tp_degree == (1 if moved else 2)
    assert processes.all(run) == set()


@pytest.mark.parametrize(("strategy", "step"), ROLL_BACK, ids=lambda value: str(value).replace(" ", "-"))
def test_a_crash_during_a_roll_back_does_too(
    tmp_path: Path, processes: Any, strategy: Strategy, step: Step
) -> None:
    run = tmp_path / "run"
    broken = tmp_path / "plan.json"
    broken.write_text('{"1": {"fake_fault": ["requests=\\"abort\\""]}}', encoding="utf-8")
    _kill_at(run, strategy, str(step), "--fake-plan", str(broken))
    broken.unlink()
    state = asyncio.run(_serve_again_with(run, strategy, processes, "--fake-plan", str(broken)))
    assert [engine.tp_degree for engine in state.engines] == [2]
    assert processes.all(run) == set()


async def _serve_again_with(run: Path, strategy: Strategy, processes: Any, *arguments: str) -> StackState:
    stack = Stack(settings_for(run, strategy, *arguments), SystemClock())
    try:
        await stack.start()
        assert processes.engines(run) == {engine.pid for engine in stack.state().engines}
        assert await processes.request(stack.port) == "served"
        return stack.state()
    finally:
        await stack.close(grace_s=0.0)


def test_an_engine_that_died_with_rlgov_is_replaced_and_its_workers_are_cleared_away(
    tmp_path: Path, processes: Any
) -> None:
    run = tmp_path / "run"
    _kill_at(run, Strategy.SIDE_BY_SIDE, "launch new")
    (engine,) = processes.engines(run)
    workers = processes.all(run) - {engine}
    assert workers
    os.kill(engine, signal.SIGKILL)
    state = asyncio.run(_serve_again(run, Strategy.SIDE_BY_SIDE, processes))
    assert state.engines[0].pid != engine
    assert processes.all(run) == set()


def test_an_engine_that_was_started_otherwise_is_not_taken_over(tmp_path: Path, processes: Any) -> None:
    run = tmp_path / "run"
    _kill_at(run, Strategy.SIDE_BY_SIDE, "launch new")
    (engine,) = processes.engines(run)
    state = asyncio.run(_serve_again_with(run, Strategy.SIDE_BY_SIDE, processes, "--max-model-len", "512"))
    assert state.engines[0].pid != engine


def test_a_hung_engine_is_not_taken_over(tmp_path: Path, processes: Any) -> None:
    run = tmp_path / "run"
    _kill_at(run, Strategy.SIDE_BY_SIDE, "launch new", "--fake-fault", "hang=false")
    (engine,) = processes.engines(run)
    os.kill(engine, signal.SIGSTOP)

    async def again() -> int | None:
        settings = settings_for(run, Strategy.SIDE_BY_SIDE, "--fake-fault", "hang=false")
        stack = Stack(processes.impatient(settings), SystemClock())
        try:
            await stack.start()
            return stack.state().engines[0].pid
        finally:
            await stack.close(grace_s=0.0)

    assert asyncio.run(again()) != engine
    assert processes.all(run) == set()


def test_two_stacks_do_not_share_a_folder(tmp_path: Path) -> None:
    async def both() -> None:
        first = Stack(settings_for(tmp_path / "run", None), SystemClock())
        await first.start()
        try:
            second = Stack(settings_for(tmp_path / "run", None), SystemClock())
            with pytest.raises(ConfigError, match="another `rlgov serve` runs in this folder"):
                await second.start()
            assert first.state().ready
            assert first.control_path.exists()
        finally:
            await first.close(grace_s=0.0)

    asyncio.run(both())
