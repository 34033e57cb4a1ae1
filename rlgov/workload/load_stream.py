"""Reading a streamed answer cheaply: events are counted, only the first and the last ones are parsed."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

END_OF_EVENT = b"\n\n"
DONE = "[DONE]"
TAIL_BYTES = 16_384  # holds the last token, the usage and [DONE] many times over
ERROR_CHARACTERS = 300
HEAD_LIMIT_BYTES = 1_000_000  # an event longer than this is none


@dataclass(frozen=True, slots=True)
class StreamEnd:
    """What the last events of a stream said."""

    done: bool  # the stream ended with [DONE]
    finish_reason: str | None
    prompt_tokens: int | None
    output_tokens: int | None
    cached_tokens: int | None
    error: str | None  # of an event that carried an error


class StreamScan:
    """Collects one stream. ``events`` counts the complete ones, [DONE] and usage included."""

    def __init__(self) -> None:
        self.events = 0
        self._head: bytes | None = b""  # the first event until it is complete, then None
        self._tail = b""
        self.first_is_token = False

    @property
    def head_seen(self) -> bool:
        """Whether the first event is complete. ``first_is_token`` then says if it carried a token."""
        return self._head is None

    def feed(self, data: bytes) -> None:
        """Take the next bytes of the stream."""
        data = data.replace(b"\r", b"")  # lines may end with CR LF, and JSON has no bare CR
        # A separator may lie across two reads.
        if self._tail[-1:] == b"\n" and data[:1] == b"\n" and self._tail[-2:] != END_OF_EVENT:
            self.events += 1 + data[1:].count(END_OF_EVENT)
        else:
            self.events += data.count(END_OF_EVENT)
        if self._head is not None:
            self._look_at_head(self._head + data)
        self._tail = data[-TAIL_BYTES:] if len(data) >= TAIL_BYTES else (self._tail + data)[-TAIL_BYTES:]

    def _look_at_head(self, head: bytes) -> None:
        self._head = None
        while END_OF_EVENT in head:
            event, _, head = head.partition(END_OF_EVENT)
            if b"data:" in event:  # anything else is a comment, sent to keep the connection open
                first = _event(event.strip())
                self.first_is_token = isinstance(first, dict) and _carries_token(first)
                return
        if len(head) <= HEAD_LIMIT_BYTES:
            self._head = head

    def end(self) -> StreamEnd:
        """Parse the last events. The stream is over, or will not go on."""
        done, reason, error = False, None, None
        prompt = output = cached = None
        for raw in reversed(self._tail.split(END_OF_EVENT)):
            event = _event(raw)
            if event == DONE:
                done = True
            if not isinstance(event, dict):
                continue
            if event.get("error"):
                error = _error_text(event["error"])
            usage = event.get("usage")
            if isinstance(usage, dict) and output is None:
                prompt, output = _count(usage.get("prompt_tokens")), _count(usage.get("completion_tokens"))
                details = usage.get("prompt_tokens_details")
                cached = _count(details.get("cached_tokens")) if isinstance(details, dict) else None
            for choice in _list(event.get("choices")):
                if isinstance(choice, dict) and choice.get("finish_reason"):
                    reason = str(choice["finish_reason"])
            if reason is not None:
                break  # before it come only tokens
        return StreamEnd(done, reason, prompt, output, cached, error)


def _event(raw: bytes) -> object:
    """The JSON object of an event, the text [DONE], or None for anything else."""
    for line in raw.splitlines():
        if line.startswith(b"data:"):
            text = line[5:].strip()
            if text == DONE.encode():
                return DONE
            try:
                return json.loads(text)
            except ValueError:  # also bytes that are no text: the beginning of the tail may be cut anywhere
                return None
    return None


def _carries_token(event: dict[str, Any]) -> bool:
    """An aborted request's only event has choices, too, but no token."""
    choices = [choice for choice in _list(event.get("choices")) if isinstance(choice, dict)]
    return any(choice.get("finish_reason") != "abort" for choice in choices)


def _list(value: object) -> list[Any]:
    return value if isinstance(value, list) else []


def _count(value: object) -> int | None:
    return value if isinstance(value, int) else None


def _error_text(error: object) -> str:
    message = error.get("message") if isinstance(error, dict) else None
    return str(message or error)[:ERROR_CHARACTERS]
