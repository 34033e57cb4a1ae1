"""Holding, moving and limiting."""

from __future__ import annotations

import asyncio
import json

import pytest

from rlgov.clock import VirtualClock
from rlgov.engine.gateway.gateway import Gateway
from rlgov.engine.samples import Outcome
from tests.fakes.scripted import (
    WHOLE_STREAM,
    Heard,
    Line,
    RawClient,
    Response,
    ask,
    eventually,
    get,
    post,
    proxy,
    run,
    scripted,
)

STREAM = {"prompt": "x", "stream": True}


def numbered(number: int) -> bytes:
    return post({"prompt": number, "stream": True})


def numbers(heard: list[Heard]) -> list[int]:
    return [json.loads(one.body)["prompt"] for one in heard]


async def held_one_by_one(gateway: Gateway, count: int) -> list[asyncio.Task[Response]]:
    tasks = []
    for k in range(count):
        tasks.append(asyncio.create_task(ask(gateway, numbered(k))))
        await eventually(lambda k=k: gateway.held == k + 1)  # type: ignore[misc]  # a default is not inferred
    return tasks


def test_requests_wait_for_a_route_and_go_in_order() -> None:
    async def body() -> None:
        async with scripted(WHOLE_STREAM) as engine, proxy(None) as gateway:
            tasks = await held_one_by_one(gateway, 10)
            record = gateway.traffic(0).open[0]
            assert (record.outcome, record.dispatched_s, record.dispatches) == (Outcome.OPEN, None, 0)
            gateway.set_limit(1)  # so that the engine hears them one after the other
            gateway.route(engine.upstream())
            assert all(response.complete for response in await asyncio.gather(*tasks))
            assert numbers(engine.heard) == list(range(10))
            assert gateway.held == 0

    run(body())


def test_a_new_route_moves_new_requests_and_leaves_the_old_engine_its_own() -> None:
    go_on = asyncio.Event()

    async def slow(_heard: Heard, line: Line) -> None:
        await go_on.wait()
        await line.write(WHOLE_STREAM)

    async def body() -> None:
        async with (
            scripted(slow) as old,
            scripted(WHOLE_STREAM) as new,
            proxy(old.upstream("old")) as gateway,
        ):
            early = asyncio.create_task(ask(gateway, post(STREAM)))
            await eventually(lambda: gateway.in_flight("old") == 1)
            gateway.route(new.upstream("new"))
            assert (await ask(gateway, post(STREAM))).complete
            assert (gateway.in_flight("old"), gateway.in_flight("new")) == (1, 0)
            go_on.set()
            assert (await early).complete
            assert gateway.in_flight("old") == 0
            assert {record.engine_id for record in gateway.traffic(0).closed} == {"old", "new"}

    run(body())


def test_the_limit_holds_and_releases_in_order() -> None:
    tickets = asyncio.Semaphore(0)
    most = running = 0

    async def answer(_heard: Heard, line: Line) -> None:
        nonlocal most, running
        running += 1
        most = max(most, running)
        await tickets.acquire()
        running -= 1
        await line.write(WHOLE_STREAM)

    async def body() -> None:
        async with scripted(answer) as engine, proxy(None) as gateway:
            gateway.set_limit(3)
            tasks = await held_one_by_one(gateway, 9)
            gateway.route(engine.upstream())
            await eventually(lambda: len(engine.heard) == 3)
            assert gateway.held == 6
            # Embeddings and the like are not generations: the limit is none of theirs.
            other = asyncio.create_task(ask(gateway, get("/v1/models")))
            await eventually(lambda: len(engine.heard) == 4)
            for _ in range(10):
                tickets.release()
            assert all(response.complete for response in await asyncio.gather(*tasks))
            await other
            assert most <= 4
            sent = [heard for heard in engine.heard if heard.method == "POST"]
            assert sorted(numbers(sent[:3])) == [0, 1, 2]
            assert sorted(numbers(sent)) == list(range(9))
            # Connections are separate, so neighbours may change places, but nobody overtakes by a window.
            assert all(abs(place - number) <= 3 for place, number in enumerate(numbers(sent)))

    run(body())


def test_too_many_held_are_refused_at_once() -> None:
    async def body() -> None:
        async with scripted(WHOLE_STREAM) as engine, proxy(None, max_held=2) as gateway:
            tasks = await held_one_by_one(gateway, 2)
            response = await ask(gateway, post(STREAM))
            assert response.status == 503
            assert response.header("retry-after")
            assert json.loads(response.body)["error"]["type"] == "ServiceUnavailableError"
            assert gateway.traffic(0).closed[0].outcome is Outcome.REJECTED
            gateway.route(engine.upstream())
            assert all(response.complete for response in await asyncio.gather(*tasks))

    run(body())


