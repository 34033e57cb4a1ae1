"""How far simulated latencies are from measured ones."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

METRICS = ("ttft", "tpot", "e2e")
QUANTILES = (50, 99)
BARS = {50: 0.05, 99: 0.10}
"""Largest median absolute error, relative, over the cells."""


@dataclass(frozen=True, slots=True, eq=False)
class Latencies:
    """Of the requests of one run, in order of arrival; NaN where there is none (one token has no TPOT)."""

    ttft_s: Floats
    tpot_s: Floats
    e2e_s: Floats

    def of(self, metric: str) -> Floats:
        """Known values of one metric."""
        values: Floats = getattr(self, f"{metric}_s")
        return values[np.isfinite(values)]

    def quantile_s(self, metric: str, percent: int) -> float:
        """By linear interpolation."""
        return float(np.percentile(self.of(metric), percent))


@dataclass(frozen=True, slots=True)
class Comparison:
    """One metric and quantile of one cell. ``measured_s`` is the median over repeats of the same traffic, and
    ``spread`` their largest distance from it, relative: what the engine differs from itself by."""

    batch_cap: int
    load: float
    rate_per_s: float
    requests: int
    metric: str
    percent: int
    measured_s: float
    simulated_s: float
    spread: float

    @property
    def error(self) -> float:
        """Relative, positive where the simulator is slower."""
        return self.simulated_s / self.measured_s - 1.0


def compare(
    place: tuple[int, float, float], measured: Sequence[Latencies], simulated: Latencies
) -> list[Comparison]:
    """Every metric and quantile of one cell.

    Args:
        place: batch cap, load and rate.
        measured: one or more repeats of the same traffic.
        simulated: the same traffic in the simulator.
    """
    found = []
    for metric in METRICS:
        for percent in QUANTILES:
            repeats = [run.quantile_s(metric, percent) for run in measured]
            middle = statistics.median(repeats)
            found.append(
                Comparison(
                    *place,
                    requests=len(simulated.e2e_s),
                    metric=metric,
                    percent=percent,
                    measured_s=middle,
                    simulated_s=simulated.quantile_s(metric, percent),
                    spread=max(abs(value / middle - 1.0) for value in repeats),
                )
            )
    return found


@dataclass(frozen=True, slots=True)
class Verdict:
    """One metric and quantile over all cells."""

    metric: str
    percent: int
    median_error: float  # of the absolute errors
    largest_error: float  # signed
    median_spread: float
    bar: float

    @property
    def met(self) -> bool:
        """Whether the median is within the bar."""
        return self.median_error <= self.bar


def judge(comparisons: Iterable[Comparison]) -> list[Verdict]:
    """One verdict a metric and quantile."""
    every = list(comparisons)
    verdicts = []
    for metric in METRICS:
        for percent in QUANTILES:
            mine = [c for c in every if (c.metric, c.percent) == (metric, percent)]
            if not mine:
                continue
            verdicts.append(
                Verdict(
                    metric=metric,
                    percent=percent,
                    median_error=statistics.median(abs(c.error) for c in mine),
                    largest_error=max((c.error for c in mine), key=abs),
                    median_spread=statistics.median(c.spread for c in mine),
                    bar=BARS[percent],
                )
            )
    return verdicts


def distance(one: Floats, other: Floats) -> float:
    """Largest difference of the two distribution functions (Kolmogorov and Smirnov's)."""
    points = np.sort(np.concatenate([one, other]))
    left = np.searchsorted(np.sort(one), points, side="right") / len(one)
    right = np.searchsorted(np.sort(other), points, side="right") / len(other)
    return float(np.abs(left - right).max())
