"""What the guard adds in service: stalls, trips, a budget of TP switches; decisions nobody carries out."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from rlgov.agents.baselines import PolicyContext, by_name
from rlgov.envs.guard import Guard, GuardSettings, Reason
from rlgov.envs.observation import FEATURES
from rlgov.envs.watch import WatchSettings
from rlgov.errors import ConfigError
from rlgov.records import WINDOW_FIELDS, Limits, Window
from rlgov.simulation.batch import SimulationBatch
from rlgov.simulation.physics import build_tables
from rlgov.simulation.profile import load_profile
from rlgov.workload.synthesis import SPECS, synthesize

SLOW = np.array([[5, 2, 0]])
BURNING = {"misses": 10.0}
STILL = {"output_tokens": 0.0, "prefill_tokens": 0.0, "served": 0.0, "running": 5.0}
QUICK = WatchSettings(
    stall_s=3.0, trip_overrides=2, trip_within_s=100.0, trip_override_s=20.0, backoff_s=10.0, latch_after=3,
    forgive_s=200.0, tp_switches_per_hour=3,
)  # fmt: skip


def row(window: Window, **changes: Any) -> NDArray[np.float64]:
    return replace(window, **changes).to_row()[None, :]


def watched(limits: Limits, **changes: Any) -> Guard:
    return Guard(
        GuardSettings(tp_dwell_s=0.0, hold_s=0.0, burn_share=2.0), limits, 1, watch=replace(QUICK, **changes)
    )


def reason(guard: Guard, rows: NDArray[np.float64]) -> Reason:
    mask = guard.mask(rows)
    applied, reasons = guard.apply(SLOW, rows)
    told = Reason(int(reasons[0]))
    if told in {Reason.STALLED, Reason.TRIPPED}:
        assert applied[0].tolist() == [0, 0, 0]
        assert mask[0, : guard.table.offsets[2]].sum() == 2  # the fastest clock, the largest cap
    return told


def test_work_without_progress_is_a_stall_and_ends_with_the_first_token(limits: Limits, calm: Window) -> None:
    guard = watched(limits)
    told = [reason(guard, row(calm, **STILL)) for _ in range(5)]
    assert [each is Reason.STALLED for each in told] == [False, False, True, True, True]
    assert reason(guard, row(calm)) is not Reason.STALLED


@pytest.mark.parametrize(
    "changes",
    [
        {"running": 0.0, "waiting": 0.0},  # nothing to do
        {"switching": 1.0},  # requests are held meanwhile
        {"prefill_tokens": 500.0},  # a long prompt
    ],
)
def test_what_only_looks_like_a_stall_is_none(
    limits: Limits, calm: Window, changes: dict[str, float]
) -> None:
    guard = watched(limits)
    told = [reason(guard, row(calm, **(STILL | changes))) for _ in range(20)]
    assert Reason.STALLED not in told


def test_blind_windows_neither_begin_nor_end_a_stall(limits: Limits, calm: Window) -> None:
    guard = watched(limits)
    for _ in range(20):
        assert reason(guard, row(calm, blind=1.0)) is Reason.BLIND
    assert reason(guard, row(calm, **STILL)) is not Reason.STALLED
    reason(guard, row(calm, **STILL))
    assert reason(guard, row(calm, blind=1.0)) is Reason.BLIND
    assert reason(guard, row(calm, **STILL)) is Reason.STALLED


def burn(guard: Guard, calm: Window, *, clock: float = 1000.0) -> Reason:
    """One override, from below the fastest clock unless said otherwise; and a quiet window after it."""
    told = reason(guard, row(calm, sm_clock_mhz=clock, **BURNING))
    if told is not Reason.TRIPPED:
        reason(guard, row(calm, sm_clock_mhz=clock))
    return told


def test_trips_double_and_latch_and_only_arming_forgives(limits: Limits, calm: Window) -> None:
    guard = watched(limits)
    assert guard.watch is not None
    lengths = []
    for _ in range(2):
        assert burn(guard, calm) is Reason.SLO_OVERRIDE
        assert burn(guard, calm) is Reason.TRIPPED
        length = 1
        while reason(guard, row(calm)) is Reason.TRIPPED:
            length += 1
        lengths.append(length)
    assert lengths == [10, 20]
    burn(guard, calm)
    burn(guard, calm)
    guard.reset(np.ones(1, dtype=np.bool_))  # a new episode forgives nothing
    assert [reason(guard, row(calm)) for _ in range(100)] == [Reason.TRIPPED] * 100
    assert np.isinf(guard.watch.backoff_left_s[0])
    guard.watch.rearm()
    assert reason(guard, row(calm)) is not Reason.TRIPPED


def test_after_a_long_quiet_time_earlier_trips_are_forgotten(limits: Limits, calm: Window) -> None:
    guard = watched(limits)
    assert guard.watch is not None
    burn(guard, calm)
    burn(guard, calm)
    assert guard.watch.trips[0] == 1
    for _ in range(260):
        reason(guard, row(calm))
    assert guard.watch.trips[0] == 0


def test_an_override_at_the_fastest_setting_is_not_the_policy_s_fault(limits: Limits, calm: Window) -> None:
    guard = watched(limits)
    told = [burn(guard, calm, clock=limits.sm_clocks_mhz[0]) for _ in range(20)]
    assert told == [Reason.SLO_OVERRIDE] * 20


def test_one_override_that_lasts_is_enough(limits: Limits, calm: Window) -> None:
    guard = watched(limits)
    burning = row(calm, sm_clock_mhz=1000.0, **BURNING)
    told = [reason(guard, burning) for _ in range(25)]
    assert told.index(Reason.TRIPPED) == 19


def test_overrides_far_apart_do_not_trip(limits: Limits, calm: Window) -> None:
    guard = watched(limits)
    for _ in range(5):
        assert burn(guard, calm) is Reason.SLO_OVERRIDE
        for _ in range(110):
            reason(guard, row(calm))


def test_only_so_many_tp_switches_in_an_hour(limits: Limits, calm: Window) -> None:
    guard = watched(limits)
    moved, tp = 0, 0
    for _ in range(3700):
        rows = row(calm, tp_degree=float(limits.tp_degrees[tp]), kv_usage=0.01)
        applied, _ = guard.apply(np.array([[0, 0, 1 - tp]]), rows)
        moved += int(applied[0, 2] != tp)
        tp = int(applied[0, 2])
        if _ == 3590:
            assert moved == QUICK.tp_switches_per_hour
    assert moved > QUICK.tp_switches_per_hour  # the hour is over


@given(st.integers(0, 2**32 - 1))
def test_rows_do_not_depend_on_each_other(limits: Limits, calm: Window, seed: int) -> None:
    rng = np.random.default_rng(seed)
    together = Guard(GuardSettings(), limits, 2, watch=QUICK)
    alone = [Guard(GuardSettings(), limits, 1, watch=QUICK) for _ in range(2)]
    for _ in range(60):
        rows = np.repeat(calm.to_row()[None, :], 2, axis=0)
        names = ("output_tokens", "prefill_tokens", "served", "misses", "blind", "switching")
        for name in names:
            rows[:, WINDOW_FIELDS.index(name)] = rng.integers(0, 2, 2) * (10.0 if name == "misses" else 1.0)
        rows[:, WINDOW_FIELDS.index("sm_clock_mhz")] = rng.choice(limits.sm_clocks_mhz, 2)
        asked = rng.integers(0, together.table.nvec, (2, 3))
        applied, reasons = together.apply(asked, rows)
        for i, each in enumerate(alone):
            one, why = each.apply(asked[i : i + 1], rows[i : i + 1])
            assert one[0].tolist() == applied[i].tolist()
            assert why[0] == reasons[i]


def test_in_healthy_serving_a_watch_changes_nothing() -> None:
    profile = load_profile("h100-qwen3-8b")
    limits, tables = profile.limits(), build_tables(profile)
    policy = by_name("ecofreq", PolicyContext(limits, tables))
    spec = replace(SPECS["conversation"], duration_s=300.0)
    trace = synthesize(spec, np.random.default_rng(2))
    decided = []
    for watch in (None, WatchSettings()):
        batch = SimulationBatch(limits, 1, tables, capacity=len(trace))
        batch.load(0, trace, tables, limits.service_level, (0, 0, 0))
        guard = Guard(GuardSettings(), limits, 1, watch=watch)
        policy.start(limits, 1)
        index = np.zeros((1, 3), dtype=np.int64)
        told = []
        for _ in range(290):
            rows = batch.advance(index)
            asked = policy.decide(np.zeros((1, len(FEATURES)), dtype=np.float32), rows, guard.mask(rows))
            index, reasons = guard.apply(asked, rows)
            told.append((index.tolist(), int(reasons[0])))
        decided.append(told)
    assert decided[0] == decided[1]


def test_a_guard_that_follows_itself_goes_on_from_its_own_decision(limits: Limits, calm: Window) -> None:
    rows = row(calm)  # the deployment stays at the fastest, whatever is decided
    following = Guard(GuardSettings(max_down_steps=2, cap_dwell_s=0.0), limits, 1, follow=True)
    plain = Guard(GuardSettings(max_down_steps=2, cap_dwell_s=0.0), limits, 1)
    decided = [following.apply(SLOW, rows)[0][0].tolist() for _ in range(4)]
    assert [clock for clock, _, _ in decided] == [2, 4, 5, 5]
    assert [plain.apply(SLOW, rows)[0][0, 0] for _ in range(4)] == [2, 2, 2, 2]


def test_a_guard_that_knows_nothing_yet_leaves_tp_as_a_blind_row_tells_it(
    limits: Limits, calm: Window
) -> None:
    guard = Guard(GuardSettings(), limits, 1)
    applied, _ = guard.apply(np.array([[0, 0, 0]]), row(calm, tp_degree=2.0, blind=1.0))
    assert limits.tp_degrees[applied[0, 2]] == 2


@pytest.mark.parametrize("bad", [{"stall_s": 0.0}, {"trip_overrides": 0}, {"backoff_s": float("inf")}])
def test_settings_that_make_no_sense_are_refused(bad: dict[str, float]) -> None:
    with pytest.raises(ConfigError):
        WatchSettings(**bad)  # type: ignore[arg-type]  # names and values of the fields
