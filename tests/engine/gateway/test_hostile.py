"""Clients that mean no good, or speak badly: bounded in bytes, time and reach."""

from __future__ import annotations

import asyncio
import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rlgov.clock import VirtualClock
from rlgov.engine.gateway.gateway import Gateway
from tests.fakes.scripted import (
    STREAM_HEAD,
    WHOLE_STREAM,
    Heard,
    Line,
    RawClient,
    answer_of,
    ask,
    chunk,
    eventually,
    get,
    post,
    proxy,
    run,
    scripted,
    token,
)

STREAM = {"prompt": "x", "stream": True}

UNUSABLE = {
    "no HTTP": (b"what?\r\n\r\n", 400),
    "TLS": (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", 400),
    "HTTP/2": (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 400),
    "two lengths": (b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 3\r\nContent-Length: 4\r\n\r\nabcd", 400),
    "length and chunks": (
        b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 400
    ),
    "other coding": (b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n", 501),
    "folded header": (b"GET / HTTP/1.1\r\nHost: a\r\n folded\r\n\r\n", 400),
    "space before colon": (b"GET / HTTP/1.1\r\nHost : a\r\n\r\n", 400),
    "zero byte": (b"GET / HTTP/1.1\r\nHost: a\x00b\r\n\r\n", 400),
    "bare newlines": (b"GET / HTTP/1.1\nHost: a\n\n", 400),
    "no host": (b"GET / HTTP/1.1\r\n\r\n", 400),
    "two hosts": (b"GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n", 400),
    "bad chunk": (b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n", 400),
    "websocket": (b"GET / HTTP/1.1\r\nHost: a\r\nConnection: upgrade\r\nUpgrade: websocket\r\n\r\n", 501),
    "tunnel": (b"CONNECT a:1 HTTP/1.1\r\nHost: a\r\n\r\n", 501),
    "strange expectation": (b"POST / HTTP/1.1\r\nHost: a\r\nExpect: x\r\nContent-Length: 1\r\n\r\na", 417),
    "many headers": (b"GET / HTTP/1.1\r\nHost: a\r\n" + b"A: b\r\n" * 1000 + b"\r\n", 431),
    "large header": (b"GET / HTTP/1.1\r\nHost: a\r\nA: " + b"b" * 100_000 + b"\r\n\r\n", 431),
    "endless header": (b"GET / HTTP/1.1\r\nHost: a\r\nA: " + b"b" * 100_000, 431),
    "endless target": (b"GET /" + b"b" * 100_000, 431),
    "large body": (b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 1000001\r\n\r\n", 413),
    "large chunks": (
        b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n" + chunk(b"x" * 600_000) * 2, 413
    ),
    "no path": (b"OPTIONS * HTTP/1.1\r\nHost: a\r\n\r\n", 400),
}  # fmt: skip


@pytest.mark.parametrize("name", UNUSABLE)
def test_what_is_no_usable_request_is_answered_and_never_reaches_the_engine(name: str) -> None:
    data, status = UNUSABLE[name]

    async def body() -> None:
        async with (
            scripted(answer_of(b"ok")) as engine,
            proxy(engine.upstream(), max_body_bytes=1_000_000) as gateway,
        ):
            response = await ask(gateway, data)
            assert (response.status, response.complete) == (status, True)
            assert json.loads(response.body)["error"]["message"]
            assert engine.heard == []
            assert (await ask(gateway, get("/x"))).status == 200  # and nothing else has suffered

    run(body())


@pytest.mark.parametrize("cut", [1, 5, 30])
def test_smuggled_requests_find_no_gap_between_the_parsers(cut: int) -> None:
    """What the client sends as a body arrives as a body, whatever it looks like."""
    inner = b"GET /rlgov/v1/state HTTP/1.1\r\nHost: a\r\n\r\n"

    async def body() -> None:
        async with scripted(answer_of(b"ok")) as engine, proxy(engine.upstream()) as gateway:
            client = await RawClient.to(gateway)
            await client.send(b"POST /x HTTP/1.1\r\nHost: gw\r\nTransfer-Encoding: chunked\r\n\r\n")
            await client.send(chunk(inner[:cut]) + chunk(inner[cut:]) + b"0\r\n\r\n")
            assert (await client.response()).body == b"ok"
            assert [heard.target for heard in engine.heard] == ["/x"]
            assert engine.heard[0].body == inner
            await client.close()

    run(body())


@pytest.mark.parametrize(
    "target",
    ["/rlgov/v1/cap", "/%72lgov/v1/cap", "//rlgov/v1/cap", "/v1/../rlgov/v1/cap", "/%2572lgov", "/pause",
     "/sleep?level=1", "/collective_rpc", "/reset_prefix_cache", "/scale_elastic_ep", "http://127.0.0.1/rlgov/v1/state"],
)  # fmt: skip
@pytest.mark.parametrize("method", ["GET", "POST", "PATCH"])
def test_what_steers_the_engine_is_out_of_reach(target: str, method: str) -> None:
    async def body() -> None:
        async with scripted(answer_of(b"ok")) as engine, proxy(engine.upstream()) as gateway:
            response = await ask(
                gateway, f"{method} {target} HTTP/1.1\r\nHost: gw\r\nContent-Length: 0\r\n\r\n".encode()
            )
            assert response.status == 403
            assert engine.heard == []

    run(body())


def test_a_good_request_before_a_bad_one_is_answered_first() -> None:
    async def answer(_heard: Heard, line: Line) -> None:
        await asyncio.sleep(0.02)
        await line.write(answer_of(b"good"))

    async def body() -> None:
        async with scripted(answer) as engine, proxy(engine.upstream()) as gateway:
            client = await RawClient.to(gateway)
            await client.send(get("/x") + b"bad\r\n\r\n")
            assert (await client.response()).body == b"good"
            assert (await client.response()).status == 400
            assert await client.rest() == b""
            await client.close()

    run(body())


@pytest.mark.parametrize(
    ("sent", "said"),
    [
        (b"", b""),
        (b"GET / HT", b"HTTP/1.1 408"),
        (b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 9\r\n\r\nabc", b"HTTP/1.1 408"),
    ],
)
def test_who_sends_too_slowly_is_sent_away(sent: bytes, said: bytes) -> None:
    async def body() -> None:
        clock = VirtualClock()
        async with proxy(None, clock, header_timeout_s=10, body_timeout_s=60) as gateway:
            client = await RawClient.to(gateway)
            await client.send(sent)
            await eventually(
                lambda: gateway._server.received_bytes == len(sent) and gateway._server.connections
            )
            clock.advance_s(61)
            assert (await client.rest()).startswith(said)
            await client.close()
            clock.advance_s(10)
            await eventually(lambda: not gateway._server.connections)

    run(body())


def test_an_idle_connection_is_closed() -> None:
    async def body() -> None:
        clock = VirtualClock()
        async with proxy(None, clock, idle_timeout_s=75) as gateway:
            client = await RawClient.to(gateway)
            await client.send(get("/rlgov/healthz"))
            assert (await client.response()).status == 503
            clock.advance_s(74)
            await client.send(get("/rlgov/healthz"))
            assert (await client.response()).status == 503
            clock.advance_s(76)
            assert await client.rest() == b""
            await client.close()

    run(body())


def test_a_request_that_is_being_answered_has_no_time_limit() -> None:
    go_on = asyncio.Event()

    async def answer(_heard: Heard, line: Line) -> None:
        await go_on.wait()
        await line.write(WHOLE_STREAM)

    async def body() -> None:
        clock = VirtualClock()
        async with scripted(answer) as engine, proxy(engine.upstream(), clock) as gateway:
            asking = asyncio.create_task(ask(gateway, post(STREAM)))
            await eventually(lambda: engine.heard)
            clock.advance_s(100_000)
            await asyncio.sleep(0.6)  # two sweeps
            go_on.set()
            assert (await asking).complete

    run(body())


def test_more_connections_than_allowed_are_told_so() -> None:
    async def body() -> None:
        async with proxy(None, max_connections=2) as gateway:
            kept = [await RawClient.to(gateway) for _ in range(2)]
            await eventually(lambda: len(gateway._server.connections) == 2)
            assert (await ask(gateway, get("/rlgov/healthz"))).status == 503
            for client in kept:
                await client.close()
            await eventually(lambda: not gateway._server.connections)
            assert b"no engine" in (await ask(gateway, get("/rlgov/healthz"))).body

    run(body())


def test_bodies_together_are_bounded_and_accounted_for_to_the_byte() -> None:
    async def body() -> None:
        async with scripted(answer_of(b"ok")) as engine, proxy(None, max_buffered_bytes=1000) as gateway:
            first = asyncio.create_task(ask(gateway, post(b"x" * 800, "/x")))
            await eventually(lambda: gateway.held == 1)
            assert gateway._server.budget.used_bytes == 800
            assert (await ask(gateway, post(b"x" * 300, "/x"))).status == 503
            gateway.route(engine.upstream())
            assert (await first).body == b"ok"
            assert (await ask(gateway, post(b"x" * 300, "/x"))).body == b"ok"
            await eventually(lambda: gateway._server.budget.used_bytes == 0)

    run(body())


def test_a_client_that_leaves_gives_its_bytes_back() -> None:
    async def body() -> None:
        async with proxy(None) as gateway:
            for sent in (post(b"x" * 500, "/x"), post(b"x" * 500, "/x")[:-100], post(b"x") + post(b"y") * 3):
                client = await RawClient.to(gateway)
                await client.send(sent)
                await eventually(lambda: gateway._server.budget.used_bytes > 0)
                await client.close()
                await eventually(lambda: gateway._server.budget.used_bytes == 0)
            assert gateway.held == 0

    run(body())


def test_a_client_that_does_not_read_stops_the_engine_not_the_memory() -> None:
    piece = chunk(token("x" * 10_000))
    sent = 0

    async def answer(_heard: Heard, line: Line) -> None:
        nonlocal sent
        await line.write(STREAM_HEAD)
        for _ in range(6000):
            await line.write(piece)
            sent += len(piece)
        await line.write(chunk(token("", "length")), chunk(b"data: [DONE]\n\n"), b"0\r\n\r\n")

    def buffered(gateway: Gateway) -> int:
        return sum(c._transport.get_write_buffer_size() for c in gateway._server.connections if c._transport)

    async def body() -> None:
        nonlocal sent
        async with scripted(answer) as engine, proxy(engine.upstream()) as gateway:
            client = await RawClient.to(gateway)
            await client.send(post(STREAM))
            await client.reader.readuntil(b"\r\n\r\n")
            client.writer.transport.pause_reading()  # type: ignore[attr-defined]  # it can
            before = -1
            while sent != before:  # until the engine is stopped by its own socket
                before = sent
                await asyncio.sleep(0.3)
            assert sent < 40e6  # of 60 MB: what the kernel's buffers take, and no more
            assert buffered(gateway) < 2e6
            client.writer.transport.resume_reading()  # type: ignore[attr-defined]  # it can
            raw = await asyncio.wait_for(_until_end(client), 30)
            assert raw > 60e6
            await client.close()

    run(body())


async def _until_end(client: RawClient) -> int:
    size, tail = 0, b""
    while not tail.endswith(b"\r\n0\r\n\r\n"):
        data = await client.reader.read(2**18)
        assert data
        size += len(data)
        tail = (tail + data)[-16:]
    return size


def test_a_client_that_never_reads_again_is_dropped() -> None:
    async def answer(_heard: Heard, line: Line) -> None:
        await line.write(STREAM_HEAD)
        while True:
            await line.write(chunk(token("x" * 10_000)))

    async def body() -> None:
        clock = VirtualClock()
        async with (
            scripted(answer) as engine,
            proxy(engine.upstream(), clock, stall_timeout_s=300) as gateway,
        ):
            client = await RawClient.to(gateway)
            client.writer.transport.pause_reading()  # type: ignore[attr-defined]  # it can
            await client.send(post(STREAM))
            await eventually(lambda: any(c.slow for c in gateway._server.connections))
            clock.advance_s(301)
            await eventually(lambda: not gateway._server.connections)
            await eventually(lambda: engine.abandoned == 1)
            await client.close()

    run(body())


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.lists(
        st.one_of(
            st.binary(max_size=40),
            st.sampled_from(
                [
                    b"GET /x HTTP/1.1\r\nHost: a\r\n\r\n", b"POST / HTTP/1.1\r\n", b"Host: a\r\n",
                    b"Content-Length: 5\r\n", b"\r\n", b"Transfer-Encoding: chunked\r\n",
                    b"5\r\nabcde\r\n", b"0\r\n\r\n", b"Connection: close\r\n",
                ]
            ),
        ),
        max_size=8,
    )
)  # fmt: skip
def test_no_bytes_throw_the_gateway_off(pieces: list[bytes]) -> None:
    async def body() -> None:
        trouble: list[object] = []
        asyncio.get_running_loop().set_exception_handler(lambda _loop, context: trouble.append(context))
        async with scripted(answer_of(b"ok")) as engine, proxy(engine.upstream()) as gateway:
            client = await RawClient.to(gateway)
            try:
                for piece in pieces:
                    await client.send(piece)
                    await asyncio.sleep(0)
                client.writer.write_eof()
            except (ConnectionError, RuntimeError):
                pass  # it hung up on us
            await client.rest()
            await client.close()
            await eventually(lambda: not gateway._server.connections)
            assert gateway._server.budget.used_bytes == 0
            assert (await ask(gateway, get("/x"))).body == b"ok"
        assert trouble == []

    run(body())
