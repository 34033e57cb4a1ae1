"""Taking times, and what a figure is."""

from __future__ import annotations

import resource
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass

from rlgov.clock import SystemClock

CLOCK = SystemClock()


@dataclass(frozen=True, slots=True)
class Figure:
    """One line of the report."""

    key: str
    value: float
    unit: str
    what: str
    note: str = ""


@dataclass(frozen=True, slots=True)
class Taken:
    """Time of one call: on the processor, and on the wall."""

    cpu_s: float
    wall_s: float


def cpu_s() -> float:
    """Processor time of this process. Everything measured runs on one core, so a busy machine adds none."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def peak_mb() -> float:
    """Largest resident memory of this process so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1e6 if sys.platform == "darwin" else 1e3)


def once(call: Callable[[], object]) -> Taken:
    """One call."""
    wall_s, processor_s = CLOCK.monotonic_s(), cpu_s()
    call()
    return Taken(cpu_s() - processor_s, CLOCK.monotonic_s() - wall_s)


def median_of(
    repeats: int, call: Callable[[], object], prepare: Callable[[], object] = lambda: None
) -> Taken:
    """Medians over ``repeats`` calls, after one that is not counted (it compiles and fills caches)."""
    taken = []
    for _ in range(repeats + 1):
        prepare()
        taken.append(once(call))
    return Taken(
        statistics.median(each.cpu_s for each in taken[1:]),
        statistics.median(each.wall_s for each in taken[1:]),
    )


def latencies_us(calls: int, call: Callable[[int], object], warm: int = 50) -> tuple[float, float]:
    """Median and 99th percentile on the wall of ``call(0)``, ``call(1)``, ..."""
    for k in range(warm):
        call(k)
    taken = []
    for k in range(calls):
        begin_s = CLOCK.monotonic_s()
        call(k)
        taken.append(1e6 * (CLOCK.monotonic_s() - begin_s))
    ordered = statistics.quantiles(taken, n=100)
    return statistics.median(taken), ordered[98]
