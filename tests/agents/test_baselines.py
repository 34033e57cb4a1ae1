"""The rules do what their authors say, for one deployment and for many."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from rlgov.agents.baselines import FAMILIES, NAMES, PolicyContext, by_name
from rlgov.agents.baselines.ecofreq import EcoFreqPolicy, EcoFreqSettings
from rlgov.agents.baselines.kv_threshold import KvThresholdPolicy
from rlgov.agents.baselines.load_lookup import LoadLookupPolicy, LoadTable, table_from_statics
from rlgov.agents.baselines.random_policy import RandomPolicy
from rlgov.agents.baselines.two_level import TwoLevelPolicy, TwoLevelSettings
from rlgov.agents.policy import Policy
from rlgov.errors import ConfigError, DeploymentError
from rlgov.records import WINDOW_FIELDS, Configuration, Window
from rlgov.simulation.physics import build_tables, iteration_time_s
from rlgov.simulation.profile import load_profile

PROFILE = load_profile("h100-qwen3-32b")
LIMITS = PROFILE.limits()
TABLES = build_tables(PROFILE)
CLOCKS = LIMITS.sm_clocks_mhz
LOWEST = len(CLOCKS) - 1
CALM = Window(
    start_s=0.0, duration_s=1.0, arrivals=2.0, prompt_tokens=1000.0, output_tokens=300.0,
    prefill_tokens=1000.0, served=2.0, misses=0.0, overdue=0.0, preemptions=0.0, running=8.0,
    waiting=0.0, waiting_tokens=0.0, oldest_wait_s=0.0, running_mean=8.0, busy_fraction=0.9,
    kv_usage=0.02, ttft_p50_s=0.1, ttft_p99_s=0.2, tpot_p50_s=0.02, tpot_p99_s=0.03, itl_mean_s=0.02,
    energy_j=900.0, measured_clock_mhz=1980.0, throttled_fraction=0.0, sm_clock_mhz=1980.0,
    batch_cap=256.0, tp_degree=4.0, switching=0.0, age_s=0.0,
)  # fmt: skip
IDLE = replace(
    CALM, arrivals=0.0, prompt_tokens=0.0, output_tokens=0.0, prefill_tokens=0.0, served=0.0, running=0.0,
    running_mean=0.0, busy_fraction=0.0, kv_usage=0.0, ttft_p50_s=None, ttft_p99_s=None, tpot_p50_s=None,
    tpot_p99_s=None, itl_mean_s=None,
)  # fmt: skip
BLIND = replace(IDLE, blind=1.0)


def decide(policy: Policy, *windows: Window) -> NDArray[np.int64]:
    """What the policy asks for, one row a window, as decided side by side."""
    rows = np.stack([window.to_row() for window in windows])
    mask = np.ones((len(windows), sum(LIMITS.axis_sizes)), np.bool_)
    return policy.decide(np.zeros((len(windows), 1), np.float32), rows, mask)


def clocks_over_time(policy: Policy, windows: list[Window]) -> list[int]:
    policy.start(LIMITS, 1)
    return [int(decide(policy, window)[0, 0]) for window in windows]


def two_level(**changes: float) -> TwoLevelPolicy:
    chosen = TwoLevelSettings(low_clock_mhz=CLOCKS[4], high_clock_mhz=CLOCKS[0], load_weight=1.0, hold_s=3.0)
    return TwoLevelPolicy(replace(chosen, **changes))  # type: ignore[arg-type]  # float fields only


def test_fastest_is_index_zero() -> None:
    policy = by_name("fastest", PolicyContext(LIMITS))
    policy.start(LIMITS, 2)
    assert not decide(policy, CALM, BLIND).any()


def test_random_repeats_after_a_start_and_obeys_the_mask() -> None:
    policy = RandomPolicy(3)
    mask = np.zeros((500, sum(LIMITS.axis_sizes)), np.bool_)
    sizes = LIMITS.axis_sizes
    allowed = [2, 5, sizes[0] + 1, sizes[0] + sizes[1]]
    mask[:, allowed] = True
    rows = np.tile(CALM.to_row(), (500, 1))
    seen = []
    for _ in range(2):
        policy.start(LIMITS, 500)
        seen.append(policy.decide(np.zeros((500, 1), np.float32), rows, mask))
    assert (seen[0] == seen[1]).all()
    assert set(seen[0][:, 0].tolist()) == {2, 5}
    assert set(seen[0][:, 1].tolist()) == {1}
    assert set(seen[0][:, 2].tolist()) == {0}
    mask[:] = False  # nothing allowed: the fastest
    assert not policy.decide(np.zeros((500, 1), np.float32), rows, mask).any()


def test_kv_bands_pick_their_clock() -> None:
    policy = KvThresholdPolicy((0.3, 0.7), (CLOCKS[5], CLOCKS[2], CLOCKS[0]), batch_cap=64, tp_degree=2)
    policy.start(LIMITS, 6)
    uses = (0.0, 0.299, 0.3, 0.699, 0.7, 1.0)
    asked = decide(policy, *(replace(CALM, kv_usage=use) for use in uses))
    assert asked[:, 0].tolist() == [5, 5, 2, 2, 0, 0]
    assert set(asked[:, 1].tolist()) == {LIMITS.batch_caps.index(64)}
    assert set(asked[:, 2].tolist()) == {LIMITS.tp_degrees.index(2)}
    assert policy.start_configuration(LIMITS) == Configuration(CLOCKS[0], 64, 2)


def test_kv_rule_refuses_a_clock_too_few() -> None:
    with pytest.raises(ConfigError, match="need 3 clocks"):
        KvThresholdPolicy((0.3, 0.7), (CLOCKS[1], CLOCKS[0]))


def test_a_rule_refuses_a_cap_that_is_not_offered_and_a_decision_before_start() -> None:
    with pytest.raises(ConfigError, match="not offered"):
        KvThresholdPolicy((), (CLOCKS[0],), batch_cap=7).start(LIMITS, 1)
    with pytest.raises(DeploymentError, match="start"):
        decide(KvThresholdPolicy((), (CLOCKS[0],)), CALM)


def test_two_level_comes_down_after_its_hold_and_goes_up_at_once() -> None:
    pressed = replace(CALM, oldest_wait_s=0.5)
    assert clocks_over_time(two_level(), [CALM] * 4 + [pressed] + [CALM] * 4) == [0, 0, 4, 4, 0, 0, 0, 4, 4]


@pytest.mark.parametrize(
    "change",
    [{"oldest_wait_s": 0.31}, {"waiting_tokens": 9000.0}, {"itl_mean_s": 0.07}, {"prompt_tokens": 21000.0}],
)
def test_each_signal_alone_raises_two_level(change: dict[str, float]) -> None:
    pressed = replace(CALM, **change)
    assert clocks_over_time(two_level(), [CALM] * 4 + [pressed])[-2:] == [4, 0]


def test_two_level_stays_high_between_release_and_threshold() -> None:
    between = replace(CALM, oldest_wait_s=0.25)  # of 0.3: above the release of 0.7, below the threshold
    assert clocks_over_time(two_level(), [between] * 10) == [0] * 10
    assert clocks_over_time(two_level(), [CALM] * 4 + [between] * 3) == [0, 0, 4, 4, 4, 4, 4]


def test_idle_rule_waits_and_wakes() -> None:
    policy = two_level(idle_after_s=5.0)
    asked = clocks_over_time(policy, [CALM] * 3 + [IDLE] * 6 + [CALM])
    assert asked == [0, 0, 4, 4, 4, 4, 4, LOWEST, LOWEST, 4]


@pytest.mark.parametrize("name", [name for name in NAMES if name not in ("best-static", "random")])
def test_a_blind_window_gets_the_fastest_clock_and_leaves_no_trace(name: str) -> None:
    context = PolicyContext(LIMITS, TABLES)
    seen, blinded = by_name(name, context), by_name(name, context)
    clear = clocks_over_time(seen, [CALM] * 40 + [IDLE] * 3)
    between = clocks_over_time(blinded, [CALM] * 40 + [BLIND] + [IDLE] * 3)
    assert between[40] == 0
    assert between[:40] + between[41:] == clear


def test_ecofreq_takes_the_lowest_clock_predicted_to_meet_the_limits() -> None:
    policy = EcoFreqPolicy(EcoFreqSettings(), TABLES)
    policy.start(LIMITS, 1)
    (clock,) = decide(policy, CALM)[:, 0].tolist()
    row = CALM.to_row()[None]
    itl_s, ttft_s = policy.predict(row, np.array([1000.0]), np.array([1000.0]))
    level = LIMITS.service_level
    meets = (itl_s[0] <= level.tpot_s) & (ttft_s[0] <= level.ttft_s)
    assert clock == np.flatnonzero(meets).max()
    assert (np.diff(itl_s[0]) >= 0).all()  # a lower clock is never predicted to be faster
    assert (np.diff(ttft_s[0]) >= 0).all()


def test_ecofreq_predicts_by_the_simulator_s_physics() -> None:
    policy = EcoFreqPolicy(EcoFreqSettings(), TABLES)
    policy.start(LIMITS, 1)
    itl_s, _ = policy.predict(CALM.to_row()[None], np.array([0.0]), np.array([0.0]))
    context_tokens = 0.02 * LIMITS.kv_capacity_tokens[0]
    for at, clock_mhz in enumerate(CLOCKS):
        k = int(np.searchsorted(TABLES.grid_clocks_mhz, clock_mhz))
        expected_s = iteration_time_s(TABLES, 0, k, 8, context_tokens, 0, 0)
        assert itl_s[0, at] == pytest.approx(expected_s, rel=1e-12)


def test_ecofreq_rules_in_their_order() -> None:
    policy = EcoFreqPolicy(EcoFreqSettings(), TABLES)
    assert clocks_over_time(policy, [replace(CALM, waiting=1.0)]) == [0]
    assert clocks_over_time(policy, [replace(CALM, oldest_wait_s=2.0)]) == [0]  # no clock meets the limit
    assert clocks_over_time(policy, [IDLE] * 5)[-1] == LOWEST
    tight = LIMITS.with_service_level(LIMITS.service_level.scaled(1e-3))
    policy.start(tight, 1)
    assert decide(policy, CALM)[0, 0] == 0


def test_ecofreq_margin_and_floor_move_the_clock_the_right_way() -> None:
    busy = replace(CALM, running_mean=128.0, running=128.0, kv_usage=0.3)
    reserve, plain, bold = (
        clocks_over_time(EcoFreqPolicy(EcoFreqSettings(margin=margin), TABLES), [busy])[0]
        for margin in (-0.7, 0.0, 0.35)
    )
    assert reserve <= plain <= bold
    assert reserve < bold
    floored = EcoFreqPolicy(EcoFreqSettings(min_clock_mhz=CLOCKS[1]), TABLES)
    assert clocks_over_time(floored, [CALM]) == [1]


def test_ecofreq_refuses_tables_of_another_profile() -> None:
    other = load_profile("h100-qwen3-8b")
    with pytest.raises(ConfigError, match="use one profile"):
        EcoFreqPolicy(EcoFreqSettings(), build_tables(other)).start(LIMITS, 1)


def test_load_lookup_rises_at_once_and_falls_after_its_hold() -> None:
    low, high = Configuration(CLOCKS[5], 128, 2), Configuration(CLOCKS[1], 256, 4)
    policy = LoadLookupPolicy(LoadTable((3000.0,), (low, high)), weight=1.0, hold_s=3.0)
    burst = replace(CALM, prompt_tokens=5000.0)
    assert clocks_over_time(policy, [CALM] * 4 + [burst] + [CALM] * 4) == [1, 1, 5, 5, 1, 1, 1, 5, 5]
    assert policy.start_configuration(LIMITS) == high


def test_load_table_from_statics_puts_edges_between_the_loads() -> None:
    cheap, dear = Configuration(CLOCKS[5], 128, 2), Configuration(CLOCKS[1], 256, 4)
    table = table_from_statics({8000.0: dear, 2000.0: cheap})
    assert table == LoadTable((4000.0,), (cheap, dear))
    with pytest.raises(ConfigError, match="at least one"):
        table_from_statics({})


@st.composite
def windows(draw: st.DrawFn) -> Window:
    """Any window whose numbers are possible."""
    count = st.floats(0, 5000)
    return replace(
        CALM,
        arrivals=draw(count),
        prompt_tokens=draw(st.floats(0, 1e6)),
        prefill_tokens=draw(st.floats(0, 1e6)),
        output_tokens=draw(count),
        running=draw(count),
        running_mean=draw(count),
        waiting=draw(st.sampled_from([0.0, 1.0, 50.0])),
        waiting_tokens=draw(st.floats(0, 1e6)),
        oldest_wait_s=draw(st.floats(0, 60)),
        kv_usage=draw(st.floats(0, 1)),
        itl_mean_s=draw(st.none() | st.floats(0, 1)),
        tp_degree=float(draw(st.sampled_from(LIMITS.tp_degrees))),
        blind=draw(st.sampled_from([0.0, 0.0, 0.0, 1.0])),
    )


@settings(max_examples=40, deadline=None)
@given(data=st.data(), name=st.sampled_from([name for name in FAMILIES if name != "static"]))
def test_many_decided_together_equal_each_decided_alone(data: st.DataObject, name: str) -> None:
    steps = data.draw(st.lists(st.lists(windows(), min_size=3, max_size=3), min_size=1, max_size=6))
    space = FAMILIES[name].space(LIMITS)
    units = data.draw(st.lists(st.floats(0, 1), min_size=len(space), max_size=len(space)))
    parameters = {dimension.name: dimension.value(unit) for dimension, unit in zip(space, units, strict=True)}
    context = PolicyContext(LIMITS, TABLES)
    together = FAMILIES[name].build(parameters, context)
    together.start(LIMITS, 3)
    alone = [FAMILIES[name].build(parameters, context) for _ in range(3)]
    for policy in alone:
        policy.start(LIMITS, 1)
    for step in steps:
        asked = decide(together, *step)
        assert ((asked >= 0) & (asked < LIMITS.axis_sizes)).all()
        single = [decide(policy, window)[0] for policy, window in zip(alone, step, strict=True)]
        assert (asked == np.stack(single)).all()


def test_garbage_rows_never_leave_the_table_or_warn() -> None:
    rows = np.full((2, len(WINDOW_FIELDS)), np.nan)
    mask = np.ones((2, sum(LIMITS.axis_sizes)), np.bool_)
    for name in NAMES:
        policy = by_name(name, PolicyContext(LIMITS, TABLES, LIMITS.fastest))
        policy.start(LIMITS, 2)
        asked = policy.decide(np.zeros((2, 1), np.float32), rows, mask)
        assert ((asked >= 0) & (asked < LIMITS.axis_sizes)).all()
