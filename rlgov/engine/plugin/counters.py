"""What the engine did, counted as it happens: a few additions an iteration. Pure; the scheduler feeds it.

Nothing here walks over the running requests, so its cost hardly grows with the batch. Prompts under way and
requests between two tokens are kept as two small sets, changed where a request enters, finishes or is
preempted.
"""

from __future__ import annotations

from collections import deque
from dataclasses import asdict
from itertools import islice
from typing import TYPE_CHECKING, Any

from rlgov.engine.samples import EngineSample

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable

COLUMNS = (
    "t_s",
    "step_s",
    "running",
    "waiting",
    "prefill_tokens",
    "decode_tokens",
    "context_tokens",
    "kv_usage",
)
"""Of a row of the ring: the iteration's end, its own time (overlap with the last one left out), requests
running in it and waiting behind it, prompt and decode tokens computed, tokens attended to, and the share of
KV blocks in use at its end."""

KEPT_ITERATIONS = 8192
KEPT_COSTS = 1024
ROWS_PER_ANSWER = 2048  # about 150 kB as JSON


Pending = tuple[float, int, int, list[str], int, int, int, float]
"""An iteration without a result yet: begin_s, tokens, prompt tokens among them, requests that get their first
token by it, running, waiting, context tokens, and seconds the plugin took so far. A tuple for speed alone."""


