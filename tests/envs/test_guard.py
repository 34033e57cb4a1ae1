from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray

from rlgov.envs.action import CAP, CLOCK, TP
from rlgov.envs.guard import Guard, GuardSettings, NullGuard, Reason
from rlgov.errors import ConfigError
from rlgov.records import WINDOW_FIELDS, Column, Limits, Window

ANY_ROWS = hnp.arrays(
    np.float64, st.tuples(st.just(2), st.just(len(WINDOW_FIELDS))), elements=st.floats(width=64)
)
ANY_ASKED = hnp.arrays(np.int64, (2, 3))
SEEDS = st.integers(0, 2**32 - 1)
SWITCH_WINDOWS = 3


def rows_at(
    window: Window, limits: Limits, index: tuple[int, int, int], **changes: Any
) -> NDArray[np.float64]:
    c = limits.configuration(index)
    placed = replace(
        window,
        sm_clock_mhz=float(c.sm_clock_mhz),
        batch_cap=float(c.batch_cap),
        tp_degree=float(c.tp_degree),
        **changes,
    )
    return placed.to_row()[None, :]


def asked(*index: int) -> NDArray[np.int64]:
    return np.array([index], dtype=np.int64)


class Plant:
    """Follows what is applied, with TP switches that take a few windows, as a deployment does."""

    def __init__(self, limits: Limits, n: int, window: Window) -> None:
        self.limits = limits
        self.rows = np.repeat(window.to_row()[None, :], n, axis=0)
        self.left = np.zeros(n, dtype=np.int64)
        self.target = np.zeros(n, dtype=np.int64)

    def follow(self, applied: NDArray[np.int64], rng: np.random.Generator) -> None:
        """One window under random load: mostly healthy, now and then blind, burning or idle."""
        for i, (clock, cap, tp) in enumerate(applied.tolist()):
            row = self.rows[i]
            wanted = self.limits.tp_degrees[tp]
            if self.left[i]:
                self.left[i] -= 1
                if not self.left[i]:
                    row[Column.TP_DEGREE] = self.target[i]
            elif wanted != row[Column.TP_DEGREE]:
                self.left[i], self.target[i] = SWITCH_WINDOWS, wanted
            row[Column.SWITCHING] = self.left[i] > 0
            row[Column.SM_CLOCK_MHZ] = self.limits.sm_clocks_mhz[clock]
            row[Column.BATCH_CAP] = self.limits.batch_caps[cap]
            row[Column.START_S] += 1.0
            load, event = rng.random(2)
            row[Column.KV_USAGE] = load / 2
            row[Column.ARRIVALS] = row[Column.RUNNING] = 0.0 if event < 0.1 else np.floor(10 * load)
            row[Column.OLDEST_WAIT_S] = load * 0.9
            row[Column.MISSES] = 4.0 if event > 0.95 else 0.0
            row[Column.BLIND] = 0.1 < event < 0.15


@given(ANY_ROWS, ANY_ASKED, ANY_ROWS)
def test_whatever_comes_in_indices_in_range_come_out(
    limits: Limits, rows: NDArray[np.float64], wanted: NDArray[np.int64], later: NDArray[np.float64]
) -> None:
    guard = Guard(GuardSettings(), limits, 2)
    for seen in (rows, later):
        mask = guard.mask(seen)
        applied, reasons = guard.apply(wanted, seen)
        assert ((applied >= 0) & (applied < guard.table.nvec)).all()
        assert all(Reason(int(r)) for r in reasons if r)
        for axis in range(3):
            part = mask[:, guard.table.offsets[axis] : guard.table.offsets[axis + 1]]
            assert part.any(axis=1).all()
            assert part[:, 0].all() or axis == TP


@given(SEEDS)
def test_a_random_run_keeps_every_promise(limits: Limits, calm: Window, seed: int) -> None:
    settings = GuardSettings(tp_dwell_s=15.0, cap_dwell_s=4.0, max_down_steps=2, hold_s=2.0)
    rng = np.random.default_rng(seed)
    n, windows = 2, 80
    guard, plant = Guard(settings, limits, n), Plant(limits, n, calm)
    switches: list[list[int]] = [[] for _ in range(n)]
    reductions: list[list[int]] = [[] for _ in range(n)]
    previous = np.zeros((n, 3), dtype=np.int64)
    for t in range(windows):
        wanted = rng.integers(0, guard.table.nvec, (n, 3))
        applied, reasons = guard.apply(wanted, plant.rows)
        overridden = np.isin(reasons, (Reason.SLO_OVERRIDE, Reason.BLIND))
        assert (applied[overridden, :TP] == 0).all()
        assert (applied[overridden, TP] <= previous[overridden, TP]).all()
        assert (applied[:, :TP] <= np.maximum(wanted, previous + 2)[:, :TP]).all()
        assert (applied[:, CLOCK] - previous[:, CLOCK] <= settings.max_down_steps).all()
        for i in range(n):
            if applied[i, TP] != previous[i, TP]:
                switches[i].append(t)
            if applied[i, CAP] != previous[i, CAP]:
                reductions[i].append(t if applied[i, CAP] > previous[i, CAP] else -t)
            if reasons[i] in {Reason.POLICY, Reason.IDLE}:
                assert np.array_equal(applied[i], wanted[i])
        plant.follow(applied, rng)
        previous = applied
    for times in switches:
        assert all(b - a >= settings.tp_dwell_s for a, b in pairwise(times))
        assert len(times) <= windows / settings.tp_dwell_s + 1
    for changes in reductions:
        for before, after in pairwise(changes):
            assert after < 0 or after - abs(before) >= settings.cap_dwell_s


