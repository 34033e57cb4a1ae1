"""Windows from a metrics page alone, where no gateway stands before the engine. Pure.

A page tells less than a gateway, and later. What differs from :mod:`rlgov.deployments.measured`:

- *Misses are fractions*: of first tokens and of finished requests, the share that a histogram puts above the
  limit, spread evenly within its buckets. A request that breaks both limits counts twice. Versions without a
  histogram of TPOT by request give the share of all gaps between tokens instead.
- *Who waits* is reckoned: first tokens and the length of the queue give arrivals, and first come first served
  gives their age, to half an interval. A request whose first chunk of prompt is under way no longer waits.
- *TPOT is told at the finish*, so a request that is decoded slowly shows when it is over.
- *Quantiles* are as fine as the buckets; above the last one they are its lower bound.
- *Clients that go away* while they wait look like prompts under way as long as anything runs.
- ``waiting_tokens`` is the queue times the mean prompt, ``running_mean`` leaves out prompts under way,
  ``busy_fraction`` comes from iterations and mean gaps (:class:`~rlgov.engine.telemetry.deltas.EngineDelta`).
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

from rlgov.deployments.blind import blind_window
from rlgov.deployments.metering import metered_between
from rlgov.engine.telemetry.deltas import difference, quantile, share_above
from rlgov.errors import DeploymentError

if TYPE_CHECKING:
    from rlgov.engine.samples import EngineSample, Histogram
    from rlgov.engine.telemetry.deltas import EngineDelta
    from rlgov.engine.telemetry.scraper import Reading
    from rlgov.hardware.meter import MeterReading
    from rlgov.records import Configuration, Limits, ServiceLevel, Window


class _Queue:
    """Who waits for a first token, reckoned from how many do and how many got theirs."""

    def __init__(self, waiting: int, at_s: float) -> None:
        self._groups: deque[list[float]] = deque([[at_s, float(waiting)]] if waiting else [])
        self._waiting = waiting
        self._started = 0.0  # prompts under way, at most
        self._at_s = at_s

    def update(self, sample: EngineSample, first_tokens: float, preemptions: float) -> float:
        """Go on to ``sample``; returns how many arrived meanwhile."""
        # A preempted request waits again and is no arrival. Who left the queue without a first token has its
        # prompt under way, and is no arrival when the token comes; or its client went away.
        change = first_tokens + sample.waiting - self._waiting - preemptions
        started = self._started - change
        arrived = max(-started, 0.0)
        self._started = min(max(started, 0.0), float(sample.running))
        if arrived > 0:
            self._groups.append([(self._at_s + sample.at_s) / 2, arrived])
        surplus = sum(group[1] for group in self._groups) - sample.waiting
        while surplus > 0 and self._groups:
            taken = min(surplus, self._groups[0][1])
            self._groups[0][1] -= taken
            surplus -= taken
            if self._groups[0][1] <= 0:
                self._groups.popleft()
        self._waiting = sample.waiting
        self._at_s = sample.at_s
        return arrived

    def overdue(self, limit_s: float) -> float:
        """How many have waited longer than ``limit_s``."""
        return sum(count for since_s, count in self._groups if self._at_s - since_s >= limit_s)

    @property
    def oldest_wait_s(self) -> float:
        """Age of the oldest one; 0 if there is none."""
        return self._at_s - self._groups[0][0] if self._groups else 0.0


class _Late(NamedTuple):
    """First tokens that broke their limit."""

    told: float  # since the start, by the histogram
    counted: float  # misses counted so far, overdue requests included


class ScrapedWindows:
    """Turns scrapes and meter readings into windows; keeps what one needs from the one before.

    A window ends when it is asked for, and holds what happened between the scrapes it is made of: scrape
    twice as often as windows are asked for, or some find nothing new and are blind.
    """

    def __init__(self) -> None:
        self._level: ServiceLevel | None = None  # None: no episode
        self._origin_s = 0.0
        self._end_s = 0.0
        self._sample: EngineSample | None = None
        self._queue = _Queue(0, 0.0)
        self._late = _Late(0.0, 0.0)
        self._meter: MeterReading | None = None
        self._blind_because = ""

    @property
    def blind_because(self) -> str:
        """Why the last window was blind; empty when it was not."""
        return self._blind_because

    def start(self, scraped: Reading, at_s: float, reading: MeterReading, limits: Limits) -> None:
        """An episode begins at ``at_s``, which is time 0."""
        self._level = limits.service_level
        self._origin_s = self._end_s = at_s
        self._meter = reading
        self._sample = None
        self._blind_because = ""
        if scraped.sample is not None and not scraped.blind:
            self._restart(scraped.sample)

    def next(
        self, scraped: Reading, at_s: float, reading: MeterReading, configuration: Configuration
    ) -> Window:
        """The window up to ``at_s``.

        Args:
            scraped: What the scraper has.
            at_s: Now, on the scraper's clock.
            reading: The meter.
            configuration: Asked for, as of the end of the window.

        Raises:
            DeploymentError: Before :meth:`start`, or ``at_s`` is not after the last window's end.
        """
        if self._level is None:
            raise DeploymentError("windows are asked for before the episode has begun: call start() first")
        begin_s = self._end_s
        if not at_s > begin_s:
            raise DeploymentError(
                f"a window cannot end at {at_s} s when it began at {begin_s} s of the monotonic clock; "
                "ask later, and give scraper and deployment the same clock"
            )
        self._end_s = at_s
        metered = metered_between(self._meter, reading)
        self._meter = reading
        age_s = math.inf if scraped.sample is None else max(at_s - scraped.sample.at_s, 0.0)
        window = blind_window(
            begin_s - self._origin_s,
            at_s - begin_s,
            metered,
            configuration,
            age_s=min(age_s, at_s - self._origin_s),
        )
        if reading.gpus and metered.energy_j is None:  # the counts are left for the next window
            self._blind_because = "the meter gave no energy for this interval"
            return window
        delta = self._delta(scraped)
        if delta is None or self._sample is None:
            return window
        return self._seen(window, self._sample, delta, self._level)

    # ------------------------------------------------------------------ parts

    def _restart(self, sample: EngineSample) -> None:
        self._sample = sample
        self._queue = _Queue(sample.waiting, sample.at_s)
        self._late = _Late(0.0, 0.0)

    def _delta(self, scraped: Reading) -> EngineDelta | None:
        """What happened since the last good sample; None with a reason when that is not known."""
        sample, before = scraped.sample, self._sample
        if sample is None or scraped.blind:
            self._blind_because = scraped.failure or "the metrics page was not read for too long"
            return None
        if before is None:
            self._blind_because = "nothing was read before, so nothing can be counted"
            self._restart(sample)
            return None
        delta = difference(before, sample)
        self._blind_because = delta.reset
        if delta.reset:
            if sample.at_s > before.at_s:
                self._restart(sample)
            return None
        self._sample = sample
        return delta

    def _seen(self, blind: Window, sample: EngineSample, delta: EngineDelta, level: ServiceLevel) -> Window:
        ttft = delta.histograms["ttft_s"]
        tpot = delta.histograms.get("tpot_s", delta.histograms["token_gap_s"])
        arrivals = self._queue.update(sample, ttft.count, delta.preemptions)
        overdue = self._queue.overdue(level.ttft_s)
        told = self._late.told + (share_above(ttft, level.ttft_s) or 0.0) * ttft.count
        counted = max(self._late.counted, told + overdue)
        late = counted - self._late.counted
        self._late = _Late(told, counted)
        slow = (share_above(tpot, level.tpot_s) or 0.0) * delta.finished
        first_tokens = sample.histograms["ttft_s"].count
        return replace(
            blind,
            arrivals=arrivals,
            prompt_tokens=delta.prompt_tokens,
            output_tokens=delta.generated_tokens,
            prefill_tokens=delta.prefill_tokens,
            served=delta.finished,
            misses=late + slow + (delta.failed or 0.0),
            overdue=overdue,
            preemptions=delta.preemptions,
            running=float(sample.running),
            waiting=float(sample.waiting),
            waiting_tokens=sample.waiting * sample.prompt_tokens / first_tokens if first_tokens else 0.0,
            oldest_wait_s=self._queue.oldest_wait_s,
            running_mean=float(sample.running) if delta.running_mean is None else delta.running_mean,
            busy_fraction=float(sample.running > 0) if delta.busy_fraction is None else delta.busy_fraction,
            kv_usage=sample.kv_usage,
            ttft_p50_s=_quantile_s(ttft, 0.5),
            ttft_p99_s=_quantile_s(ttft, 0.99),
            tpot_p50_s=_quantile_s(tpot, 0.5),
            tpot_p99_s=_quantile_s(tpot, 0.99),
            itl_mean_s=delta.itl_mean_s,
            blind=0.0,
        )


def _quantile_s(histogram: Histogram, q: float) -> float | None:
    found = quantile(histogram, q)
    return None if found is None else found.value
