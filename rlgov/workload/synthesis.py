"""Synthetic traces: a load curve, bursts on top of it, and heavy-tailed lengths.

Arrivals form a Cox process. Its rate is the product of three parts, the last two of mean 1:

1. the load curve, a fraction of ``rate_per_s`` that swings from ``low`` to ``high`` like a day;
2. a switch between busy and quiet, with exponential stays (bursts of seconds);
3. a lognormal drift with exponentially decaying memory (minutes).

Given the rate, arrivals are Poisson. The parameters are fitted in :mod:`rlgov.workload.fit_synthesis`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from rlgov.errors import ConfigError
from rlgov.workload import fitted
from rlgov.workload.trace import Trace

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from rlgov.workload.lengths import LengthMixture

CELL_S = 0.1  # the rate is constant within a cell; far below the shortest burst
DRIFT_STEP_S = 1.0
MAX_REQUESTS = 50_000_000  # 2 GB of arrays: beyond this a parameter is wrong


@dataclass(frozen=True, slots=True)
class Burstiness:
    """How a rate varies around its load curve.

    ``busy_share`` of the time the stream is busy; when quiet its rate is ``quiet_ratio`` times the
    busy one. ``memory_s`` is the correlation time of that switch: busy stays last
    ``memory_s / (1 - busy_share)`` on average, quiet ones ``memory_s / busy_share``. ``drift_std`` is
    the deviation of the logarithm of the slow drift and ``drift_memory_s`` its correlation time.
    """

    busy_share: float = 1.0
    quiet_ratio: float = 1.0
    memory_s: float = 1.0
    drift_std: float = 0.0
    drift_memory_s: float = 300.0

    def __post_init__(self) -> None:
        usable = (
            0 < self.busy_share <= 1
            and 0 <= self.quiet_ratio <= 1
            and self.memory_s > 0
            and 0 <= self.drift_std <= 2  # noqa: PLR2004  # e^2 is already a factor of seven
            and self.drift_memory_s > 0
        )
        if not usable:
            msg = (
                f"{self} cannot be used; busy_share must lie in (0, 1], quiet_ratio in 0..1, "
                "drift_std in 0..2, and both memories must be above 0 s"
            )
            raise ConfigError(msg)


POISSON = Burstiness()


@dataclass(frozen=True, slots=True)
class SynthesisSpec:
    """What to synthesise. The load runs from ``low`` to ``high`` times ``rate_per_s``."""

    name: str
    lengths: LengthMixture
    burstiness: Burstiness
    rate_per_s: float
    duration_s: float = 3600.0
    low: float = 1.0
    high: float = 1.0
    cycles: float = 1.0  # days within duration_s
    phase: float = 0.0  # share of a day at which it starts; 0 is the deepest night

    def __post_init__(self) -> None:
        if not (0 < self.rate_per_s < math.inf and 0 < self.duration_s < math.inf):
            msg = f"{self.name}: rate_per_s and duration_s must be finite and above 0"
            raise ConfigError(msg)
        if not 0 <= self.low <= self.high < math.inf or self.high == 0:
            msg = f"{self.name}: give 0 <= low <= high and high above 0, got low {self.low}, high {self.high}"
            raise ConfigError(msg)
        if not (0 < self.cycles < math.inf and math.isfinite(self.phase)):
            msg = f"{self.name}: cycles must be above 0 and phase finite, got {self.cycles}, {self.phase}"
            raise ConfigError(msg)
        if self.rate_per_s * self.high * self.duration_s > MAX_REQUESTS:
            msg = f"{self.name}: more than {MAX_REQUESTS} requests; lower rate_per_s or duration_s"
            raise ConfigError(msg)

    def load(self, at_s: NDArray[np.float64]) -> NDArray[np.float64]:
        """Fraction of ``rate_per_s`` on the load curve at the given times."""
        return self.low + (self.high - self.low) * day_shape(
            at_s / self.duration_s * self.cycles + self.phase
        )


def day_shape(day: NDArray[np.float64]) -> NDArray[np.float64]:
    """A day of load scaled to 0..1: deepest at 0, a broad plateau around the middle, 1 at its height.

    Two harmonics, the second flattening the plateau and sharpening the night, as in office-hours traffic.
    """
    angle = 2 * np.pi * np.asarray(day, dtype=np.float64)
    # At 0 the sum is -1.2 and its maximum is 0.8, at angle pi; both harmonics are even around it.
    return (1.2 - np.cos(angle) - 0.2 * np.cos(2 * angle)) / 2.0


def synthesize(spec: SynthesisSpec, rng: np.random.Generator) -> Trace:
    """Draw one trace. Equal generators give equal traces."""
    arrival_rng, length_rng = rng.spawn(2)  # a change of lengths leaves the arrivals as they are
    cells = math.ceil(spec.duration_s / CELL_S)
    edge_s = np.minimum(np.arange(cells + 1) * CELL_S, spec.duration_s)
    width_s = np.diff(edge_s)
    middle_s = (edge_s[:-1] + edge_s[1:]) / 2
    rate_per_s = spec.rate_per_s * spec.load(middle_s)
    rate_per_s = rate_per_s * _busy_factor(spec.burstiness, edge_s, arrival_rng)
    rate_per_s *= _drift_factor(spec.burstiness, middle_s, arrival_rng)
    counts = arrival_rng.poisson(rate_per_s * width_s)
    start_s, span_s = np.repeat(edge_s[:-1], counts), np.repeat(width_s, counts)
    arrival_s = np.sort(start_s + span_s * arrival_rng.random(len(start_s)))
    prompt_tokens, output_tokens = spec.lengths.sample(len(arrival_s), length_rng)
    return Trace(
        spec.name,
        arrival_s,
        prompt_tokens,
        output_tokens,
        np.zeros(len(arrival_s), dtype=np.int64),
        float(spec.duration_s),
    )


def day_trace(
    peak_rate_per_s: float,
    duration_s: float,
    low: float,
    high: float,
    rng: np.random.Generator,
    *,
    lengths: LengthMixture | None = None,
    phase: float = 0.0,
) -> Trace:
    """A compressed day whose load swings from ``low`` to ``high`` times ``peak_rate_per_s``.

    ``peak_rate_per_s`` is the rate that counts as full load, which a ``high`` below 1 never reaches
    on average. Lengths are those of the conversation trace unless given.
    """
    spec = replace(
        SPECS["day"],
        rate_per_s=peak_rate_per_s,
        duration_s=duration_s,
        low=low,
        high=high,
        phase=phase,
        lengths=SPECS["day"].lengths if lengths is None else lengths,
    )
    return synthesize(spec, rng)


def _busy_factor(
    burstiness: Burstiness, edge_s: NDArray[np.float64], rng: np.random.Generator
) -> NDArray[np.float64]:
    """Mean rate factor of each cell from exponential busy and quiet stays, starting in equilibrium."""
    share, ratio = burstiness.busy_share, burstiness.quiet_ratio
    if share == 1 or ratio == 1:
        return np.ones(len(edge_s) - 1)
    end_s = float(edge_s[-1])
    busy_first = bool(rng.random() < share)
    stay_s = np.array([burstiness.memory_s / (1 - share), burstiness.memory_s / share])
    if not busy_first:
        stay_s = stay_s[::-1]
    change_s = np.zeros(1)
    while change_s[-1] < end_s:
        block = rng.exponential(np.tile(stay_s, 1024))
        change_s = np.concatenate([change_s, change_s[-1] + np.cumsum(block)])
    # Busy time up to each change of state, hence, between changes, by linear interpolation.
    stays = np.diff(change_s)
    is_busy = (np.arange(len(stays)) % 2 == 0) == busy_first
    busy_s = np.concatenate([[0.0], np.cumsum(stays * is_busy)])
    busy_part = np.diff(np.interp(edge_s, change_s, busy_s)) / np.diff(edge_s)
    factor: NDArray[np.float64] = (ratio + (1 - ratio) * busy_part) / (share + (1 - share) * ratio)
    return factor


def _drift_factor(
    burstiness: Burstiness, at_s: NDArray[np.float64], rng: np.random.Generator
) -> NDArray[np.float64]:
    """A lognormal of mean 1 whose logarithm is an Ornstein-Uhlenbeck process, held for each step."""
    std = burstiness.drift_std
    if std == 0:
        return np.ones(len(at_s))
    steps = int(at_s[-1] / DRIFT_STEP_S) + 1
    keep = math.exp(-DRIFT_STEP_S / burstiness.drift_memory_s)
    noise = rng.standard_normal(steps) * std * math.sqrt(1 - keep**2)
    noise[0] = rng.standard_normal() * std
    log_factor = np.empty(steps)
    level = 0.0
    for step, kick in enumerate(noise.tolist()):
        level = keep * level + kick
        log_factor[step] = level
    return np.exp(log_factor - std**2 / 2)[(at_s / DRIFT_STEP_S).astype(np.int64)]


SPECS: dict[str, SynthesisSpec] = {
    "conversation": SynthesisSpec(
        name="conversation",
        lengths=fitted.CONVERSATION_LENGTHS,
        burstiness=Burstiness(**fitted.CONVERSATION_BURSTINESS),
        rate_per_s=fitted.CONVERSATION_RATE_PER_S,
    ),
    "code": SynthesisSpec(
        name="code",
        lengths=fitted.CODE_LENGTHS,
        burstiness=Burstiness(**fitted.CODE_BURSTINESS),
        rate_per_s=fitted.CODE_RATE_PER_S,
    ),
    # The day curve takes the place of the slow drift, so that the load stays between low and high.
    "day": SynthesisSpec(
        name="day",
        lengths=fitted.CONVERSATION_LENGTHS,
        burstiness=replace(Burstiness(**fitted.CONVERSATION_BURSTINESS), drift_std=0.0),
        rate_per_s=fitted.CONVERSATION_RATE_PER_S,
        low=0.1,
        high=0.8,
    ),
}