@given(SEEDS)
def test_a_row_alone_decides_as_among_others_and_twice_alike(limits: Limits, calm: Window, seed: int) -> None:
    settings = GuardSettings(tp_dwell_s=10.0)
    rng = np.random.default_rng(seed)
    many, again, alone = (Guard(settings, limits, n) for n in (4, 4, 1))
    plant = Plant(limits, 4, calm)
    for _ in range(40):
        wanted = rng.integers(0, many.table.nvec, (4, 3))
        mask = many.mask(plant.rows)  # asking for the mask changes no decision: the others never ask
        applied, reasons = many.apply(wanted, plant.rows)
        repeated, _ = again.apply(wanted, plant.rows)
        single, reason = alone.apply(wanted[2:3], plant.rows[2:3])
        assert np.array_equal(applied, repeated)
        assert np.array_equal(applied[2], single[0])
        assert reasons[2] == reason[0]
        assert mask.shape == (4, many.table.size)
        plant.follow(applied, rng)


@given(SEEDS)
def test_what_the_mask_allows_passes_unaltered(limits: Limits, calm: Window, seed: int) -> None:
    rng = np.random.default_rng(seed)
    guard, plant = Guard(GuardSettings(tp_dwell_s=10.0), limits, 1), Plant(limits, 1, calm)
    for _ in range(60):
        mask = guard.mask(plant.rows)[0]
        parts = np.split(mask, guard.table.offsets[1:3])
        wanted = asked(*(int(rng.choice(np.flatnonzero(part))) for part in parts))
        applied, _ = guard.apply(wanted, plant.rows)
        assert np.array_equal(applied, wanted)
        plant.follow(applied, rng)


def test_the_clock_falls_in_steps_and_rises_at_once(limits: Limits, calm: Window) -> None:
    guard = Guard(GuardSettings(max_down_steps=2), limits, 1)
    applied, reasons = guard.apply(asked(5, 0, 0), rows_at(calm, limits, (0, 0, 0)))
    assert (applied[0, CLOCK], reasons[0]) == (2, Reason.RATE_LIMIT)
    applied, reasons = guard.apply(asked(0, 0, 0), rows_at(calm, limits, (5, 0, 0)))
    assert (applied[0, CLOCK], reasons[0]) == (0, Reason.POLICY)


def test_the_cap_may_grow_at_once_but_shrinks_only_after_its_dwell_time(limits: Limits, calm: Window) -> None:
    guard = Guard(GuardSettings(cap_dwell_s=3.0), limits, 1)
    guard.apply(asked(0, 1, 0), rows_at(calm, limits, (0, 0, 0)))
    held, reasons = guard.apply(asked(0, 3, 0), rows_at(calm, limits, (0, 1, 0)))
    assert (held[0, CAP], reasons[0]) == (1, Reason.DWELL)
    grown, _ = guard.apply(asked(0, 0, 0), rows_at(calm, limits, (0, 1, 0)))
    assert grown[0, CAP] == 0
    for expected in (0, 0, 3):
        applied, _ = guard.apply(asked(0, 3, 0), rows_at(calm, limits, (0, 0, 0)))
        assert applied[0, CAP] == expected


def test_tp_holds_during_a_switch_and_for_its_dwell_time_after(limits: Limits, calm: Window) -> None:
    guard = Guard(GuardSettings(tp_dwell_s=4.0), limits, 1)
    applied, _ = guard.apply(asked(0, 0, 1), rows_at(calm, limits, (0, 0, 0)))
    assert applied[0, TP] == 1
    during = rows_at(calm, limits, (0, 0, 0), switching=1.0)
    applied, reasons = guard.apply(asked(0, 0, 2), during)
    assert (applied[0, TP], reasons[0]) == (1, Reason.SWITCHING)
    assert guard.mask(during)[0, -3:].tolist() == [False, True, False]
    after = rows_at(calm, limits, (0, 0, 1))
    for expected in (Reason.DWELL, Reason.DWELL, Reason.DWELL, Reason.POLICY):
        applied, reasons = guard.apply(asked(0, 0, 2), after)
        assert reasons[0] == expected
    assert applied[0, TP] == 2


