"""Counts a gateway's requests the way the simulator counts its own. Pure: records in, counts out.

Times are turned into whole picoseconds, in which the simulator reckons, so that the same requests give the
same counts and the same quantiles to the last bit.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from rlgov.engine.samples import Outcome
from rlgov.journal import Request

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rlgov.engine.samples import RequestRecord, Traffic
    from rlgov.records import ServiceLevel

_PS_PER_S: Final = 10**12
_KEPT_REQUESTS: Final = 100_000  # finished requests kept for a recorder that does not come for them
_KEPT_SAMPLES: Final = 4096  # latencies kept while windows are blind
_KEPT_LENGTHS: Final = 256  # prompts whose mean stands in for a length that is not known yet

_Key = tuple[str, int]  # clients may send one request id twice, so the arrival belongs to it


def _ps(seconds: float) -> int:
    return round(seconds * _PS_PER_S)


@dataclass(slots=True)
class _Seen:
    """What was counted already of a request that is still open."""

    first: bool = False
    missed: bool = False


@dataclass(slots=True)
class Counts:
    """What happened since the counts were last taken."""

    arrivals: int = 0
    prompt_tokens: int = 0  # of those arrivals whose length is known
    lengths_unknown: int = 0  # arrivals whose prompt length is not known on arrival
    served: int = 0
    misses: int = 0
    ttft_ps: list[int] = field(default_factory=list)
    tpot_ps: list[int] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Pending:
    """The requests that are open at one moment."""

    open: int = 0
    held: int = 0  # not handed to an engine
    overdue: int = 0
    oldest_wait_s: float = 0.0
    untouched_tokens: float = 0.0  # prompts without a first token, held ones included
    held_tokens: float = 0.0
    by_engine: dict[str, int] = field(default_factory=dict)  # dispatched and open


class RequestTally:
    """Counts each request once: its arrival, its miss when it happens, its end.

    A request is a miss when its TTFT limit passes without a first token, at that moment; when it ends served
    with a TPOT above the limit; or when it fails or is rejected. One that its client cancelled, or that is
    invalid, is a miss only if it was late by then.

    Args:
        service_level: The limits.
    """

    def __init__(self, service_level: ServiceLevel) -> None:
        self._ttft_ps = _ps(service_level.ttft_s)
        self._tpot_ps = _ps(service_level.tpot_s)
        self._seen: dict[_Key, _Seen] = {}
        self._counts = Counts()
        self._finished: deque[tuple[float, Request]] = deque(maxlen=_KEPT_REQUESTS)
        self._lengths: deque[int] = deque(maxlen=_KEPT_LENGTHS)
        self.unrecorded = 0
        """Requests that ended and cannot be recorded: not served, or of unknown length."""

    def begin(self, traffic: Traffic) -> Pending:
        """Start anew at ``traffic.now_s``: what is open by then arrived before, and is not counted again."""
        now = _ps(traffic.now_s)
        self._counts = Counts()
        self._finished.clear()
        self.unrecorded = 0
        self._seen = {
            self._key(record): _Seen(
                first=record.first_token_s is not None, missed=self._is_late(record, now)
            )
            for record in traffic.open
        }
        return self._pending(traffic.open, now)

    def observe(self, traffic: Traffic) -> Pending:
        """Count what happened up to ``traffic.now_s``; returns what is open then."""
        now = _ps(traffic.now_s)
        for record in traffic.closed:
            seen = self._seen.pop(self._key(record), None) or self._arrive(record)
            self._close(record, seen)
        still: dict[_Key, _Seen] = {}
        for record in traffic.open:
            seen = self._seen.get(self._key(record)) or self._arrive(record)
            still[self._key(record)] = seen
            self._note_first_token(record, seen)
            if self._is_late(record, now):
                self._miss(seen)
        self._seen = still  # whatever is neither open nor closed was forgotten by the gateway
        return self._pending(traffic.open, now)

    def take_counts(self) -> Counts:
        """The counts since they were last taken."""
        counts, self._counts = self._counts, Counts()
        return counts

    def forget_latencies(self) -> None:
        """Bound what is kept while nobody takes the counts."""
        del self._counts.ttft_ps[:-_KEPT_SAMPLES]
        del self._counts.tpot_ps[:-_KEPT_SAMPLES]

    def take_finished(self, origin_s: float, until_s: float) -> list[Request]:
        """Served requests that arrived before ``until_s`` and were not taken yet, by arrival.

        Args:
            origin_s: Monotonic time that counts as 0 in the requests and in ``until_s``.
            until_s: On that axis.
        """
        taken: list[Request] = []
        kept: list[tuple[float, Request]] = []
        for at_s, request in self._finished:
            arrival_s = at_s - origin_s
            if arrival_s >= until_s:
                kept.append((at_s, request))
            elif arrival_s >= 0:
                taken.append(
                    Request(
                        arrival_s, request.prompt_tokens, request.output_tokens, request.prefix_hit_tokens
                    )
                )
            else:
                self.unrecorded += 1  # it arrived before the episode
        self._finished = deque(kept, maxlen=_KEPT_REQUESTS)
        return sorted(taken, key=lambda request: request.arrival_s)

    # ------------------------------------------------------------------ one request

    @staticmethod
    def _key(record: RequestRecord) -> _Key:
        return record.request_id, _ps(record.arrival_s)

    def _arrive(self, record: RequestRecord) -> _Seen:
        self._counts.arrivals += 1
        if record.prompt_tokens is None:
            self._counts.lengths_unknown += 1
        else:
            self._counts.prompt_tokens += record.prompt_tokens
        return _Seen()

    def _miss(self, seen: _Seen) -> None:
        if not seen.missed:
            seen.missed = True
            self._counts.misses += 1

    def _note_first_token(self, record: RequestRecord, seen: _Seen) -> None:
        if record.first_token_s is not None and not seen.first:
            seen.first = True
            self._counts.ttft_ps.append(_ps(record.first_token_s) - _ps(record.arrival_s))

    def _is_late(self, record: RequestRecord, now: int) -> bool:
        """Whether the first token came after its limit, or did not come although the limit has passed."""
        deadline = _ps(record.arrival_s) + self._ttft_ps
        if record.first_token_s is None:
            return deadline <= now
        return _ps(record.first_token_s) > deadline

    def _close(self, record: RequestRecord, seen: _Seen) -> None:
        self._note_first_token(record, seen)
        if record.prompt_tokens is not None:
            self._lengths.append(record.prompt_tokens)
        if record.outcome is Outcome.SERVED:
            self._serve(record, seen)
            return
        self.unrecorded += 1
        lost = record.outcome in {Outcome.FAILED, Outcome.REJECTED}
        if lost or (record.finished_s is not None and self._is_late(record, _ps(record.finished_s))):
            self._miss(seen)

    def _serve(self, record: RequestRecord, seen: _Seen) -> None:
        self._counts.served += 1
        end_s = record.finished_s if record.last_token_s is None else record.last_token_s
        tokens = record.output_tokens
        if record.first_token_s is not None:
            if self._is_late(record, 0):
                self._miss(seen)
            if tokens is not None and tokens > 1 and end_s is not None:
                elapsed = _ps(end_s) - _ps(record.first_token_s)
                self._counts.tpot_ps.append(elapsed // (tokens - 1))
                if elapsed > self._tpot_ps * (tokens - 1):
                    self._miss(seen)
        elif end_s is not None and self._is_late(record, _ps(end_s)):
            self._miss(seen)
        if record.prompt_tokens and tokens:
            self._finished.append(
                (
                    record.arrival_s,
                    Request(record.arrival_s, record.prompt_tokens, tokens, record.cached_tokens or 0),
                )
            )
        else:
            self.unrecorded += 1

    # ------------------------------------------------------------------ all that are open

    def _pending(self, records: Sequence[RequestRecord], now: int) -> Pending:
        mean = sum(self._lengths) / len(self._lengths) if self._lengths else 0.0
        held = 0
        overdue = 0
        oldest = now
        held_tokens = 0.0
        untouched_tokens = 0.0
        by_engine: dict[str, int] = {}
        for record in records:
            tokens = (
                mean if record.prompt_tokens is None else record.prompt_tokens - (record.cached_tokens or 0)
            )
            if record.dispatched_s is None:
                held += 1
                held_tokens += tokens
            elif record.engine_id is not None:
                by_engine[record.engine_id] = by_engine.get(record.engine_id, 0) + 1
            if record.first_token_s is None:
                oldest = min(oldest, _ps(record.arrival_s))
                untouched_tokens += tokens
                overdue += self._is_late(record, now)
        return Pending(
            open=len(records),
            held=held,
            overdue=overdue,
            oldest_wait_s=(now - oldest) / _PS_PER_S,
            untouched_tokens=untouched_tokens,
            held_tokens=held_tokens,
            by_engine=by_engine,
        )


def quantile_s(values_ps: Sequence[int], q: float) -> float | None:
    """The ``q``-quantile in seconds, interpolated linearly between values; None without values."""
    if not values_ps:
        return None
    ordered = sorted(values_ps)
    at = q * (len(ordered) - 1)
    low = int(at)
    high = ordered[min(low + 1, len(ordered) - 1)]
    return (ordered[low] + (at - low) * (high - ordered[low])) / _PS_PER_S
