"""The two ends of a gateway as bare sockets: an engine with a script, and a client that sees bytes."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any, TypeVar

import httptools
import uvloop

from rlgov.clock import Clock, SystemClock
from rlgov.engine.gateway.gateway import Gateway, GatewaySettings, Upstream

ResultT = TypeVar("ResultT")

PATIENCE_S = 30.0  # for what takes milliseconds on an idle machine
DONE = b"data: [DONE]\n\n"
STREAM_HEAD = (
    b"HTTP/1.1 200 OK\r\nserver: uvicorn\r\ncontent-type: text/event-stream; charset=utf-8\r\n"
    b"transfer-encoding: chunked\r\n\r\n"
)


def run(work: Coroutine[Any, Any, ResultT]) -> ResultT:
    """Run a test on the loop that serves in production, and not for ever."""

    async def bounded() -> ResultT:
        async with asyncio.timeout(2 * PATIENCE_S):
            return await work

    return uvloop.run(bounded())


async def eventually(condition: Callable[[], object]) -> None:
    """Wait until something holds."""
    async with asyncio.timeout(PATIENCE_S):
        while not condition():  # noqa: ASYNC110  # what is waited for has no event
            await asyncio.sleep(0.002)


def event(document: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(document, separators=(",", ":")).encode() + b"\n\n"


def token(text: str = "a", reason: str | None = None, index: int = 0) -> bytes:
    return event({"id": "cmpl-1", "choices": [{"index": index, "text": text, "finish_reason": reason}]})


def usage(prompt: int = 7, output: int = 3) -> bytes:
    counts = {"prompt_tokens": prompt, "completion_tokens": output, "total_tokens": prompt + output}
    return event({"id": "cmpl-1", "choices": [], "usage": counts})


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


def stream_of(*events: bytes, end: bool = True) -> bytes:
    """A whole response that streams these events, each in a chunk."""
    return STREAM_HEAD + b"".join(map(chunk, events)) + (b"0\r\n\r\n" if end else b"")


def answer_of(body: bytes | dict[str, Any], status: int = 200, kind: str = "application/json") -> bytes:
    """A whole response with a length."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    return (
        f"HTTP/1.1 {status} X\r\ncontent-type: {kind}\r\ncontent-length: {len(data)}\r\n\r\n".encode() + data
    )


def completion(text: str = "aaa", reason: str = "length", tokens: int = 3) -> dict[str, Any]:
    return {
        "id": "cmpl-1",
        "choices": [{"index": 0, "text": text, "finish_reason": reason}],
        "usage": {"prompt_tokens": 7, "completion_tokens": tokens, "total_tokens": 7 + tokens},
    }


WHOLE_STREAM = stream_of(token(), token(), token(reason="length"), usage(), DONE)


@dataclass
class Heard:
    """One request as it came to the engine."""

    method: str
    target: str
    headers: dict[str, str]
    body: bytes
    connection: int  # the how-manieth
    number: int = 0  # among all that the engine has heard


@dataclass
class Line:
    """The connection a script answers on."""

    writer: asyncio.StreamWriter

    async def write(self, *data: bytes) -> None:
        for piece in data:
            self.writer.write(piece)
            await self.writer.drain()

    def abort(self) -> None:
        self.writer.transport.abort()


Script = Callable[[Heard, Line], Awaitable[None]]


@dataclass
class ScriptedEngine:
    """Answers each request as the script says; knows which connections were closed in the middle."""

    script: Script
    heard: list[Heard] = field(default_factory=list)
    connections: int = 0
    abandoned: int = 0
    port: int = 0

    async def _converse(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        number = self.connections
        try:
            while not writer.is_closing():
                heard = await _read_request(reader, number)
                self.heard.append(heard)
                heard.number = len(self.heard)
                answering = asyncio.ensure_future(self.script(heard, Line(writer)))
                watching = asyncio.ensure_future(reader.read(1))
                await asyncio.wait({answering, watching}, return_when=asyncio.FIRST_COMPLETED)
                if not answering.done() or isinstance(answering.exception(), ConnectionError):
                    self.abandoned += 1
                for task in (answering, watching):
                    task.cancel()
                    with contextlib.suppress(asyncio.CancelledError, ConnectionError):
                        await task
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()
            with contextlib.suppress(ConnectionError):
                await writer.wait_closed()

    def upstream(self, engine_id: str = "one") -> Upstream:
        return Upstream(engine_id, "127.0.0.1", self.port)


async def _read_request(reader: asyncio.StreamReader, connection: int) -> Heard:
    head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
    first, *lines = head.split("\r\n")[:-2]
    method, target, _ = first.split(" ")
    headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}
    body = await reader.readexactly(int(headers.get("content-length", "0")))
    return Heard(method, target, headers, body, connection)