def test_a_tp_degree_too_small_for_the_load_is_refused(limits: Limits, calm: Window) -> None:
    guard = Guard(GuardSettings(), limits, 1)
    rows = rows_at(calm, limits, (0, 0, 0), kv_usage=0.4)  # 160 000 of 400 000 tokens
    assert guard.mask(rows)[0, -3:].tolist() == [True, True, False]
    applied, reasons = guard.apply(asked(0, 0, 2), rows)
    assert (applied[0, TP], reasons[0]) == (0, Reason.MASKED)


DEFAULTS = GuardSettings()


@pytest.mark.parametrize(
    ("signal", "threshold"),
    [
        ("oldest_wait_s", DEFAULTS.override_wait_fraction),  # the fixture's TTFT limit is 1 s
        ("overdue", DEFAULTS.override_overdue),
        ("misses", DEFAULTS.override_misses),
    ],
)
def test_a_burning_slo_overrides_upwards_and_holds(
    limits: Limits, calm: Window, signal: str, threshold: float
) -> None:
    guard = Guard(GuardSettings(hold_s=2.0, burn_misses=np.inf), limits, 1)
    slow = (3, 2, 1)
    nearly = rows_at(calm, limits, slow, **{signal: 0.99 * threshold})
    assert guard.apply(asked(*slow), nearly)[1][0] == Reason.POLICY
    bad = rows_at(calm, limits, slow, **{signal: threshold})
    assert guard.mask(bad)[0].nonzero()[0].tolist()[:2] == [0, 6]
    applied, reasons = guard.apply(asked(*slow), bad)
    assert applied[0].tolist() == [0, 0, 1]  # TP stays as asked
    assert reasons[0] == Reason.SLO_OVERRIDE
    for expected in (Reason.SLO_OVERRIDE, Reason.SLO_OVERRIDE, Reason.POLICY):
        _, reasons = guard.apply(asked(0, 0, 1), rows_at(calm, limits, (0, 0, 1)))
        assert reasons[0] == expected


def test_a_burning_slo_refuses_a_smaller_tp_degree_and_allows_a_larger(limits: Limits, calm: Window) -> None:
    bad = rows_at(calm, limits, (0, 0, 1), misses=9.0)
    guard = Guard(GuardSettings(), limits, 1)
    assert guard.mask(bad)[0, -3:].tolist() == [True, True, False]
    assert guard.apply(asked(0, 0, 2), bad)[0][0, TP] == 1
    assert Guard(GuardSettings(), limits, 1).apply(asked(0, 0, 0), bad)[0][0, TP] == 0


def test_slow_burning_triggers_by_its_share_of_arrivals(limits: Limits, calm: Window) -> None:
    guard = Guard(GuardSettings(override_misses=np.inf), limits, 1)
    reasons = []
    for _ in range(10):
        rows = rows_at(calm, limits, (2, 0, 0), arrivals=4.0, misses=1.0)
        _, reason = guard.apply(asked(2, 0, 0), rows)
        reasons.append(Reason(int(reason[0])))
    assert reasons[0] == Reason.POLICY
    assert reasons[-1] == Reason.SLO_OVERRIDE


def test_a_healthy_window_is_left_to_the_policy(limits: Limits, calm: Window) -> None:
    guard = Guard(GuardSettings(), limits, 1)
    for _ in range(50):
        rows = rows_at(calm, limits, (2, 1, 0), oldest_wait_s=0.5 * DEFAULTS.override_wait_fraction)
        applied, reasons = guard.apply(asked(3, 1, 0), rows)
        assert (applied[0].tolist(), reasons[0]) == ([3, 1, 0], Reason.POLICY)


def test_idle_is_the_policys_and_blind_is_not(limits: Limits, calm: Window) -> None:
    idle = {"arrivals": 0.0, "running": 0.0, "waiting": 0.0}
    applied, reasons = Guard(GuardSettings(), limits, 1).apply(
        asked(4, 1, 1), rows_at(calm, limits, (4, 1, 1), **idle)
    )
    assert (applied[0].tolist(), reasons[0]) == ([4, 1, 1], Reason.IDLE)
    guard = Guard(GuardSettings(), limits, 1)
    guard.apply(asked(3, 1, 1), rows_at(calm, limits, (3, 1, 1)))
    applied, reasons = guard.apply(asked(4, 1, 2), rows_at(calm, limits, (4, 1, 0), blind=1.0, **idle))
    assert (applied[0].tolist(), reasons[0]) == ([0, 0, 1], Reason.BLIND)  # TP as applied last


