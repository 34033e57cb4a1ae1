"""What a serving stack tells about itself: values that cross from engine and gateway to a deployment.

All times are seconds of the machine's monotonic clock, which every process of one machine shares.
``None`` means that the source cannot tell, never zero.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum


class Outcome(StrEnum):
    """What became of a request."""

    OPEN = "open"  # not finished
    SERVED = "served"  # every token delivered, with a finish reason other than abort
    CANCELLED = "cancelled"  # the client went away
    FAILED = "failed"  # the engine failed or aborted it; the client got an error
    REJECTED = "rejected"  # refused for want of room by the gateway or the engine (429, 503)
    INVALID = "invalid"  # the client's own mistake (any other 4xx): no fault of serving


@dataclass(frozen=True, slots=True)
class RequestRecord:
    """One generation request as the gateway saw it."""

    request_id: str
    arrival_s: float  # its head and body were complete
    outcome: Outcome
    dispatched_s: float | None = None  # handed to an engine; None while it is held
    first_token_s: float | None = None
    last_token_s: float | None = None
    finished_s: float | None = None
    prompt_tokens: int | None = None
    output_tokens: int | None = None
    cached_tokens: int | None = None  # of the prompt, found in the prefix cache
    finish_reason: str | None = None
    engine_id: str | None = None  # the engine that served it
    dispatches: int = 0  # above 1: sent again after an engine had failed before its first token


@dataclass(frozen=True, slots=True)
class Traffic:
    """The requests of the gateway at ``now_s``: those open, and those closed after a cursor."""

    now_s: float
    cursor: int  # ask with this the next time
    open: tuple[RequestRecord, ...]
    closed: tuple[RequestRecord, ...]
    dropped: int = 0  # closed records that were forgotten before they were asked for


@dataclass(frozen=True, slots=True)
class Histogram:
    """A cumulative Prometheus histogram: ``counts[i]`` observations at or below ``bounds[i]``.

    The last bound is infinity. ``count`` equals the last entry of ``counts``.
    """

    bounds: tuple[float, ...]
    counts: tuple[float, ...]
    sum: float
    count: float


@dataclass(frozen=True, slots=True)
class EngineSample:
    """One engine at one moment: gauges at ``at_s``, counters since the engine started.

    Counters of two samples may be subtracted only when ``engine_id`` is the same.
    """

    at_s: float
    source: str  # "plugin" or "metrics"
    engine_id: str  # another one after a restart
    running: int
    waiting: int
    kv_usage: float  # 0..1
    generated_tokens: float
    prompt_tokens: float  # of requests: as they arrive (plugin) or as they are prefilled (metrics)
    prefill_tokens: float  # prompt tokens computed, recomputation after preemption included
    preemptions: float
    finished: float  # with every token
    arrived: float | None = None
    token_gaps: float | None = None  # gaps between consecutive tokens of a request ...
    token_gap_s: float | None = None  # ... and their sum
    iterations: float | None = None
    busy_s: float | None = None  # time spent iterating
    running_s: float | None = None  # running requests integrated over time
    waiting_tokens: float | None = None  # gauge: prompt tokens still to be computed
    batch_cap: int | None = None  # gauge: admission cap in force
    kv_capacity_tokens: int | None = None
    max_num_seqs: int | None = None
    failed: float | None = None  # ended by an error or an abort, or refused at admission; not in `finished`
    histograms: dict[str, Histogram] = field(default_factory=dict)
    """By :mod:`rlgov.engine.telemetry` name: ttft_s, tpot_s, e2e_s, queue_s, token_gap_s."""


@dataclass(frozen=True, slots=True)
class EngineIterations:
    """Iterations of one engine after a cursor, oldest first. A cursor is of one engine."""

    engine_id: str
    cursor: int  # ask with this the next time
    dropped: int  # iterations that were forgotten before they were asked for
    columns: tuple[str, ...]  # of :data:`rlgov.engine.plugin.counters.COLUMNS`
    rows: tuple[tuple[float, ...], ...]


@dataclass(frozen=True, slots=True)
class EngineInfo:
    """One engine of a serving stack."""

    engine_id: str
    tp_degree: int
    gpu_uuids: tuple[str, ...]
    phase: str  # starting, warming, active, draining, asleep, stopping, failed
    url: str
    pid: int | None
    version: str | None  # of vLLM
    cap_by: str  # "plugin", "gateway" or "none": who holds the batch cap
    note: str = ""  # why the plugin stepped aside, or what failed


@dataclass(frozen=True, slots=True)
class StackState:
    """The serving stack at one moment."""

    now_s: float
    tp_degree: int  # of the engine that takes new requests
    batch_cap: int  # in force for new requests
    switching: bool
    ready: bool  # an engine takes requests
    held: int  # requests waiting in the gateway
    tp_refused: dict[int, str]  # degrees that cannot be had now, with the reason
    engines: tuple[EngineInfo, ...]
    last_switch: dict[str, float | str] = field(default_factory=dict)
    """from, to, strategy, outcome, total_s, held_s of the last TP switch."""
    conditions: dict[str, str] = field(default_factory=dict)
    """What is wrong now, by name (EngineHung, EngineDown, ...), with what to do about it."""


@dataclass(frozen=True, slots=True)
class StackInterval:
    """One reading of everything, in one answer."""

    state: StackState
    traffic: Traffic
    engines: tuple[EngineSample, ...]  # of every engine that could be read now
    unread: dict[str, str] = field(default_factory=dict)  # engine_id -> why it could not be read


@dataclass(frozen=True, slots=True)
class StackLimits:
    """What a serving stack offers, largest first on every axis; aligned with ``tp_degrees``."""

    model: str
    batch_caps: tuple[int, ...]
    tp_degrees: tuple[int, ...]
    gpu_uuids: tuple[str, ...]  # allotted; empty without GPUs
    allotted_gpus: int  # on a machine without GPUs: the largest TP degree
    max_num_batched_tokens: int
    kv_capacity_tokens: tuple[int, ...]  # measured where an engine ran, else estimated, else 0
    switch_s: tuple[float, ...]  # measured where a switch was made, else the prior
    strategy: str  # side-by-side, sleep or restart
