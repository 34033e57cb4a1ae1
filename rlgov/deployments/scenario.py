"""What an episode of simulation consists of, and where episodes come from."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

import numpy as np

from rlgov.errors import ConfigError
from rlgov.simulation.batch import SimulationBatch
from rlgov.simulation.physics import build_tables, draw_parameters
from rlgov.workload.synthesis import SPECS, synthesize
from rlgov.workload.trace import Trace

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from rlgov.records import Limits, ServiceLevel
    from rlgov.simulation.profile import Profile
    from rlgov.simulation.tables import PhysicsTables
    from rlgov.workload.synthesis import SynthesisSpec

CAPACITY_ATTAINMENT = 0.995
"""A deployment is at 100 % load where its fastest setting holds just this attainment."""

_SEARCH_STEPS = 10  # bisections of the capacity search, from a factor of 4 to 0.2 %
_LOWEST_SCALE = 1 / 256
_HIGHEST_SCALE = 256.0
_DRAIN_WINDOWS = 120


@dataclass(frozen=True, slots=True, eq=False)
class Scenario:
    """One episode: requests, physics, SLO, and the axis indices it begins with."""

    trace: Trace
    tables: PhysicsTables
    service_level: ServiceLevel
    start: tuple[int, int, int] = (0, 0, 0)
    group: int = 0  # which of the sampler's constraint groups the episode belongs to
    loads: tuple[float, ...] = (1.0,)  # share of capacity, at even times from begin to end of the episode


class ScenarioSampler(Protocol):
    """Gives each episode its scenario; all chance comes from ``rng``."""

    def sample(self, rng: np.random.Generator) -> Scenario:
        """The scenario of one episode."""
        ...


@dataclass(frozen=True, slots=True, eq=False)
class FixedScenario:
    """The same episode every time."""

    trace: Trace
    tables: PhysicsTables
    service_level: ServiceLevel
    start: tuple[int, int, int] = (0, 0, 0)

    def sample(self, rng: np.random.Generator) -> Scenario:  # noqa: ARG002  # nothing to draw
        """The one scenario there is."""
        return Scenario(self.trace, self.tables, self.service_level, self.start)


def attainment_at_full_clock(
    limits: Limits, tables: PhysicsTables, trace: Trace, service_level: ServiceLevel, tp_index: int = 0
) -> float:
    """Share of requests served within the SLO at the fastest clock and cap, by default also TP degree."""
    batch = SimulationBatch(limits, 1, tables, capacity=max(len(trace), 1))
    held = (0, 0, tp_index)
    batch.load(0, trace, tables, service_level, held)
    windows = math.ceil(trace.duration_s / limits.interval_s) + _DRAIN_WINDOWS
    batch.advance_windows(0, np.tile(np.array(held, dtype=np.int64), (windows, 1)))
    log = batch.request_log(0)
    return 1.0 - float(np.mean(log.missed | np.isnan(log.finish_s)))


def capacity_scale(limits: Limits, tables: PhysicsTables, trace: Trace, service_level: ServiceLevel) -> float:
    """The largest rate scale at which the fastest setting holds 99.5 % attainment on ``trace``.

    Found by bisection on a logarithmic scale. Raises ConfigError when no scale from 1/256 on will do,
    that is when bursts alone break the SLO.
    """
    scale = _capacity_at(limits, tables, trace, service_level, 0)
    if scale is None:
        msg = (
            f"trace {trace.name}: the fastest setting misses {service_level} for more than 0.5 % of requests "
            "even at a 256th of the rate; loosen the SLO (slo_scale) or leave this workload out"
        )
        raise ConfigError(msg)
    return scale


def _capacity_at(
    limits: Limits, tables: PhysicsTables, trace: Trace, service_level: ServiceLevel, tp_index: int
) -> float | None:
    def holds(scale: float) -> bool:
        attainment = attainment_at_full_clock(limits, tables, trace.scaled(scale), service_level, tp_index)
        return attainment >= CAPACITY_ATTAINMENT

    # Bracket outward from the trace's own rate: very low rates make very long simulations.
    low = high = 1.0
    while not holds(low):
        high, low = low, low / 4
        if low < _LOWEST_SCALE:
            return None
    while high == low or holds(high):
        low, high = high, high * 4
        if low > _HIGHEST_SCALE:
            return low
    for _ in range(_SEARCH_STEPS):
        middle = math.sqrt(low * high)
        if holds(middle):
            low = middle
        else:
            high = middle
    return low


@dataclass(frozen=True, slots=True)
class Capacity:
    """What a workload's load is measured in, for one SLO.

    ``full`` is the rate scale (of a trace) or rate in 1/s (of a synthetic workload) at which the fastest
    setting holds 99.5 %; ``tp_shares`` says what share of it each TP degree carries at full clock.
    """

    full: float
    tp_shares: tuple[float, ...]

    def starts(self, load: float) -> list[int]:
        """TP indices that can carry ``load``; the largest degree always counts."""
        return [0, *(j for j in range(1, len(self.tp_shares)) if self.tp_shares[j] >= load)]


def measure_capacity(
    limits: Limits, tables: PhysicsTables, trace: Trace, service_level: ServiceLevel
) -> Capacity:
    """Capacity of the fastest setting in rate scales of ``trace``, and each TP degree's share of it."""
    full = capacity_scale(limits, tables, trace, service_level)
    others = [
        _capacity_at(limits, tables, trace, service_level, j) or 0.0 for j in range(1, len(limits.tp_degrees))
    ]
    return Capacity(full, (1.0, *(scale / full for scale in others)))


