"""What an episode of simulation consists of, and where episodes come from."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

import numpy as np

from rlgov.errors import ConfigError
from rlgov.simulation.batch import SimulationBatch
from rlgov.simulation.physics import build_tables, draw_parameters
from rlgov.workload.synthesis import SPECS, synthesize

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rlgov.records import Limits, ServiceLevel
    from rlgov.simulation.profile import Profile
    from rlgov.simulation.tables import PhysicsTables
    from rlgov.workload.synthesis import SynthesisSpec
    from rlgov.workload.trace import Trace

CAPACITY_ATTAINMENT = 0.995
"""A deployment is at 100 % load where its fastest setting holds just this attainment."""

_SEARCH_STEPS = 14  # bisections of the capacity search: better than 0.1 %
_DRAIN_WINDOWS = 120


@dataclass(frozen=True, slots=True, eq=False)
class Scenario:
    """One episode: requests, physics, SLO, and the axis indices it begins with."""

    trace: Trace
    tables: PhysicsTables
    service_level: ServiceLevel
    start: tuple[int, int, int] = (0, 0, 0)


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


def attainment_of_fastest(
    limits: Limits, tables: PhysicsTables, trace: Trace, service_level: ServiceLevel
) -> float:
    """Share of the trace's requests served within the SLO when the fastest setting is held."""
    batch = SimulationBatch(limits, 1, tables, capacity=max(len(trace), 1))
    batch.load(0, trace, tables, service_level)
    windows = math.ceil(trace.duration_s / limits.interval_s) + _DRAIN_WINDOWS
    batch.advance_windows(0, np.zeros((windows, 3), dtype=np.int64))
    log = batch.request_log(0)
    return 1.0 - float(np.mean(log.missed | np.isnan(log.finish_s)))


def capacity_scale(
    limits: Limits, tables: PhysicsTables, trace: Trace, service_level: ServiceLevel, *, most: float = 64.0
) -> float:
    """The largest rate scale at which the fastest setting holds 99.5 % attainment on ``trace``.

    Found by bisection on a logarithmic scale. Raises ConfigError when no scale between 1/64 and
    ``most`` will do, that is when the SLO cannot be held even without load.
    """
    low, high = math.log(1 / 64), math.log(most)

    def holds(scale: float) -> bool:
        level = attainment_of_fastest(limits, tables, trace.scaled(scale), service_level)
        return level >= CAPACITY_ATTAINMENT

    if not holds(math.exp(low)):
        msg = (
            f"trace {trace.name}: the fastest setting misses {service_level} for more than 0.5 % of requests "
            "even at a 64th of the rate; loosen the SLO (slo_scale) or drop the longest prompts"
        )
        raise ConfigError(msg)
    for _ in range(_SEARCH_STEPS):
        middle = (low + high) / 2
        if holds(math.exp(middle)):
            low = middle
        else:
            high = middle
    return math.exp(low)


class Source(Protocol):
    """Where an episode's requests come from. ``load`` 1 is the capacity of the fastest setting."""

    def draw(
        self, rng: np.random.Generator, load: float, duration_s: float, slo_scale: float
    ) -> tuple[Trace, float]:
        """Requests of one episode, and the load they amount to."""
        ...


