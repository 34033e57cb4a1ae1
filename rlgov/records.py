"""The values that cross borders: frozen, with units in their names.

On every axis of a configuration **index 0 is the fastest, safest setting**, so that a fault that
yields zeros never slows serving.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from enum import IntEnum
from typing import TYPE_CHECKING, Self

import numpy as np

from rlgov.errors import ConfigError

if TYPE_CHECKING:
    from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class ServiceLevel:
    """Latency objectives of one request: a request is a miss when it breaks either.

    TTFT counts from arrival to the first token; TPOT is the mean time per output token after the
    first one, ``(finish - first) / (output_tokens - 1)``, as in vLLM's goodput.
    """

    ttft_s: float
    tpot_s: float

    def __post_init__(self) -> None:
        if not (self.ttft_s > 0 and self.tpot_s > 0):
            msg = f"SLO limits must be positive seconds, got {self}; set ttft_s and tpot_s above 0"
            raise ConfigError(msg)

    def scaled(self, slo_scale: float) -> ServiceLevel:
        """Both limits times ``slo_scale``: 0.6 stands for the 3x rule, 1 for 5x, 2 for 10x."""
        return ServiceLevel(self.ttft_s * slo_scale, self.tpot_s * slo_scale)


@dataclass(frozen=True, slots=True)
class Configuration:
    """What the governor controls."""

    sm_clock_mhz: int
    batch_cap: int
    tp_degree: int


@dataclass(frozen=True, slots=True)
class Limits:
    """What a deployment allows. Every tuple is ordered fastest first.

    ``kv_capacity_tokens`` and ``switch_s`` (time from asking for a TP degree until its engine takes
    traffic) are aligned with ``tp_degrees``.
    """

    sm_clocks_mhz: tuple[int, ...]
    batch_caps: tuple[int, ...]
    tp_degrees: tuple[int, ...]
    interval_s: float
    service_level: ServiceLevel
    allotted_gpus: int
    tdp_w: float
    kv_capacity_tokens: tuple[int, ...]
    switch_s: tuple[float, ...]
    max_num_batched_tokens: int

    def __post_init__(self) -> None:
        for name in ("sm_clocks_mhz", "batch_caps", "tp_degrees"):
            axis: tuple[int, ...] = getattr(self, name)
            if not axis or list(axis) != sorted(set(axis), reverse=True) or axis[-1] <= 0:
                msg = f"{name} must be distinct positive numbers, fastest (largest) first: {axis}"
                raise ConfigError(msg)
        if self.interval_s <= 0:
            msg = f"interval_s must be above 0, got {self.interval_s}"
            raise ConfigError(msg)
        if self.tp_degrees[0] > self.allotted_gpus:
            msg = f"TP degree {self.tp_degrees[0]} needs more than {self.allotted_gpus} GPUs"
            raise ConfigError(msg)

    @property
    def axis_sizes(self) -> tuple[int, int, int]:
        """Number of clocks, batch caps and TP degrees."""
        return len(self.sm_clocks_mhz), len(self.batch_caps), len(self.tp_degrees)

    @property
    def fastest(self) -> Configuration:
        """Index 0 on every axis."""
        return self.configuration((0, 0, 0))

    def configuration(self, index: tuple[int, int, int]) -> Configuration:
        """The configuration at an index per axis (clock, cap, TP)."""
        clock, cap, tp = index
        return Configuration(self.sm_clocks_mhz[clock], self.batch_caps[cap], self.tp_degrees[tp])

    def index(self, configuration: Configuration) -> tuple[int, int, int]:
        """Inverse of :meth:`configuration`. Raises ConfigError for a setting that is not offered."""
        try:
            return (
                self.sm_clocks_mhz.index(configuration.sm_clock_mhz),
                self.batch_caps.index(configuration.batch_cap),
                self.tp_degrees.index(configuration.tp_degree),
            )
        except ValueError:
            msg = (
                f"{configuration} is not offered here; clocks {self.sm_clocks_mhz} MHz, "
                f"caps {self.batch_caps}, TP degrees {self.tp_degrees}"
            )
            raise ConfigError(msg) from None

    def with_service_level(self, service_level: ServiceLevel) -> Limits:
        """The same limits under other latency objectives."""
        return replace(self, service_level=service_level)


@dataclass(frozen=True, slots=True)
class Window:
    """What happened in one control interval. Counts are of this window; states are at its end.

    ``None`` means that nothing was there to measure (no first token, no finish, no energy meter), never a
    zero. ``blind`` means that the deployment could not be observed: then no other field may be used. Energy
    is ``None`` outside blind windows only where there is no meter at all: such windows serve for watching,
    not for deciding.
    """

    start_s: float
    duration_s: float
    arrivals: float
    prompt_tokens: float  # of the requests that arrived
    output_tokens: float  # generated
    prefill_tokens: float  # prompt tokens computed, recomputation after preemption included
    served: float  # requests finished, in time or not
    misses: float  # SLO misses, counted once a request, when they happen
    overdue: float  # at the end: past their TTFT limit and still without a first token
    preemptions: float
    running: float
    waiting: float
    waiting_tokens: float  # prompt tokens that still have to be computed, running prefills included
    oldest_wait_s: float  # age of the oldest request without a first token; 0 if there is none
    running_mean: float  # time average
    busy_fraction: float  # share of the window in which the serving engine was iterating
    kv_usage: float  # share of the serving engine's KV blocks in use, 0..1
    ttft_p50_s: float | None  # of requests whose first token fell in this window
    ttft_p99_s: float | None
    tpot_p50_s: float | None  # of requests that finished in this window
    tpot_p99_s: float | None
    itl_mean_s: float | None  # mean gap between tokens, over all tokens decoded in this window
    energy_j: float | None  # all allotted GPUs, idle ones and both engines of a TP switch included
    measured_clock_mhz: float  # time-weighted, after throttling
    throttled_fraction: float  # share of the window spent below the asked clock because of TDP
    sm_clock_mhz: float  # configuration asked for at the end of the window
    batch_cap: float
    tp_degree: float  # of the engine that takes new requests
    switching: float  # 1 while a TP switch is in progress
    age_s: float  # age of the data when the window was handed over; 0 in simulation
    blind: float = 0.0  # 1 when the deployment could not be observed
    tp_refused: float = 0.0  # bit i set: the TP degree at index i of the limits cannot be had now

    @property
    def configuration(self) -> Configuration:
        """The configuration in force at the end of the window."""
        return Configuration(int(self.sm_clock_mhz), int(self.batch_cap), int(self.tp_degree))

    def to_row(self) -> NDArray[np.float64]:
        """One float64 row in the order of :class:`Column`; ``None`` becomes NaN."""
        values = (getattr(self, name) for name in WINDOW_FIELDS)
        return np.array([np.nan if v is None else v for v in values], dtype=np.float64)

    @classmethod
    def from_row(cls, row: NDArray[np.float64]) -> Self:
        """Inverse of :meth:`to_row`."""
        values = [None if np.isnan(v) else float(v) for v in row]
        return cls(**dict(zip(WINDOW_FIELDS, values, strict=True)))  # type: ignore[arg-type]  # checked by a round-trip test


WINDOW_FIELDS: tuple[str, ...] = tuple(f.name for f in fields(Window))


class Column(IntEnum):
    """Column numbers of a window row: the vectorised code's view of :class:`Window`, in its order."""

    START_S = 0
    DURATION_S = 1
    ARRIVALS = 2
    PROMPT_TOKENS = 3
    OUTPUT_TOKENS = 4
    PREFILL_TOKENS = 5
    SERVED = 6
    MISSES = 7
    OVERDUE = 8
    PREEMPTIONS = 9
    RUNNING = 10
    WAITING = 11
    WAITING_TOKENS = 12
    OLDEST_WAIT_S = 13
    RUNNING_MEAN = 14
    BUSY_FRACTION = 15
    KV_USAGE = 16
    TTFT_P50_S = 17
    TTFT_P99_S = 18
    TPOT_P50_S = 19
    TPOT_P99_S = 20
    ITL_MEAN_S = 21
    ENERGY_J = 22
    MEASURED_CLOCK_MHZ = 23
    THROTTLED_FRACTION = 24
    SM_CLOCK_MHZ = 25
    BATCH_CAP = 26
    TP_DEGREE = 27
    SWITCHING = 28
    AGE_S = 29
    BLIND = 30
    TP_REFUSED = 31


@dataclass(frozen=True, slots=True)
class Decision:
    """One decision with its reason. ``at_s`` is the end of the window it was taken on."""

    at_s: float
    asked: Configuration
    applied: Configuration
    reason: str  # a value of rlgov.envs.guard.Reason
    probability: float | None = None  # of the asked action under the policy, if it has one
    policy_digest: str = ""
