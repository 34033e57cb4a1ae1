"""On the simulator's requests, measured windows are the simulator's windows; nothing twice, nothing lost."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from rlgov.deployments.measured import MeasuredWindows
from rlgov.engine.samples import StackInterval
from rlgov.records import Column, ServiceLevel
from rlgov.simulation.batch import RequestLog, SimulationBatch
from rlgov.simulation.physics import build_tables
from rlgov.simulation.profile import load_profile
from rlgov.workload.synthesis import SPECS, synthesize
from rlgov.workload.trace import Trace
from tests.fakes.measurements import NO_METER, LoggedGateway, interval, sample, state

PROFILE = load_profile("h100-qwen3-32b")
LIMITS = PROFILE.limits()
TABLES = build_tables(PROFILE)
SCARCE = replace(TABLES, kv_blocks=np.array([900, 500, 300], dtype=np.int64))

Index = tuple[int, int, int]

EXACT = (
    Column.ARRIVALS,
    Column.PROMPT_TOKENS,
    Column.OUTPUT_TOKENS,
    Column.PREFILL_TOKENS,
    Column.SERVED,
    Column.MISSES,
    Column.OVERDUE,
    Column.PREEMPTIONS,
    Column.RUNNING,
    Column.WAITING,
    Column.WAITING_TOKENS,
    Column.OLDEST_WAIT_S,
    Column.KV_USAGE,
    Column.TTFT_P50_S,
    Column.TTFT_P99_S,
    Column.TPOT_P50_S,
    Column.TPOT_P99_S,
    Column.SM_CLOCK_MHZ,
    Column.BATCH_CAP,
    Column.TP_DEGREE,
    Column.SWITCHING,
    Column.BLIND,
)
CLOSE = (  # through sums of floats
    Column.START_S,
    Column.DURATION_S,
    Column.RUNNING_MEAN,
    Column.BUSY_FRACTION,
    Column.ITL_MEAN_S,
)


class Simulated:
    """A simulation and, at the end of each of its windows, what its stack would show."""

    def __init__(self, trace: Trace, level: ServiceLevel, start: Index, *, scarce: bool) -> None:
        tables = SCARCE if scarce else TABLES
        self.limits = LIMITS.with_service_level(level)
        self._batch = SimulationBatch(LIMITS, 1, tables)
        self._batch.load(0, trace, tables, level, start)
        self._gateway = LoggedGateway()
        self._refused_at_s: dict[int, float] = {}
        self._counters: dict[str, Any] = dict.fromkeys(
            (
                "generated_tokens",
                "prefill_tokens",
                "preemptions",
                "running_s",
                "busy_s",
                "token_gaps",
                "token_gap_s",
            ),
            0.0,
        )

    @property
    def log(self) -> RequestLog:
        return self._batch.request_log(0)

    @property
    def refused_at_s(self) -> dict[int, float]:
        return self._refused_at_s

    def advance(self, index: Index) -> tuple[NDArray[np.float64], StackInterval]:
        row = self._batch.advance_only(0, index).copy()
        span_s = float(row[Column.DURATION_S])
        end_s = float(row[Column.START_S]) + span_s
        gapped = not np.isnan(row[Column.ITL_MEAN_S])
        for name, change in (
            ("generated_tokens", row[Column.OUTPUT_TOKENS]),
            ("prefill_tokens", row[Column.PREFILL_TOKENS]),
            ("preemptions", row[Column.PREEMPTIONS]),
            ("running_s", row[Column.RUNNING_MEAN] * span_s),
            ("busy_s", row[Column.BUSY_FRACTION] * span_s),
            ("token_gaps", float(gapped)),
            ("token_gap_s", row[Column.ITL_MEAN_S] if gapped else 0.0),
        ):
            self._counters[name] += float(change)
        for i in np.flatnonzero(self.log.refused):
            self._refused_at_s.setdefault(int(i), end_s)
        engine = sample(
            end_s,
            running=int(row[Column.RUNNING]),
            waiting=int(row[Column.WAITING]),
            kv_usage=float(row[Column.KV_USAGE]),
            waiting_tokens=float(row[Column.WAITING_TOKENS]),
            **self._counters,
        )
        now = state(end_s, tp_degree=int(row[Column.TP_DEGREE]), switching=bool(row[Column.SWITCHING]))
        traffic = self._gateway.traffic(self.log, end_s, self._refused_at_s)
        return row, interval(end_s, traffic, samples=[engine], now=now)


def conversation(rate_per_s: float, seed: int, duration_s: float = 40.0) -> Trace:
    spec = replace(SPECS["conversation"], rate_per_s=rate_per_s, duration_s=duration_s)
    return synthesize(spec, np.random.default_rng(seed))


@st.composite
def held_settings(draw: st.DrawFn) -> list[Index]:
    index = st.tuples(st.integers(0, 9), st.integers(0, 5), st.integers(0, 2))
    held = draw(st.lists(st.tuples(index, st.integers(1, 20)), min_size=1, max_size=6))
    return [setting for setting, windows in held for _ in range(windows)]


def total_of_agreeing_windows(simulated: Simulated, held: list[Index]) -> NDArray[np.float64]:
    """Both rows of every window, compared; returns the sums of the simulator's."""
    windows = MeasuredWindows()
    windows.start(interval(0.0), NO_METER, simulated.limits)
    total = np.zeros(len(Column))
    for index in held:
        row, seen = simulated.advance(index)
        asked = replace(LIMITS.configuration(index), tp_degree=seen.state.tp_degree)
        window = windows.next(seen, NO_METER, asked)
        assert windows.blind_because == ""
        assert window.energy_j is None
        measured = window.to_row()
        np.testing.assert_array_equal(measured[list(EXACT)], row[list(EXACT)], err_msg=str(window.start_s))
        np.testing.assert_allclose(measured[list(CLOSE)], row[list(CLOSE)], rtol=1e-6, atol=1e-6)
        assert windows.open_requests == row[Column.RUNNING] + row[Column.WAITING]
        total += np.nan_to_num(row)
    return total


