"""Reads a stream of server-sent events as it passes. Pure: bytes in, bytes and a tally out.

What comes out is what went in, byte for byte, apart from the usage event that the client did not ask
for. Events come out whole, so that a stream can be broken off cleanly at any time.
"""

from __future__ import annotations

import json
import re
from typing import Any, Final

from rlgov.engine.gateway.paths import Kind
from rlgov.engine.gateway.tally import Tally, read_event

_END: Final = re.compile(rb"\r?\n\r?\n")
_LONGEST_END: Final = 4
_DONE: Final = b"[DONE]"
_GOES_ON: Final = b'"finish_reason":null'
_FIRST_CHOICE: Final = b'"index":0,'


class StreamObserver:
    """Observes one stream.

    Args:
        kind: The API whose events these are.
        strips_usage: Leave out the event that holds nothing but the usage.
        max_event_bytes: A longer event counts as a failure of the engine.
    """

    def __init__(self, kind: Kind, *, strips_usage: bool, max_event_bytes: int) -> None:
        self.tally = Tally()
        self.done = False  # the closing mark of a stream of choices has come
        self._choices = kind is Kind.CHOICES
        self._read = read_event(kind)
        self._strips_usage = strips_usage
        self._max_event_bytes = max_event_bytes
        self._rest = b""
        self._searched = 0  # of the rest, known to hold no end

    def feed(self, data: bytes) -> bytes:
        """Take the next bytes and return what may go to the client.

        Stops in front of the event with which the engine fails or refuses: see the tally.
        """
        if self._rest:
            data = self._rest + data
        passed: list[bytes] = []
        begin, search_from = 0, self._searched
        plain = b"\r" not in data  # nearly always, and then the end is found several times faster
        while (end := _end_of_event(data, search_from, plain=plain)) > 0:
            event = data[begin:end]
            passes = self._passes(event)
            if self.tally.failure or self.tally.refusal:
                self._rest = data[begin:]
                self._searched = 0
                return b"".join(passed)
            if passes:
                passed.append(event)
            begin = search_from = end
        self._rest = data[begin:]
        self._searched = max(0, len(self._rest) - _LONGEST_END + 1)
        if len(self._rest) > self._max_event_bytes:
            self.tally.failure = f"the engine sent an event of more than {self._max_event_bytes} bytes"
        return passed[0] if len(passed) == 1 else b"".join(passed)

    def rest(self) -> bytes:
        """What came after the last whole event, or from the failing one on."""
        return self._rest

    def _passes(self, event: bytes) -> bool:
        """Take note of one event; False when the client shall not see it."""
        tally = self.tally
        if (
            self._choices
            and tally.token_events
            and _GOES_ON in event
            and _FIRST_CHOICE in event
            and b'"usage":' not in event
        ):
            tally.token_events += 1  # one more token of the only choice: not worth parsing
            tally.unfinished.add(0)
            return True
        payload = _payload(event)
        if not payload:
            return True
        if payload == _DONE:
            self.done = True
            if not tally.failure and (tally.unfinished or tally.finish_reason is None):
                tally.failure = "the engine closed the stream without a finish reason"
            return True
        document = _parsed(payload)
        if document is None:
            return True
        self._read(tally, document)
        return not (self._strips_usage and document.get("choices") == [] and document.get("usage"))


def _end_of_event(data: bytes, search_from: int, *, plain: bool) -> int:
    """Where the first event ends; 0 when it does not."""
    if plain:
        at = data.find(b"\n\n", search_from)
        return at + 2 if at >= 0 else 0
    found = _END.search(data, search_from)
    return found.end() if found is not None else 0


def _payload(event: bytes) -> bytes:
    """The data of an event, as the specification puts its lines together."""
    if event.startswith(b"data: ") and event.count(b"\n") == 2 and b"\r" not in event:  # noqa: PLR2004  # its own end
        return event[6:-2]
    lines = [line[5:] for line in event.splitlines() if line.startswith(b"data:")]
    return b"\n".join(line.removeprefix(b" ") for line in lines)


def _parsed(payload: bytes) -> dict[str, Any] | None:
    try:
        document = json.loads(payload)
    except (ValueError, RecursionError):
        return None
    return document if isinstance(document, dict) else None
