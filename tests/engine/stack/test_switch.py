"""Changes of the TP degree on running engines, under load: nothing is lost, whatever goes wrong."""

from __future__ import annotations

import asyncio
import os
import signal
from typing import Any

import aiohttp
import pytest

from rlgov.engine.switch.machine import Strategy

ALL = list(Strategy)
SHORT_DRAIN = {"drain_timeout_s": 0.3}


@pytest.mark.parametrize("strategy", ALL)
def test_a_switch_under_streaming_load_loses_nothing(bench: Any, strategy: Strategy) -> None:
    async def test(stack: Any) -> None:
        load = stack.load()
        async with load.running():
            for degree in (1, 2):
                await asyncio.sleep(0.2)
                told = await stack.switch(degree)
                assert (told["outcome"], told["strategy"]) == ("done", strategy)
                assert told["notes"] == ""
                assert stack.serving.tp_degree == stack.state.tp_degree == degree
                assert (told["held_s"] > 0) == (strategy is not Strategy.SIDE_BY_SIDE)
        assert load.oddities == []
        assert set(load.results) == {"served"}
        assert load.results["served"] > 12
        limits = stack.stack.limits()
        assert all(switch_s > 0 for switch_s in limits.switch_s)
        assert limits.kv_capacity_tokens == (65536, 65536)
        page = await stack.metrics()
        assert page[f'rlgov_switches_total{{outcome="done",strategy="{strategy}"}}'] == 2
        assert page["rlgov_tp_degree"] == 2

    bench(test, strategy)


@pytest.mark.parametrize("strategy", [Strategy.SIDE_BY_SIDE, Strategy.RESTART])
@pytest.mark.parametrize(
    ("plan", "said"),
    [
        ({"fake_fail": "oom"}, "too little free memory"),
        ({"fake_fault": ['requests="abort"']}, "it drops requests"),
    ],
    ids=["out of memory", "warm-up fails"],
)
def test_a_degree_that_fails_is_refused_and_the_old_one_serves_on(
    bench: Any, strategy: Strategy, plan: dict[str, Any], said: str
) -> None:
    async def test(stack: Any) -> None:
        load = stack.load()
        async with load.running():
            told = await stack.switch(1)
            assert told["outcome"] == "rolled-back"
            assert said in told["reason"]
            assert said in stack.state.tp_refused[1]
            assert not (await stack.ask(tp_degree=1)).switching  # not again so soon
        assert set(load.results) == {"served"}
        assert stack.serving.tp_degree == 2
        assert len(stack.state.engines) == 1

    bench(test, strategy, plan={"1": plan})


def test_a_sleeping_engine_that_died_is_started_anew(bench: Any) -> None:
    async def test(stack: Any) -> None:
        (asleep,) = [engine for engine in stack.state.engines if engine.phase == "asleep"]
        os.kill(asleep.pid, signal.SIGKILL)
        await stack.until(lambda: len(stack.state.engines) == 1)
        assert (await stack.switch(1))["outcome"] == "done"
        assert {(e.tp_degree, e.phase) for e in stack.state.engines} == {(1, "active"), (2, "asleep")}
        assert await stack.request() == "served"

    bench(test, Strategy.SLEEP)


def test_a_sleeping_degree_that_does_not_start_is_refused_from_the_beginning(bench: Any) -> None:
    async def test(stack: Any) -> None:
        assert "too little free memory" in stack.state.tp_refused[1]
        assert await stack.request() == "served"

    bench(test, Strategy.SLEEP, plan={"1": {"fake_fail": "oom"}})


def test_the_old_engine_takes_over_again_when_the_new_one_dies_during_the_drain(bench: Any) -> None:
    async def test(stack: Any) -> None:
        load = stack.load()
        async with aiohttp.ClientSession() as session:
            long = asyncio.create_task(load.stream(session, 600))  # three seconds: keeps the old one draining
            old = stack.serving
            await asyncio.sleep(0.2)
            await stack.ask(tp_degree=1)
            await stack.until(lambda: stack.state.tp_degree == 1)
            os.kill(stack.serving.pid, signal.SIGKILL)
            await stack.until(lambda: not stack.state.switching)
            assert stack.state.last_switch["outcome"] == "rolled-back"
            assert stack.serving == old
            assert await stack.request() == "served"
            assert await long == "served"

    bench(test, Strategy.SIDE_BY_SIDE)


def test_a_stream_longer_than_the_drain_ends_within_the_shutdown_timeout_and_it_is_told(bench: Any) -> None:
    async def test(stack: Any) -> None:
        async with aiohttp.ClientSession() as session:
            long = asyncio.create_task(stack.load().stream(session, 300))
            await asyncio.sleep(0.2)
            told = await stack.switch(1)
            assert told["outcome"] == "done"
            assert "still run after 0.3 s" in told["notes"]
            assert await long == "served"

    bench(test, Strategy.SIDE_BY_SIDE, timing=SHORT_DRAIN)


