"""Nothing appears and nothing is lost: requests, tokens, verdicts and joules of a run add up."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from rlgov.records import Column, Limits, ServiceLevel
from rlgov.simulation.batch import RequestLog, SimulationBatch
from rlgov.simulation.physics import build_tables
from rlgov.simulation.profile import Profile, load_profile
from rlgov.simulation.tables import PhysicsTables
from rlgov.workload.synthesis import SPECS, synthesize
from rlgov.workload.trace import Trace

Index = tuple[int, int, int]
FASTEST: Index = (0, 0, 0)
DRAIN = 4000  # windows after which everything is served, whatever was held before


@dataclass(frozen=True)
class Run:
    """Window rows and request log of one simulation; ``end_s`` is when it was looked at."""

    trace: Trace
    limits: Limits
    service_level: ServiceLevel
    rows: NDArray[np.float64]
    log: RequestLog
    end_s: float
    unfinished: int

    def total(self, column: Column) -> float:
        return float(self.rows[:, column].sum())

    @property
    def served(self) -> NDArray[np.bool_]:
        return ~np.isnan(self.log.finish_s)

    @property
    def verdicts(self) -> NDArray[np.bool_]:
        """Who broke the SLO by ``end_s``, judged from the request times alone."""
        level = self.service_level
        late = np.where(np.isnan(self.log.first_token_s), self.end_s - self.log.arrival_s, self.log.ttft_s)
        return self.log.refused | (late > level.ttft_s) | (self.log.tpot_s > level.tpot_s)


def conversation(rate_per_s: float, duration_s: float = 60.0, seed: int = 0) -> Trace:
    spec = replace(SPECS["conversation"], rate_per_s=rate_per_s, duration_s=duration_s)
    return synthesize(spec, np.random.default_rng(seed))


def run(
    trace: Trace,
    limits: Limits,
    tables: PhysicsTables,
    held: list[Index],
    service_level: ServiceLevel | None = None,
) -> Run:
    level = limits.service_level if service_level is None else service_level
    batch = SimulationBatch(limits, 1, tables)
    batch.load(0, trace, tables, level, held[0])
    rows = batch.advance_windows(0, np.array(held, dtype=np.int64))
    return Run(
        trace, limits, level, rows, batch.request_log(0), float(batch.now_s[0]), int(batch.unfinished[0])
    )


class Site:
    """The default profile's limits and physics. No dataclass: hypothesis would print every array."""

    def __init__(self, profile: Profile) -> None:
        self.limits = profile.limits()
        self.tables = build_tables(profile)
        # little memory left for KV: preemptions and refusals
        self.scarce = replace(self.tables, kv_blocks=np.array([900, 500, 300], dtype=np.int64))


@pytest.fixture(scope="session")
def site() -> Site:
    return Site(load_profile("h100-qwen3-32b"))


@st.composite
def held_settings(draw: st.DrawFn) -> list[Index]:
    index = st.tuples(st.integers(0, 9), st.integers(0, 5), st.integers(0, 2))
    held = draw(st.lists(st.tuples(index, st.integers(1, 25)), min_size=1, max_size=6))
    return [setting for setting, windows in held for _ in range(windows)]


@given(
    rate_per_s=st.floats(0.5, 20.0),
    seed=st.integers(0, 1000),
    held=held_settings(),
    slo_scale=st.sampled_from([0.6, 1.0, 2.0]),
    scarce=st.booleans(),
    drained=st.booleans(),
)
@settings(max_examples=60, deadline=None, derandomize=True)
def test_windows_and_request_log_tell_one_story(
    site: Site,
    rate_per_s: float,
    seed: int,
    held: list[Index],
    slo_scale: float,
    scarce: bool,  # noqa: FBT001  # drawn by hypothesis
    drained: bool,  # noqa: FBT001  # drawn by hypothesis
) -> None:
    trace = conversation(rate_per_s, 40.0, seed)
    done = run(
        trace,
        site.limits,
        site.scarce if scarce else site.tables,
        held + [FASTEST] * (DRAIN if drained else 0),
        site.limits.service_level.scaled(slo_scale),
    )
    log = done.log
    arrived = log.arrival_s <= done.end_s
    # every arrival is served, refused or still there
    assert done.total(Column.ARRIVALS) == arrived.sum()
    assert done.total(Column.PROMPT_TOKENS) == log.prompt_tokens[arrived].sum()
    assert done.total(Column.SERVED) == done.served.sum()
    assert not (done.served & log.refused).any()
    assert done.unfinished == len(trace) - done.served.sum() - log.refused.sum()
    there = arrived.sum() - done.served.sum() - log.refused.sum()
    last = done.rows[-1]
    assert last[Column.RUNNING] + last[Column.WAITING] == there
    # tokens: whoever finished has got every token, and nobody more than asked for
    generated = done.total(Column.OUTPUT_TOKENS)
    owed = log.output_tokens[done.served].sum()
    possible = log.output_tokens[~np.isnan(log.first_token_s)].sum()
    assert owed <= generated <= possible
    computed = done.total(Column.PREFILL_TOKENS)
    if drained:
        assert done.unfinished == 0
        assert generated == owed
        fresh = log.prompt_tokens[done.served].sum()
        if done.total(Column.PREEMPTIONS):
            assert computed > fresh  # what was preempted is computed again
        else:
            assert computed == fresh
        for column in (
            Column.RUNNING,
            Column.WAITING,
            Column.WAITING_TOKENS,
            Column.OVERDUE,
            Column.KV_USAGE,
        ):
            assert last[column] == 0, column.name
    # verdicts
    np.testing.assert_array_equal(log.missed, done.verdicts & arrived)
    assert done.total(Column.MISSES) == log.missed.sum()


