"""HTTP/1.1 as bytes: heads, chunks and error bodies. Nothing here does I/O."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from http import HTTPStatus
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterable

Headers = list[tuple[bytes, bytes]]

HOP_BY_HOP: Final = frozenset(
    {
        b"connection",
        b"keep-alive",
        b"proxy-authenticate",
        b"proxy-authorization",
        b"proxy-connection",
        b"te",
        b"trailer",
        b"transfer-encoding",
        b"upgrade",
    }
)
LAST_CHUNK: Final = b"0\r\n\r\n"
CONTINUE: Final = b"HTTP/1.1 100 Continue\r\n\r\n"

_REQUEST_ID: Final = re.compile(rb"[\x21-\x7e]{1,128}")

_NOT_FORWARDED: Final = HOP_BY_HOP | {
    b"content-length",
    b"expect",
    b"host",
    b"x-forwarded-for",
    b"x-request-id",
}
_NOT_RETURNED: Final = HOP_BY_HOP | {b"content-length", b"x-request-id"}
_REASONS: Final = {status.value: status.phrase.encode() for status in HTTPStatus}
_STATUS_LINES: Final = {code: b"HTTP/1.1 %d %b\r\n" % (code, phrase) for code, phrase in _REASONS.items()}
_TYPES: Final = {
    400: "BadRequestError",
    403: "PermissionDeniedError",
    404: "NotFoundError",
    408: "RequestTimeoutError",
    413: "RequestTooLargeError",
    502: "BadGatewayError",
    503: "ServiceUnavailableError",
}


@dataclass(slots=True)
class Request:
    """One complete request as it was read from a client."""

    method: bytes
    target: bytes
    headers: Headers
    body: bytes
    http_1_1: bool
    keep_alive: bool
    peer: str
    request_id: str = ""


@dataclass(frozen=True, slots=True)
class ResponseHead:
    """Head of an engine's response."""

    status: int
    headers: Headers
    length_bytes: int | None  # None: chunked, or until the connection closes

    def header(self, name: bytes) -> bytes:
        """Value of the header of this lower-case name; empty when it is absent."""
        return header(self.headers, name)


def header(headers: Headers, name: bytes) -> bytes:
    """Value of the first header of this lower-case name; empty when it is absent."""
    for key, value in headers:
        if key.lower() == name:
            return value
    return b""


def _named_by_connection(headers: Headers) -> set[bytes]:
    """Headers that the Connection header declares to be for one hop."""
    named: set[bytes] = set()
    for key, value in headers:
        if key.lower() == b"connection":
            named.update(part.strip().lower() for part in value.split(b","))
    return named


def objection_to_head(
    headers: Headers, version: str, *, upgrade: bool, max_body_bytes: int
) -> tuple[int, str] | None:
    """Why a well-formed request head is not taken, with the status that says so; None when it is."""
    if upgrade or version not in {"1.0", "1.1"}:
        return 501, "only HTTP/1.1 is spoken here: no upgrades to WebSocket or HTTP/2, no CONNECT"
    hosts = 0
    for key, value in headers:
        name = key.lower()
        if name == b"content-length" and int(value) > max_body_bytes:
            return 413, f"the body has more than {max_body_bytes} bytes"
        if name == b"transfer-encoding" and value.strip().lower() != b"chunked":
            return 501, "the only transfer encoding spoken here is chunked"
        if name == b"expect" and value.strip().lower() != b"100-continue":
            return 417, "the only expectation met here is 100-continue"
        hosts += name == b"host"
    if hosts > 1 or (hosts == 0 and version == "1.1"):
        return 400, "a request needs exactly one Host header"
    return None


def usable_request_id(value: bytes) -> str | None:
    """The client's request id, unless it could do harm in a log or a header."""
    return value.decode("ascii") if _REQUEST_ID.fullmatch(value) else None


def request_head(request: Request, authority: bytes, body_bytes: int, *, identity: bool) -> bytes:
    """Head of the request as it goes to an engine.

    Args:
        request: What the client sent.
        authority: Host of the engine, used when the client named none.
        body_bytes: Length of the body that follows.
        identity: Ask for an answer without compression, because it has to be read here.
    """
    headers = request.headers
    one_hop = _named_by_connection(headers)
    lines = [b"%b %b HTTP/1.1\r\n" % (request.method, request.target)]
    host = authority
    forwarded = request.peer.encode()
    for key, value in headers:
        name = key.lower()
        if name in _NOT_FORWARDED:
            if name == b"host":
                host = value
            elif name == b"x-forwarded-for":
                forwarded = value + b", " + forwarded if forwarded else value
            continue
        if name in one_hop or (identity and name == b"accept-encoding"):
            continue
        lines.append(b"%b: %b\r\n" % (key, value))
    lines.append(b"Host: %b\r\nX-Request-Id: %b\r\n" % (host, request.request_id.encode()))
    if forwarded:
        lines.append(b"X-Forwarded-For: %b\r\n" % forwarded)
    if body_bytes or request.method not in {b"GET", b"HEAD", b"OPTIONS", b"DELETE"}:
        lines.append(b"Content-Length: %d\r\n" % body_bytes)
    lines.append(b"\r\n")
    return b"".join(lines)


def response_head(head: ResponseHead, request_id: str, framing: bytes) -> bytes:
    """Head of an engine's response as it goes to the client; ``framing`` are lines of headers of ours."""
    one_hop = _named_by_connection(head.headers)
    lines = [status_line(head.status)]
    lines += [
        b"%b: %b\r\n" % (key, value)
        for key, value in head.headers
        if (name := key.lower()) not in _NOT_RETURNED and name not in one_hop
    ]
    lines.append(b"X-Request-Id: %b\r\n%b\r\n" % (request_id.encode(), framing))
    return b"".join(lines)


def status_line(status: int) -> bytes:
    """The first line of a response."""
    return _STATUS_LINES.get(status) or b"HTTP/1.1 %d Unknown\r\n" % status


def chunk(data: bytes) -> bytes:
    """One chunk of a chunked body; ``data`` must not be empty, which would end the body."""
    return b"%x\r\n%b\r\n" % (len(data), data)


def own_response(
    status: int,
    body: bytes,
    *,
    content_type: bytes = b"application/json",
    headers: Iterable[tuple[bytes, bytes]] = (),
    keep_alive: bool = True,
    head_only: bool = False,
) -> bytes:
    """A whole response of the gateway's own."""
    lines = [status_line(status), b"Content-Type: %b\r\nContent-Length: %d\r\n" % (content_type, len(body))]
    lines += [b"%b: %b\r\n" % pair for pair in headers]
    if not keep_alive:
        lines.append(b"Connection: close\r\n")
    lines.append(b"\r\n")
    if not head_only:
        lines.append(body)
    return b"".join(lines)


def error_body(status: int, message: str) -> bytes:
    """An error as OpenAI's clients expect it."""
    kind = _TYPES.get(status, "GatewayError")
    error = {"message": message, "type": kind, "param": None, "code": status}
    return json.dumps({"error": error}, ensure_ascii=True).encode()


def error_event(status: int, message: str) -> bytes:
    """The same as an event of a stream."""
    return b"data: " + error_body(status, message) + b"\n\n"