class Source(Protocol):
    """Where an episode's requests come from. ``load`` 1 is the capacity of the fastest setting."""

    @property
    def name(self) -> str:
        """For reports."""
        ...

    @property
    def capacity(self) -> dict[float, Capacity]:
        """By SLO scale; a scale that cannot be held at any rate is absent."""
        ...

    @property
    def steady(self) -> bool:
        """Whether the load is the asked one throughout, rather than a curve of its own."""
        ...

    def draw(
        self, rng: np.random.Generator, load: float, duration_s: float, slo_scale: float
    ) -> tuple[Trace, tuple[float, ...]]:
        """Requests of one episode, and its load at even times from begin to end."""
        ...


@dataclass(frozen=True, slots=True, eq=False)
class TraceSource:
    """Random slices of a trace (give it the training span only), at a rate that makes the asked load."""

    trace: Trace
    capacity: dict[float, Capacity]

    @property
    def name(self) -> str:
        """The trace's."""
        return self.trace.name

    @property
    def steady(self) -> bool:
        """A trace has no load curve but its own."""
        return True

    def draw(
        self, rng: np.random.Generator, load: float, duration_s: float, slo_scale: float
    ) -> tuple[Trace, tuple[float, ...]]:
        """A slice that begins at a random time; the trace is read as a ring."""
        scale = self.capacity[slo_scale].full * load
        length_s = duration_s * scale
        span_s = self.trace.duration_s
        start_s = float(rng.uniform(0.0, span_s))
        return _ring_slice(self.trace, start_s, min(length_s, span_s)).scaled(scale), (load,)


def _ring_slice(trace: Trace, start_s: float, length_s: float) -> Trace:
    """``length_s`` seconds from ``start_s`` on; after the end the trace begins again."""
    rest_s = trace.duration_s - start_s
    if length_s <= rest_s:
        return trace.slice(start_s, start_s + length_s)
    head = trace.slice(start_s, trace.duration_s)
    if length_s - rest_s <= 0:
        return head
    tail = trace.slice(0.0, length_s - rest_s)
    return replace(
        head,
        arrival_s=np.concatenate([head.arrival_s, tail.arrival_s + rest_s]),
        prompt_tokens=np.concatenate([head.prompt_tokens, tail.prompt_tokens]),
        output_tokens=np.concatenate([head.output_tokens, tail.output_tokens]),
        prefix_hit_tokens=np.concatenate([head.prefix_hit_tokens, tail.prefix_hit_tokens]),
        duration_s=length_s,
    )


@dataclass(frozen=True, slots=True, eq=False)
class SyntheticSource:
    """Freshly generated requests, of a spec or, with a load curve (``low`` below ``high``), a part of it."""

    spec: SynthesisSpec
    capacity: dict[float, Capacity]

    @property
    def name(self) -> str:
        """The spec's."""
        return self.spec.name

    @property
    def steady(self) -> bool:
        """Whether the spec has no load curve."""
        return self.spec.low == self.spec.high

    def draw(
        self, rng: np.random.Generator, load: float, duration_s: float, slo_scale: float
    ) -> tuple[Trace, tuple[float, ...]]:
        """A new trace of the asked length; a load curve keeps its own heights."""
        rate_per_s = self.capacity[slo_scale].full
        if self.spec.low == self.spec.high:
            spec = replace(self.spec, rate_per_s=rate_per_s * load / self.spec.high, duration_s=duration_s)
            return synthesize(spec, rng), (load,)
        cycles = float(rng.uniform(*_DAYS_PER_EPISODE))
        spec = replace(
            self.spec, rate_per_s=rate_per_s, duration_s=duration_s, cycles=cycles, phase=float(rng.uniform())
        )
        return synthesize(spec, rng), tuple(spec.load(np.linspace(0.0, duration_s, _LOAD_POINTS)).tolist())


# An episode of minutes sees a part of a day, steeper or flatter than a whole hour's compressed day.
_DAYS_PER_EPISODE = (0.04, 0.4)
_LOAD_POINTS = 33
_NEAR = (0.75, 1.25)  # loads this far outside a group's range still belong to it


def synthetic_capacity(
    limits: Limits, tables: PhysicsTables, spec: SynthesisSpec, service_level: ServiceLevel
) -> Capacity:
    """As :func:`measure_capacity`, in requests per second, for ``spec`` without its load curve."""
    flat = replace(spec, low=1.0, high=1.0, duration_s=1800.0)
    trace = synthesize(flat, np.random.default_rng(20231116))
    capacity = measure_capacity(limits, tables, trace, service_level)
    return replace(capacity, full=capacity.full * trace.mean_rate_per_s)


