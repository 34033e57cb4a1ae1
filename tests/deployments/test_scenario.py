"""Where episodes come from: the measure of load, and what is drawn from which span."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from rlgov.deployments.scenario import (
    CAPACITY_ATTAINMENT,
    Capacity,
    EpisodeSampler,
    FixedScenario,
    SyntheticSource,
    TraceSource,
    attainment_at_full_clock,
    capacity_scale,
    measure_capacity,
    synthetic_capacity,
)
from rlgov.errors import ConfigError
from rlgov.records import ServiceLevel
from rlgov.simulation.physics import build_tables
from rlgov.simulation.profile import Profile, load_profile
from rlgov.workload.synthesis import SPECS, synthesize
from rlgov.workload.trace import Trace

PROFILE = load_profile("h100-qwen3-32b")
SMALL = load_profile("h100-qwen3-8b")
CAPACITY = Capacity(2.0, (1.0, 0.4, 0.1))


def conversation(rate_per_s: float, duration_s: float, seed: int = 0) -> Trace:
    spec = replace(SPECS["conversation"], rate_per_s=rate_per_s, duration_s=duration_s)
    return synthesize(spec, np.random.default_rng(seed))


def numbered(count: int = 500, gap_s: float = 0.4) -> Trace:
    """Evenly spaced requests whose prompt length is their number."""
    number = np.arange(count, dtype=np.int64)
    return Trace(
        "numbered",
        gap_s * number.astype(np.float64),
        number + 1,
        np.full(count, 100, dtype=np.int64),
        np.zeros(count, dtype=np.int64),
        gap_s * count,
    )


# ---------------------------------------------------------------- the measure of load


@pytest.mark.parametrize("profile", [PROFILE, SMALL], ids=lambda profile: profile.name)
def test_capacity_is_the_last_rate_that_the_fastest_setting_holds(profile: Profile) -> None:
    limits, tables = profile.limits(), build_tables(profile)
    trace = conversation(5.0, 600.0)
    scale = capacity_scale(limits, tables, trace, limits.service_level)

    def attainment(times: float) -> float:
        return attainment_at_full_clock(limits, tables, trace.scaled(scale * times), limits.service_level)

    assert attainment(0.99) >= CAPACITY_ATTAINMENT
    assert attainment(1.1) < CAPACITY_ATTAINMENT
    assert attainment(3.0) < 0.9
    # time is all that a rate scale changes
    assert capacity_scale(limits, tables, trace.scaled(2.0), limits.service_level) == pytest.approx(
        scale / 2, rel=0.01
    )


def test_a_tighter_slo_and_fewer_gpus_carry_less() -> None:
    limits, tables = PROFILE.limits(), build_tables(PROFILE)
    trace = conversation(5.0, 300.0)
    loose, normal, tight = (
        measure_capacity(limits, tables, trace, limits.service_level.scaled(x)) for x in (2.0, 1.0, 0.6)
    )
    assert loose.full > normal.full > tight.full > 0
    for capacity in (loose, normal, tight):
        assert capacity.tp_shares[0] == 1.0
        assert 1.0 > capacity.tp_shares[1] > capacity.tp_shares[2] >= 0.0


def test_an_slo_that_cannot_be_held_at_any_rate_is_an_error() -> None:
    limits, tables = SMALL.limits(), build_tables(SMALL)
    with pytest.raises(ConfigError, match="loosen the SLO"):
        capacity_scale(limits, tables, conversation(2.0, 100.0), ServiceLevel(0.002, 0.001))


def test_episodes_start_where_the_load_can_be_carried() -> None:
    assert CAPACITY.starts(0.05) == [0, 1, 2]
    assert CAPACITY.starts(0.1) == [0, 1, 2]
    assert CAPACITY.starts(0.3) == [0, 1]
    assert CAPACITY.starts(0.9) == [0]
    assert CAPACITY.starts(1.5) == [0]


def test_the_capacity_of_a_synthetic_workload_is_a_rate_that_is_held() -> None:
    limits, tables = SMALL.limits(), build_tables(SMALL)
    level = limits.service_level
    day = synthetic_capacity(limits, tables, SPECS["day"], level)
    # the load curve does not enter: load 1 is the height of 1 of the curve
    assert day == synthetic_capacity(limits, tables, replace(SPECS["day"], low=0.3, high=0.5), level)
    assert day.tp_shares == (1.0,)

    def attainment(load: float) -> float:
        steady = replace(SPECS["day"], low=1.0, high=1.0, rate_per_s=load * day.full, duration_s=1800.0)
        trace = synthesize(steady, np.random.default_rng(5))
        return attainment_at_full_clock(limits, tables, trace, level)

    assert attainment(0.9) > CAPACITY_ATTAINMENT
    assert attainment(1.3) < CAPACITY_ATTAINMENT


# ---------------------------------------------------------------- sources


def _numbers(trace: Trace) -> NDArray[np.int64]:
    return trace.prompt_tokens - 1


@given(seed=st.integers(0, 10_000), load=st.floats(0.05, 1.2), duration_s=st.floats(5.0, 90.0))
@settings(max_examples=80, deadline=None, derandomize=True)
def test_a_trace_source_plays_neighbouring_requests_at_the_asked_load(
    seed: int, load: float, duration_s: float
) -> None:
    trace = numbered()
    source = TraceSource(trace, {1.0: CAPACITY})
    drawn, _ = source.draw(np.random.default_rng(seed), load, duration_s, 1.0)
    numbers = _numbers(drawn)
    # in the order of the ring, none twice
    assert len(set(numbers.tolist())) == len(numbers)
    if len(numbers) > 1:
        assert (np.diff(numbers) % len(trace) == 1).all()
    whole = duration_s * CAPACITY.full * load >= trace.duration_s
    assert drawn.duration_s == pytest.approx(
        trace.duration_s / (CAPACITY.full * load) if whole else duration_s, rel=1e-9
    )
    expected = trace.mean_rate_per_s * CAPACITY.full * load * drawn.duration_s
    assert abs(len(drawn) - expected) <= 2
    assert (np.diff(drawn.arrival_s) > 0).all()


def test_a_trace_source_reaches_every_part_of_its_span_and_nothing_else() -> None:
    train, test = numbered().split(0.7)
    source = TraceSource(train, {1.0: CAPACITY})
    rng = np.random.default_rng(3)
    seen: set[int] = set()
    for _ in range(80):
        seen |= set(_numbers(source.draw(rng, 0.5, 30.0, 1.0)[0]).tolist())
    assert seen == set(_numbers(train).tolist())
    assert not seen & set(_numbers(test).tolist())


def test_a_synthetic_source_makes_fresh_requests_at_the_asked_load() -> None:
    source = SyntheticSource(SPECS["conversation"], {1.0: replace(CAPACITY, full=8.0)})
    rng = np.random.default_rng(0)
    drawn = [source.draw(rng, load, 4000.0, 1.0)[0] for load in (0.2, 0.6)]
    for trace, load in zip(drawn, (0.2, 0.6), strict=True):
        assert trace.mean_rate_per_s == pytest.approx(8.0 * load, rel=0.15)
    again = source.draw(rng, 0.2, 4000.0, 1.0)[0]
    assert not np.array_equal(again.arrival_s[:50], drawn[0].arrival_s[:50])


def test_a_load_curve_keeps_its_own_heights() -> None:
    source = SyntheticSource(SPECS["day"], {1.0: replace(CAPACITY, full=8.0)})
    rng = np.random.default_rng(1)
    rates = [source.draw(rng, 0.05, 300.0, 1.0)[0].mean_rate_per_s / 8.0 for _ in range(40)]
    assert min(rates) < 0.35
    assert max(rates) > 0.5  # although a load of 0.05 was asked for
    assert max(rates) < 1.0


# ---------------------------------------------------------------- episodes


@pytest.fixture(scope="module")
def sampler() -> EpisodeSampler:
    return EpisodeSampler(
        PROFILE, [conversation(5.0, 300.0)], load_range=(0.2, 0.6), slo_scales=(1.0, 2.0), episode_s=40.0
    )


def test_episodes_follow_the_generator(sampler: EpisodeSampler) -> None:
    def draw(seed: int) -> list[object]:
        rng = np.random.default_rng(seed)
        return [
            (s.trace.arrival_s.tolist(), s.tables.decode_memory_s.tolist(), s.service_level, s.start, s.group)
            for s in (sampler.sample(rng) for _ in range(4))
        ]

    assert draw(5) == draw(5)
    assert draw(5) != draw(6)


def test_episodes_spread_over_everything_that_is_drawn(sampler: EpisodeSampler) -> None:
    rng = np.random.default_rng(0)
    drawn = [sampler.sample(rng) for _ in range(120)]
    assert {s.service_level for s in drawn} == {
        sampler.limits.service_level.scaled(scale) for scale in sampler.slo_scales
    }
    assert {s.group for s in drawn} == set(range(len(sampler.groups)))
    assert {s.start[2] for s in drawn} >= {0, 1}
    assert {s.start[:2] for s in drawn} == {(0, 0)}
    # randomised physics: no two alike, all of one shape
    assert len({float(s.tables.decode_memory_s[0, 1]) for s in drawn}) == len(drawn)
    assert {s.tables.busy_w.shape for s in drawn} == {sampler.nominal.busy_w.shape}
    rates = [s.trace.mean_rate_per_s for s in drawn]
    assert max(rates) > 2 * min(rates)
    assert {round(s.trace.duration_s, 6) for s in drawn} == {40.0}


def test_groups_are_load_bins_of_steady_workloads_and_the_whole_range_of_a_load_curve() -> None:
    bins = EpisodeSampler(
        SMALL, [numbered(), "day"], load_range=(0.2, 0.8), load_bins=2, episode_s=20.0, randomize=False
    )
    assert bins.groups == (
        "numbered slo 1 load 0.20-0.50",
        "numbered slo 1 load 0.50-0.80",
        "day slo 1 load 0.20-0.80",
    )
    rng = np.random.default_rng(0)
    drawn = [bins.sample(rng) for _ in range(90)]
    assert {scenario.group for scenario in drawn} == {0, 1, 2}
    for scenario in drawn:
        if scenario.group < 2:
            (load,) = scenario.loads
            assert (0.2, 0.5)[scenario.group] <= load <= (0.5, 0.8)[scenario.group]
        else:
            assert len(scenario.loads) > 10
            assert len(set(scenario.loads)) > 1
            assert 0.0 < min(scenario.loads) < max(scenario.loads) <= 1.0
    # bins touch, and what lies a little outside still counts as the group's
    assert [bins.covers(0, load) for load in (0.1, 0.16, 0.5, 0.6, 0.7)] == [False, True, True, True, False]
    assert all(bins.covers(2, load) for load in (0.2, 0.5, 0.8))


def test_steady_traffic_of_a_group_has_the_asked_load_even_of_a_load_curve(sampler: EpisodeSampler) -> None:
    curve = EpisodeSampler(SMALL, ["day"], episode_s=20.0, randomize=False)
    for drawer, group in ((sampler, 0), (sampler, len(sampler.groups) - 1), (curve, 0)):
        low, high = (
            drawer.traffic(group, load, 3000.0, np.random.default_rng(1))[0].mean_rate_per_s
            for load in (0.2, 0.6)
        )
        assert high == pytest.approx(3 * low, rel=0.15)
    scales = [sampler.traffic(g, 0.3, 20.0, np.random.default_rng(0))[1] for g in range(len(sampler.groups))]
    bins = len(sampler.groups) // len(sampler.slo_scales)
    expected = [sampler.limits.service_level.scaled(x) for x in sampler.slo_scales for _ in range(bins)]
    assert scales == expected


def test_without_randomisation_the_physics_is_nominal() -> None:
    plain = EpisodeSampler(SMALL, [numbered()], episode_s=20.0, randomize=False)
    rng = np.random.default_rng(0)
    assert all(plain.sample(rng).tables is plain.nominal for _ in range(5))


def test_episodes_have_loads_of_the_asked_range() -> None:
    trace = numbered()
    plain = EpisodeSampler(SMALL, [trace], load_range=(0.3, 0.5), episode_s=20.0, randomize=False)
    full = capacity_scale(plain.limits, plain.nominal, trace, plain.limits.service_level)
    rng = np.random.default_rng(0)
    loads = [plain.sample(rng).trace.mean_rate_per_s / (trace.mean_rate_per_s * full) for _ in range(60)]
    assert 0.3 - 0.02 <= min(loads) < 0.33
    assert 0.47 < max(loads) <= 0.5 + 0.02


def test_a_scale_too_tight_for_a_workload_is_left_out_and_if_all_are_it_is_an_error() -> None:
    trace = conversation(2.0, 100.0)
    both = EpisodeSampler(SMALL, [trace], slo_scales=(0.001, 1.0), episode_s=20.0)
    rng = np.random.default_rng(0)
    assert {both.sample(rng).service_level for _ in range(20)} == {both.limits.service_level}
    with pytest.raises(ConfigError, match="loosen the SLO"):
        EpisodeSampler(SMALL, [trace], slo_scales=(0.001,))


def test_what_cannot_be_sampled_from_is_refused() -> None:
    with pytest.raises(ConfigError, match="at least one workload"):
        EpisodeSampler(SMALL, [])
    with pytest.raises(ConfigError, match="at least one workload"):
        EpisodeSampler(SMALL, ["day"], slo_scales=())
    with pytest.raises(ConfigError, match=r"'days'.*code, conversation, day"):
        EpisodeSampler(SMALL, ["days"])


def test_a_fixed_scenario_is_always_the_same() -> None:
    fixed = FixedScenario(numbered(), build_tables(SMALL), SMALL.limits().service_level, (1, 0, 0))
    one, two = fixed.sample(np.random.default_rng(0)), fixed.sample(np.random.default_rng(1))
    assert one.trace is two.trace
    assert one.tables is two.tables
    assert (one.service_level, one.start) == (fixed.service_level, (1, 0, 0))
