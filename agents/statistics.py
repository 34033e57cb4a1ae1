"""Confidence intervals: bootstrap over seeds, and over blocks of time within one deterministic run.

A run has no noise of its own, so its uncertainty is which traffic it met: a run is cut into blocks
(60 s, longer than the latency objectives and the bursts) that are drawn with replacement. Two policies
that met the same traffic are compared block by block (paired), which removes what they share.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np
from scipy import stats

from rlgov.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import ArrayLike, NDArray

LEVEL = 0.95
RESAMPLES = 2000
MIN_SAMPLES = 4  # fewer say nothing about spread; the interval is then None, never a point
BLOCK_S = 60.0
MAX_UNBATCHED = 2000  # samples; above it the resamples are drawn 100 at a time to bound memory


class _Statistic(Protocol):
    def __call__(self, *samples: NDArray[np.float64], axis: int = -1) -> NDArray[np.float64]: ...


@dataclass(frozen=True, slots=True)
class Interval:
    """A two-sided confidence interval."""

    low: float
    high: float


def quantile(values: ArrayLike, fraction: float) -> float | None:
    """Nearest-rank quantile: always one of the values, so it is equal to the last bit everywhere.

    None where there is no finite value. Non-finite values are left out.
    """
    array = np.asarray(values, dtype=np.float64)
    ordered = np.sort(array[np.isfinite(array)])
    if ordered.size == 0:
        return None
    # the tolerance keeps 0.99 * 100 = 99.00000000000001 at rank 99
    rank = max(1, math.ceil(fraction * ordered.size - 1e-9))
    return float(ordered[rank - 1])


def block_count(span_s: float, block_s: float = BLOCK_S) -> int:
    """Blocks of about ``block_s`` that fill ``span_s`` without a stub at the end."""
    if not (span_s > 0 and block_s > 0):
        msg = f"span_s and block_s must be above 0, got {span_s} and {block_s}"
        raise ConfigError(msg)
    return max(1, round(span_s / block_s))


def block_sums(at_s: ArrayLike, values: ArrayLike, span_s: float, blocks: int) -> NDArray[np.float64]:
    """Sum ``values`` by block of time; what lies after the span (a drain) belongs to the last block."""
    times = np.asarray(at_s, dtype=np.float64)
    index = np.clip((times * (blocks / span_s)).astype(np.int64), 0, blocks - 1)
    return np.bincount(index, weights=np.asarray(values, dtype=np.float64), minlength=blocks).astype(
        np.float64
    )


def mean_interval(values: ArrayLike, rng: np.random.Generator, *, level: float = LEVEL) -> Interval | None:
    """Interval of the mean, e.g. over training seeds."""

    def mean(*samples: NDArray[np.float64], axis: int = -1) -> NDArray[np.float64]:
        return np.asarray(np.mean(samples[0], axis=axis))

    return _bootstrap([values], mean, rng, level)


def difference_interval(
    a: ArrayLike, b: ArrayLike, rng: np.random.Generator, *, level: float = LEVEL
) -> Interval | None:
    """Interval of mean(a - b) where ``a[i]`` and ``b[i]`` share their seed or slice."""
    return mean_interval(np.asarray(a, dtype=np.float64) - np.asarray(b, dtype=np.float64), rng, level=level)


def total_interval(values: ArrayLike, rng: np.random.Generator, *, level: float = LEVEL) -> Interval | None:
    """Interval of a run's total, given its sums by block."""
    interval = mean_interval(values, rng, level=level)
    if interval is None:
        return None
    n = np.asarray(values).size
    return Interval(interval.low * n, interval.high * n)


def saving_interval(
    energy_j: ArrayLike, reference_j: ArrayLike, rng: np.random.Generator, *, level: float = LEVEL
) -> Interval | None:
    """Interval of ``1 - sum(energy) / sum(reference)`` over blocks that met the same traffic."""
    return _bootstrap([energy_j, reference_j], _one_minus_ratio, rng, level)


def attainment_interval(
    misses: ArrayLike, arrivals: ArrayLike, rng: np.random.Generator, *, level: float = LEVEL
) -> Interval | None:
    """Interval of the share of arrivals that met the objectives, given counts by block."""
    interval = _bootstrap([misses, arrivals], _one_minus_ratio, rng, level)
    # a resample can only lie in 0..1; the bias correction must not leave it either
    return None if interval is None else Interval(max(0.0, interval.low), min(1.0, interval.high))


def _one_minus_ratio(*samples: NDArray[np.float64], axis: int = -1) -> NDArray[np.float64]:
    numerator, denominator = (np.sum(sample, axis=axis) for sample in samples)
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = numerator / denominator
    return np.where(denominator > 0, 1.0 - ratio, 1.0)


def _bootstrap(
    samples: Sequence[ArrayLike], statistic: _Statistic, rng: np.random.Generator, level: float
) -> Interval | None:
    data = [np.asarray(sample, dtype=np.float64) for sample in samples]
    n = data[0].size
    if any(sample.shape != (n,) for sample in data):
        msg = f"paired samples must be one-dimensional and of equal length, got {[s.shape for s in data]}"
        raise ConfigError(msg)
    if n < MIN_SAMPLES:
        return None
    if all(np.all(sample == sample[0]) for sample in data):
        point = float(statistic(*data))
        return Interval(point, point)
    for method in ("BCa", "percentile"):
        with warnings.catch_warnings():
            # BCa is undefined where no jackknife value differs (e.g. no misses); percentile follows then
            warnings.simplefilter("ignore", stats.DegenerateDataWarning)
            warnings.simplefilter("ignore", RuntimeWarning)
            result = stats.bootstrap(
                data,
                statistic,
                n_resamples=RESAMPLES,
                batch=RESAMPLES if n <= MAX_UNBATCHED else 100,
                paired=len(data) > 1,
                vectorized=True,
                confidence_level=level,
                method=method,
                rng=rng,
            ).confidence_interval
        if np.isfinite(result.low) and np.isfinite(result.high):
            return Interval(float(result.low), float(result.high))
    msg = "the samples hold values that are not finite; leave out what was not measured"
    raise ConfigError(msg)
