"""A serving stack, its GPUs and its traffic in one process and in virtual time.

The engine is a toy: requests arrive by a seeded Poisson process, wait for a place under the batch cap, get
their first token after a prefill and then a token every so often, all of it faster at higher clocks and TP
degrees. Its power model is invented. It exists to test what governs a stack, not to say what a stack does.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from rlgov.clock import VirtualClock
from rlgov.engine.samples import (
    EngineInfo,
    EngineSample,
    Outcome,
    RequestRecord,
    StackInterval,
    StackLimits,
    StackState,
    Traffic,
)
from rlgov.errors import EngineError, HardwareError
from rlgov.hardware.clocks import ClockCheck, ClockState, GpuCheck, Verdict, judge_clock
from rlgov.hardware.meter import GpuReading, MeterReading

UUIDS = ("GPU-a", "GPU-b", "GPU-c", "GPU-d")
CAPS = (256, 128, 64, 32)
TP_DEGREES = (4, 2, 1)
TOP_MHZ = 1980
SUPPORTED_MHZ = tuple(range(TOP_MHZ, 200, -15))
SWITCH_S = 5.0
_SLICE_S = 0.05
_EVERY_CLOSED = 10_000


@dataclass(eq=False)
class _Job:
    number: int
    arrival_s: float
    prompt_tokens: int
    output_tokens: int
    engine_id: str = ""
    dispatched_s: float | None = None
    first_s: float | None = None
    last_s: float | None = None
    prefill_left: float = 0.0
    tokens: float = 0.0

    def record(self, outcome: Outcome) -> RequestRecord:
        served = outcome is Outcome.SERVED
        return RequestRecord(
            request_id=str(self.number),
            arrival_s=self.arrival_s,
            outcome=outcome,
            dispatched_s=self.dispatched_s,
            first_token_s=self.first_s,
            last_token_s=self.last_s,
            finished_s=self.last_s if served else None,
            prompt_tokens=self.prompt_tokens if served else None,
            output_tokens=self.output_tokens if served else None,
            cached_tokens=0 if served else None,
            finish_reason="length" if served else None,
            engine_id=self.engine_id or None,
            dispatches=int(self.dispatched_s is not None),
        )


@dataclass
class _Counters:
    generated: float = 0.0
    prompt: float = 0.0
    prefill: float = 0.0
    finished: float = 0.0
    arrived: float = 0.0
    gaps: float = 0.0
    gap_s: float = 0.0
    iterations: float = 0.0
    busy_s: float = 0.0
    running_s: float = 0.0


@dataclass
class World:
    """Everything there is, caught up to the clock whenever somebody looks.

    ``before_call`` is called with the name of every call into the stack, the meter or the clocks, before it
    does anything: tests raise from it.
    """

    rate_per_s: float = 4.0
    seed: int = 0
    clock: VirtualClock = field(default_factory=lambda: VirtualClock(monotonic_s=1000.0))
    before_call: Callable[[str], None] = lambda name: None  # noqa: ARG005  # a hook that does nothing
    calls: list[str] = field(default_factory=list)
    call_s: float = 0.0  # virtual time that every call takes
    batch_cap: int = CAPS[0]
    lease_ends_s: float | None = None
    tp_degree: int = TP_DEGREES[0]
    switching_to: int | None = None
    switch_ends_s: float = 0.0
    switch_fails: bool = False
    switches: int = 0
    tp_refused: dict[int, str] = field(default_factory=dict)
    lock_mhz: int | None = None
    clocks_ignored: bool = False  # locks are taken, and change nothing
    gpu_unreadable: bool = False
    engine_starts: int = 1
    leases_s: list[float | None] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._rng = np.random.default_rng(self.seed)
        self._now_s = self.clock.monotonic_s()
        self._next_arrival_s = self._now_s + self._gap_s()
        self._made = 0
        self._waiting: list[_Job] = []
        self._running: list[_Job] = []
        self._closed: list[RequestRecord] = []
        self._counters = _Counters()
        self.energy_j = dict.fromkeys(UUIDS, 5000.0)

    def enter(self, name: str) -> None:
        self.calls.append(name)
        self.before_call(name)
        if self.call_s:
            self.clock.advance_s(self.call_s)
        self.catch_up()

    @property
    def sm_clock_mhz(self) -> int:
        return TOP_MHZ if self.lock_mhz is None or self.clocks_ignored else self.lock_mhz

    # ------------------------------------------------------------------ the toy

    def catch_up(self) -> None:
        now_s = self.clock.monotonic_s()
        while self._now_s < now_s - 1e-9:
            self._slice(min(_SLICE_S, now_s - self._now_s))

    def _gap_s(self) -> float:
        return float(self._rng.exponential(1.0 / self.rate_per_s)) if self.rate_per_s else float("inf")

    def _slice(self, span_s: float) -> None:
        end_s = self._now_s + span_s
        if self.switching_to is not None and end_s >= self.switch_ends_s:
            if self.switch_fails:
                self.tp_refused[self.switching_to] = "it would not start"
            else:
                self.tp_degree = self.switching_to
                self.engine_starts += 1
            self.switching_to = None
        if self.lease_ends_s is not None and end_s >= self.lease_ends_s:
            self.batch_cap, self.lease_ends_s = CAPS[0], None
        while self._next_arrival_s < end_s:
            prompt, output = int(self._rng.integers(20, 400)), int(self._rng.integers(2, 120))
            job = _Job(self._made, self._next_arrival_s, prompt, output, prefill_left=float(prompt))
            self._waiting.append(job)
            self._made += 1
            self._counters.arrived += 1
            self._counters.prompt += prompt
            self._next_arrival_s += self._gap_s()
        self._serve(span_s, end_s)
        self._now_s = end_s

    def _serve(self, span_s: float, end_s: float) -> None:
        counters = self._counters
        while self._waiting and len(self._running) < self.batch_cap:
            job = self._waiting.pop(0)
            job.dispatched_s = max(job.arrival_s, self._now_s)
            job.engine_id = self.engine_id
            self._running.append(job)
        speed = self.sm_clock_mhz / TOP_MHZ * self.tp_degree / TP_DEGREES[0]
        token_gap_s = 0.02 / speed
        share = len(self._running) and 1.0 / len(self._running)
        for job in tuple(self._running):
            if job.first_s is None:
                done = min(job.prefill_left, 20_000 * speed * share * span_s)
                job.prefill_left -= done
                counters.prefill += done
                if job.prefill_left <= 0:
                    job.first_s = job.last_s = end_s
                    job.tokens = 1.0
                    counters.generated += 1
                    self._end(job)
                continue
            made = min(span_s / token_gap_s, job.output_tokens - job.tokens)
            job.tokens += made
            job.last_s = end_s
            counters.generated += made
            counters.gaps += made
            counters.gap_s += made * token_gap_s
            self._end(job)
        busy = bool(self._running)
        counters.busy_s += span_s * busy
        counters.iterations += span_s / token_gap_s * busy
        counters.running_s += span_s * len(self._running)
        x = self.sm_clock_mhz / TOP_MHZ
        for k, uuid in enumerate(UUIDS):
            used = busy and k < self.tp_degree
            self.energy_j[uuid] += span_s * (80.0 + 60.0 * x + used * 400.0 * x**2)

    def _end(self, job: _Job) -> None:
        if job.tokens >= job.output_tokens - 1e-9:
            self._running.remove(job)
            self._counters.finished += 1
            self._closed.append(job.record(Outcome.SERVED))

    # ------------------------------------------------------------------ what is seen of it

    @property
    def engine_id(self) -> str:
        return f"engine-{self.engine_starts}"

    def state(self) -> StackState:
        return StackState(
            now_s=self._now_s,
            tp_degree=self.tp_degree,
            batch_cap=self.batch_cap,
            switching=self.switching_to is not None,
            ready=True,
            held=0,
            tp_refused=dict(self.tp_refused),
            engines=(
                EngineInfo(
                    self.engine_id, self.tp_degree, UUIDS[: self.tp_degree], "active", "http://fake", 1,
                    "0.32.0", "plugin",
                ),
            ),
        )  # fmt: skip

    def traffic(self, after: int) -> Traffic:
        jobs = sorted([*self._waiting, *self._running], key=lambda job: job.number)
        still_open = tuple(job.record(Outcome.OPEN) for job in jobs)
        return Traffic(self._now_s, len(self._closed), still_open, tuple(self._closed[after:]))

    def sample(self) -> EngineSample:
        c = self._counters
        return EngineSample(
            at_s=self._now_s, source="plugin", engine_id=self.engine_id, running=len(self._running),
            waiting=len(self._waiting), kv_usage=min(len(self._running) / 300.0, 1.0),
            generated_tokens=c.generated, prompt_tokens=c.prompt, prefill_tokens=c.prefill,
            preemptions=0.0, finished=c.finished, arrived=c.arrived, token_gaps=c.gaps,
            token_gap_s=c.gap_s, iterations=c.iterations, busy_s=c.busy_s, running_s=c.running_s,
            waiting_tokens=sum(job.prefill_left for job in [*self._waiting, *self._running]),
            batch_cap=self.batch_cap, kv_capacity_tokens=100_000, max_num_seqs=CAPS[0],
        )  # fmt: skip


class FakeStack:
    """The client of a stack, as StackClient of rlgov.engine.control.client; usable after a close, too."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.closed = 0

    def limits(self) -> StackLimits:
        self.world.enter("limits")
        return StackLimits(
            "Qwen/Qwen3-32B", CAPS, TP_DEGREES, UUIDS, len(UUIDS), 8192, (400_000, 180_000, 60_000),
            (SWITCH_S,) * 3, "side-by-side",
        )  # fmt: skip

    def state(self) -> StackState:
        self.world.enter("state")
        return self.world.state()

    def interval(self, after: int) -> StackInterval:
        self.world.enter("interval")
        return StackInterval(self.world.state(), self.world.traffic(after), (self.world.sample(),))

    def configure(
        self, *, batch_cap: int | None = None, tp_degree: int | None = None, lease_s: float | None = None
    ) -> StackState:
        self.world.enter("configure")
        world = self.world
        if batch_cap is not None:
            world.batch_cap = batch_cap
            world.lease_ends_s = None if lease_s is None else world.clock.monotonic_s() + lease_s
            world.leases_s.append(lease_s)
        if tp_degree is not None and tp_degree != world.tp_degree and world.switching_to is None:
            if tp_degree in world.tp_refused:
                raise EngineError(f"TP degree {tp_degree} is refused: {world.tp_refused[tp_degree]}")
            world.switching_to = tp_degree
            world.switch_ends_s = world.clock.monotonic_s() + SWITCH_S
            world.switches += 1
        return world.state()

    def close(self) -> None:
        self.world.enter("close")
        self.closed += 1


