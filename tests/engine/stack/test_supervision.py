"""What a stack does when an engine dies, hangs or cannot hold the cap; and what it tells about it."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from rlgov.clock import SystemClock
from rlgov.engine.stack import Stack
from rlgov.engine.switch.feasibility import ModelShape
from rlgov.engine.switch.machine import Strategy
from rlgov.errors import ConfigError, EngineError
from tests.fakes.stack import settings_for

QUICK_TO_SUSPECT = {"hung_after_s": 0.3, "probe_timeout_s": 0.5, "health_s": 0.1}


def test_an_engine_killed_under_load_is_replaced_and_nobody_gets_an_empty_success(bench: Any) -> None:
    async def test(stack: Any) -> None:
        load = stack.load(tokens=40)
        killed = stack.serving
        async with load.running():
            await asyncio.sleep(0.3)
            os.kill(killed.pid, signal.SIGKILL)
            await stack.until(lambda: stack.state.ready and stack.serving.engine_id != killed.engine_id)
            await asyncio.sleep(0.3)
        assert load.oddities == []
        # Streams that had begun break off visibly; all others are sent again and served.
        assert set(load.results) <= {"served", "error event", "connection error"}
        assert load.results["error event"] + load.results["connection error"] <= 12
        assert load.results["served"] > 0
        assert stack.serving.tp_degree == killed.tp_degree
        assert stack.state.conditions == {}
        assert (await stack.metrics())["rlgov_engine_restarts_total"] == 1

    bench(test)


def test_a_hung_engine_is_reported_though_its_health_check_answers(bench: Any) -> None:
    async def test(stack: Any) -> None:
        engine = stack.serving
        await stack.fault(engine, hang=True)
        waiting = asyncio.create_task(stack.request())
        await stack.until(lambda: "EngineHung" in stack.state.conditions)
        assert "--restart-hung" in stack.state.conditions["EngineHung"]
        assert stack.serving.engine_id == engine.engine_id  # reported, and left alone
        assert "hangs" in stack.serving.note
        assert (await stack.metrics())['rlgov_condition{condition="EngineHung"}'] == 1
        await stack.fault(engine, reset=True)
        assert await waiting == "served"
        await stack.until(lambda: stack.state.conditions == {})

    bench(test, timing=QUICK_TO_SUSPECT)


def test_a_hung_engine_is_restarted_where_the_operator_wants_it(bench: Any) -> None:
    async def test(stack: Any) -> None:
        engine = stack.serving
        await stack.fault(engine, hang=True)
        waiting = asyncio.create_task(stack.request())
        await stack.until(lambda: stack.state.ready and stack.serving.engine_id != engine.engine_id)
        assert await waiting == "served"
        await stack.until(lambda: stack.state.conditions == {})

    bench(test, timing=QUICK_TO_SUSPECT, restart_hung=True)


def test_an_idle_engine_that_hangs_is_found_too(bench: Any) -> None:
    async def test(stack: Any) -> None:
        await stack.fault(stack.serving, hang=True)
        await stack.until(lambda: "EngineHung" in stack.state.conditions)

    bench(test, timing={**QUICK_TO_SUSPECT, "idle_probe_s": 0.3})


async def _running(stack: Any, clients: int, seen: list[int]) -> None:
    """Ask with many clients, and note how many requests the engine runs at once."""
    load = stack.load(tokens=30)
    async with load.running(clients):
        await asyncio.sleep(0.3)
        for _ in range(20):
            interval = await stack.stack.interval(0)
            seen += [sample.running for sample in interval.engines]
            await asyncio.sleep(0.02)
    assert set(load.results) == {"served"}


def test_a_cap_is_held_by_the_engine_and_over_a_switch(bench: Any) -> None:
    async def test(stack: Any) -> None:
        assert (await stack.ask(batch_cap=2)).batch_cap == 2
        seen: list[int] = []
        await _running(stack, 8, seen)
        assert max(seen) == 2
        await stack.switch(1)
        assert stack.serving.cap_by == "plugin"
        (sample,) = (await stack.stack.interval(0)).engines
        assert sample.batch_cap == 2
        assert (await stack.ask(batch_cap=1000)).batch_cap == 32  # never above the engine's maximum
        (sample,) = (await stack.stack.interval(0)).engines
        assert sample.batch_cap == 32

    bench(test, Strategy.SIDE_BY_SIDE)


@pytest.mark.parametrize("arguments", [(), ("--fake-no-plugin",)], ids=["plugin", "gateway"])
def test_a_cap_whose_lease_runs_out_falls_back_open(bench: Any, arguments: tuple[str, ...]) -> None:
    async def test(stack: Any) -> None:
        assert stack.serving.cap_by == ("gateway" if arguments else "plugin")
        assert (await stack.ask(batch_cap=2, lease_s=0.5)).batch_cap == 2
        await stack.until(lambda: stack.state.batch_cap == 32)
        seen: list[int] = []
        await _running(stack, 8, seen)
        assert max(seen) > 2

    bench(test, None, *arguments)


def test_the_gateway_holds_the_cap_where_the_engine_cannot(bench: Any) -> None:
    async def test(stack: Any) -> None:
        await stack.ask(batch_cap=2)
        seen: list[int] = []
        await _running(stack, 8, seen)
        assert max(seen) == 2
        assert (await stack.switch(1))["outcome"] == "done"
        seen.clear()
        await _running(stack, 8, seen)
        assert max(seen) == 2

    bench(test, Strategy.SIDE_BY_SIDE, "--fake-no-plugin")


def test_the_gateway_takes_the_cap_over_from_a_plugin_that_fails(bench: Any) -> None:
    async def test(stack: Any) -> None:
        await stack.fault(stack.serving, plugin="refuse-cap")
        await stack.ask(batch_cap=2)
        assert "held by the gateway" in stack.serving.note
        seen: list[int] = []
        await _running(stack, 8, seen)
        assert max(seen) == 2

    bench(test)


def test_an_engine_that_does_not_answer_in_time_is_named(bench: Any) -> None:
    async def test(stack: Any) -> None:
        assert await stack.request() == "served"
        first = await stack.stack.interval(0)
        assert [record.outcome for record in first.traffic.closed] == ["served"]
        assert first.unread == {}
        await stack.fault(stack.serving, plugin="slow")
        later = await stack.stack.interval(first.traffic.cursor)
        assert later.engines == ()
        assert list(later.unread) == [stack.serving.engine_id]
        assert later.traffic.closed == ()

    bench(test, timing={"sample_timeout_s": 0.3, "health_s": 60.0})


def test_degrees_that_can_never_be_had_are_not_offered(bench: Any) -> None:
    async def test(stack: Any) -> None:
        assert stack.stack.limits().tp_degrees == (4, 2)
        assert "does not divide the model's 4 attention heads" in stack.state.tp_refused[3]
        with pytest.raises(ConfigError, match="attention heads"):
            await stack.ask(tp_degree=3)

    bench(test, tp_degrees=(4, 3, 2), shape=ModelShape(attention_heads=4))


def test_a_stack_whose_first_engine_does_not_start_says_why_and_leaves_nothing(
    tmp_path: Path, processes: Any
) -> None:
    run = tmp_path / "run"

    async def start() -> None:
        stack = Stack(settings_for(run, None, "--fake-fail", "oom"), SystemClock())
        with pytest.raises(EngineError, match="too little free memory"):
            await stack.start()

    asyncio.run(start())
    assert processes.all(run) == set()
    assert not (run / "control.sock").exists()


def test_a_folder_that_cannot_be_written_is_told_and_serving_goes_on(
    bench: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    async def test(stack: Any) -> None:
        with monkeypatch.context() as patch:
            patch.setattr("rlgov.engine.switch.journal.RunFolder.save", full)
            await stack.ask(tp_degree=1)
            await stack.until(lambda: not stack.state.switching)
            assert "cannot be written down" in stack.state.tp_refused[1]
            assert stack.serving.tp_degree == 2
            os.kill(stack.serving.pid, signal.SIGKILL)
            await stack.until(lambda: not stack.state.ready)
            await stack.until(lambda: stack.state.ready)
            assert "make room" in stack.state.conditions["StateUnwritten"]
        assert await stack.request() == "served"

    bench(test, Strategy.SIDE_BY_SIDE)


def test_the_first_request_need_not_wait_for_the_engine_to_be_there(tmp_path: Path, processes: Any) -> None:
    async def test() -> str:
        settings = settings_for(tmp_path / "run", None, "--fake-start-s", "1")
        stack = Stack(settings, SystemClock())
        starting = asyncio.create_task(stack.start())
        try:
            async with asyncio.timeout(60):
                while not stack.port or not stack.control_path.exists():  # noqa: ASYNC110  # told by nobody
                    await asyncio.sleep(0.01)
            async with aiohttp.ClientSession() as session:
                url = f"http://127.0.0.1:{stack.port}/rlgov/healthz"
                async with session.get(url) as answer:
                    assert answer.status == 503
            served: str = await processes.request(stack.port)
            await starting
            return served
        finally:
            await stack.close(grace_s=0.0)

    assert asyncio.run(test()) == "served"