@given(rate_per_s=st.floats(0.5, 25.0), seed=st.integers(0, 1000), held=held_settings())
@settings(max_examples=60, deadline=None, derandomize=True)
def test_misses_are_counted_in_the_window_in_which_they_happen(
    site: Site, rate_per_s: float, seed: int, held: list[Index]
) -> None:
    done = run(conversation(rate_per_s, 40.0, seed), site.limits, site.tables, held)
    log, level, windows = done.log, done.service_level, len(held)
    deadline_s = log.arrival_s + level.ttft_s
    first_s = np.where(np.isnan(log.first_token_s), np.inf, log.first_token_s)
    broke_ttft = first_s > deadline_s
    broke_tpot = ~broke_ttft & (log.tpot_s > level.tpot_s)
    at_s = np.concatenate([deadline_s[broke_ttft], log.finish_s[broke_tpot]])
    window = (np.ceil(at_s / site.limits.interval_s) - 1).astype(np.int64)
    expected = np.bincount(window[window < windows], minlength=windows)
    np.testing.assert_array_equal(done.rows[:, Column.MISSES], expected)
    ends_s = site.limits.interval_s * np.arange(1, windows + 1)
    overdue = ((deadline_s[:, None] <= ends_s) & (first_s[:, None] > ends_s)).sum(axis=0)
    np.testing.assert_array_equal(done.rows[:, Column.OVERDUE], overdue)


@given(rate_per_s=st.floats(0.2, 20.0), seed=st.integers(0, 1000), held=held_settings())
@settings(max_examples=60, deadline=None, derandomize=True)
def test_power_lies_between_idling_and_tdp(
    site: Site, rate_per_s: float, seed: int, held: list[Index]
) -> None:
    done = run(conversation(rate_per_s, 40.0, seed), site.limits, site.tables, held)
    tables = site.tables
    gpus, interval_s = tables.allotted_gpus, site.limits.interval_s
    energy_j = done.rows[:, Column.ENERGY_J]
    # what a starting engine draws stays below TDP too, so nothing exceeds it
    per_gpu_w = np.concatenate([tables.startup_w, tables.warmup_w]) / np.tile(tables.tp_degrees, 2)
    assert per_gpu_w.max() <= tables.tdp_w
    assert (energy_j <= tables.tdp_w * gpus * interval_s * (1 + 1e-9)).all()
    assert (energy_j >= tables.idle_w.min() * gpus * interval_s * (1 - 1e-9)).all()
    # and where nothing ran, started or changed its clock, it is idle power to the last joule
    clock_mhz, switching = done.rows[:, Column.MEASURED_CLOCK_MHZ], done.rows[:, Column.SWITCHING]
    k = np.minimum(np.searchsorted(tables.grid_clocks_mhz, clock_mhz), tables.grid_clocks_mhz.size - 1)
    idle = (done.rows[:, Column.SM_CLOCK_MHZ] == clock_mhz) & (done.rows[:, Column.BUSY_FRACTION] == 0)
    idle &= (switching == 0) & (np.concatenate([[0.0], switching[:-1]]) == 0)
    idle &= np.diff(done.rows[:, Column.TP_DEGREE], prepend=tables.tp_degrees[held[0][2]]) == 0
    np.testing.assert_allclose(energy_j[idle], tables.idle_w[k[idle]] * gpus * interval_s, rtol=1e-9)


