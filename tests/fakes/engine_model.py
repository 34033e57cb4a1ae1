"""The inside of the fake vLLM server: continuous batching, one token per running request and iteration."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from rlgov.clock import Clock
from rlgov.engine.samples import EngineSample

RING_ROWS = 4096
ITERATION_COLUMNS = (
    "t_s",
    "step_s",
    "running",
    "waiting",
    "prefill_tokens",
    "decode_tokens",
    "context_tokens",
    "kv_usage",
)


@dataclass(frozen=True)
class Pace:
    """How fast the fake is, and how large."""

    token_s: float
    prefill_token_s: float
    max_num_seqs: int
    kv_capacity_tokens: int


@dataclass(eq=False)
class Sequence:
    """One prompt being answered. ``deliver`` gets (tokens, finish reason or None)."""

    prompt_tokens: int
    max_tokens: int
    deliver: Callable[[int, str | None], None]
    stop_after: int | None = None  # an end-of-sequence token comes here
    generated: int = 0
    arrived_s: float = 0.0
    admitted_s: float = 0.0
    first_token_s: float = 0.0
    last_token_s: float = 0.0


@dataclass
class Counters:
    """What the plugin counts."""

    arrived: int = 0
    prompt_tokens: int = 0
    prefill_tokens: int = 0
    generated_tokens: int = 0
    finished: int = 0
    token_gaps: int = 0
    token_gap_s: float = 0.0
    iterations: int = 0
    busy_s: float = 0.0
    running_s: float = 0.0


@dataclass
class Observer:
    """Called at what the metrics page counts."""

    on_token: Callable[[Sequence, float | None], None] = lambda _sequence, _gap_s: None
    on_finish: Callable[[Sequence, str, float], None] = lambda _sequence, _reason, _at_s: None
    on_iteration: Callable[[int], None] = lambda _tokens: None


@dataclass
class FakeEngine:
    """First come, first served admission up to the cap in force; lowering the cap preempts nothing."""

    engine_id: str
    pace: Pace
    clock: Clock
    observer: Observer = field(default_factory=Observer)
    counters: Counters = field(default_factory=Counters)
    running: list[Sequence] = field(default_factory=list)
    waiting: deque[Sequence] = field(default_factory=deque)
    draining: bool = False
    asleep: bool = False
    frozen: bool = False  # a hang: requests are taken and nothing moves any more

    def __post_init__(self) -> None:
        self._cap: int | None = None
        self._cap_until_s: float | None = None
        self._changed = asyncio.Event()
        self.moved = asyncio.Event()  # set after every iteration and change
        self._rows: deque[tuple[float, ...]] = deque(maxlen=RING_ROWS)
        self._row_count = 0

    @property
    def batch_cap(self) -> int:
        """The cap in force; a lease that has run out leaves the maximum."""
        if self._cap_until_s is not None and self.clock.monotonic_s() >= self._cap_until_s:
            self._cap, self._cap_until_s = None, None
        return self.pace.max_num_seqs if self._cap is None else self._cap

    def set_cap(self, batch_cap: int | None, lease_s: float | None) -> int:
        """As the plugin: None restores the maximum, a cap beyond it is the maximum."""
        self._cap = None if batch_cap is None else max(1, min(batch_cap, self.pace.max_num_seqs))
        self._cap_until_s = None if lease_s is None else self.clock.monotonic_s() + lease_s
        self._changed.set()
        return self.batch_cap

    def wake(self) -> None:
        """Look again: a fault, a cap or a sleep has changed."""
        self._changed.set()
        self.moved.set()

    @property
    def idle(self) -> bool:
        """Nothing runs and nothing waits."""
        return not self.running and not self.waiting

    @property
    def kv_usage(self) -> float:
        """Share of the token capacity in use."""
        held = sum(sequence.prompt_tokens + sequence.generated for sequence in self.running)
        return min(held / self.pace.kv_capacity_tokens, 1.0)

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence. While draining it is aborted at once, as vLLM does."""
        sequence.arrived_s = self.clock.monotonic_s()
        if self.draining:
            sequence.deliver(0, "abort")
            return
        self.counters.arrived += 1
        self.counters.prompt_tokens += sequence.prompt_tokens
        self.waiting.append(sequence)
        self._changed.set()

    def cancel(self, sequence: Sequence) -> None:
        """The client went away: the sequence is dropped without a count, as vLLM does."""
        if sequence in self.running:
            self.running.remove(sequence)
        elif sequence in self.waiting:
            self.waiting.remove(sequence)
        self.wake()

    def abort_all(self) -> None:
        """End everything with finish reason abort."""
        for sequence in [*self.running, *self.waiting]:
            sequence.deliver(0, "abort")
        self.running.clear()
        self.waiting.clear()

    async def run(self) -> None:
        """Iterate for ever."""
        while True:
            self._changed.clear()
            if not self.frozen and not self.asleep:
                prefill_tokens = self._admit()
                if self.running:
                    await self._iterate(prefill_tokens)
                    continue
            await self._wait()

    async def _wait(self) -> None:
        lease_s = None
        if self._cap_until_s is not None:
            lease_s = max(self._cap_until_s - self.clock.monotonic_s(), 0.001)
        try:
            async with asyncio.timeout(lease_s):
                await self._changed.wait()
        except TimeoutError:
            return

    def _admit(self) -> int:
        prefill_tokens = 0
        room = self.pace.kv_capacity_tokens * (1 - self.kv_usage)
        while self.waiting and len(self.running) < self.batch_cap:
            needed = self.waiting[0].prompt_tokens + self.waiting[0].max_tokens
            if self.running and needed > room:
                break
            sequence = self.waiting.popleft()
            sequence.admitted_s = self.clock.monotonic_s()
            room -= needed
            prefill_tokens += sequence.prompt_tokens
            self.running.append(sequence)
        self.counters.prefill_tokens += prefill_tokens
        return prefill_tokens

    async def _iterate(self, prefill_tokens: int) -> None:
        batch = list(self.running)
        started_s = self.clock.monotonic_s()
        await asyncio.sleep(self.pace.token_s + prefill_tokens * self.pace.prefill_token_s)
        while self.frozen or self.asleep:
            await self._wait()
            self._changed.clear()
        now_s = self.clock.monotonic_s()
        step_s = now_s - started_s
        tokens = 0
        for sequence in batch:
            if sequence in self.running:  # not cancelled meanwhile
                tokens += 1
                self._token(sequence, now_s)
        counters = self.counters
        counters.iterations += 1
        counters.busy_s += step_s
        counters.running_s += step_s * len(batch)
        self.observer.on_iteration(tokens + prefill_tokens)
        context = sum(s.prompt_tokens + s.generated for s in self.running)
        row = (now_s, step_s, len(batch), len(self.waiting), prefill_tokens, tokens, context, self.kv_usage)
        self._rows.append(tuple(float(value) for value in row))
        self._row_count += 1
        self.moved.set()

    def _token(self, sequence: Sequence, now_s: float) -> None:
        gap_s = now_s - sequence.last_token_s if sequence.generated else None
        sequence.generated += 1
        self.counters.generated_tokens += 1
        if gap_s is None:
            sequence.first_token_s = now_s
        else:
            self.counters.token_gaps += 1
            self.counters.token_gap_s += gap_s
        sequence.last_token_s = now_s
        self.observer.on_token(sequence, gap_s)
        reason = None
        if sequence.generated >= sequence.max_tokens:
            reason = "length"
        elif sequence.stop_after is not None and sequence.generated >= sequence.stop_after:
            reason = "stop"
        if reason is not None:
            self.running.remove(sequence)
            self.counters.finished += 1
            self.observer.on_finish(sequence, reason, now_s)
        sequence.deliver(1, reason)

    def sample(self) -> EngineSample:
        """What the plugin's state call reports."""
        counters = self.counters
        return EngineSample(
            at_s=self.clock.monotonic_s(),
            source="plugin",
            engine_id=self.engine_id,
            running=len(self.running),
            waiting=len(self.waiting),
            kv_usage=self.kv_usage,
            generated_tokens=float(counters.generated_tokens),
            prompt_tokens=float(counters.prompt_tokens),
            prefill_tokens=float(counters.prefill_tokens),
            preemptions=0.0,
            finished=float(counters.finished),
            arrived=float(counters.arrived),
            token_gaps=float(counters.token_gaps),
            token_gap_s=counters.token_gap_s,
            iterations=float(counters.iterations),
            busy_s=counters.busy_s,
            running_s=counters.running_s,
            waiting_tokens=float(sum(sequence.prompt_tokens for sequence in self.waiting)),
            batch_cap=self.batch_cap,
            kv_capacity_tokens=self.pace.kv_capacity_tokens,
            max_num_seqs=self.pace.max_num_seqs,
        )

    def iterations(self, after: int) -> dict[str, object]:
        """The rows after a cursor, as the plugin's ring gives them."""
        first = self._row_count - len(self._rows)
        rows = list(self._rows)[max(after - first, 0) :]
        return {
            "cursor": self._row_count,
            "dropped": max(first - after, 0),
            "columns": list(ITERATION_COLUMNS),
            "rows": [list(row) for row in rows],
        }
