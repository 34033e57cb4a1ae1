"""The simulator in its plain form: every request is touched in every iteration. The oracle of the tests.

What both forms model, after vLLM V1 (0.32):

- *Scheduling.* Running requests first, in order of admission, each with one decode token or the next
  chunk of its prompt, under ``max_num_batched_tokens``; then waiting requests, first come first served,
  while the batch cap and the KV blocks allow. A request is admitted only when its whole known sequence
  fits. Lowering the cap stops admission and preempts nothing.
- *KV blocks* of 16 tokens, taken as tokens are computed. When none is free the last admitted request is
  preempted: it loses its blocks, goes to the front of the queue and is computed again. A step that
  preempts admits nobody. A request longer than the whole cache is refused.
- *Tokens.* An iteration that completes a prompt gives its first token; each later one gives one more.
- *Clock.* A new clock takes effect ``clock_delay_s`` after it was asked for, also within an iteration:
  the rest of the work then runs at the new clock. Power above TDP lowers the clock of that iteration.
- *TP switch.* Side by side when the GPUs of both engines fit: start-up, warm-up, then new arrivals go
  to the new engine and the old one drains what it has. Otherwise what arrives is held, the old engine
  drains, and the new one starts on its GPUs. One switch at a time.
- *Order at one instant*: iterations end; a ready engine takes traffic; the asked clock takes effect;
  the configuration of the next interval is applied; engines form their next iteration.

Not modelled: tokenisation and HTTP time, sampling parameters, speculative decoding, LoRA, priorities.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from rlgov.simulation.kernel import iteration
from rlgov.simulation.layout import (
    BLOCK_TOKENS,
    PS_PER_S,
    Physics,
    allocate_batch,
    allocate_physics,
    store_constants,
    store_physics,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

    from rlgov.simulation.tables import PhysicsTables
    from rlgov.workload.trace import Trace


@dataclass(slots=True)
class _Request:
    arrival: int
    prompt: int
    output: int
    hit: int
    computed: int = 0
    generated: int = 0
    held: int = 0  # KV blocks
    decoding: bool = False
    first: int = -1
    finish: int = -1
    refused: bool = False
    preemptions: int = 0

    @property
    def known(self) -> int:
        return self.prompt + self.generated


@dataclass(slots=True)
class _Engine:
    j: int
    free: int
    queue: list[_Request] = field(default_factory=list)
    running: list[_Request] = field(default_factory=list)
    scheduled: dict[int, int] = field(default_factory=dict)  # id -> tokens, of the iteration in flight
    flying: bool = False
    end: int = 0
    full: int = 0
    power_w: float = 0.0
    work: tuple[int, int, int, int] = (0, 0, 0, 0)
    draining: bool = False


@dataclass(frozen=True, slots=True)
class NaiveResult:
    """Times in picoseconds, -1 where an event never happened; one row a request."""

    first_ps: NDArray[np.int64]
    finish_ps: NDArray[np.int64]
    refused: NDArray[np.bool_]
    energy_j: NDArray[np.float64]  # one a window
    iterations: int
    preemptions: int
    output_tokens: int
    peak_power_w: float


def _blocks(tokens: int) -> int:
    return -(-tokens // BLOCK_TOKENS)


class NaiveSimulation:
    """One deployment under a sequence of settings, one a window.

    ``settings`` holds (grid clock index, batch cap, TP index) a window. ``cost`` is the iteration
    function; pure Python when the compiled one's ``py_func`` is given.
    """

    def __init__(
        self,
        trace: Trace,
        tables: PhysicsTables,
        settings: Sequence[tuple[int, int, int]],
        interval_s: float,
        *,
        start: tuple[int, int, int],
        cost: Callable[..., tuple[int, float, int]] = iteration,
    ) -> None:
        self.tables = tables
        stacked = allocate_physics(1, tables)
        store_physics(stacked, 0, tables)
        self._physics = Physics(stacked.decode[0], stacked.unit[0], stacked.clock[0])
        batch = allocate_batch(1, 1, 1)
        store_constants(batch, 0, tables)
        self._constants = batch.floats[0]
        self.settings = settings
        self.interval = int(interval_s * PS_PER_S + 0.5)
        self.cost = cost
        self.requests = [
            _Request(int(a * PS_PER_S + 0.5), int(p), int(o), int(h), computed=int(h))
            for a, p, o, h in zip(
                trace.arrival_s,
                trace.prompt_tokens,
                trace.output_tokens,
                trace.prefix_hit_tokens,
                strict=True,
            )
        ]
        self.clock, self.cap, j = start
        self.asked_clock = self.clock
        self.clock_due: int | None = None
        self.active = _Engine(j, int(tables.kv_blocks[j]))
        self.old: _Engine | None = None
        self.new: tuple[_Engine, bool] | None = None  # a starting engine, and whether side by side
        self.start_at: int | None = None
        self.held: list[_Request] = []
        self.arrived = 0
        self.iterations = 0
        self.output_tokens = 0
        self.peak_power_w = 0.0

    # ------------------------------------------------------------------ time

    def run(self) -> NaiveResult:
        """Play every window and return what happened."""
        now = 0
        window = 0
        energy = np.zeros(len(self.settings))
        self._arrive(0)
        self._apply(self.settings[0], 0)
        self._schedule_all(0)
        while window < len(self.settings):
            boundary = (window + 1) * self.interval
            to = min([boundary, *self._event_times(now)])
            power = self._power_w(now)
            self.peak_power_w = max(self.peak_power_w, power)
            energy[window] += power * ((to - now) / PS_PER_S)
            now = to
            self._arrive(now)
            for engine in self._engines():
                if engine.flying and engine.end == now:
                    self._complete(engine, now)
            self._become_ready(now)
            if self.clock_due is not None and self.clock_due <= now:
                self.clock, self.clock_due = self.asked_clock, None
                for engine in self._engines():
                    self._retime(engine, now)
            if now == boundary:
                window += 1
                if window < len(self.settings):
                    self._apply(self.settings[window], now)
                    if self.clock_due is not None and self.clock_due <= now:
                        self.clock, self.clock_due = self.asked_clock, None
                        for engine in self._engines():
                            self._retime(engine, now)
                else:
                    break
            self._schedule_all(now)
        return NaiveResult(
            np.array([r.first for r in self.requests], dtype=np.int64),
            np.array([r.finish for r in self.requests], dtype=np.int64),
            np.array([r.refused for r in self.requests], dtype=np.bool_),
            energy,
            self.iterations,
            sum(r.preemptions for r in self.requests),
            self.output_tokens,
            self.peak_power_w,
        )

    def _engines(self) -> list[_Engine]:
        return [self.active] if self.old is None else [self.old, self.active]

    def _event_times(self, now: int) -> list[int]:
        times = [e.end for e in self._engines() if e.flying]
        if self.arrived < len(self.requests):
            times.append(self.requests[self.arrived].arrival)
        if self.clock_due is not None:
            times.append(self.clock_due)
        if self.start_at is not None:
            up, ready = self._start_times()
            times += [t for t in (up, ready) if t > now]
        return times

    def _start_times(self) -> tuple[int, int]:
        if self.new is None or self.start_at is None:
            msg = "no engine is starting"
            raise RuntimeError(msg)
        j = self.new[0].j
        up = self.start_at + int(self.tables.startup_s[j] * PS_PER_S + 0.5)
        return up, up + int(self.tables.warmup_s[j] * PS_PER_S + 0.5)

    def _power_w(self, now: int) -> float:
        gpus = float(self.tables.allotted_gpus)
        power = 0.0
        for engine in self._engines():
            if engine.flying:
                power += engine.power_w
                gpus -= float(self.tables.tp_degrees[engine.j])
        if self.new is not None and self.start_at is not None:
            up, _ = self._start_times()
            watts = self.tables.startup_w if now < up else self.tables.warmup_w
            power += float(watts[self.new[0].j])
            gpus -= float(self.tables.tp_degrees[self.new[0].j])
        return power + gpus * float(self.tables.idle_w[self.clock])

    # ------------------------------------------------------------------ control

    def _apply(self, setting: tuple[int, int, int], now: int) -> None:
        clock, self.cap, j = setting
        if clock != self.asked_clock:
            self.asked_clock = clock
            self.clock_due = now + int(self.tables.clock_delay_s * PS_PER_S + 0.5)
        if self.old is None and self.new is None and j != self.active.j:
            engine = _Engine(j, int(self.tables.kv_blocks[j]))
            degrees = self.tables.tp_degrees
            side_by_side = degrees[self.active.j] + degrees[j] <= self.tables.allotted_gpus
            self.new = (engine, bool(side_by_side))
            if side_by_side:
                self.start_at = now
                self._become_ready(now)
            else:
                self.active.draining = True

    def _arrive(self, now: int) -> None:
        while self.arrived < len(self.requests) and self.requests[self.arrived].arrival <= now:
            request = self.requests[self.arrived]
            (self.held if self.active.draining else self.active.queue).append(request)
            self.arrived += 1

    def _become_ready(self, now: int) -> None:
        if self.new is None or self.start_at is None or self._start_times()[1] > now:
            return
        engine, side_by_side = self.new
        if side_by_side:
            self.old = self.active
            self.old.draining = True
        engine.queue = self.held
        self.held = []
        self.active = engine
        self.new = None
        self.start_at = None

    # ------------------------------------------------------------------ scheduling

    def _schedule_all(self, now: int) -> None:
        for engine in self._engines():
            while not engine.flying and (engine.running or engine.queue):
                before = len(engine.queue)
                self._schedule(engine, now)
                if len(engine.queue) == before and not engine.running:
                    break
        if self.old is not None and not (self.old.running or self.old.queue):
            self.old = None
        drained = self.active.draining and not (self.active.running or self.active.queue)
        if drained and self.new is not None and self.start_at is None:
            self.start_at = now
            self._become_ready(now)
            self._schedule_all(now)

    def _preempt_last(self, engine: _Engine) -> _Request:
        last = engine.running.pop()
        engine.free += last.held
        last.held = 0
        last.computed = last.hit
        last.decoding = False
        last.preemptions += 1
        engine.queue.insert(0, last)
        return last

    def _schedule(self, engine: _Engine, now: int) -> None:
        budget = int(self.tables.max_num_batched_tokens)
        plan: list[tuple[_Request, int]] = []
        preempted = False
        at = 0
        while at < len(engine.running):
            request = engine.running[at]
            tokens = min(request.known - request.computed, budget)
            need = _blocks(request.computed + tokens) - request.held
            alive = True
            while need > engine.free:
                preempted = True
                if self._preempt_last(engine) is request:
                    alive = False
                    break
            if not alive:
                break
            engine.free -= need
            request.held += need
            plan.append((request, tokens))
            budget -= tokens
            at += 1
        while not preempted and engine.queue:
            request = engine.queue[0]
            if _blocks(request.prompt + request.output) > self.tables.kv_blocks[engine.j]:
                engine.queue.pop(0)
                request.refused = True
                continue
            if len(engine.running) >= self.cap or budget <= 0 or _blocks(request.known) > engine.free:
                break
            engine.queue.pop(0)
            tokens = min(request.known - request.computed, budget)
            request.held = _blocks(request.computed + tokens)
            engine.free -= request.held
            engine.running.append(request)
            plan.append((request, tokens))
            budget -= tokens
        if plan:
            self._launch(engine, plan, now)

    def _launch(self, engine: _Engine, plan: list[tuple[_Request, int]], now: int) -> None:
        decodes = context = prefill = pairs = 0
        for request, tokens in plan:
            if request.decoding:
                decodes += 1
                context += request.computed
            else:
                prefill += tokens
                pairs += tokens * request.computed + tokens * (tokens + 1) // 2
        engine.work = (decodes, context, prefill, pairs)
        duration, energy, _ = self.cost(self._physics, self._constants, engine.j, self.clock, *engine.work)
        engine.scheduled = {id(request): tokens for request, tokens in plan}
        engine.flying = True
        engine.end = now + int(duration)
        engine.full = int(duration)
        engine.power_w = energy / (duration / PS_PER_S)

    def _retime(self, engine: _Engine, now: int) -> None:
        if not engine.flying:
            return
        duration, energy, _ = self.cost(self._physics, self._constants, engine.j, self.clock, *engine.work)
        rest = (engine.end - now) / engine.full
        engine.end = now + int(rest * duration + 0.5)
        engine.full = int(duration)
        engine.power_w = energy / (duration / PS_PER_S)

    def _complete(self, engine: _Engine, now: int) -> None:
        self.iterations += 1
        engine.flying = False
        still = []
        for request in engine.running:
            request.computed += engine.scheduled[id(request)]
            if request.computed == request.known:
                request.decoding = True
                request.generated += 1
                self.output_tokens += 1
                if request.first < 0:
                    request.first = now
            if request.generated == request.output:
                request.finish = now
                engine.free += request.held
            else:
                still.append(request)
        engine.running = still