@pytest.mark.parametrize("held", [FASTEST, (6, 1, 1), (8, 3, 0)])
def test_energy_is_an_integral_however_it_is_cut(site: Site, held: Index) -> None:
    trace = conversation(3.0, 58.0)
    coarse, fine, finest = (
        run(trace, replace(site.limits, interval_s=interval_s), site.tables, [held] * round(60 / interval_s))
        for interval_s in (60.0, 1.0, 0.02)
    )
    for cut in (fine, finest):
        assert cut.total(Column.ENERGY_J) == pytest.approx(coarse.total(Column.ENERGY_J), rel=1e-9)
        np.testing.assert_array_equal(cut.log.finish_s, coarse.log.finish_s)
        for column in (Column.MISSES, Column.OUTPUT_TOKENS, Column.SERVED, Column.PREFILL_TOKENS):
            assert cut.total(column) == coarse.total(column), column.name
    # means over time are means over the pieces
    for column in (
        Column.RUNNING_MEAN,
        Column.BUSY_FRACTION,
        Column.THROTTLED_FRACTION,
        Column.MEASURED_CLOCK_MHZ,
    ):
        assert finest.rows[:, column].mean() == pytest.approx(coarse.rows[0, column], rel=1e-6), column.name


def test_a_switch_costs_its_start_up(
    make_tables: Callable[..., PhysicsTables], make_limits: Callable[[PhysicsTables], Limits]
) -> None:
    tables = make_tables()
    limits = make_limits(tables)
    nothing = Trace("nothing", *_no_requests(), duration_s=1.0)
    stay = run(nothing, limits, tables, [(0, 0, 1)] * 10)
    move = run(nothing, limits, tables, [(0, 0, 1)] + [(0, 0, 2)] * 9)
    # one GPU at 150 W for 0.4 s and at 250 W for 0.1 s, instead of 100 W
    extra_j = 0.4 * (150.0 - 100.0) + 0.1 * (250.0 - 100.0)
    assert move.total(Column.ENERGY_J) - stay.total(Column.ENERGY_J) == pytest.approx(extra_j, rel=1e-9)


def test_a_request_refused_after_its_deadline_is_one_miss(
    make_tables: Callable[..., PhysicsTables], make_limits: Callable[[PhysicsTables], Limits]
) -> None:
    tables = make_tables(kv_blocks=(20, 20, 20))
    limits = make_limits(tables)
    # the first keeps the cap of 1 occupied, the second waits for it, and the third would need 22 blocks
    lengths = (np.array([10, 10, 300]), np.array([250, 5, 50]), np.zeros(3, dtype=np.int64))
    trace = Trace("refused late", np.array([0.0, 0.05, 0.05]), *lengths, duration_s=1.0)
    done = run(trace, limits, tables, [(0, 3, 0)] * 40)
    assert done.log.refused.tolist() == [False, False, True]
    assert done.log.finish_s[0] > 0.05 + limits.service_level.ttft_s
    assert done.log.missed.tolist() == [False, True, True]
    assert done.total(Column.MISSES) == 2
    assert done.rows[-1, Column.OVERDUE] == 0


def _no_requests() -> tuple[NDArray[np.float64], NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    return np.zeros(0), *(np.zeros(0, dtype=np.int64) for _ in range(3))  # type: ignore[return-value]  # three of them


# ---------------------------------------------------------------- deferring work


@pytest.fixture(scope="module")
def busy() -> Trace:
    return conversation(6.0, 120.0)


def test_the_slowest_setting_saves_energy_and_loses_the_slo(site: Site, busy: Trace) -> None:
    slowest = tuple(size - 1 for size in site.limits.axis_sizes[:2])
    fast = run(busy, site.limits, site.tables, [FASTEST] * 120)
    slow = run(busy, site.limits, site.tables, [(slowest[0], slowest[1], 0)] * 120)
    assert slow.total(Column.ENERGY_J) < fast.total(Column.ENERGY_J)
    assert fast.verdicts.mean() < 0.01
    assert slow.verdicts.mean() > 0.5
    # and it is told so while it happens: most of its misses have not had a first token yet
    unserved = np.isnan(slow.log.first_token_s)
    assert slow.total(Column.MISSES) == slow.log.missed.sum()
    assert (slow.log.missed & unserved).sum() > 0.5 * slow.log.missed.sum()
    assert (np.cumsum(slow.rows[:, Column.MISSES]) > np.cumsum(slow.rows[:, Column.SERVED]))[20:].all()


def test_catching_up_later_undoes_no_miss(site: Site, busy: Trace) -> None:
    deferred = run(busy, site.limits, site.tables, [(11, 5, 0)] * 30 + [FASTEST] * 490)
    prompt = run(busy, site.limits, site.tables, [FASTEST] * 520)
    assert deferred.unfinished == prompt.unfinished == 0
    during, after = deferred.rows[:30], deferred.rows[30:]
    assert during[:, Column.MISSES].sum() > 50
    assert during[-1, Column.OVERDUE] > 50
    assert deferred.total(Column.MISSES) == deferred.verdicts.sum() >= during[:, Column.MISSES].sum()
    assert after[-1, Column.OVERDUE] == 0
    assert deferred.verdicts.mean() > prompt.verdicts.mean() + 0.05