class FakeMeter:
    """Reads the world's GPUs."""

    def __init__(self, world: World, *, present: bool = True) -> None:
        self.world = world
        self.present = present

    def read(self) -> MeterReading:
        self.world.enter("read")
        world = self.world
        at_s = world.clock.monotonic_s()
        if not self.present:
            return MeterReading(at_s, ())
        return MeterReading(
            at_s,
            tuple(
                GpuReading(
                    uuid,
                    None if world.gpu_unreadable else world.energy_j[uuid],
                    300.0,
                    world.sm_clock_mhz,
                )
                for uuid in UUIDS
            ),
        )


class FakeClocks:
    """Sets the world's SM clock."""

    present = True
    supported_mhz = SUPPORTED_MHZ

    def __init__(self, world: World) -> None:
        self.world = world

    def lock(self, sm_clock_mhz: int) -> None:
        self.world.enter("lock")
        if sm_clock_mhz not in SUPPORTED_MHZ:
            raise HardwareError(f"{sm_clock_mhz} MHz is no clock of these GPUs")
        self.world.lock_mhz = sm_clock_mhz

    def renew(self) -> None:
        self.world.enter("renew")

    def restore(self) -> None:
        self.world.enter("restore")
        self.world.lock_mhz = None

    def check(self) -> ClockCheck:
        self.world.enter("check")
        asked_mhz = self.world.lock_mhz
        if asked_mhz is None:
            return ClockCheck(None, ())
        state = ClockState(self.world.sm_clock_mhz, frozenset())
        verdict = judge_clock(asked_mhz, state.sm_clock_mhz, state.throttle_reasons)
        assert verdict in set(Verdict)
        return ClockCheck(
            asked_mhz,
            tuple(GpuCheck(uuid, state.sm_clock_mhz, state.throttle_reasons, verdict) for uuid in UUIDS),
        )


class FakeGpus:
    """Meter and clocks of the world's GPUs, as :class:`rlgov.hardware.hardware.Hardware`."""

    def __init__(self, world: World, *, metered: bool = True) -> None:
        self.meter = FakeMeter(world, present=metered)
        self.clocks = FakeClocks(world)
        self.closed = 0

    def close(self) -> None:
        self.closed += 1
