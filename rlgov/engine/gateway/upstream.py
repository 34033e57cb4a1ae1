"""Connections to engines: one request at a time on each, kept for the next."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Protocol, cast

import httptools

from rlgov.engine.gateway.wire import ResponseHead

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rlgov.clock import Clock
    from rlgov.engine.gateway.settings import GatewaySettings

_MAX_HEAD_BYTES: Final = 256 * 1024  # of a response; an engine in order stays far below
_NO_BODY: Final = frozenset({204, 304})
_INFORMATIONAL: Final = 200  # below: the real one follows, or an upgrade nobody asked for


@dataclass(frozen=True, slots=True)
class Upstream:
    """Where an engine listens."""

    engine_id: str
    host: str
    port: int

    @property
    def authority(self) -> bytes:
        """Host and port as in a Host header."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{host}:{self.port}".encode()


class Sink(Protocol):
    """Who receives a response. After ``on_end`` or ``on_lost`` nothing more comes."""

    def on_head(self, head: ResponseHead) -> None:
        """The head has come."""
        ...

    def on_body(self, data: bytes) -> None:
        """Some of the body has come."""
        ...

    def on_end(self) -> None:
        """The response is complete; the connection has gone back to its pool."""
        ...

    def on_lost(self, why: str, *, untouched: bool) -> None:
        """The connection broke before the end; ``untouched``: it was a kept one, and no byte came back."""
        ...


class UpstreamConnection(asyncio.Protocol):
    """One connection to an engine."""

    def __init__(self, pool: Pool, upstream: Upstream) -> None:
        self.upstream = upstream
        self.idle_since_s = 0.0
        self.heard_s = 0.0
        self._pool = pool
        self._transport: asyncio.Transport | None = None
        self._sink: Sink | None = None
        self._parser = httptools.HttpResponseParser(self)
        self._headers: list[tuple[bytes, bytes]] = []
        self._head_bytes = 0
        self._body: list[bytes] = []
        self._head_request = False
        self._reused = False
        self._heard = False  # a byte of the present response
        self._begun = False  # its head
        self._until_close = False
        self._complete = False
        self._keep = True

    # What the owner calls.

    def send(self, sink: Sink, data: Sequence[bytes], *, head_request: bool) -> None:
        """Send a request; the answer goes to ``sink``."""
        self._sink = sink
        self._head_request = head_request
        self._heard = self._begun = self._complete = self._until_close = False
        self._head_bytes = 0
        self._headers = []
        self.heard_s = self._pool.now_s()
        if self._transport is not None:
            self._transport.writelines(data)

    @property
    def usable(self) -> bool:
        """Whether another request may be sent."""
        return self._transport is not None and not self._transport.is_closing()

    @property
    def busy(self) -> bool:
        """Whether a response is under way."""
        return self._sink is not None

    def pause(self) -> None:
        """Read no more for now: the client does not keep up."""
        if self._transport is not None and not self._transport.is_closing():
            self._transport.pause_reading()

    def resume(self) -> None:
        """Read on."""
        if self._transport is not None and not self._transport.is_closing():
            self._transport.resume_reading()

    def abort(self) -> None:
        """Close at once, whatever is under way. The engine stops working on it."""
        self._sink = None
        if self._transport is not None:
            self._transport.abort()

    def fail(self, why: str) -> None:
        """Close at once, and tell the receiver."""
        sink, self._sink = self._sink, None
        if self._transport is not None:
            self._transport.abort()
        if sink is not None:
            sink.on_lost(why, untouched=False)

    # What the event loop calls.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Connected."""
        self._transport = cast("asyncio.Transport", transport)
        self.idle_since_s = self._pool.now_s()
        self._pool.add(self)

    def connection_lost(self, exc: Exception | None) -> None:
        """The engine closed, or died."""
        self._transport = None
        self._pool.forget(self)
        sink, self._sink = self._sink, None
        if sink is None:
            return
        if self._until_close and self._begun and exc is None:
            sink.on_end()
            return
        why = "closed the connection" if exc is None else f"lost the connection ({exc})"
        sink.on_lost(f"engine {self.upstream.engine_id} {why}", untouched=self._reused and not self._heard)

    def data_received(self, data: bytes) -> None:
        """Bytes of the response."""
        if self._sink is None:
            self.abort()  # nothing was asked
            return
        self._heard = True
        self.heard_s = self._pool.now_s()
        if not self._begun:
            self._head_bytes += len(data)
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            self.fail(f"engine {self.upstream.engine_id} sent what is not HTTP: {error}")
            return
        except httptools.HttpParserUpgrade:
            self.fail(f"engine {self.upstream.engine_id} switched protocols unasked")
            return
        if not self._begun and self._head_bytes > _MAX_HEAD_BYTES:
            self.fail(f"engine {self.upstream.engine_id} sent a head of more than {_MAX_HEAD_BYTES} bytes")
            return
        if self._body and self._sink is not None:
            body, self._body = self._body, []
            self._sink.on_body(body[0] if len(body) == 1 else b"".join(body))
        if self._complete:
            self._end()

    # What the parser calls.

    def on_header(self, name: bytes, value: bytes) -> None:
        """One header; those after the body are trailers, which nobody reads."""
        if not self._begun:
            self._headers.append((name, value))

    def on_headers_complete(self) -> None:
        """The head is complete."""
        if self._complete:
            self._keep = False  # a second response to one request: not to be trusted with another
            return
        status = self._parser.get_status_code()
        if status < _INFORMATIONAL:
            self._headers = []
            return
        length: int | None = None
        chunked = False
        for name, value in self._headers:
            key = name.lower()
            if key == b"content-length":
                length = int(value)
            elif key == b"transfer-encoding":
                chunked = True
        self._keep = self._parser.should_keep_alive()
        self._begun = True
        bare = self._head_request or status in _NO_BODY
        self._until_close = not bare and length is None and not chunked
        if self._head_request:
            # The parser expects the body that the length announces: this connection ends here.
            self._complete = True
            self._keep = False
        if self._sink is not None:
            self._sink.on_head(ResponseHead(status, self._headers, length))

    def on_body(self, data: bytes) -> None:
        """Some of the body."""
        if not self._complete:
            self._body.append(data)

    def on_message_complete(self) -> None:
        """The end of a message, be it an informational one."""
        if self._begun:
            self._complete = True

    def _end(self) -> None:
        sink, self._sink = self._sink, None
        self._body = []
        if self._keep and self.usable:
            self._reused = True
            self._pool.give_back(self)
        elif self._transport is not None:
            self._transport.close()
        if sink is not None:
            sink.on_end()