@given(
    rate_per_s=st.floats(0.5, 20.0),
    seed=st.integers(0, 1000),
    held=held_settings(),
    slo_scale=st.sampled_from([0.3, 0.6, 1.0, 2.0]),
    scarce=st.booleans(),
)
@settings(max_examples=40, deadline=None, derandomize=True)
def test_windows_equal_the_simulators_on_the_simulators_requests(
    rate_per_s: float,
    seed: int,
    held: list[Index],
    slo_scale: float,
    scarce: bool,  # noqa: FBT001  # drawn by hypothesis
) -> None:
    level = LIMITS.service_level.scaled(slo_scale)
    simulated = Simulated(conversation(rate_per_s, seed), level, held[0], scarce=scarce)
    total_of_agreeing_windows(simulated, held)


def test_the_comparison_with_the_simulator_sees_every_kind_of_event() -> None:
    held: list[Index] = [(9, 0, 0)] * 15 + [(9, 0, 1)] * 15 + [(0, 0, 1)] * 30
    level = LIMITS.service_level.scaled(0.6)
    trace = conversation(14.0, 3)
    total = total_of_agreeing_windows(Simulated(trace, level, held[0], scarce=True), held)
    for column in (
        Column.ARRIVALS,
        Column.SERVED,
        Column.MISSES,
        Column.OVERDUE,
        Column.PREEMPTIONS,
        Column.OLDEST_WAIT_S,
        Column.SWITCHING,
        Column.TPOT_P99_S,
    ):
        assert total[column] > 0, column


def test_a_refused_request_counts_in_both_as_an_arrival_and_a_miss() -> None:
    trace = Trace(  # the first is longer than the scarce cache
        "refused",
        np.array([0.5, 0.6]),
        np.array([20_000, 100]),
        np.array([50, 5]),
        prefix_hit_tokens=np.array([0, 0]),
        duration_s=1.0,
    )
    simulated = Simulated(trace, LIMITS.service_level.scaled(10), (0, 0, 2), scarce=True)
    total = total_of_agreeing_windows(simulated, [(0, 0, 2)] * 10)
    assert total[[Column.ARRIVALS, Column.SERVED, Column.MISSES]].tolist() == [2, 1, 1]


@given(
    seed=st.integers(0, 50),
    cuts=st.lists(st.floats(0.001, 59.999), max_size=60, unique=True),
    blind=st.sets(st.integers(0, 60)),
    origin_s=st.sampled_from([0.0, 12.5, 86_400.25]),
)
@settings(max_examples=60, deadline=None, derandomize=True)
def test_every_request_counts_once_however_time_is_cut(
    seed: int, cuts: list[float], blind: set[int], origin_s: float
) -> None:
    level = LIMITS.service_level.scaled(0.6)
    simulated = Simulated(conversation(8.0, seed, 30.0), level, (9, 0, 0), scarce=True)
    for _ in range(round(60.0 / LIMITS.interval_s)):
        simulated.advance((9, 0, 0))
    log, refused_at_s = simulated.log, simulated.refused_at_s
    gateway = LoggedGateway(origin_s)
    windows = MeasuredWindows()
    windows.start(interval(origin_s), NO_METER, simulated.limits)
    totals = np.zeros(len(Column))
    ends = [*sorted(cuts), 60.0]
    for number, end_s in enumerate(ends):
        at_s = origin_s + end_s
        traffic = gateway.traffic(log, end_s, refused_at_s)
        unread = {"a": "did not answer"} if number in blind and number < len(ends) - 1 else {}
        seen = interval(at_s, traffic, samples=[] if unread else None, unread=unread)
        window = windows.next(seen, NO_METER, LIMITS.fastest)
        assert bool(window.blind) == bool(unread)
        totals += np.nan_to_num(window.to_row())
    arrived = log.arrival_s <= 60.0
    served = log.finish_s <= 60.0
    late = np.where(log.first_token_s <= 60.0, log.ttft_s, 60.0 - log.arrival_s) > level.ttft_s
    missed = arrived & (log.refused | late | (served & (log.tpot_s > level.tpot_s)))
    assert totals[Column.ARRIVALS] == arrived.sum()
    assert totals[Column.PROMPT_TOKENS] == log.prompt_tokens[arrived].sum()
    assert totals[Column.SERVED] == served.sum()
    assert totals[Column.MISSES] == missed.sum()
    taken = windows.take()
    assert len(taken) == served.sum()
    assert all(a.arrival_s <= b.arrival_s for a, b in pairwise(taken))
    np.testing.assert_allclose([r.arrival_s for r in taken], log.arrival_s[served], atol=1e-9)
    assert windows.take() == []
