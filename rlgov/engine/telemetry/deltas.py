"""What happened between two samples of one engine, and what histograms say about it."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, Final, NamedTuple

from rlgov.engine.samples import Histogram

if TYPE_CHECKING:
    from rlgov.engine.samples import EngineSample

_COUNTERS: Final = (
    "generated_tokens",
    "prompt_tokens",
    "prefill_tokens",
    "preemptions",
    "finished",
)
_OPTIONAL: Final = (
    "failed",
    "arrived",
    "token_gaps",
    "token_gap_s",
    "iterations",
    "busy_s",
    "running_s",
)
_ROUNDING: Final = 1e-9  # relative: sums of seconds are floats


@dataclass(frozen=True, slots=True)
class EngineDelta:
    """Counters of the later sample less those of the earlier one.

    ``reset`` says why they must not be used: the engine restarted, or the two are no pair. The values are
    then those since the restart, as Prometheus takes them. ``None``: a sample does not tell.
    """

    engine_id: str
    span_s: float
    reset: str
    generated_tokens: float
    prompt_tokens: float
    prefill_tokens: float
    preemptions: float
    finished: float
    failed: float | None = None
    arrived: float | None = None
    token_gaps: float | None = None
    token_gap_s: float | None = None
    iterations: float | None = None
    busy_s: float | None = None
    running_s: float | None = None
    histograms: dict[str, Histogram] = field(default_factory=dict)

    @property
    def itl_mean_s(self) -> float | None:
        """Mean gap between tokens; None without gaps or where the engine does not tell."""
        if not self.token_gaps or self.token_gap_s is None:
            return None
        return self.token_gap_s / self.token_gaps

    @property
    def running_mean(self) -> float | None:
        """Requests running, averaged over time.

        From a metrics page, which does not integrate them, it is the gaps between tokens by time: requests
        that decode, without those whose prompt is under way. None where neither is told.
        """
        total_s = self.token_gap_s if self.running_s is None else self.running_s
        return None if total_s is None or self.span_s <= 0 else total_s / self.span_s

    @property
    def busy_fraction(self) -> float | None:
        """Share of the time spent iterating, at most 1.

        From a metrics page it is the iterations times the mean gap between tokens, which is an iteration as
        long as requests decode; None where neither is told or nothing decoded.
        """
        busy_s = self.busy_s
        if busy_s is None:
            if self.iterations is None:
                return None
            mean_s = self.itl_mean_s if self.iterations else 0.0
            if mean_s is None:
                return None
            busy_s = self.iterations * mean_s
        return min(busy_s / self.span_s, 1.0) if self.span_s > 0 else None


def difference(before: EngineSample, after: EngineSample) -> EngineDelta:
    """What happened from ``before`` to ``after``."""
    reset = _why_no_pair(before, after)
    histograms = {}
    for name, later in after.histograms.items():
        earlier = before.histograms.get(name)
        if reset or earlier is None:
            histograms[name] = later
            continue
        change = _histogram_change(earlier, later)
        if change is None:
            reset = f"histogram {name} shrank or changed its buckets"
            histograms[name] = later
        else:
            histograms[name] = change
    if not reset and (gone := before.histograms.keys() - after.histograms.keys()):
        reset = f"histogram {', '.join(sorted(gone))} vanished"
    values: dict[str, float | None] = {}
    for name in (*_COUNTERS, *_OPTIONAL):
        now, then = getattr(after, name), getattr(before, name)
        values[name] = now if reset else None if now is None or then is None else max(now - then, 0.0)
    return EngineDelta(
        engine_id=after.engine_id,
        span_s=after.at_s - before.at_s,
        reset=reset,
        histograms=histograms,
        **values,  # type: ignore[arg-type]  # counters of a sample are never None, so neither are their changes
    )


def _why_no_pair(before: EngineSample, after: EngineSample) -> str:
    if after.engine_id != before.engine_id:
        return f"engine {before.engine_id} is now {after.engine_id}: it restarted"
    if after.source != before.source:
        return f"the source changed from {before.source} to {after.source}"
    if not after.at_s > before.at_s:
        return "the later sample is not newer than the earlier one"
    for name in (*_COUNTERS, *_OPTIONAL):
        now, then = getattr(after, name), getattr(before, name)
        if now is not None and then is not None and now < then - _ROUNDING * abs(then):
            return f"{name} went back from {then:g} to {now:g}: the engine restarted"
    return ""


def _histogram_change(before: Histogram, after: Histogram) -> Histogram | None:
    """Observations from ``before`` to ``after``; None after a reset."""
    if before.bounds != after.bounds:
        return None
    counts = tuple(b - a for a, b in zip(before.counts, after.counts, strict=True))
    shrank = any(change < 0 for change in counts)
    shrank |= any(low > high for low, high in pairwise(counts))
    if shrank or after.sum < before.sum * (1 - _ROUNDING):
        return None
    return Histogram(before.bounds, counts, max(after.sum - before.sum, 0.0), counts[-1])


class Quantile(NamedTuple):
    """A quantile read off a histogram."""

    value: float
    at_least: bool  # it lies in the open top bucket: the true value is this or more


def quantile(histogram: Histogram, q: float) -> Quantile | None:
    """The ``q``-quantile, spread evenly over its bucket as PromQL does; None without observations.

    Observations in the open top bucket are only known to lie above its lower bound, which is then returned
    and marked ``at_least``.
    """
    if histogram.count <= 0:
        return None
    rank = q * histogram.count
    at = next(i for i, count in enumerate(histogram.counts) if count >= rank and count > 0)
    upper = histogram.bounds[at]
    lower = histogram.bounds[at - 1] if at else min(0.0, upper)
    if math.isinf(upper):
        return Quantile(lower if at else 0.0, at_least=True)
    below = histogram.counts[at - 1] if at else 0.0
    inside = histogram.counts[at] - below
    return Quantile(lower + (upper - lower) * max(rank - below, 0.0) / inside, at_least=False)


def share_above(histogram: Histogram, limit: float) -> float | None:
    """Share of observations above ``limit``, 0..1, spread evenly over their buckets; None without any.

    Observations in the open top bucket count as above: nothing says that they are not.
    """
    if histogram.count <= 0:
        return None
    below = 0.0
    lower, counted = 0.0, 0.0
    for upper, count in zip(histogram.bounds, histogram.counts, strict=True):
        if limit >= upper:
            below = count
        elif limit > lower and not math.isinf(upper):
            below = counted + (count - counted) * (limit - lower) / (upper - lower)
            break
        else:
            break
        lower, counted = upper, count
    return max(1.0 - below / histogram.count, 0.0)