class Pool:
    """Kept connections by engine.

    Args:
        settings: Timeouts.
        clock: The time.
    """

    def __init__(self, settings: GatewaySettings, clock: Clock) -> None:
        self.now_s = clock.monotonic_s
        self._settings = settings
        self._idle: dict[Upstream, list[UpstreamConnection]] = {}
        self._all: set[UpstreamConnection] = set()
        self.empty = asyncio.Event()
        self.empty.set()

    def take(self, upstream: Upstream) -> UpstreamConnection | None:
        """A kept connection; None when a new one is needed."""
        idle = self._idle.get(upstream)
        oldest_s = self.now_s() - self._settings.upstream_keepalive_s
        while idle:
            connection = idle.pop()
            if connection.usable and connection.idle_since_s > oldest_s:
                return connection
            connection.abort()
        return None

    async def connect(self, upstream: Upstream) -> UpstreamConnection:
        """A new connection. Raises OSError (TimeoutError included) when the engine cannot be reached."""
        loop = asyncio.get_running_loop()
        async with asyncio.timeout(self._settings.connect_timeout_s):
            _, connection = await loop.create_connection(
                lambda: UpstreamConnection(self, upstream), upstream.host, upstream.port
            )
        return connection

    def add(self, connection: UpstreamConnection) -> None:
        """A connection is open."""
        self._all.add(connection)
        self.empty.clear()

    def give_back(self, connection: UpstreamConnection) -> None:
        """Keep a connection for the next request."""
        connection.resume()
        connection.idle_since_s = self.now_s()
        self._idle.setdefault(connection.upstream, []).append(connection)

    def forget(self, connection: UpstreamConnection) -> None:
        """A connection is closed."""
        self._all.discard(connection)
        if not self._all:
            self.empty.set()
        idle = self._idle.get(connection.upstream)
        if idle is not None:
            if connection in idle:
                idle.remove(connection)
            if not idle:
                del self._idle[connection.upstream]

    def sweep(self) -> None:
        """Close what has been unused, and fail what has been silent, for too long."""
        now_s = self.now_s()
        silence_s = self._settings.upstream_idle_timeout_s
        for connection in list(self._all):
            if not connection.busy:
                if now_s - connection.idle_since_s >= self._settings.upstream_keepalive_s:
                    connection.abort()
            elif silence_s is not None and now_s - connection.heard_s >= silence_s:
                connection.fail(f"engine {connection.upstream.engine_id} was silent for {silence_s:g} s")

    def retire(self, upstream: Upstream | None) -> None:
        """Close the unused connections to every engine but this one."""
        for other, idle in list(self._idle.items()):
            if other != upstream:
                for connection in list(idle):
                    connection.abort()

    def close(self) -> None:
        """Close everything at once."""
        for connection in list(self._all):
            connection.abort()