@dataclass(frozen=True, slots=True)
class _Group:
    source: int
    slo_scale: float
    low: float  # loads
    high: float


class EpisodeSampler:
    """Training episodes: a source, a load, an SLO scale, a physics and a start, all drawn at random.

    Args:
        profile: What is simulated.
        sources: Traces (training spans only) and names or specs of synthetic workloads.
        load_range: Loads to draw from, relative to the capacity of the fastest setting.
        slo_scales: Scales of the profile's SLO to draw from.
        episode_s: Length of an episode.
        randomize: Draw the profile's uncertain parameters too; otherwise they stay nominal.
        load_bins: Parts of the load range that each make a constraint group of their own: a policy must
            not pay for misses at high load with spare attainment at low load.
    """

    def __init__(
        self,
        profile: Profile,
        sources: Sequence[Trace | SynthesisSpec | str],
        *,
        load_range: tuple[float, float] = (0.1, 0.8),
        slo_scales: Sequence[float] = (1.0,),
        episode_s: float = 300.0,
        randomize: bool = True,
        load_bins: int = 3,
    ) -> None:
        if not sources or not slo_scales:
            msg = "training needs at least one workload and one SLO scale"
            raise ConfigError(msg)
        self.profile = profile
        self.limits = profile.limits()
        self.slo_scales = tuple(slo_scales)
        self.episode_s = episode_s
        self._randomize = randomize
        self._nominal = build_tables(profile)
        self._sources = [self._source(source) for source in sources]
        edges = np.linspace(*load_range, load_bins + 1).tolist()
        bins = list(itertools.pairwise(edges))
        self._groups = [
            _Group(k, scale, *loads)
            for k, source in enumerate(self._sources)
            for scale in source.capacity
            for loads in (bins if source.steady else [load_range])
        ]

    @property
    def nominal(self) -> PhysicsTables:
        """The profile's physics without randomisation."""
        return self._nominal

    def _source(self, source: Trace | SynthesisSpec | str) -> Source:
        if isinstance(source, str):
            if source not in SPECS:
                msg = f"no synthetic workload is called {source!r}; there are {', '.join(sorted(SPECS))}"
                raise ConfigError(msg)
            source = SPECS[source]
        if isinstance(source, Trace):
            trace = source
            return TraceSource(
                trace,
                self._capacities(lambda level: measure_capacity(self.limits, self._nominal, trace, level)),
            )
        spec = source
        return SyntheticSource(
            spec, self._capacities(lambda level: synthetic_capacity(self.limits, self._nominal, spec, level))
        )

    def _capacities(self, measure: Callable[[ServiceLevel], Capacity]) -> dict[float, Capacity]:
        found: dict[float, Capacity] = {}
        failure: ConfigError | None = None
        for slo_scale in self.slo_scales:
            try:
                found[slo_scale] = measure(self.limits.service_level.scaled(slo_scale))
            except ConfigError as error:  # too tight for this workload, perhaps not for the others
                failure = error
        if not found and failure is not None:
            raise failure
        return found

    @property
    def groups(self) -> tuple[str, ...]:
        """Constraint groups: each holds the stated attainment by itself. One a workload, SLO and load bin."""
        return tuple(
            f"{self._sources[g.source].name} slo {g.slo_scale:g} load {g.low:.2f}-{g.high:.2f}"
            for g in self._groups
        )

    def covers(self, group: int, load: float) -> bool:
        """Whether episodes of a constraint group have about this load."""
        chosen = self._groups[group]
        return chosen.low * _NEAR[0] <= load <= chosen.high * _NEAR[1]

    def traffic(
        self, group: int, load: float, duration_s: float, rng: np.random.Generator
    ) -> tuple[Trace, ServiceLevel]:
        """Steady traffic of a constraint group at a given load, and the group's SLO."""
        chosen = self._groups[group]
        slo_scale = chosen.slo_scale
        source = self._sources[chosen.source]
        if isinstance(source, SyntheticSource):
            source = replace(source, spec=replace(source.spec, low=1.0, high=1.0))
        trace, _ = source.draw(rng, load, duration_s, slo_scale)
        return trace, self.limits.service_level.scaled(slo_scale)

    def sample(self, rng: np.random.Generator) -> Scenario:
        """The scenario of one episode."""
        group = int(rng.integers(len(self._groups)))
        chosen = self._groups[group]
        slo_scale = chosen.slo_scale
        source = self._sources[chosen.source]
        trace, loads = source.draw(
            rng, float(rng.uniform(chosen.low, chosen.high)), self.episode_s, slo_scale
        )
        tables = self._nominal
        if self._randomize:
            tables = build_tables(self.profile, draw=draw_parameters(self.profile, rng))
        # Start where the load can be carried: what misses at a hopeless start teaches nothing.
        degrees = source.capacity[slo_scale].starts(max(loads))
        start = (0, 0, degrees[int(rng.integers(len(degrees)))])
        return Scenario(trace, tables, self.limits.service_level.scaled(slo_scale), start, group, loads)
