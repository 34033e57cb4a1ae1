"""Many policies over many episodes in one vectorised simulation.

Row by row this gives exactly what :func:`rlgov.agents.playback.play` gives (a test compares them), at a
small part of the cost: each interval is one call of the kernel, the guard and the encoder for all rows.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Final

import numpy as np

from rlgov.agents.playback import counted, figures, is_over
from rlgov.envs.guard import Guard, GuardLike, GuardSettings, NullGuard
from rlgov.envs.observation import FEATURES, ObservationEncoder
from rlgov.records import WINDOW_FIELDS, Column
from rlgov.simulation.batch import SimulationBatch
from rlgov.workload.trace import Trace

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from rlgov.agents.playback import Figures, Schedule
    from rlgov.agents.policy import Policy
    from rlgov.records import Limits
    from rlgov.simulation.tables import PhysicsTables

# What the figures of a run need of its windows; whole rows of ten hours would fill the memory.
_KEPT: Final = np.array(
    [
        Column.START_S,
        Column.DURATION_S,
        Column.OUTPUT_TOKENS,
        Column.ENERGY_J,
        Column.SM_CLOCK_MHZ,
        Column.BATCH_CAP,
        Column.TP_DEGREE,
    ],
    dtype=np.intp,
)


@dataclass(frozen=True, slots=True, eq=False)
class Episode:
    """Requests, and when what counts; what :func:`rlgov.agents.playback.cut` gives."""

    trace: Trace
    schedule: Schedule


@dataclass(frozen=True, slots=True, eq=False)
class Entry:
    """One policy and the episodes it is put through. No two entries may share a policy object."""

    policy: Policy
    episodes: tuple[Episode, ...]


def play_side_by_side(
    entries: Sequence[Entry],
    limits: Limits,
    tables: PhysicsTables,
    *,
    guard: GuardSettings | None = None,
    observe: bool = True,
) -> list[tuple[Figures, ...]]:
    """Put every entry's policy through its episodes, all at once.

    Args:
        entries: Who plays what.
        limits: What is offered, under the SLO of every episode.
        tables: The physics of every episode.
        guard: Settings for the policies that want a guard; the default ones if None.
        observe: Whether any policy reads observations; rules read rows only, and encoding costs time.

    Returns:
        For each entry the figures of its episodes, in order.
    """
    results: list[tuple[Figures, ...]] = [()] * len(entries)
    for guarded in (True, False):
        places = [k for k, entry in enumerate(entries) if entry.policy.guarded == guarded]
        if not places:
            continue
        chosen = [entries[k] for k in places]
        n = sum(len(entry.episodes) for entry in chosen)
        held: GuardLike = Guard(guard or GuardSettings(), limits, n) if guarded else NullGuard(limits, n)
        table = _Table(chosen, limits, tables, held, observe=observe)
        for k, played in zip(places, table.play(), strict=True):
            results[k] = played
    return results


class _Table:
    """The rows of one roll: entry by entry, each with its episodes."""

    def __init__(
        self,
        entries: Sequence[Entry],
        limits: Limits,
        tables: PhysicsTables,
        guard: GuardLike,
        *,
        observe: bool,
    ) -> None:
        self._entries = entries
        self._limits = limits
        self._tables = tables
        self._guard = guard
        self._episodes = [episode for entry in entries for episode in entry.episodes]
        self._n = len(self._episodes)
        edges = np.cumsum([0, *(len(entry.episodes) for entry in entries)]).tolist()
        self._parts = [slice(a, b) for a, b in pairwise(edges)]
        self._encoder = ObservationEncoder(limits, self._n) if observe else None
        self._blank = np.zeros((self._n, len(FEATURES)), dtype=np.float32)
        level = limits.service_level
        self._levels = np.tile([level.ttft_s, level.tpot_s], (self._n, 1))
        self._span_end_s = np.array([episode.schedule.span_end_s for episode in self._episodes])
        self._end_s = np.array([episode.schedule.end_s for episode in self._episodes])
        capacity = max(1, *(len(episode.trace) for episode in self._episodes))
        self._batch = SimulationBatch(limits, self._n, tables, capacity=capacity)
        windows = math.ceil(self._end_s.max() / limits.interval_s) + 1
        self._history = np.empty((windows, self._n, len(_KEPT)))

    def play(self) -> list[tuple[Figures, ...]]:
        """Play until every row is over."""
        index = self._begin()
        asked = index.copy()
        results: list[Figures | None] = [None] * self._n
        live = np.ones(self._n, dtype=np.bool_)
        for window in range(len(self._history)):
            rows = self._batch.advance(index)
            self._history[window] = rows[:, _KEPT]
            over = live & is_over(rows, self._span_end_s, self._end_s)
            for i in np.flatnonzero(over).tolist():
                results[i] = self._finish(i, window + 1)
            live &= ~over
            if not live.any():
                break
            observation = self._blank if self._encoder is None else self._encoder.encode(rows, self._levels)
            mask = self._guard.mask(rows)
            for entry, part in zip(self._entries, self._parts, strict=True):
                if live[part].any():
                    asked[part] = entry.policy.decide(observation[part], rows[part], mask[part])
            index, _ = self._guard.apply(asked, rows)
        done = [result for result in results if result is not None]
        return [tuple(done[part]) for part in self._parts]

    def _begin(self) -> NDArray[np.int64]:
        index = np.zeros((self._n, 3), dtype=np.int64)
        for entry, part in zip(self._entries, self._parts, strict=True):
            index[part] = self._limits.index(entry.policy.start_configuration(self._limits))
            entry.policy.start(self._limits, len(entry.episodes))
        for i, episode in enumerate(self._episodes):
            clock, cap, tp = index[i].tolist()
            self._load(i, episode.trace, (clock, cap, tp))
        everything = np.ones(self._n, dtype=np.bool_)
        self._guard.reset(everything)
        if self._encoder is not None:
            self._encoder.reset(everything)
        return index

    def _load(self, i: int, trace: Trace, start: tuple[int, int, int]) -> None:
        self._batch.load(i, trace, self._tables, self._limits.service_level, start)

    def _finish(self, i: int, windows: int) -> Figures:
        episode = self._episodes[i]
        rows = np.zeros((windows, len(WINDOW_FIELDS)))
        rows[:, _KEPT] = self._history[:windows, i]
        reasons = np.zeros(windows, dtype=np.int8)
        run = counted("", self._limits, episode.schedule, rows, reasons, self._batch.request_log(i))
        # An empty deployment costs next to nothing to go on with while others are still being played.
        self._load(i, _EMPTY, (0, 0, 0))
        return figures(run)


def _empty_trace() -> Trace:
    nothing = np.zeros(0, dtype=np.int64)
    return Trace("nothing", np.zeros(0), nothing, nothing.copy(), nothing.copy(), 0.0)


_EMPTY: Final = _empty_trace()
