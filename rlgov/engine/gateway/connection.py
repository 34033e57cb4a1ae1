"""Connections of clients: reads requests one after the other, answers them in order."""

from __future__ import annotations

import asyncio
import socket
import struct
from collections import deque
from typing import TYPE_CHECKING, Final, cast

import httptools

from rlgov.engine.gateway.wire import (
    CONTINUE,
    LAST_CHUNK,
    Headers,
    Request,
    ResponseHead,
    chunk,
    error_body,
    header,
    objection_to_head,
    own_response,
    response_head,
)

if TYPE_CHECKING:
    from rlgov.engine.gateway.server import Server, Serving

_LINGER_S: Final = 2.0  # after a refusal: how long what the client still sends is read and thrown away
_WRITE_BUFFER_BYTES: Final = 64 * 1024
_NO_LENGTH: Final = frozenset({204, 304})


class _Refused(Exception):  # noqa: N818  # not an error of ours: a signal out of the parser's callbacks
    """The request cannot be taken."""


class ClientConnection(asyncio.Protocol):
    """One connection of a client. One that closes its sending side counts as gone, as with other proxies.

    Args:
        server: What connections share.
    """

    def __init__(self, server: Server) -> None:
        self.peer = ""
        self._server = server
        self._settings = server.settings
        self._transport: asyncio.Transport | None = None
        self._parser = httptools.HttpRequestParser(self)
        self._target = b""
        self._headers: Headers = []
        self._body: list[bytes] = []
        self._body_bytes = 0
        self._head_bytes = 0
        self._arrived_bytes = 0
        self._in_head = True
        self._in_request = False
        self._requests: deque[Request] = deque()
        self._backlog = bytearray()
        self._current: Request | None = None
        self._serving: Serving | None = None
        self._chunked = False
        self._delimited = True  # the client can tell where the answer ends
        self._refusal: tuple[int, str] | None = None
        self._lingering = False
        self._last = False  # no request after the present one
        self._slow_since_s: float | None = None
        self._deadline_s: float | None = None
        self._continue_due = False
        self._out: list[bytes] = []

    # What the event loop calls.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """A client connected."""
        self._transport = cast("asyncio.Transport", transport)
        self._transport.set_write_buffer_limits(high=_WRITE_BUFFER_BYTES)
        address = transport.get_extra_info("peername")
        self.peer = str(address[0]) if isinstance(address, tuple) else ""
        server = self._server
        server.connections.add(self)
        server.empty.clear()
        self._deadline_s = server.now_s() + self._settings.header_timeout_s
        if len(server.connections) > self._settings.max_connections:
            self._refuse(503, f"more than {self._settings.max_connections} connections; try again later")

    def connection_lost(self, exc: Exception | None) -> None:
        """The client closed, or we did."""
        del exc
        self._transport = None
        server = self._server
        server.connections.discard(self)
        if not server.connections:
            server.empty.set()
        budget = server.budget
        budget.give(self._body_bytes)
        for request in self._requests:
            budget.give(len(request.body))
        self._requests.clear()
        self._body_bytes = 0
        if self._current is not None:
            budget.give(len(self._current.body))
            self._current = None
        serving, self._serving = self._serving, None
        if serving is not None:
            serving.on_client_gone()

    def pause_writing(self) -> None:
        """The client reads slower than we write."""
        self._slow_since_s = self._server.now_s()
        if self._serving is not None:
            self._serving.on_client_slow()

    def resume_writing(self) -> None:
        """The client has caught up."""
        self._slow_since_s = None
        if self._serving is not None:
            self._serving.on_client_ready()
        elif self._current is None:
            self._advance()

    def data_received(self, data: bytes) -> None:
        """Bytes of a request."""
        self._server.received_bytes += len(data)
        if self._lingering or self._refusal is not None:
            return
        if self._current is not None or self._requests:
            # Pipelined: read later. Reading goes on as long as it is not too much, to see the client leave.
            self._backlog += data
            if len(self._backlog) > self._settings.max_pipelined_bytes and self._transport is not None:
                self._transport.pause_reading()
            return
        self._feed(data)
        self._advance()

    # What the parser calls.

    def on_message_begin(self) -> None:
        """First byte of a request."""
        self._in_request = self._in_head = True
        self._target = b""
        self._headers = []
        self._head_bytes = self._arrived_bytes = 0
        self._deadline_s = self._server.now_s() + self._settings.header_timeout_s

    def on_url(self, url: bytes) -> None:
        """Some of the target."""
        self._target += url

    def on_header(self, name: bytes, value: bytes) -> None:
        """One header; those after the body are trailers, which are dropped."""
        if not self._in_head:
            return
        self._head_bytes += len(name) + len(value) + 4
        self._headers.append((name, value))
        if len(self._headers) > self._settings.max_headers:
            self._refuse_while_parsing(431, f"more than {self._settings.max_headers} header fields")

    def on_headers_complete(self) -> None:
        """The head is complete."""
        settings = self._settings
        if self._head_bytes + len(self._target) > settings.max_head_bytes:
            self._refuse_while_parsing(431, f"the head has more than {settings.max_head_bytes} bytes")
        version = self._parser.get_http_version()
        objection = objection_to_head(
            self._headers,
            version,
            upgrade=self._parser.should_upgrade(),
            max_body_bytes=settings.max_body_bytes,
        )
        if objection is not None:
            self._refuse_while_parsing(*objection)
        self._in_head = False
        self._deadline_s = self._server.now_s() + settings.body_timeout_s
        self._continue_due = version == "1.1" and bool(header(self._headers, b"expect"))

    def on_body(self, body: bytes) -> None:
        """Some of the body."""
        self._continue_due = False  # the client did not wait
        if not self._server.budget.take(len(body)):
            self._refuse_while_parsing(503, "too many request bodies are waiting; try again later")
        self._body_bytes += len(body)
        if self._body_bytes > self._settings.max_body_bytes:
            self._refuse_while_parsing(413, f"the body has more than {self._settings.max_body_bytes} bytes")
        self._body.append(body)

    def on_message_complete(self) -> None:
        """A request is complete."""
        body = self._body[0] if len(self._body) == 1 else b"".join(self._body)
        http_1_1 = self._parser.get_http_version() == "1.1"
        self._requests.append(
            Request(
                method=self._parser.get_method(),
                target=self._target,
                headers=self._headers,
                body=body,
                http_1_1=http_1_1,
                keep_alive=http_1_1 and self._parser.should_keep_alive(),
                peer=self.peer,
            )
        )
        self._body = []
        self._body_bytes = 0
        self._in_request = self._continue_due = False
        self._in_head = True

    # What whoever answers calls.

    def begin(self, head: ResponseHead, request_id: str, *, length_bytes: int | None) -> None:
        """Send an answer's head; without a length the body goes in chunks or ends with the connection."""
        request = self._current
        if request is None or self._transport is None:
            return
        close = self._closes_after(request)
        framing = b""
        self._chunked = False
        self._delimited = True
        if length_bytes is not None:
            framing = b"Content-Length: %d\r\n" % length_bytes
        elif request.method == b"HEAD" or head.status in _NO_LENGTH:
            pass
        elif request.http_1_1:
            self._chunked = True
            framing = b"Transfer-Encoding: chunked\r\n"
        else:
            close = True
            self._delimited = False
        if close:
            self._last = True
            framing += b"Connection: close\r\n"
        self._write(response_head(head, request_id, framing))

    def send(self, data: bytes) -> None:
        """Send some of the body."""
        if data:
            self._write(chunk(data) if self._chunked else data)

    def end(self) -> None:
        """The answer is complete."""
        if self._chunked:
            self._write(LAST_CHUNK)
        self._done()

    def break_off(self, data: bytes = b"") -> None:
        """End an answer so that nobody takes it for complete: after ``data`` the connection closes."""
        self.send(data)
        self._last = True
        if self._delimited or self._transport is None:
            self._done()
        else:
            _reset(self._transport)

    def respond(
        self,
        status: int,
        body: bytes,
        *,
        request_id: str = "",
        content_type: bytes = b"application/json",
        headers: tuple[tuple[bytes, bytes], ...] = (),
    ) -> None:
        """Send a whole answer of the gateway's own."""
        request = self._current
        if request is None or self._transport is None:
            return
        close = self._closes_after(request)
        self._last = self._last or close
        extra = [*headers, (b"Date", self._server.date().encode())]
        if request_id:
            extra.append((b"X-Request-Id", request_id.encode()))
        self._write(
            own_response(
                status,
                body,
                content_type=content_type,
                headers=extra,
                keep_alive=not close,
                head_only=request.method == b"HEAD",
            )
        )
        self._chunked = False
        self._done()

    @property
    def slow(self) -> bool:
        """Whether the client does not keep up at present."""
        return self._slow_since_s is not None

    # What the server calls.

    def check(self, now_s: float) -> None:
        """Close when the time is up."""
        if self._slow_since_s is not None and now_s - self._slow_since_s >= self._settings.stall_timeout_s:
            self.abort()
        elif self._current is None and self._deadline_s is not None and now_s >= self._deadline_s:
            if self._lingering or not self._in_request:
                self.abort()
            else:
                self._refuse(408, "the request did not arrive in time")

    def close_when_idle(self) -> None:
        """Close now, or after the answer under way."""
        if self._current is not None:
            self._last = True
        elif not self._in_request:
            self._close()

    def abort(self) -> None:
        """Close at once."""
        if self._transport is not None:
            self._transport.abort()

    # Inside.

    def _closes_after(self, request: Request) -> bool:
        return self._last or not request.keep_alive or self._server.draining

    def _write(self, data: bytes) -> None:
        """Send soon: what comes together, such as a head and the first token, leaves together."""
        if self._transport is None:
            return
        if not self._out:
            asyncio.get_running_loop().call_soon(self._flush)
        self._out.append(data)

    def _flush(self) -> None:
        if not self._out:
            return
        data = self._out[0] if len(self._out) == 1 else b"".join(self._out)
        self._out.clear()
        if self._transport is not None:
            self._server.sent_bytes += len(data)
            self._transport.write(data)

    def _close(self) -> None:
        """Close once everything is sent."""
        self._flush()
        if self._transport is not None:
            self._transport.close()

    def _feed(self, data: bytes) -> None:
        in_head = self._in_head
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade) as error:
            if self._refusal is None:
                self._refusal = (400, f"this is not a request in HTTP/1.1: {error}")
        else:
            if self._in_request and self._in_head and in_head:
                # The parser keeps what it has not told yet to itself, as of one endless header.
                self._arrived_bytes += len(data)
                if self._arrived_bytes > self._settings.max_head_bytes:
                    self._refusal = (431, f"the head has more than {self._settings.max_head_bytes} bytes")
        if self._continue_due and not self._requests and self._refusal is None:
            self._continue_due = False
            self._write(CONTINUE)

    def _advance(self) -> None:
        """Begin with the next request, if nothing is in the way."""
        while self._current is None and not self.slow and self._transport is not None:
            if self._last:
                self._close()
                return
            if self._requests:
                self._begin_next()
            elif self._refusal is not None:
                self._refuse(*self._refusal)
                return
            elif self._backlog:
                data = bytes(self._backlog)
                self._backlog.clear()
                self._transport.resume_reading()
                self._feed(data)
            else:
                return

    def _begin_next(self) -> None:
        request = self._current = self._requests.popleft()
        self._chunked = False
        serving = self._server.serve(self, request)
        if self._current is request:
            self._serving = serving

    def _done(self) -> None:
        request, self._current = self._current, None
        self._serving = None
        if request is None:
            return
        self._server.budget.give(len(request.body))
        if not self._in_request:
            self._deadline_s = self._server.now_s() + self._settings.idle_timeout_s
        if self._last:
            self._close()
            return
        if self._requests or self._backlog or self._refusal is not None:
            # Not at once: a client may have sent thousands of requests ahead.
            asyncio.get_running_loop().call_soon(self._advance)

    def _refuse_while_parsing(self, status: int, message: str) -> None:
        self._refusal = (status, message)
        raise _Refused

    def _refuse(self, status: int, message: str) -> None:
        """Answer what is no usable request, and close; what still comes is read for a moment.

        Closing with unread bytes would reset the connection, and the client might never see the answer.
        """
        transport = self._transport
        if transport is None or transport.is_closing():
            return
        self._refusal = (status, message)
        self._server.refused[status] = self._server.refused.get(status, 0) + 1
        self._write(
            own_response(
                status,
                error_body(status, message),
                headers=[(b"Date", self._server.date().encode())],
                keep_alive=False,
            )
        )
        self._lingering = True
        self._body = []
        self._deadline_s = self._server.now_s() + _LINGER_S
        self._flush()
        if transport.can_write_eof():
            transport.write_eof()


def _reset(transport: asyncio.Transport) -> None:
    """Close with a reset: all that tells a broken answer from a proper end where the end is the close."""
    connection = transport.get_extra_info("socket")
    if connection is not None:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    transport.abort()