class Counters:
    """Counters of one engine since its start.

    Args:
        now_s: Monotonic time of the start.
        kept: Iterations the ring keeps.
    """

    __slots__ = (
        "_between",
        "_end_s",
        "_pending",
        "_ring",
        "_running",
        "_since_s",
        "arrived",
        "busy_s",
        "ended",
        "failed",
        "generated",
        "iterations",
        "own_s",
        "own_times_s",
        "preemptions",
        "prefill",
        "prefilling",
        "prompt",
        "running_s",
        "token_gap_s",
        "token_gaps",
    )

    def __init__(self, now_s: float, kept: int = KEPT_ITERATIONS) -> None:
        self.arrived = 0
        self.prompt = 0
        self.prefill = 0
        self.generated = 0
        self.preemptions = 0
        self.ended = 0  # in whichever way ...
        self.failed = 0  # ... and of these by an abort or an error
        self.iterations = 0
        self.token_gaps = 0
        self.token_gap_s = 0.0
        self.busy_s = 0.0
        self.running_s = 0.0
        self.own_s = 0.0  # spent in this accounting itself ...
        self.own_times_s: deque[float] = deque(maxlen=KEPT_COSTS)  # ... and in each of the last iterations
        self.prefilling: set[str] = set()  # running, with prompt tokens left to compute
        self._between: set[str] = set()  # had a token, and another is to come
        self._pending: deque[Pending] = deque()
        self._ring: deque[tuple[float, ...]] = deque(maxlen=kept)
        self._running = 0
        self._since_s = now_s
        self._end_s = now_s

    def arrive(self, prompt_tokens: int) -> None:
        """A request was accepted."""
        self.arrived += 1
        self.prompt += prompt_tokens

    def leave(self, finished: Collection[str], preempted: Collection[str] | None) -> None:
        """Requests ended or were preempted since the last iteration was scheduled.

        vLLM schedules between any two results as long as there is such news, so this always comes before
        the next result is accounted for.
        """
        if finished:
            self.ended += len(finished)
            self.prefilling.difference_update(finished)
            self._between.difference_update(finished)
        if preempted:
            self.preemptions += len(preempted)
            self.prefilling.difference_update(preempted)

    def enter(self, admitted: Iterable[str]) -> None:
        """Requests were admitted, for the first time or again after a preemption."""
        self.prefilling.update(admitted)

    def abort(self, requests: Collection[str]) -> None:
        """Requests were ended before they were done: whatever is computed for them, nobody gets."""
        self.failed += len(requests)
        for pending in self._pending:
            completing = pending[3]
            if completing:
                completing[:] = [request for request in completing if request not in requests]

    def pause(self, at_s: float, running: int) -> None:
        """Requests came or went at ``at_s`` without an iteration."""
        self.running_s = self.running_until_s(at_s)
        self._since_s = at_s
        self._running = running

    def begin(self, pending: Pending) -> None:
        """An iteration was scheduled."""
        completing = pending[3]
        if completing:
            self.prefilling.difference_update(completing)
        self._pending.append(pending)

    def end(self, now_s: float, generated: int, running: int, kv_usage: float) -> float:
        """The oldest iteration under way has its result.

        Args:
            now_s: Monotonic time.
            generated: Tokens that requests got by it.
            running: Requests running now.
            kv_usage: Share of KV blocks in use now.

        Returns:
            Seconds the plugin took when the iteration began.
        """
        begin_s, tokens, prefill, completing, ran, waited, context, own_s = self._pending.popleft()
        last_s = self._end_s
        # Where iterations overlap, only what the last one left over is this one's own time.
        step_s = now_s - max(begin_s, last_s)
        self.busy_s += step_s
        self.iterations += 1
        since_s = self._since_s
        if begin_s > since_s:
            self.running_s += self._running * (begin_s - since_s) + ran * (now_s - begin_s)
        else:
            self.running_s += ran * (now_s - since_s)
        self._since_s = self._end_s = now_s
        self._running = running
        # Between the ends of two iterations each request in `_between` waits for its next token.
        between = self._between
        self.token_gap_s += len(between) * (now_s - last_s)
        self.generated += generated
        self.token_gaps += generated
        self.prefill += prefill
        for request in completing:
            if request not in between:  # else resumed after a preemption: it goes on, with one long gap
                self.token_gaps -= 1
                between.add(request)
        self._ring.append((now_s, step_s, ran, waited, prefill, tokens - prefill, context, kv_usage))
        return own_s

    def cost(self, own_s: float) -> None:
        """An iteration is accounted for, at this price."""
        self.own_s += own_s
        self.own_times_s.append(own_s)

    def busy_until_s(self, now_s: float) -> float:
        """Seconds spent iterating, the iteration under way included."""
        if not self._pending:
            return self.busy_s
        return self.busy_s + now_s - max(self._pending[0][0], self._end_s)

    def running_until_s(self, now_s: float) -> float:
        """Request-seconds of running, the iteration under way included."""
        if not self._pending:
            return self.running_s + self._running * (now_s - self._since_s)
        begin_s, *_, ran, _waited, _context, _own = self._pending[0]
        begin_s = max(begin_s, self._since_s)
        return self.running_s + self._running * (begin_s - self._since_s) + ran * (now_s - begin_s)

    def rows(self, after: int) -> dict[str, Any]:
        """Iterations after a cursor, oldest first; plain types.

        At most ROWS_PER_ANSWER: ask again with the cursor of the answer for more. A cursor that lies in the
        future is another engine's, and is taken for 0.
        """
        oldest = self.iterations - len(self._ring)
        asked = after if 0 <= after <= self.iterations else 0
        start = max(asked, oldest)
        found = list(islice(self._ring, start - oldest, start - oldest + ROWS_PER_ANSWER))
        return {
            "cursor": start + len(found),
            "dropped": start - asked,
            "columns": list(COLUMNS),
            "rows": [list(row) for row in found],
        }


def sample_of(counters: Counters, now_s: float, gauges: dict[str, Any]) -> dict[str, Any]:
    """An :class:`EngineSample` as plain types.

    Args:
        counters: What was counted.
        now_s: Monotonic time.
        gauges: The fields that are read, not counted: engine_id, running, waiting, kv_usage,
            waiting_tokens, batch_cap, kv_capacity_tokens, max_num_seqs, and ended_now: requests that
            ended since the last iteration was scheduled.
    """
    known = dict(gauges)
    ended_now = known.pop("ended_now")
    return asdict(
        EngineSample(
            at_s=now_s,
            source="plugin",
            generated_tokens=counters.generated,
            prompt_tokens=counters.prompt,
            prefill_tokens=counters.prefill,
            preemptions=counters.preemptions,
            finished=counters.ended + ended_now - counters.failed,
            failed=counters.failed,
            arrived=counters.arrived,
            token_gaps=counters.token_gaps,
            token_gap_s=counters.token_gap_s,
            iterations=counters.iterations,
            busy_s=counters.busy_until_s(now_s),
            running_s=counters.running_until_s(now_s),
            **known,
        )
    )