@dataclass(frozen=True, slots=True, eq=False)
class TraceSource:
    """Random slices of a trace (give it the training span only), at a rate that makes the asked load.

    ``capacity`` holds the rate scale of full load for each SLO scale.
    """

    trace: Trace
    capacity: dict[float, float]

    def draw(
        self, rng: np.random.Generator, load: float, duration_s: float, slo_scale: float
    ) -> tuple[Trace, float]:
        """A slice that begins at a random time; the trace is read as a ring."""
        scale = self.capacity[slo_scale] * load
        length_s = duration_s * scale
        span_s = self.trace.duration_s
        start_s = float(rng.uniform(0.0, span_s))
        return _ring_slice(self.trace, start_s, min(length_s, span_s)).scaled(scale), load


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
    """Freshly generated requests. ``capacity`` holds the rate (1/s) of full load for each SLO scale.

    A spec with a load curve (``low`` below ``high``) keeps its own swing: it is compressed into the
    episode and ``load`` sets its height relative to ``peak_load``.
    """

    spec: SynthesisSpec
    capacity: dict[float, float]

    def draw(
        self, rng: np.random.Generator, load: float, duration_s: float, slo_scale: float
    ) -> tuple[Trace, float]:
        """A new trace of the asked length."""
        rate_per_s = self.capacity[slo_scale]
        if self.spec.low == self.spec.high:
            spec = replace(self.spec, rate_per_s=rate_per_s * load / self.spec.high, duration_s=duration_s)
            return synthesize(spec, rng), load
        # an episode sees a part of the day, half of it on average, anywhere in it
        cycles = float(rng.uniform(0.1, 1.0))
        spec = replace(
            self.spec, rate_per_s=rate_per_s, duration_s=duration_s, cycles=cycles, phase=float(rng.uniform())
        )
        return synthesize(spec, rng), float(np.mean(spec.load(np.linspace(0.0, duration_s, 64))))


def synthetic_capacity(
    limits: Limits, tables: PhysicsTables, spec: SynthesisSpec, service_level: ServiceLevel
) -> float:
    """Arrival rate (1/s) at which the fastest setting holds 99.5 %, for ``spec`` without its load curve."""
    flat = replace(spec, low=1.0, high=1.0, duration_s=1800.0)
    trace = synthesize(flat, np.random.default_rng(20231116))
    return capacity_scale(limits, tables, trace, service_level) * trace.mean_rate_per_s


class EpisodeSampler:
    """Training episodes: a source, a load, an SLO scale, a physics and a start, all drawn at random.

    Args:
        profile: What is simulated.
        sources: Traces (training spans only) and names or specs of synthetic workloads.
        load_range: Loads to draw from, relative to the capacity of the fastest setting.
        slo_scales: Scales of the profile's SLO to draw from.
        episode_s: Length of an episode.
        randomize: Draw the profile's uncertain parameters too; otherwise they stay nominal.
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
    ) -> None:
        if not sources or not slo_scales:
            msg = "training needs at least one workload and one SLO scale"
            raise ConfigError(msg)
        self.profile = profile
        self.limits = profile.limits()
        self.slo_scales = tuple(slo_scales)
        self.episode_s = episode_s
        self._load_range = load_range
        self._randomize = randomize
        self._nominal = build_tables(profile)
        self._sources = [self._source(source) for source in sources]

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
        level = self.limits.service_level
        if hasattr(source, "arrival_s"):
            trace: Trace = source
            return TraceSource(
                trace,
                {s: capacity_scale(self.limits, self._nominal, trace, level.scaled(s)) for s in self.slo_scales},
            )
        spec: SynthesisSpec = source
        return SyntheticSource(
            spec,
            {s: synthetic_capacity(self.limits, self._nominal, spec, level.scaled(s)) for s in self.slo_scales},
        )

    def sample(self, rng: np.random.Generator) -> Scenario:
        """The scenario of one episode."""
        source = self._sources[int(rng.integers(len(self._sources)))]
        slo_scale = self.slo_scales[int(rng.integers(len(self.slo_scales)))]
        load = float(rng.uniform(*self._load_range))
        trace, _ = source.draw(rng, load, self.episode_s, slo_scale)
        tables = self._nominal
        if self._randomize:
            tables = build_tables(self.profile, draw=draw_parameters(self.profile, rng))
        clocks, _, degrees = self.limits.axis_sizes
        start = (int(rng.integers(clocks)), 0, int(rng.integers(degrees)))
        return Scenario(trace, tables, self.limits.service_level.scaled(slo_scale), start)