def test_holding_ends_after_its_time() -> None:
    async def body() -> None:
        clock = VirtualClock()
        async with proxy(None, clock, hold_timeout_s=120.0) as gateway:
            task = asyncio.create_task(ask(gateway, post(STREAM)))
            await eventually(lambda: gateway.held == 1)
            clock.advance_s(119.9)
            await asyncio.sleep(0.6)  # two sweeps
            assert gateway.held == 1
            clock.advance_s(0.2)
            assert (await task).status == 503
            assert gateway.held == 0

    run(body())


def test_a_held_client_that_leaves_is_forgotten() -> None:
    async def body() -> None:
        async with scripted(WHOLE_STREAM) as engine, proxy(None) as gateway:
            client = await RawClient.to(gateway)
            await client.send(post(STREAM))
            await eventually(lambda: gateway.held == 1)
            await client.close()
            await eventually(lambda: gateway.held == 0)
            gateway.route(engine.upstream())
            assert gateway.traffic(0).closed[0].outcome is Outcome.CANCELLED
            assert engine.heard == []

    run(body())


@pytest.mark.parametrize("path", ["/health", "/ping", "/version", "/load"])
def test_probes_are_not_held(path: str) -> None:
    async def body() -> None:
        async with proxy(None) as gateway:
            assert (await ask(gateway, get(path))).status == 503

    run(body())


def test_health_follows_the_route() -> None:
    async def body() -> None:
        async with scripted(WHOLE_STREAM) as engine, proxy(None) as gateway:
            assert (await ask(gateway, get("/rlgov/healthz"))).status == 503
            gateway.route(engine.upstream())
            assert (await ask(gateway, get("/rlgov/healthz"))).status == 200
            assert (await ask(gateway, post(b"", "/rlgov/healthz"))).status == 405

    run(body())


def test_a_failed_request_goes_to_the_engine_that_is_routed_next() -> None:
    async def dies(_heard: Heard, line: Line) -> None:
        gateways[0].route(None)  # the supervisor saw it, too
        await line.write(b"")
        line.abort()

    async def body() -> None:
        async with (
            scripted(dies) as old,
            scripted(WHOLE_STREAM) as new,
            proxy(old.upstream("old")) as gateway,
        ):
            gateways.append(gateway)
            task = asyncio.create_task(ask(gateway, post(STREAM)))
            await eventually(lambda: old.heard and gateway.held == 1)
            gateway.route(new.upstream("new"))
            assert (await task).complete
            (record,) = gateway.traffic(0).closed
            assert (record.outcome, record.engine_id, record.dispatches) == (Outcome.SERVED, "new", 2)

    gateways: list[Gateway] = []
    run(body())


def test_closing_lets_requests_finish_and_takes_no_more() -> None:
    go_on = asyncio.Event()

    async def slow(_heard: Heard, line: Line) -> None:
        await go_on.wait()
        await line.write(WHOLE_STREAM)

    async def body() -> None:
        async with scripted(slow) as engine, proxy(engine.upstream()) as gateway:
            client = await RawClient.to(gateway)
            idle = await RawClient.to(gateway)
            await client.send(post(STREAM))
            await eventually(lambda: gateway.in_flight("one") == 1)
            closing = asyncio.create_task(gateway.close(grace_s=30))
            assert await idle.rest() == b""
            with pytest.raises(ConnectionError):
                await RawClient.to(gateway)
            go_on.set()
            response = await client.response()
            assert response.complete
            assert response.header("connection") == "close"
            await closing
            await client.close()
            await idle.close()

    run(body())


def test_closing_without_grace_breaks_off() -> None:
    async def silent(_heard: Heard, line: Line) -> None:
        await line.write(b"")
        await asyncio.sleep(100)

    async def body() -> None:
        async with scripted(silent) as engine, proxy(engine.upstream()) as gateway:
            client = await RawClient.to(gateway)
            await client.send(post(STREAM))
            await eventually(lambda: engine.heard)
            gateway.route(None)
            held = asyncio.create_task(ask(gateway, post(STREAM)))
            await eventually(lambda: gateway.held == 1)
            await gateway.close()
            assert await client.rest() == b""
            assert (await held).status == 503
            await client.close()
            await eventually(lambda: engine.abandoned == 1)
            outcomes = {record.outcome for record in gateway.traffic(0).closed}
            assert outcomes == {Outcome.REJECTED, Outcome.FAILED}

    run(body())