@given(st.integers(0, 7), st.integers(0, 2), st.integers(0, 2))
def test_a_refused_tp_degree_is_masked_unless_it_is_in_force(
    limits: Limits, calm: Window, bits: int, in_force: int, wanted: int
) -> None:
    rows = rows_at(calm, limits, (0, 0, in_force), tp_refused=float(bits))
    guard = Guard(GuardSettings(), limits, 1)
    allowed = [not bits >> tp & 1 or tp == in_force for tp in range(3)]
    assert guard.mask(rows)[0, guard.table.offsets[TP] :].tolist() == allowed
    applied, reasons = guard.apply(asked(0, 0, wanted), rows)
    assert applied[0, TP] == (wanted if allowed[wanted] else in_force)
    assert reasons[0] == (Reason.POLICY if allowed[wanted] else Reason.MASKED)


@pytest.mark.parametrize("value", [np.nan, np.inf, -1.0])
@pytest.mark.parametrize("name", ["waiting", "oldest_wait_s", "kv_usage", "sm_clock_mhz", "energy_j"])
def test_an_unusable_number_counts_as_blind(limits: Limits, calm: Window, name: str, value: float) -> None:
    rows = rows_at(calm, limits, (3, 1, 0))
    rows[0, Column[name.upper()]] = value
    applied, reasons = Guard(GuardSettings(), limits, 1).apply(asked(3, 1, 0), rows)
    assert (applied[0].tolist(), reasons[0]) == ([0, 0, 0], Reason.BLIND)


def test_nothing_to_measure_is_not_blind(limits: Limits, calm: Window) -> None:
    rows = rows_at(calm, limits, (1, 0, 0), ttft_p50_s=None, ttft_p99_s=None, itl_mean_s=None)
    _, reasons = Guard(GuardSettings(), limits, 1).apply(asked(1, 0, 0), rows)
    assert reasons[0] == Reason.POLICY


def test_an_index_out_of_range_means_fastest_but_never_a_switch(limits: Limits, calm: Window) -> None:
    guard = Guard(GuardSettings(), limits, 1)
    applied, reasons = guard.apply(asked(99, -1, 7), rows_at(calm, limits, (2, 2, 1)))
    assert (applied[0].tolist(), reasons[0]) == ([0, 0, 1], Reason.MASKED)


def test_the_slo_of_an_episode_moves_the_wait_limit(limits: Limits, calm: Window) -> None:
    guard = Guard(GuardSettings(), limits, 1)
    wait_s = 0.7 * DEFAULTS.override_wait_fraction  # between that share of 0.6 s and of 1 s
    rows = rows_at(calm, limits, (2, 0, 0), oldest_wait_s=wait_s)
    assert guard.apply(asked(2, 0, 0), rows)[1][0] == Reason.POLICY
    guard.reset(np.array([True]), np.array([[0.6, 0.045]]))
    assert guard.apply(asked(2, 0, 0), rows)[1][0] == Reason.SLO_OVERRIDE


def test_reset_forgets_dwell_times_and_holds_of_the_rows_named(limits: Limits, calm: Window) -> None:
    guard = Guard(GuardSettings(), limits, 2)
    both = np.repeat(rows_at(calm, limits, (0, 0, 0), misses=9.0), 2, axis=0)
    guard.apply(np.array([[0, 0, 1], [0, 0, 1]]), both)
    guard.reset(np.array([True, False]))
    rows = np.repeat(rows_at(calm, limits, (0, 0, 1)), 2, axis=0)
    applied, reasons = guard.apply(np.array([[1, 1, 2], [1, 1, 2]]), rows)
    assert applied.tolist() == [[1, 1, 2], [0, 0, 1]]
    assert reasons.tolist() == [Reason.POLICY, Reason.SLO_OVERRIDE]


def test_the_null_guard_lets_everything_through_that_is_an_index(limits: Limits, calm: Window) -> None:
    guard = NullGuard(limits, 1)
    rows = rows_at(calm, limits, (0, 0, 0), misses=99.0, switching=1.0)
    assert guard.mask(rows).all()
    applied, reasons = guard.apply(asked(5, 3, 2), rows)
    assert (applied[0].tolist(), reasons[0]) == ([5, 3, 2], Reason.POLICY)
    applied, reasons = guard.apply(asked(5, 9, 2), rows)
    assert (applied[0].tolist(), reasons[0]) == ([5, 0, 2], Reason.MASKED)


@pytest.mark.parametrize(
    "bad", [{"tp_dwell_s": -1.0}, {"hold_s": float("nan")}, {"max_down_steps": 0}, {"burn_window_s": 0.0}]
)
def test_settings_that_cannot_be_are_refused(bad: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(bad))):
        GuardSettings(**bad)
