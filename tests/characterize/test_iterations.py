"""Iterations that are fetched from an engine which goes on meanwhile."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import numpy as np

from rlgov.characterize.iterations import StackIterations
from rlgov.characterize.measure import RING_COLUMNS
from rlgov.engine.plugin.counters import ROWS_PER_ANSWER
from rlgov.engine.samples import EngineIterations, StackState

if TYPE_CHECKING:
    from rlgov.engine.control.client import StackClient


class BusyStack:
    """An engine that has made ``pace`` more iterations whenever it is asked."""

    def __init__(self, pace: int, behind: int = 0) -> None:
        self.made = behind
        self.asked = 0
        self._pace = pace

    def state(self) -> StackState:
        return StackState(0.0, 1, 8, False, True, 0, {}, (), {}, {})  # noqa: FBT003  # a record

    def iterations(self, after: int, engine_id: str = "") -> EngineIterations:
        assert engine_id in {"", "one"}
        self.asked += 1
        self.made += self._pace
        last = min(self.made, after + ROWS_PER_ANSWER)
        rows = tuple((float(i), *([1.0] * (len(RING_COLUMNS) - 1))) for i in range(after, last))
        return EngineIterations("one", last, 0, RING_COLUMNS, rows)

    def close(self) -> None:
        pass


def test_an_engine_that_never_rests_is_asked_once() -> None:
    stack = BusyStack(pace=3)
    source = StackIterations(cast("StackClient", stack))
    source.skip()
    assert stack.asked == 1
    source.fetch()
    source.fetch()
    told = source.take(100.0)
    assert told is not None
    assert stack.asked == 3
    assert told.rows[:, 0].tolist() == [i - 100.0 for i in range(3, 9)]


def test_what_was_missed_for_long_is_fetched_at_once() -> None:
    stack = BusyStack(pace=2, behind=2 * ROWS_PER_ANSWER + 7)
    source = StackIterations(cast("StackClient", stack))
    source.fetch()
    told = source.take(0.0)
    assert told is not None
    assert stack.asked == 3
    assert np.array_equal(told.rows[:, 0], np.arange(stack.made))