@contextlib.asynccontextmanager
async def scripted(script: Script | bytes) -> AsyncIterator[ScriptedEngine]:
    """An engine; bytes stand for the answer to every request."""

    async def say(_heard: Heard, line: Line) -> None:
        await line.write(script if isinstance(script, bytes) else b"")

    engine = ScriptedEngine(say if isinstance(script, bytes) else script)
    tasks: set[asyncio.Task[None]] = set()
    writers: set[asyncio.StreamWriter] = set()

    def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        # At once, not in the task: one that is cancelled before its first step would leave the socket open.
        writers.add(writer)
        task = asyncio.get_running_loop().create_task(engine._converse(reader, writer))
        tasks.add(task)
        task.add_done_callback(tasks.discard)

    server = await asyncio.start_server(accept, "127.0.0.1", 0, limit=2**22)
    engine.port = server.sockets[0].getsockname()[1]
    try:
        yield engine
    finally:
        server.close()
        for task in list(tasks):
            task.cancel()
        for outcome in await asyncio.gather(*tasks, return_exceptions=True):
            if isinstance(outcome, Exception):
                raise outcome
        for writer in writers:
            writer.transport.abort()
        await asyncio.sleep(0)


@contextlib.asynccontextmanager
async def proxy(
    upstream: Upstream | None, clock: Clock | None = None, **settings: Any
) -> AsyncIterator[Gateway]:
    """A gateway on a port of its own."""
    gateway = Gateway(GatewaySettings(port=0, **settings), clock or SystemClock())
    await gateway.start()
    gateway.route(upstream)
    try:
        yield gateway
    finally:
        await gateway.close()


@dataclass
class Response:
    """One response as it came to the client."""

    status: int
    headers: list[tuple[str, str]]
    body: bytes
    complete: bool  # it ended as HTTP says an answer ends

    def header(self, name: str) -> str:
        return next((value for key, value in self.headers if key.lower() == name), "")

    @property
    def events(self) -> list[bytes]:
        return [one + b"\n\n" for one in self.body.split(b"\n\n") if one]


class _Parser:
    def __init__(self) -> None:
        self.parser = httptools.HttpResponseParser(self)
        self.reset()

    def reset(self) -> None:
        self.response = Response(0, [], b"", complete=False)

    def on_header(self, name: bytes, value: bytes) -> None:
        self.response.headers.append((name.decode(), value.decode()))

    def on_headers_complete(self) -> None:
        self.response.status = self.parser.get_status_code()

    def on_body(self, body: bytes) -> None:
        self.response.body += body

    def on_message_complete(self) -> None:
        self.response.complete = True


class RawClient:
    """A connection to a gateway."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer
        self.raw = b""  # what came and belongs to no response yet

    @classmethod
    async def to(cls, gateway: Gateway) -> RawClient:
        return cls(*await asyncio.open_connection("127.0.0.1", gateway.port, limit=2**22))

    async def send(self, data: bytes) -> None:
        self.writer.write(data)
        await self.writer.drain()

    async def response(self) -> Response:
        """The next response, complete or as far as it came."""
        parser = _Parser()
        while True:
            # By single bytes where one response may end and the next begin, so that none is lost.
            data, self.raw = self.raw, b""
            for k in range(len(data)):
                parser.parser.feed_data(data[k : k + 1])
                if parser.response.complete and parser.response.status >= 200:
                    self.raw = data[k + 1 :]
                    return parser.response
                if parser.response.complete:
                    parser.reset()  # an informational one
            try:
                self.raw = await self.reader.read(2**16)
            except ConnectionError:
                self.raw = b""
            if not self.raw:
                return parser.response

    async def rest(self) -> bytes:
        """Everything up to the end of the connection."""
        with contextlib.suppress(ConnectionError):
            while data := await self.reader.read(2**16):
                self.raw += data
        return self.raw

    async def close(self) -> None:
        self.writer.close()
        with contextlib.suppress(ConnectionError):
            await self.writer.wait_closed()


def post(
    body: bytes | dict[str, Any], path: str = "/v1/completions", headers: str = "", version: str = "1.1"
) -> bytes:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    return (
        f"POST {path} HTTP/{version}\r\nHost: gw\r\nContent-Length: {len(data)}\r\n{headers}\r\n".encode()
        + data
    )


def get(path: str, headers: str = "") -> bytes:
    return f"GET {path} HTTP/1.1\r\nHost: gw\r\n{headers}\r\n".encode()


async def ask(gateway: Gateway, request: bytes) -> Response:
    """One request on a connection of its own."""
    client = await RawClient.to(gateway)
    try:
        await client.send(request)
        return await client.response()
    finally:
        await client.close()


def metric(page: bytes, name: str) -> float:
    """One value of a metrics page."""
    found = re.search(rb"^" + re.escape(name.encode()) + rb" (\S+)$", page, re.MULTILINE)
    assert found, name
    return float(found[1])
