"""The compiled simulator against the plain one: every time equal to the picosecond, whatever happens."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from rlgov.errors import ConfigError
from rlgov.records import Column, Configuration, Limits
from rlgov.simulation.batch import SimulationBatch
from rlgov.simulation.naive import NaiveResult, NaiveSimulation
from rlgov.simulation.tables import PhysicsTables
from rlgov.workload.trace import Trace

MakeTables = Callable[..., PhysicsTables]
MakeLimits = Callable[[PhysicsTables], Limits]
Index = tuple[int, int, int]

# Windows count and time exactly alike with and without jumps; sums of energy differ in the last bits.
SUMS = (Column.ENERGY_J, Column.RUNNING_MEAN, Column.MEASURED_CLOCK_MHZ)
EXACT = [int(column) for column in Column if column not in SUMS]


@dataclass(frozen=True)
class Case:
    """A small deployment, its requests (gap in ms, prompt, output and hit tokens) and its settings."""

    physics: dict[str, Any] = field(default_factory=dict)
    requests: tuple[tuple[float, int, int, int], ...] = ()
    settings: tuple[Index, ...] = ((0, 0, 0),)
    start: Index = (0, 0, 0)

    @property
    def trace(self) -> Trace:
        gaps_ms, prompts, outputs, hits = (
            np.array([request[k] for request in self.requests], dtype=np.float64) for k in range(4)
        )
        arrival_s = (np.round(np.cumsum(gaps_ms), 3) / 1000.0).astype(np.float64)
        return Trace(
            "case",
            arrival_s,
            prompts.astype(np.int64),
            outputs.astype(np.int64),
            np.minimum(hits, prompts - 1).astype(np.int64),
            float(arrival_s[-1]) if len(self.requests) else 0.0,
        )


@dataclass(frozen=True)
class Played:
    """What the compiled simulator made of a case."""

    rows: NDArray[np.float64]
    first_ps: NDArray[np.int64]
    finish_ps: NDArray[np.int64]
    refused: NDArray[np.bool_]
    iterations: int
    switches: int


@pytest.fixture(scope="session")
def play(make_tables: MakeTables, make_limits: MakeLimits) -> Callable[..., Played]:
    def played(case: Case, *, jump: bool) -> Played:
        tables = make_tables(**case.physics)
        limits = make_limits(tables)
        batch = SimulationBatch(limits, 1, tables, capacity=4)
        batch.load(0, case.trace, tables, limits.service_level, case.start)
        rows = np.stack([batch.advance_only(0, setting, jump=jump).copy() for setting in case.settings])
        first_ps, finish_ps = batch.times_ps(0)
        refused = batch.request_log(0).refused
        return Played(rows, first_ps, finish_ps, refused, int(batch.iterations[0]), int(batch.tp_switches[0]))

    return played


@pytest.fixture(scope="session")
def oracle(make_tables: MakeTables, make_limits: MakeLimits) -> Callable[[Case], NaiveResult]:
    def result(case: Case) -> NaiveResult:
        tables = make_tables(**case.physics)
        limits = make_limits(tables)
        grid = tables.grid_clocks_mhz.tolist()

        def naive(setting: Index) -> Index:
            clock, cap, tp = setting
            return grid.index(limits.sm_clocks_mhz[clock]), limits.batch_caps[cap], tp

        simulation = NaiveSimulation(
            case.trace,
            tables,
            [naive(setting) for setting in case.settings],
            limits.interval_s,
            start=naive(case.start),
        )
        return simulation.run()

    return result


@pytest.fixture(scope="session")
def check(play: Callable[..., Played], oracle: Callable[[Case], NaiveResult]) -> Callable[[Case], Played]:
    """Plays a case in all three forms and compares them."""

    def checked(case: Case) -> Played:
        plain = oracle(case)
        jumped, stepped = play(case, jump=True), play(case, jump=False)
        for fast in (jumped, stepped):
            np.testing.assert_array_equal(fast.first_ps, plain.first_ps)
            np.testing.assert_array_equal(fast.finish_ps, plain.finish_ps)
            np.testing.assert_array_equal(fast.refused, plain.refused)
            assert fast.iterations == plain.iterations
            assert fast.rows[:, Column.PREEMPTIONS].sum() == plain.preemptions
            assert fast.rows[:, Column.OUTPUT_TOKENS].sum() == plain.output_tokens
            np.testing.assert_allclose(fast.rows[:, Column.ENERGY_J], plain.energy_j, rtol=1e-9)
        np.testing.assert_array_equal(jumped.rows[:, EXACT], stepped.rows[:, EXACT])
        np.testing.assert_allclose(jumped.rows[:, SUMS], stepped.rows[:, SUMS], rtol=1e-9)
        return jumped

    return checked


CLOCK_DELAYS_S = (0.0, 0.0303, 0.1, 0.25)
START_UPS_S = ((0.0, 0.0), (0.0, 0.1), (0.05, 0.0), (0.4, 0.1))  # and warm-ups


@st.composite
def cases(draw: st.DrawFn) -> Case:
    startup_s, warmup_s = draw(st.sampled_from(START_UPS_S))
    physics = {
        "kv_blocks": draw(st.sampled_from([(400, 180, 60), (40, 20, 10), (14, 9, 6)])),
        "clock_delay_s": draw(st.sampled_from(CLOCK_DELAYS_S)),
        "startup_s": startup_s,
        "warmup_s": warmup_s,
        "tdp_w": draw(st.sampled_from([700.0, 400.0, 300.0, 150.0])),
        "host_s": draw(st.sampled_from([0.0, 0.004, 0.0085])),
        "budget_tokens": draw(st.sampled_from([16, 64, 512])),
    }
    # halves of a millisecond meet ends of iterations and windows; the odd gaps meet nothing
    gap_ms = st.one_of(st.integers(0, 400).map(lambda halves: halves / 2), st.floats(0.0, 90.0))
    request = st.tuples(gap_ms, st.integers(1, 150), st.integers(1, 60), st.integers(0, 60))
    requests = draw(st.lists(request, max_size=24))
    index = st.tuples(st.integers(0, 3), st.integers(0, 3), st.integers(0, 2))
    start = draw(index)
    held = draw(st.lists(st.tuples(index, st.integers(1, 6)), min_size=1, max_size=8))
    chosen = tuple(setting for setting, windows in held for _ in range(windows))
    return Case(physics, tuple(requests), chosen, start)


@given(case=cases())
@settings(max_examples=600, deadline=None, derandomize=True)
def test_compiled_and_plain_agree(check: Callable[[Case], Played], case: Case) -> None:
    check(case)


def random_case(seed: int) -> Case:
    """A longer and busier case than hypothesis draws."""
    rng = np.random.default_rng(seed)
    startup_s, warmup_s = START_UPS_S[seed // 2 % len(START_UPS_S)]
    physics = {
        "kv_blocks": [(400, 180, 60), (60, 30, 16), (20, 12, 9)][seed % 3],
        "clock_delay_s": CLOCK_DELAYS_S[seed // 3 % len(CLOCK_DELAYS_S)],
        "startup_s": startup_s,
        "warmup_s": warmup_s,
        "tdp_w": [700.0, 350.0, 250.0][seed // 4 % 3],
        "host_s": [0.004, 0.0085][seed // 5 % 2],
        "budget_tokens": [32, 64, 512][seed // 2 % 3],
    }
    count = 80
    gaps_ms = rng.exponential(rng.choice([8.0, 30.0, 80.0]), count) * (rng.random(count) < 0.8)
    lengths = np.stack(
        [rng.integers(1, 200, count), rng.geometric(0.03, count), rng.integers(0, 80, count)], axis=1
    )
    windows = 60
    change = rng.random((windows, 3)) < (0.3, 0.2, 0.1)
    steps = rng.integers(0, (4, 4, 3), (windows, 3))
    for window in range(1, windows):
        steps[window] = np.where(change[window], steps[window], steps[window - 1])
    held = tuple((int(a), int(b), int(c)) for a, b, c in steps)
    return Case(
        physics,
        tuple((float(g), int(p), int(o), int(h)) for g, (p, o, h) in zip(gaps_ms, lengths, strict=True)),
        held,
        (0, 0, int(rng.integers(3))),
    )


SWEEP = 48


@pytest.fixture(scope="module")
def sweep(check: Callable[[Case], Played]) -> list[tuple[Case, Played]]:
    return [(case, check(case)) for case in map(random_case, range(SWEEP))]


def test_longer_runs_agree_and_see_every_event(sweep: list[tuple[Case, Played]]) -> None:
    rows = np.concatenate([played.rows for _, played in sweep])
    happened = {
        "preemptions": int(rows[:, Column.PREEMPTIONS].sum()),
        "throttled windows": int((rows[:, Column.THROTTLED_FRACTION] > 0).sum()),
        "refusals": sum(int(played.refused.sum()) for _, played in sweep),
        "switches": sum(played.switches for _, played in sweep),
        "misses": int(rows[:, Column.MISSES].sum()),
        "finished": sum(int((played.finish_ps >= 0).sum()) for _, played in sweep),
        "unfinished": sum(int(((played.finish_ps < 0) & ~played.refused).sum()) for _, played in sweep),
    }
    assert min(happened.values()) >= 40, happened


def test_both_kinds_of_tp_switch_fall_into_traffic(sweep: list[tuple[Case, Played]]) -> None:
    pairs: dict[tuple[int, int], int] = {}
    for case, played in sweep:
        tp = np.concatenate([[(4, 2, 1)[case.start[2]]], played.rows[:, Column.TP_DEGREE]])
        busy = played.rows[:, Column.RUNNING] > 0
        for window in np.flatnonzero((np.diff(tp) != 0) & busy):
            pair = int(tp[window]), int(tp[window + 1])
            pairs[pair] = pairs.get(pair, 0) + 1
    assert set(pairs) == {(4, 2), (4, 1), (2, 4), (1, 4), (2, 1), (1, 2)}


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(
            Case({}, ((0.0, 40, 20, 0),), ((0, 0, 1),), (0, 0, 0)),
            id="arrival and TP switch at the beginning",
        ),
        pytest.param(
            Case({"startup_s": 0.0, "warmup_s": 0.0}, (), ((0, 0, 2),) * 2, (0, 0, 1)),
            id="an engine side by side that starts in no time",
        ),
        pytest.param(
            Case({"clock_delay_s": 0.1}, (), ((1, 0, 0), (0, 0, 0))),
            id="one clock due when another is asked for",
        ),
    ],
)
def test_the_order_at_one_instant(check: Callable[[Case], Played], case: Case) -> None:
    check(case)


# ---------------------------------------------------------------- single events, in numbers

LONE = ((0.0, 40, 20, 0),)


def test_a_request_longer_than_the_cache_is_refused_and_missed(
    check: Callable[[Case], Played],
) -> None:
    # 10 blocks of 16 tokens: 150 + 20 tokens need 11
    played = check(Case({"kv_blocks": (10, 10, 10)}, ((0.0, 150, 20, 0), (5.0, 40, 4, 0)), ((0, 0, 0),) * 5))
    assert played.refused.tolist() == [True, False]
    assert played.first_ps[0] == -1
    assert played.finish_ps[1] > 0
    assert played.rows[:, Column.MISSES].sum() == 1


def test_the_cache_preempts_the_youngest_request_which_still_finishes(
    check: Callable[[Case], Played],
) -> None:
    # each needs 2 blocks for its prompt and in the end 5; there are 6
    played = check(Case({"kv_blocks": (6, 6, 6)}, ((0.0, 32, 40, 0), (1.0, 32, 40, 0)), ((0, 0, 0),) * 20))
    assert played.rows[:, Column.PREEMPTIONS].sum() >= 1
    assert 0 < played.finish_ps[0] < played.finish_ps[1]
    assert played.rows[:, Column.PREFILL_TOKENS].sum() > 64  # the preempted one is computed again


def test_a_prefix_hit_saves_its_prompt_tokens(check: Callable[[Case], Played]) -> None:
    cold = check(Case({}, ((0.0, 60, 3, 0),), ((0, 0, 0),) * 3))
    warm = check(Case({}, ((0.0, 60, 3, 50),), ((0, 0, 0),) * 3))
    assert cold.rows[:, Column.PREFILL_TOKENS].sum() == 60
    assert warm.rows[:, Column.PREFILL_TOKENS].sum() == 10
    assert 0 < warm.first_ps[0] < cold.first_ps[0]


def test_a_lower_cap_stops_admission_and_preempts_nobody(check: Callable[[Case], Played]) -> None:
    requests = tuple((1.0, 10, 60, 0) for _ in range(8))
    played = check(Case({}, requests, ((0, 0, 0), *((0, 3, 0),) * 30)))
    assert played.rows[:, Column.PREEMPTIONS].sum() == 0
    assert played.rows[0, Column.RUNNING] == 8
    assert played.rows[1, Column.RUNNING] == 8
    late = check(Case({}, requests, ((0, 3, 0),) * 60))
    assert late.rows[:, Column.RUNNING].max() == 1
    assert (np.diff(late.first_ps) > 0).all()


@pytest.mark.parametrize("delay_s", [0.0, 0.05, 0.25])
def test_a_clock_takes_effect_after_its_delay(check: Callable[[Case], Played], delay_s: float) -> None:
    played = check(Case({"clock_delay_s": delay_s}, ((0.0, 5, 900, 0),), ((0, 0, 0), *((3, 0, 0),) * 5)))
    clocks = played.rows[1:, Column.MEASURED_CLOCK_MHZ]
    late = np.clip(delay_s - 0.1 * np.arange(5), 0.0, 0.1) / 0.1
    np.testing.assert_allclose(clocks, 500 + 1500 * late, rtol=1e-9)
    assert played.rows[:, Column.SM_CLOCK_MHZ].tolist() == [2000, *[500] * 5]


def test_tdp_lowers_the_clock_of_what_would_exceed_it(check: Callable[[Case], Played]) -> None:
    requests = tuple((0.0, 60, 100, 0) for _ in range(12))
    free, bound = (check(Case({"tdp_w": w}, requests, ((0, 0, 0),) * 40)) for w in (700.0, 250.0))
    assert free.rows[:, Column.THROTTLED_FRACTION].max() == 0
    assert bound.rows[:, Column.THROTTLED_FRACTION].max() == 1
    assert bound.rows[:, Column.MEASURED_CLOCK_MHZ].min() < 1500
    assert (bound.finish_ps > free.finish_ps).all()
    assert bound.rows[:, Column.ENERGY_J].max() <= 4 * 250.0 * 0.1 * (1 + 1e-9)


def test_a_switch_side_by_side_keeps_serving(check: Callable[[Case], Played]) -> None:
    requests = tuple((10.0, 10, 30, 0) for _ in range(80))
    played = check(Case({}, requests, ((0, 0, 1), *((0, 0, 2),) * 20), (0, 0, 1)))
    switching = played.rows[:, Column.SWITCHING] == 1
    assert switching.sum() >= 5  # 0.5 s of start-up and warm-up
    assert (played.rows[switching, Column.OUTPUT_TOKENS] > 0).all()
    assert played.rows[:, Column.TP_DEGREE].tolist()[:5] == [2] * 5
    assert played.rows[-1, Column.TP_DEGREE] == 1


def test_a_switch_without_room_drains_first(check: Callable[[Case], Played]) -> None:
    requests = ((0.0, 10, 60, 0), (120.0, 10, 5, 0))
    played = check(Case({}, requests, ((0, 0, 0), *((0, 0, 1),) * 15)))
    assert played.switches == 1
    # the second request arrived after the switch was asked for: it waits for drain, start-up and warm-up
    assert played.first_ps[1] >= played.finish_ps[0] + 500_000_000_000
    assert played.rows[-1, Column.TP_DEGREE] == 2


def test_a_second_switch_is_ignored_while_one_is_in_progress(check: Callable[[Case], Played]) -> None:
    played = check(Case({}, LONE, ((0, 0, 0), (0, 0, 1), (0, 0, 2), *((0, 0, 1),) * 10)))
    assert played.switches == 1
    assert played.rows[-1, Column.TP_DEGREE] == 2


def test_an_engine_that_starts_in_no_time_serves_at_once(check: Callable[[Case], Played]) -> None:
    swift = {"startup_s": 0.0, "warmup_s": 0.0}
    played = check(Case(swift, ((105.0, 10, 5, 0),), ((0, 0, 0), *((0, 0, 1),) * 5)))
    assert played.rows[:, Column.SWITCHING].tolist() == [0] * 6
    assert played.rows[1:, Column.TP_DEGREE].tolist() == [2] * 5
    assert 105_000_000_000 < played.first_ps[0] < 120_000_000_000


def test_nothing_to_do_draws_idle_power(check: Callable[[Case], Played]) -> None:
    played = check(Case({}, (), ((0, 0, 0), (3, 0, 0), (3, 0, 0))))
    # 100 W a GPU at 2000 MHz, 70 W at 500 MHz, which comes 0.03 s late
    np.testing.assert_allclose(played.rows[:, Column.ENERGY_J], [40.0, 28.0 + 12.0 * 0.3, 28.0], rtol=1e-9)
    assert not played.rows[:, Column.BUSY_FRACTION].any()
    assert np.isnan(played.rows[:, Column.TTFT_P50_S]).all()


# ---------------------------------------------------------------- the batch around the kernel


def test_simulations_of_a_batch_do_not_touch_each_other(
    make_tables: MakeTables, make_limits: MakeLimits, play: Callable[..., Played]
) -> None:
    # cases whose physics have the same shape, each with its own numbers, in one call a window
    own = [random_case(seed) for seed in range(6)]
    tables = [make_tables(**case.physics) for case in own]
    limits = make_limits(tables[0])
    batch = SimulationBatch(limits, len(own), tables[0], capacity=4)
    for i, (case, physics) in enumerate(zip(own, tables, strict=True)):
        batch.load(i, case.trace, physics, limits.service_level, case.start)
    rows = np.stack(
        [
            batch.advance(np.array(index, dtype=np.int64)).copy()
            for index in zip(*(c.settings for c in own), strict=True)
        ]
    )
    for i, case in enumerate(own):
        alone = play(case, jump=True)
        np.testing.assert_array_equal(rows[:, i], alone.rows)
        np.testing.assert_array_equal(batch.times_ps(i)[1], alone.finish_ps)


def test_many_windows_in_one_call_equal_one_by_one(
    make_tables: MakeTables, make_limits: MakeLimits, play: Callable[..., Played]
) -> None:
    case = random_case(1)
    tables = make_tables(**case.physics)
    limits = make_limits(tables)
    batch = SimulationBatch(limits, 1, tables)
    for _ in range(2):  # loading again begins anew
        batch.load(0, case.trace, tables, limits.service_level, case.start)
        rows = batch.advance_windows(0, np.array(case.settings, dtype=np.int64))
        np.testing.assert_array_equal(rows, play(case, jump=True).rows)


def test_a_table_that_does_not_fit_is_refused(make_tables: MakeTables, make_limits: MakeLimits) -> None:
    tables = make_tables()
    fitting = make_limits(tables)
    other = {
        "supported clocks": Limits(**_fields(fitting) | {"sm_clocks_mhz": (1999, 500)}),
        "TP degrees": Limits(**_fields(fitting) | {"tp_degrees": (4, 2)}),
        "batches up to": Limits(**_fields(fitting) | {"batch_caps": (32, 8)}),
    }
    for words, limits in other.items():
        with pytest.raises(ConfigError, match=words):
            SimulationBatch(limits, 1, tables)
    with pytest.raises(ConfigError, match="max_num_batched_tokens"):
        SimulationBatch(fitting, 1, make_tables(budget_tokens=8))
    assert fitting.fastest == Configuration(2000, 16, 4)


def _fields(limits: Limits) -> dict[str, Any]:
    return {name: getattr(limits, name) for name in Limits.__dataclass_fields__}
