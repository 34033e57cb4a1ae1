"""The records of requests: those open, and the last of those closed."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from itertools import islice

from rlgov.engine.samples import Outcome, RequestRecord, Traffic


@dataclass(slots=True, eq=False)
class Entry:
    """A record in the making; the fields are :class:`RequestRecord`'s."""

    request_id: str
    arrival_s: float
    dispatched_s: float | None = None
    first_token_s: float | None = None
    last_token_s: float | None = None
    prompt_tokens: int | None = None
    output_tokens: int | None = None
    cached_tokens: int | None = None
    finish_reason: str | None = None
    engine_id: str | None = None
    dispatches: int = 0

    def record(self, outcome: Outcome, finished_s: float | None) -> RequestRecord:
        """As it is now."""
        return RequestRecord(
            request_id=self.request_id,
            arrival_s=self.arrival_s,
            outcome=outcome,
            dispatched_s=self.dispatched_s,
            first_token_s=self.first_token_s,
            last_token_s=self.last_token_s,
            finished_s=finished_s,
            prompt_tokens=self.prompt_tokens,
            output_tokens=self.output_tokens,
            cached_tokens=self.cached_tokens,
            finish_reason=self.finish_reason,
            engine_id=self.engine_id,
            dispatches=self.dispatches,
        )


class Ledger:
    """Open and closed requests.

    Args:
        capacity: Closed records that are kept.
    """

    def __init__(self, capacity: int) -> None:
        self._open: dict[Entry, None] = {}  # in order of arrival
        self._closed: deque[RequestRecord] = deque(maxlen=capacity)
        self._closed_ever = 0

    def enter(self, entry: Entry) -> None:
        """A request arrived."""
        self._open[entry] = None

    def close(self, entry: Entry, outcome: Outcome, now_s: float) -> RequestRecord:
        """A request ended."""
        del self._open[entry]
        record = entry.record(outcome, now_s)
        self._closed.append(record)
        self._closed_ever += 1
        return record

    def traffic(self, after: int, now_s: float) -> Traffic:
        """Everything open, and what was closed after the cursor of an earlier call; 0: all there is."""
        if not 0 <= after <= self._closed_ever:
            after = 0  # a cursor of another gateway
        fresh = self._closed_ever - after
        kept = min(fresh, len(self._closed))
        closed = tuple(islice(reversed(self._closed), kept))[::-1]
        return Traffic(
            now_s=now_s,
            cursor=self._closed_ever,
            open=tuple(entry.record(Outcome.OPEN, None) for entry in self._open),
            closed=closed,
            dropped=fresh - kept,
        )