def test_a_drain_without_end_gives_the_switch_up_while_requests_would_have_to_wait(bench: Any) -> None:
    async def test(stack: Any) -> None:
        async with aiohttp.ClientSession() as session:
            long = asyncio.create_task(stack.load().stream(session, 300))
            await asyncio.sleep(0.2)
            waiting = asyncio.create_task(stack.request())
            told = await stack.switch(1)
            assert told["outcome"] == "rolled-back"
            assert "still run after 0.3 s" in stack.state.tp_refused[1]
            assert await waiting == "served"
            assert await long == "served"
        assert stack.serving.tp_degree == 2

    bench(test, Strategy.RESTART, timing=SHORT_DRAIN)


def test_the_old_engine_dying_before_the_move_hastens_the_switch(bench: Any) -> None:
    async def test(stack: Any) -> None:
        await stack.ask(tp_degree=1)
        os.kill(next(e.pid for e in stack.state.engines if e.tp_degree == 2), signal.SIGKILL)
        await stack.until(lambda: not stack.state.switching)
        assert stack.state.last_switch["outcome"] == "done"
        assert await stack.request() == "served"

    bench(test, Strategy.SIDE_BY_SIDE)


def test_when_neither_degree_starts_the_stack_goes_on_trying(bench: Any, tmp_path: Any) -> None:
    async def test(stack: Any) -> None:
        plan = tmp_path / "plan.json"
        plan.write_text('{"*": {"fake_fail": "oom"}}', encoding="utf-8")
        told = await stack.switch(1)
        assert told["outcome"] == "broken"
        assert not stack.state.ready
        await stack.until(lambda: "in a row failed" in stack.state.conditions.get("EngineDown", ""))
        waiting = asyncio.create_task(stack.request())
        plan.write_text("{}", encoding="utf-8")
        assert await waiting == "served"
        await stack.until(lambda: stack.state.conditions == {})
        assert stack.serving.tp_degree == 2

    bench(test, Strategy.RESTART, plan={})


def test_only_what_is_offered_can_be_asked_for(bench: Any) -> None:
    from rlgov.errors import ConfigError

    async def test(stack: Any) -> None:
        with pytest.raises(ConfigError, match="TP degree 3 is not offered"):
            await stack.ask(tp_degree=3)
        await stack.ask(tp_degree=1)
        before = stack.state.engines
        assert (await stack.ask(tp_degree=2)).switching  # passed over: one switch at a time
        assert {e.engine_id for e in before} <= {e.engine_id for e in stack.state.engines}
        await stack.until(lambda: not stack.state.switching)
        assert stack.state.tp_degree == 1

    bench(test, Strategy.SIDE_BY_SIDE)


GPUS = tuple(f"GPU-{number}" for number in range(4))


def _places(stack: Any) -> dict[int, set[str]]:
    return {engine.tp_degree: set(engine.gpu_uuids) for engine in stack.state.engines}


def test_engines_are_kept_asleep_where_no_two_fit_side_by_side(bench: Any) -> None:
    async def test(stack: Any) -> None:
        assert stack.stack.limits().strategy == Strategy.SLEEP
        assert {(e.tp_degree, e.phase) for e in stack.state.engines} == {
            (4, "active"), (2, "asleep"), (1, "asleep"),
        }  # fmt: skip
        places = _places(stack)
        assert {degree: len(place) for degree, place in places.items()} == {4: 4, 2: 2, 1: 1}
        assert not places[2] & places[1]
        load = stack.load()
        async with load.running():
            assert (await stack.switch(2))["held_s"] > 0  # both lie on the same GPUs
            assert (await stack.switch(1))["held_s"] == 0  # these two do not
            assert (await stack.switch(4))["held_s"] > 0
        assert set(load.results) == {"served"}
        assert _places(stack) == places

    bench(test, None, gpu_uuids=GPUS, tp_degrees=(4, 2, 1))


def test_engines_are_restarted_where_vllm_offers_no_sleep(bench: Any) -> None:
    async def test(stack: Any) -> None:
        assert stack.stack.limits().strategy == Strategy.RESTART
        assert len(stack.state.engines) == 1
        load = stack.load()
        async with load.running():
            assert (await stack.switch(2))["strategy"] == "restart"
            assert (await stack.switch(1))["strategy"] == "side-by-side"  # two GPUs are free: nothing is held
        assert set(load.results) == {"served"}

    bench(test, None, "--fake-no-plugin", gpu_uuids=GPUS, tp_degrees=(4, 2, 1))


def test_sleep_that_was_asked_for_and_cannot_be_had_is_refused(bench: Any) -> None:
    from rlgov.errors import EngineError

    async def test(_stack: Any) -> None:
        pytest.fail("it must not start")

    with pytest.raises(EngineError, match="use --switch auto"):
        bench(test, Strategy.SLEEP, "--fake-no-plugin")


def test_a_degree_without_free_gpus_is_refused_side_by_side(bench: Any) -> None:
    async def test(stack: Any) -> None:
        assert not (await stack.ask(tp_degree=2)).switching
        assert "too few GPUs are free" in stack.state.tp_refused[2]
        assert await stack.request() == "served"

    bench(test, Strategy.SIDE_BY_SIDE, gpu_uuids=GPUS, tp_degrees=(4, 2, 1))
