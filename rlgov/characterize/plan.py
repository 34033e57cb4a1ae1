"""Which points a characterisation has, and in which order they are measured. Pure."""

from __future__ import annotations

import hashlib
import itertools
import json
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from rlgov.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from rlgov.characterize.workloads import Lengths

Mode = Literal["closed", "open"]


@dataclass(frozen=True, slots=True)
class Point:
    """One configuration under one load. ``sm_clock_mhz`` is None where the clock cannot be set."""

    workload: str
    lengths: str  # identity of the lengths
    mode: Mode
    concurrency: int | None
    rate_per_s: float | None
    sm_clock_mhz: int | None
    batch_cap: int
    tp_degree: int

    @property
    def point_id(self) -> str:
        """Twelve hexadecimal digits of what the point is: the same in every campaign that has it."""
        text = json.dumps(asdict(self), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:12]

    @property
    def label(self) -> str:
        """A few words for progress and errors."""
        load = f"{self.concurrency} at once" if self.mode == "closed" else f"{self.rate_per_s:g}/s"
        clock = "" if self.sm_clock_mhz is None else f"{self.sm_clock_mhz} MHz, "
        return f"{clock}cap {self.batch_cap}, TP {self.tp_degree}, {self.workload}, {load}"


@dataclass(frozen=True, slots=True)
class Task:
    """One repetition of a point."""

    point: Point
    repeat: int

    @property
    def key(self) -> tuple[str, int]:
        """What tells it from every other."""
        return self.point.point_id, self.repeat

    def seed(self, campaign_seed: int) -> list[int]:
        """Seeds the requests of this repetition, whatever was measured before it.

        A repeat has the same requests at every clock, cap and TP degree where the load is the same, so that
        configurations are compared on equal work.
        """
        load = (self.point.lengths, self.point.mode, self.point.concurrency, self.point.rate_per_s)
        digest = hashlib.sha256(json.dumps(load).encode()).digest()
        return [campaign_seed, self.repeat, int.from_bytes(digest[:8], "little")]


@dataclass(frozen=True, slots=True)
class Axes:
    """The values of each axis of a campaign."""

    sm_clocks_mhz: tuple[int | None, ...]
    batch_caps: tuple[int, ...]
    tp_degrees: tuple[int, ...]
    closed: bool = True
    concurrencies: tuple[int, ...] = ()  # empty: the batch cap's own
    rates_per_s: tuple[float, ...] = ()


def choose(asked: Sequence[int], offered: Sequence[int], what: str) -> tuple[int, ...]:
    """The values asked for, all of what is offered when none are, largest first.

    Raises:
        ConfigError: Something that is asked for is not offered, or nothing is.
    """
    if not offered:
        msg = f"this deployment offers no {what}"
        raise ConfigError(msg)
    missing = sorted(set(asked) - set(offered), reverse=True)
    if missing:
        msg = (
            f"{what} {', '.join(map(str, missing))} not offered here; choose among "
            f"{', '.join(map(str, sorted(offered, reverse=True)))}"
        )
        raise ConfigError(msg)
    return tuple(sorted(set(asked) or set(offered), reverse=True))


def build_points(axes: Axes, workloads: Sequence[Lengths]) -> tuple[Point, ...]:
    """Every combination, in a fixed order: TP degree, workload, load, cap, clock.

    Raises:
        ConfigError: Nothing is to be measured.
    """
    if not workloads:
        msg = "there is nothing to send; name at least one class of lengths, or a trace"
        raise ConfigError(msg)
    if not axes.closed and not axes.rates_per_s:
        msg = "there is no load to measure under; leave the closed loop in, or give rates"
        raise ConfigError(msg)
    points = []
    grid = itertools.product(axes.tp_degrees, workloads, axes.batch_caps, axes.sm_clocks_mhz)
    for tp_degree, lengths, cap, clock_mhz in grid:
        loads: list[tuple[Mode, int | None, float | None]] = []
        if axes.closed:
            loads += [("closed", users, None) for users in (axes.concurrencies or (cap,))]
        loads += [("open", None, rate) for rate in axes.rates_per_s]
        points += [
            Point(lengths.name, lengths.identity, mode, users, rate, clock_mhz, cap, tp_degree)
            for mode, users, rate in loads
        ]
    return tuple(dict.fromkeys(points))


def order_tasks(points: Iterable[Point], repeats: int, seed: int) -> tuple[Task, ...]:
    """In which order to measure: one TP degree after another, everything else at random.

    A change of the TP degree costs minutes, so each degree is visited once, in random order. Within a degree
    each repetition goes through all points in an order of its own: what drifts slowly, such as temperature,
    then spreads over all of them instead of looking like an effect of the clock.
    """
    rng = np.random.default_rng([seed, 0x0DE2])
    by_degree: dict[int, list[Point]] = {}
    for point in points:
        by_degree.setdefault(point.tp_degree, []).append(point)
    tasks: list[Task] = []
    degrees = sorted(by_degree, reverse=True)
    for at in rng.permutation(len(degrees)):
        group = by_degree[degrees[int(at)]]
        for repeat in range(repeats):
            tasks += [Task(group[int(i)], repeat) for i in rng.permutation(len(group))]
    return tuple(tasks)
