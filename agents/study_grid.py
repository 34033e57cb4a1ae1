"""What a study is run on: workloads under SLO scales, test scenarios, and training stretches.

The first part of a trace is its training span, the rest its test span. Full load is the rate scale at
which the fastest setting holds 99.5 % attainment on the *training* span, so nothing is fitted to a test
span. The synthetic day has training days and a test day of different seeds.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final

import numpy as np

from rlgov.agents.playback import LEAD_IN_S, cut
from rlgov.agents.side_by_side import Episode
from rlgov.deployments.scenario import capacity_scale, synthetic_capacity
from rlgov.errors import ConfigError
from rlgov.workload.synthesis import SPECS, synthesize

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from rlgov.records import Limits
    from rlgov.simulation.tables import PhysicsTables
    from rlgov.workload.trace import Trace

DAY: Final = "day"
DAY_S: Final = 3600.0
DAY_LOW, DAY_HIGH = 0.1, 0.8
DAY_TEST_SEED: Final = 20240
DAY_TRAINING_SEEDS: Final = (11, 12, 13)
CHUNK_S: Final = 900.0  # stretches of a training span are played side by side: long ones would cost more
CHUNK_LEAD_S: Final = 120.0
MAX_CHUNKS: Final = 32  # of a load; a span that has more is sampled evenly


@dataclass(frozen=True, slots=True, eq=False)
class Scenario:
    """A test span at one load. ``load`` is None where the load swings."""

    load: float | None
    rate_scale: float
    test: Episode
    training: tuple[Episode, ...]
    """Stretches of the training span at the same load."""

    @property
    def label(self) -> str:
        """The load as reports name it."""
        return f"{100 * DAY_LOW:g}-{100 * DAY_HIGH:g} %" if self.load is None else f"{100 * self.load:g} %"


@dataclass(frozen=True, slots=True, eq=False)
class Cell:
    """One workload under one SLO: what rules are tuned for."""

    workload: str
    slo_scale: float
    limits: Limits
    tables: PhysicsTables
    capacity: float
    """At full load: a rate scale of a trace, requests per second of the synthetic day."""
    scenarios: tuple[Scenario, ...]


@dataclass(frozen=True, slots=True)
class NotHoldable:
    """A workload that misses an SLO even at a 256th of its rate."""

    workload: str
    slo_scale: float
    why: str


def trace_cell(
    trace: Trace,
    slo_scale: float,
    limits: Limits,
    tables: PhysicsTables,
    *,
    loads: Sequence[float],
    train_fraction: float,
) -> Cell | NotHoldable:
    """The test span of a trace at several loads, each with its training stretches."""
    limits = limits.with_service_level(limits.service_level.scaled(slo_scale))
    training, _ = trace.split(train_fraction)
    try:
        capacity = capacity_scale(limits, tables, training, limits.service_level)
    except ConfigError as error:
        return NotHoldable(trace.name, slo_scale, str(error))
    scenarios = []
    for load in loads:
        scale = capacity * load
        test = cut(
            trace,
            interval_s=limits.interval_s,
            from_s=trace.duration_s * train_fraction,
            rate_scale=scale,
        )
        chunks = tuple(_chunks(training, scale, limits.interval_s))
        scenarios.append(Scenario(load, scale, Episode(*test), chunks))
    return Cell(trace.name, slo_scale, limits, tables, capacity, tuple(scenarios))


def day_cell(slo_scale: float, limits: Limits, tables: PhysicsTables) -> Cell | NotHoldable:
    """A compressed synthetic day."""
    limits = limits.with_service_level(limits.service_level.scaled(slo_scale))
    try:
        capacity = synthetic_capacity(limits, tables, SPECS[DAY], limits.service_level).full
    except ConfigError as error:
        return NotHoldable(DAY, slo_scale, str(error))
    interval_s = limits.interval_s
    test = Episode(*cut(_day(capacity, DAY_TEST_SEED), interval_s=interval_s, from_s=LEAD_IN_S))
    chunks = tuple(
        chunk for seed in DAY_TRAINING_SEEDS for chunk in _chunks(_day(capacity, seed), 1.0, interval_s)
    )
    return Cell(DAY, slo_scale, limits, tables, capacity, (Scenario(None, 1.0, test, chunks),))


def _day(rate_per_s: float, seed: int) -> Trace:
    """One day, and before it the end of the day before, to lead in."""
    length_s = LEAD_IN_S + DAY_S
    spec = replace(
        SPECS[DAY],
        rate_per_s=rate_per_s,
        duration_s=length_s,
        low=DAY_LOW,
        high=DAY_HIGH,
        cycles=length_s / DAY_S,
        phase=-LEAD_IN_S / DAY_S,
    )
    return synthesize(spec, np.random.default_rng(seed))


def _chunks(trace: Trace, rate_scale: float, interval_s: float) -> Iterator[Episode]:
    """Stretches of ``CHUNK_S`` that fill a trace, or are spread over it where it has too many."""
    count = max(1, int(trace.duration_s / rate_scale / CHUNK_S))
    length_s = trace.duration_s / count
    kept = np.unique(np.linspace(0, count - 1, min(count, MAX_CHUNKS)).round().astype(np.int64))
    for k in kept.tolist():
        from_s, to_s = k * length_s, (k + 1) * length_s
        first, last = np.searchsorted(trace.arrival_s, [from_s, to_s])
        if first == last:  # nobody came: nothing to hold, and every setting idles alike
            continue
        part = cut(
            trace,
            interval_s=interval_s,
            from_s=from_s,
            to_s=to_s,
            rate_scale=rate_scale,
            lead_in_s=CHUNK_LEAD_S,
        )
        yield Episode(*part)
