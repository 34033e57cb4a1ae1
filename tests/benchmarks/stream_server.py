"""A server that streams tokens at a fixed pace for next to nothing (a module to be run).

It is what the load generator is measured against, so it does only what that needs: no HTTP but this one
request, no model. Streams are spread over the slots of a period by their arrival.
"""

from __future__ import annotations

import asyncio
import re
import sys
from collections import deque
from typing import cast

import uvloop

PERIOD_S = 0.1  # one token a stream
SLOTS = 20

# As long as vLLM's.
EVENT = (
    b'data: {"id":"cmpl-1","object":"text_completion","created":1,"model":"m","choices":[{"index":0,"text":'
    b'" word","logprobs":null,"finish_reason":null,"stop_reason":null,"token_ids":null}],"usage":null}\n\n'
)
LAST = EVENT.replace(b'"finish_reason":null', b'"finish_reason":"length"')
HEAD = (
    b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\ntransfer-encoding: chunked\r\n\r\n"
)
MODELS = b'{"data":[{"id":"m"}]}'


def chunk(data: bytes) -> bytes:
    """One chunk of a chunked answer."""
    return b"%x\r\n%b\r\n" % (len(data), data)


TOKEN_CHUNK = chunk(EVENT)


class Stream:
    """One answer on its way."""

    __slots__ = ("left", "prompt", "tokens", "transport")

    def __init__(self, transport: asyncio.WriteTransport, prompt: int, tokens: int) -> None:
        self.transport = transport
        self.prompt = prompt
        self.tokens = tokens
        self.left = tokens

    def step(self) -> bool:
        """Send the next token; tells whether there are more."""
        self.left -= 1
        if self.left > 0:
            self.transport.write(TOKEN_CHUNK)
            return True
        usage = b'data: {"choices":[],"usage":{"prompt_tokens":%d,"completion_tokens":%d}}\n\n'
        end = chunk(usage % (self.prompt, self.tokens)) + chunk(b"data: [DONE]\n\n") + b"0\r\n\r\n"
        self.transport.write(chunk(LAST) + end)
        return False


class Connection(asyncio.Protocol):
    """Reads one request after the other."""

    def __init__(self, slots: list[deque[Stream]], now: list[int]) -> None:
        self._slots = slots
        self._now = now
        self._read = b""
        self._transport: asyncio.WriteTransport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.WriteTransport", transport)  # uvloop's has no such base

    def data_received(self, data: bytes) -> None:
        assert self._transport is not None
        self._read += data
        head, found, body = self._read.partition(b"\r\n\r\n")
        if not found:
            return
        if head.startswith(b"GET"):
            self._read = b""
            length = len(MODELS)
            self._transport.write(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n%b" % (length, MODELS))
            return
        told = re.search(rb"content-length: (\d+)", head, re.IGNORECASE)
        if told is None or len(body) < int(told[1]):
            return
        self._read = b""
        asked = re.search(rb'"max_tokens":(\d+)', body)
        tokens = int(asked[1]) if asked else 1
        stream = Stream(self._transport, body.count(b",", body.index(b"[")) + 1, tokens)
        self._transport.write(HEAD)
        if stream.step():
            self._slots[(self._now[0] - 1) % SLOTS].append(stream)


async def main() -> None:
    """Serve until the standard input is closed; the port is the first line of the output."""
    loop = asyncio.get_running_loop()
    slots: list[deque[Stream]] = [deque() for _ in range(SLOTS)]
    now = [0]
    server = await loop.create_server(lambda: Connection(slots, now), "127.0.0.1", 0, backlog=4096)
    sys.stdout.write(f"{server.sockets[0].getsockname()[1]}\n")
    sys.stdout.flush()
    closed = loop.run_in_executor(None, sys.stdin.read)
    begin_s = loop.time()
    while not closed.done():
        slot = slots[now[0] % SLOTS]
        for _ in range(len(slot)):
            stream = slot.popleft()
            if not stream.transport.is_closing() and stream.step():
                slot.append(stream)
        now[0] += 1
        await asyncio.sleep(begin_s + now[0] * PERIOD_S / SLOTS - loop.time())


if __name__ == "__main__":
    uvloop.run(main())
