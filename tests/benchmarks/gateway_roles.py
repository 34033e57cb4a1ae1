"""The processes of the gateway's benchmark: ``python -m tests.benchmarks.gateway_roles ROLE ...``.

``upstream`` streams as a fast engine would, ``gateway PORT`` is what is measured, ``client PORT STREAMS
SECONDS`` keeps so many streams open one after the other and prints what it saw as JSON. Upstream and client
are bare protocols, so that they cost little beside a proxy.
"""

from __future__ import annotations

import asyncio
import json
import os
import statistics
import sys
from typing import cast

import httptools
import uvloop

from rlgov.clock import SystemClock
from rlgov.engine.gateway.gateway import Gateway, GatewaySettings, Upstream

CHUNKS = 20
CLOCK = SystemClock()
HEAD = (
    b"HTTP/1.1 200 OK\r\nserver: uvicorn\r\ncontent-type: text/event-stream; charset=utf-8\r\n"
    b"transfer-encoding: chunked\r\n\r\n"
)
FORM = (
    b'data: {"id":"cmpl-0123456789abcdef0123456789abcdef","object":"text_completion","created":1790000000,'
    b'"model":"bench","choices":[{"index":0,"text":" word","logprobs":null,"finish_reason":%b,'
    b'"stop_reason":null,"prompt_token_ids":null,"token_ids":null}]}\n\n'
)
LAST = (
    (
        b'data: {"id":"cmpl-0123456789abcdef0123456789abcdef","object":"text_completion",'
        b'"created":1790000000,"model":"bench","choices":[],'
        b'"usage":{"prompt_tokens":100,"total_tokens":120,"completion_tokens":20}}\n\n'
    ),
    b"data: [DONE]\n\n",
)


def _chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


TOKEN = _chunk(FORM % b"null")
END = _chunk(FORM % b'"length"') + b"".join(_chunk(event) for event in LAST) + b"0\r\n\r\n"
BODY = json.dumps({"model": "bench", "prompt": "word " * 100, "max_tokens": CHUNKS, "stream": True}).encode()


class EngineConnection(asyncio.Protocol):
    """Answers every request with a stream; one write a token, as a server does that yields them."""

    def __init__(self, token_s: float) -> None:
        self._token_s = token_s
        self._parser = httptools.HttpRequestParser(self)
        self._transport: asyncio.Transport | None = None
        self._left = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)

    def connection_lost(self, exc: Exception | None) -> None:
        del exc
        self._transport = None

    def data_received(self, data: bytes) -> None:
        self._parser.feed_data(data)

    def on_message_complete(self) -> None:
        self._left = CHUNKS - 1
        if self._transport is not None:
            self._transport.write(HEAD)
        self._token()

    def _token(self) -> None:
        if self._transport is None:
            return
        if self._left == 0:
            self._transport.write(END)
            return
        self._left -= 1
        self._transport.write(TOKEN)
        loop = asyncio.get_running_loop()
        if self._token_s:
            loop.call_later(self._token_s, self._token)
        else:
            loop.call_soon(self._token)


class ClientConnection(asyncio.Protocol):
    """One stream after the other."""

    def __init__(self, request: bytes, first_s: list[float]) -> None:
        self.finished = 0
        self._request = request
        self._first_s = first_s
        self._transport: asyncio.Transport | None = None
        self._sent_s = 0.0
        self._waiting = False
        self._tail = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)
        self._ask()

    def connection_lost(self, exc: Exception | None) -> None:
        if self._transport is not None:
            raise SystemExit(f"the connection broke: {exc}")

    def stop(self) -> None:
        transport, self._transport = self._transport, None
        if transport is not None:
            transport.abort()

    def data_received(self, data: bytes) -> None:
        if self._waiting and b"data: " in data:
            self._waiting = False
            self._first_s.append(CLOCK.monotonic_s() - self._sent_s)
        tail = self._tail + data
        if tail.endswith(b"\r\n0\r\n\r\n"):
            self._tail = b""
            self.finished += 1
            self._ask()
        else:
            self._tail = tail[-8:]

    def _ask(self) -> None:
        if self._transport is not None:
            self._waiting = True
            self._sent_s = CLOCK.monotonic_s()
            self._transport.write(self._request)


async def upstream(token_ms: float) -> None:
    loop = asyncio.get_running_loop()
    server = await loop.create_server(lambda: EngineConnection(token_ms / 1000), "127.0.0.1", 0, backlog=512)
    _say(server.sockets[0].getsockname()[1])
    await server.serve_forever()


async def gateway(port: int) -> None:
    proxy = Gateway(GatewaySettings(port=0), CLOCK)
    await proxy.start()
    proxy.route(Upstream("engine", "127.0.0.1", port))
    _say(proxy.port)
    await asyncio.Event().wait()


async def client(port: int, streams: int, seconds_s: float) -> None:
    head = (
        f"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nUser-Agent: bench\r\nAccept: */*\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(BODY)}\r\n\r\n"
    )
    first_s: list[float] = []
    loop = asyncio.get_running_loop()
    connections = []
    for k in range(streams):
        made, connection = await loop.create_connection(
            lambda: ClientConnection(head.encode() + BODY, first_s), "127.0.0.1", port
        )
        del made
        connections.append(connection)
        await asyncio.sleep(0.4 / streams if k else 0)  # spread: nobody's streams start in one instant
    await asyncio.sleep(0.5)
    first_s.clear()
    before, begin_s = sum(connection.finished for connection in connections), CLOCK.monotonic_s()
    await asyncio.sleep(seconds_s)
    finished = sum(connection.finished for connection in connections) - before
    passed_s = CLOCK.monotonic_s() - begin_s
    everything = sum(connection.finished for connection in connections)
    for connection in connections:
        connection.stop()
    ordered = statistics.quantiles(first_s, n=100)
    _say(
        {
            "all_requests": everything,
            "requests_per_s": finished / passed_s,
            "ttft_p50_ms": 1000 * ordered[49],
            "ttft_p99_ms": 1000 * ordered[98],
        }
    )


def _say(value: object) -> None:
    sys.stdout.write(json.dumps(value) + "\n")
    sys.stdout.flush()


def main(role: str, core: str, *arguments: str) -> None:
    if core != "-":
        os.sched_setaffinity(0, {int(core)})
    numbers = [float(argument) for argument in arguments]
    if role == "upstream":
        uvloop.run(upstream(numbers[0]))
    elif role == "gateway":
        uvloop.run(gateway(int(numbers[0])))
    else:
        uvloop.run(client(int(numbers[0]), int(numbers[1]), numbers[2]))


if __name__ == "__main__":
    main(*sys.argv[1:])
