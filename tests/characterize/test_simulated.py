from __future__ import annotations

import numpy as np
import pytest

from rlgov.characterize.campaign import plan_points
from rlgov.characterize.measure import RING_COLUMNS
from rlgov.characterize.plan import Point, Task
from rlgov.characterize.simulated import SimulatedBench
from rlgov.characterize.workloads import length_class
from rlgov.config import CharacterizeSettings
from rlgov.errors import CharacterizationError
from rlgov.records import Column
from rlgov.simulation.batch import SimulationBatch
from rlgov.simulation.physics import build_tables
from rlgov.simulation.profile import load_profile
from rlgov.workload.trace import Trace

PROFILE = load_profile("h100-qwen3-32b")
LENGTHS = length_class("short-in/short-out")


def task(**changes: object) -> Task:
    known = {"mode": "closed", "concurrency": 8, "rate_per_s": None, "cap": 8, "clock": 1980} | changes
    return Task(
        Point(
            LENGTHS.name, LENGTHS.identity, known["mode"], known["concurrency"], known["rate_per_s"],  # type: ignore[arg-type]  # of a test
            known["clock"], known["cap"], 2,  # type: ignore[arg-type]  # as above
        ),
        0,
    )  # fmt: skip


def bench() -> SimulatedBench:
    return SimulatedBench(PROFILE, {LENGTHS.name: LENGTHS}, 0)


@pytest.mark.parametrize(("clock", "cap", "rate"), [(0, 0, 20.0), (4, 4, 2.0), (2, 5, 40.0)])
def test_iterations_one_by_one_are_the_simulation_itself(clock: int, cap: int, rate: float) -> None:
    """Stepped by iterations or by windows: the same counts, times and state."""
    rng = np.random.default_rng(5)
    n = 200
    arrival_s = np.cumsum(rng.exponential(1 / rate, n))
    prompt, output = LENGTHS.draw(n, rng)
    trace = Trace("t", arrival_s, prompt, output, np.zeros(n, dtype=np.int64), float(arrival_s[-1]))
    tables, limits = build_tables(PROFILE), PROFILE.limits()
    level, index = limits.service_level, (clock, cap, 1)
    until_s = 40.0

    whole = SimulationBatch(limits, 1, tables, capacity=n)
    whole.load(0, trace, tables, level, index)
    windows = whole.advance_windows(0, np.tile(np.array(index), (int(until_s), 1)))
    stepped = SimulationBatch(limits, 1, tables, capacity=n)
    stepped.load(0, trace, tables, level, index)
    rows = stepped.play_iterations(0, index, until_s)

    assert len(rows) == whole.iterations[0] == stepped.iterations[0]
    for one, other in zip(whole.times_ps(0), stepped.times_ps(0), strict=True):
        assert np.array_equal(one, other)
    column = {name: rows[:, i] for i, name in enumerate(RING_COLUMNS)}
    assert stepped.now_s[0] == until_s
    assert np.all(np.diff(column["t_s"]) > 0)
    assert np.all(column["step_s"] > 0)
    ends = column["t_s"] - column["step_s"]
    assert np.all(ends[1:] >= column["t_s"][:-1] - 1e-9)  # none begins before the last has ended
    first = int(np.count_nonzero(~np.isnan(whole.request_log(0).first_token_s)))
    assert column["decode_tokens"].sum() + first == windows[:, Column.OUTPUT_TOKENS].sum()
    under_way = windows[:, Column.PREFILL_TOKENS].sum() - column["prefill_tokens"].sum()
    assert 0 <= under_way <= tables.max_num_batched_tokens
    assert column["running"].max() <= limits.batch_caps[cap]


def test_play_until_and_iterations_go_on_from_any_moment() -> None:
    tables, limits = build_tables(PROFILE), PROFILE.limits()
    trace = Trace(
        "t", np.zeros(64), *LENGTHS.draw(64, np.random.default_rng(0)), np.zeros(64, dtype=np.int64), 0.0
    )
    index = (0, 4, 1)

    def loaded() -> SimulationBatch:
        batch = SimulationBatch(limits, 1, tables, capacity=64)
        batch.load(0, trace, tables, limits.service_level, index)
        return batch

    all_rows = loaded().play_iterations(0, index, 8.0)
    later = loaded()
    later.play_until(0, index, 3.0)
    rows = later.play_iterations(0, index, 8.0)
    assert np.array_equal(rows, all_rows[all_rows[:, 0] > 3.0])


def test_a_closed_loop_keeps_its_users_busy_and_never_runs_dry() -> None:
    hold = bench().hold(task(), 500.0)
    windows = [hold.advance() for _ in range(200)]
    assert sum(w.served for w in windows) > 32  # more than the queue began with
    assert min(w.running for w in windows) == 8
    again = bench().hold(task(), 500.0)
    assert [again.advance() for _ in range(200)] == windows  # also those before the queue was made longer


def test_the_closed_loop_is_under_its_users_or_its_cap_whichever_is_less() -> None:
    few = bench().hold(task(concurrency=4, cap=64), 60.0)
    assert {few.advance().running for _ in range(20)} == {4.0}
    many = bench().hold(task(concurrency=24, cap=8), 60.0)
    windows = [many.advance() for _ in range(60)]
    assert {window.running + window.waiting for window in windows} == {24.0}
    told = many.evidence(30.0, 60.0)
    sent = told.requests.sent_s
    inside = (told.requests.first_token_s > 30) & (told.requests.first_token_s <= 60)
    wait_s = float(np.median((told.requests.first_token_s - sent)[inside]))
    served_per_s = sum(w.served for w in windows[30:]) / 30
    assert wait_s == pytest.approx(16 / served_per_s, rel=0.15)  # Little: sixteen wait at any time


def test_energy_is_of_the_engines_gpus() -> None:
    hold = bench().hold(task(), 60.0)
    windows = [hold.advance() for _ in range(40)]
    told = hold.evidence(10.0, 40.0)
    assert told.measured_gpus == 2
    assert told.energy_j == pytest.approx(sum(w.energy_j or 0 for w in windows[10:]))
    assert told.energy_j is not None
    assert 2 * 70 * 30 < told.energy_j < 2 * 700 * 30


def test_an_open_loop_arrives_at_its_rate() -> None:
    hold = bench().hold(task(mode="open", concurrency=None, rate_per_s=4.0), 220.0)
    windows = [hold.advance() for _ in range(200)]
    assert sum(w.arrivals for w in windows) == pytest.approx(800, abs=5 * 800**0.5)
    told = hold.evidence(50.0, 200.0)
    assert np.nanmin(told.requests.first_token_s - told.requests.sent_s) > 0


def test_requests_that_do_not_fit_the_cache_are_refused_before() -> None:
    long = length_class("long-in/long-out", 200.0)
    settings = CharacterizeSettings(classes=(long.name,), caps=(8,))
    with pytest.raises(CharacterizationError, match=r"at TP 1 one may take \d+; leave out"):
        plan_points(settings, SimulatedBench(PROFILE, {long.name: long}, 0), [long])
