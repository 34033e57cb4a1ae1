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
"""Of a row of the ring: the iteration's end, its own time (overlap with the last one left out), requests in
it and waiting behind it, prompt and decode tokens computed, tokens attended to, share of KV blocks in use."""

KEPT_ITERATIONS = 8192
ROWS_PER_ANSWER = 2048  # about 150 kB as JSON


class Step:
    """An iteration that was scheduled and has no result yet."""

    __slots__ = ("begin_s", "completing", "context", "decode", "kv_usage", "prefill", "running", "waiting")

    def __init__(self, begin_s: float) -> None:
        self.begin_s = begin_s
        self.prefill = 0
        self.decode = 0
        self.context = 0
        self.running = 0
        self.waiting = 0
        self.kv_usage = 0.0
        self.completing: list[str] = []  # their prompt is complete with it, so they get a token


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
        self.own_s = 0.0  # spent in this accounting itself
        self.prefilling: set[str] = set()  # running, with prompt tokens left to compute
        self._between: set[str] = set()  # had a token, and another is to come
        self._pending: deque[Step] = deque()
        self._ring: deque[tuple[float, ...]] = deque(maxlen=kept)
        self._running = 0
        self._since_s = now_s
        self._end_s = now_s

    def arrive(self, prompt_tokens: int) -> None:
        """A request was accepted."""
        self.arrived += 1
        self.prompt += prompt_tokens

    def leave(self, finished: Collection[str], preempted: Collection[str] | None) -> None:
        """Requests finished or were preempted since the last iteration was scheduled."""
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

    def hold(self, at_s: float, running: int) -> None:
        """From ``at_s`` on so many requests are running."""
        self.running_s += self._running * (at_s - self._since_s)
        self._since_s = at_s
        self._running = running

    def begin(self, step: Step, total: int, prefill: int, completing: list[str]) -> None:
        """An iteration was scheduled.

        Args:
            step: When it began, and what it holds; completed here.
            total: Tokens it computes.
            prefill: How many of these belong to requests in `prefilling`.
            completing: Requests in `prefilling` whose prompt is complete with it.
        """
        if completing:
            self.prefilling.difference_update(completing)
        step.completing = completing
        step.prefill = prefill
        step.decode = total - prefill
        self._pending.append(step)

    @property
    def pending(self) -> int:
        """Iterations under way."""
        return len(self._pending)

    def first(self) -> Step:
        """The oldest iteration under way. Raises IndexError when there is none."""
        return self._pending[0]

    def end(self, now_s: float, generated: int, finished: Collection[str], running: int) -> None:
        """The oldest iteration under way has its result.

        Args:
            now_s: Monotonic time.
            generated: Tokens that requests got by it.
            finished: Requests that finished since the last iteration was scheduled.
            running: Requests running now.
        """
        step = self._pending.popleft()
        begin_s = max(step.begin_s, self._end_s)  # with overlap: only what the last iteration left over
        step_s = now_s - begin_s
        # Between the ends of two iterations each request in `_between` waits for its next token.
        self.token_gap_s += len(self._between) * (now_s - self._end_s)
        firsts = 0
        for request in step.completing:
            if request not in self._between:  # else resumed after a preemption: it goes on, with one long gap
                firsts += 1
                self._between.add(request)
        if finished:
            self._between.difference_update(finished)
        self.token_gaps += generated - firsts
        self.generated += generated
        self.prefill += step.prefill
        self.iterations += 1
        self.busy_s += step_s
        self._end_s = now_s
        self.hold(now_s, running)
        self._ring.append(
            (
                now_s,
                step_s,
                step.running,
                step.waiting,
                step.prefill,
                step.decode,
                step.context,
                step.kv_usage,
            )
        )

    def busy_until_s(self, now_s: float) -> float:
        """Seconds spent iterating, the iteration under way included."""
        if not self._pending:
            return self.busy_s
        return self.busy_s + now_s - max(self._pending[0].begin_s, self._end_s)

    def running_until_s(self, now_s: float) -> float:
        """Request-seconds of running."""
        return self.running_s + self._running * (now_s - self._since_s)

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
