"""Engines that fail, and what the client is told: only tokens and a finish reason make a request served."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable

import pytest

from rlgov.engine.samples import Outcome
from tests.fakes.scripted import (
    DONE,
    STREAM_HEAD,
    WHOLE_STREAM,
    Heard,
    Line,
    RawClient,
    Script,
    answer_of,
    ask,
    chunk,
    completion,
    eventually,
    get,
    post,
    proxy,
    run,
    scripted,
    stream_of,
    token,
)

STREAM = {"prompt": "x", "stream": True}
ROLE = b'data: {"choices":[{"index":0,"delta":{"role":"assistant","content":""},"finish_reason":null}]}\n\n'


def saying(data: bytes, *, dies: bool = False) -> Script:
    async def answer(_heard: Heard, line: Line) -> None:
        await line.write(data)
        if dies:
            line.abort()

    return answer


BEFORE_THE_FIRST_TOKEN: dict[str, Script] = {
    "silence, then gone": saying(b"", dies=True),
    "half a head": saying(STREAM_HEAD[:40], dies=True),
    "head only": saying(STREAM_HEAD, dies=True),
    "role, then gone": saying(stream_of(ROLE, end=False), dies=True),
    "nothing but the closing mark": saying(stream_of(DONE)),
    "role and closing mark": saying(stream_of(ROLE, DONE)),
    "empty stream": saying(stream_of()),
    "empty 200": saying(answer_of(b"")),
    "abort as 200": saying(answer_of(completion("", "abort", 0))),
    "stop without a token": saying(answer_of(completion("", "stop", 0))),
    "abort event": saying(stream_of(token("", "abort"), DONE)),
    "aborted together with its tokens": saying(stream_of(token() + token("", "abort") + DONE)),
    "500": saying(answer_of(b'{"error": {"message": "EngineCore died"}}', 500)),
    "502": saying(answer_of(b"bad gateway", 502)),
    "error event": saying(stream_of(b'data: {"error": {"message": "died", "code": 500}}\n\n', DONE)),
    "garbage": saying(b"SSH-2.0-OpenSSH\r\n\r\n"),
    "cut body": saying(answer_of(completion())[:-5], dies=True),
    "switched protocols": saying(b"HTTP/1.1 101 X\r\nUpgrade: a\r\nConnection: upgrade\r\n\r\n"),
    "not JSON": saying(answer_of(b"<html>")),
    "endless head": saying(b"HTTP/1.1 200 OK\r\nX: " + b"x" * 400_000),
}


@pytest.mark.parametrize("name", BEFORE_THE_FIRST_TOKEN)
def test_a_failure_before_the_first_token_is_not_seen_when_another_engine_answers(name: str) -> None:
    fails = BEFORE_THE_FIRST_TOKEN[name]

    async def answer(heard: Heard, line: Line) -> None:
        await (fails(heard, line) if heard.number < 3 else line.write(WHOLE_STREAM))

    async def body() -> None:
        async with scripted(answer) as engine, proxy(engine.upstream()) as gateway:
            response = await ask(gateway, post(STREAM))
            assert response.complete
            assert response.body == token() + token() + token(reason="length") + DONE
            (record,) = gateway.traffic(0).closed
            assert record.outcome is Outcome.SERVED
            assert record.dispatches == 3
            assert len({heard.body for heard in engine.heard}) == 1

    run(body())


@pytest.mark.parametrize("name", BEFORE_THE_FIRST_TOKEN)
def test_a_failure_that_stays_is_told_with_when_to_come_back(name: str) -> None:
    async def body() -> None:
        async with (
            scripted(BEFORE_THE_FIRST_TOKEN[name]) as engine,
            proxy(engine.upstream(), redispatches=1) as gateway,
        ):
            response = await ask(gateway, post(STREAM))
            assert response.status in {500, 502}
            assert response.complete
            if name not in {"500", "502"}:
                assert response.header("retry-after")
                assert json.loads(response.body)["error"]["code"] == 502
            assert len(engine.heard) == 2
            (record,) = gateway.traffic(0).closed
            assert record.outcome is Outcome.FAILED
            assert record.dispatches == 2
            assert gateway.in_flight("one") == 0
            assert gateway.held == 0

    run(body())


AFTER_THE_FIRST_TOKEN: dict[str, Callable[[Line], object]] = {
    "gone": Line.abort,
    "abort": lambda line: line.writer.write(chunk(token("", "abort")) + chunk(DONE) + b"0\r\n\r\n"),
    "closing mark": lambda line: line.writer.write(chunk(DONE) + b"0\r\n\r\n"),
    "end": lambda line: line.writer.write(b"0\r\n\r\n"),
    "error": lambda line: line.writer.write(
        chunk(b'data: {"error": {"message": "died", "code": 500}}\n\n') + chunk(DONE) + b"0\r\n\r\n"
    ),
    "garbage": lambda line: line.writer.write(b"what?"),
}


@pytest.mark.parametrize("name", AFTER_THE_FIRST_TOKEN)
@pytest.mark.parametrize("version", ["1.1", "1.0"])
def test_a_failure_after_the_first_token_is_told_in_the_stream_which_stays_incomplete(
    name: str, version: str
) -> None:
    go_on = asyncio.Event()

    async def answer(_heard: Heard, line: Line) -> None:
        await line.write(STREAM_HEAD, chunk(token()))
        await go_on.wait()
        AFTER_THE_FIRST_TOKEN[name](line)
        await asyncio.sleep(10)

    async def body() -> None:
        async with scripted(answer) as engine, proxy(engine.upstream()) as gateway:
            client = await RawClient.to(gateway)
            await client.send(post(STREAM, version=version))
            await client.reader.readuntil(token())
            go_on.set()
            if version == "1.1":
                raw = await client.rest()
                assert not raw.endswith(b"0\r\n\r\n")
                assert DONE not in raw
                (told,) = [line for line in raw.split(b"\r\n") if line.startswith(b"data: ")]
                assert json.loads(told[6:])["error"]["code"] == 502
            else:  # only a reset tells an answer that broke off from one that ended
                with pytest.raises(ConnectionResetError):
                    await client.reader.read(-1)
            await client.close()
            assert len(engine.heard) == 1
            (record,) = gateway.traffic(0).closed
            assert record.outcome is Outcome.FAILED
            assert record.first_token_s is not None
            assert gateway.in_flight("one") == 0

    run(body())


def test_other_requests_are_not_sent_twice() -> None:
    async def body() -> None:
        async with scripted(saying(b"", dies=True)) as engine, proxy(engine.upstream()) as gateway:
            assert (await ask(gateway, post(b"x", "/v1/embeddings"))).status == 502
            assert len(engine.heard) == 1

    run(body())


def test_an_answer_that_breaks_off_stays_incomplete() -> None:
    cut = answer_of(b"0123456789", kind="text/plain")[:-5]

    async def body() -> None:
        async with scripted(saying(cut, dies=True)) as engine, proxy(engine.upstream()) as gateway:
            response = await ask(gateway, get("/x"))
            assert response.status == 200
            assert not response.complete

    run(body())


def test_a_kept_connection_that_the_engine_closed_meanwhile_costs_no_try() -> None:
    async def answer(heard: Heard, line: Line) -> None:
        if heard.connection == 1 and heard.number == 2:
            line.abort()  # as if it had been closing just when the request came
        else:
            await line.write(WHOLE_STREAM)

    async def body() -> None:
        async with scripted(answer) as engine, proxy(engine.upstream(), redispatches=0) as gateway:
            assert (await ask(gateway, post(STREAM))).complete
            assert (await ask(gateway, post(STREAM))).complete
            assert [record.dispatches for record in gateway.traffic(0).closed] == [1, 1]
            assert [heard.connection for heard in engine.heard] == [1, 1, 2]

    run(body())


def test_an_engine_that_cannot_be_reached_holds_requests_until_one_can() -> None:
    async def body() -> None:
        async with scripted(WHOLE_STREAM) as gone:
            nowhere = gone.upstream("gone")
        async with scripted(WHOLE_STREAM) as engine, proxy(nowhere) as gateway:
            asking = asyncio.create_task(ask(gateway, post(STREAM)))
            await eventually(lambda: gateway.held == 1)
            assert gateway.in_flight("gone") == 0
            gateway.route(engine.upstream("new"))
            assert (await asking).complete
            (record,) = gateway.traffic(0).closed
            assert (record.outcome, record.engine_id, record.dispatches) == (Outcome.SERVED, "new", 1)

    run(body())


def test_an_engine_that_is_never_reached_ends_in_503() -> None:
    async def body() -> None:
        async with scripted(WHOLE_STREAM) as gone:
            nowhere = gone.upstream()
        async with proxy(nowhere, hold_timeout_s=0.3) as gateway:
            response = await ask(gateway, post(STREAM))
            assert response.status == 503
            assert response.header("retry-after")
            assert gateway.traffic(0).closed[0].outcome is Outcome.REJECTED
            assert (await ask(gateway, get("/v1/models"))).status == 502

    run(body())


def test_a_silent_engine_fails_only_when_told_to() -> None:
    async def answer(_heard: Heard, line: Line) -> None:
        await line.write(b"")
        await asyncio.sleep(100)

    async def body() -> None:
        async with (
            scripted(answer) as engine,
            proxy(engine.upstream(), upstream_idle_timeout_s=0.1, redispatches=0) as gateway,
        ):
            response = await ask(gateway, post(STREAM))
            assert response.status == 502
            assert b"silent" in response.body
            await eventually(lambda: engine.abandoned == 1)

    run(body())


def test_a_client_that_leaves_stops_the_engine() -> None:
    async def answer(_heard: Heard, line: Line) -> None:
        await line.write(STREAM_HEAD, chunk(token()))
        await asyncio.sleep(100)

    async def body() -> None:
        async with scripted(answer) as engine, proxy(engine.upstream()) as gateway:
            client = await RawClient.to(gateway)
            await client.send(post(STREAM))
            await client.reader.readuntil(token())
            assert gateway.in_flight("one") == 1
            await client.close()
            await eventually(lambda: engine.abandoned == 1)
            await eventually(lambda: gateway.in_flight("one") == 0)
            (record,) = gateway.traffic(0).closed
            assert record.outcome is Outcome.CANCELLED

    run(body())


def test_a_client_that_leaves_before_the_first_token_stops_the_engine_too() -> None:
    async def answer(_heard: Heard, line: Line) -> None:
        await line.write(b"")
        await asyncio.sleep(100)

    async def body() -> None:
        async with scripted(answer) as engine, proxy(engine.upstream()) as gateway:
            client = await RawClient.to(gateway)
            await client.send(post(STREAM))
            await eventually(lambda: engine.heard)
            await client.close()
            await eventually(lambda: engine.abandoned == 1)
            await eventually(lambda: gateway.traffic(0).closed)
            assert gateway.traffic(0).closed[0].outcome is Outcome.CANCELLED

    run(body())
