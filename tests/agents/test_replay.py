"""Replay counts what it says, and says the same again whatever the number of workers."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from rlgov.agents.audit import audit_journal
from rlgov.agents.baselines.static import StaticPolicy
from rlgov.agents.playback import Figures, Schedule, cut, figures, hold, play
from rlgov.agents.replay import (
    BEST_STATIC,
    FASTEST,
    ReplayResult,
    ReplaySpec,
    StaticPoint,
    best_static,
    replay,
    trace_digest,
)
from rlgov.deployments.recorded import RecordedDeployment
from rlgov.deployments.replayed import Outcome
from rlgov.deployments.simulated import SimulatedDeployment
from rlgov.envs.serving_env import ServingEnv
from rlgov.errors import ConfigError
from rlgov.journal import Journal, read_journal
from rlgov.records import Column, Configuration, Limits
from rlgov.simulation.batch import SimulationBatch
from rlgov.simulation.physics import build_tables
from rlgov.simulation.profile import Profile, load_profile
from rlgov.workload.trace import Trace

PROFILE = "h100-qwen3-8b"  # one GPU, so the fewest static settings


def make_trace(rate_per_s: float = 3.0, duration_s: float = 60.0, seed: int = 3) -> Trace:
    rng = np.random.default_rng(seed)
    count = int(rate_per_s * duration_s)
    arrival_s = np.sort(rng.uniform(0.0, duration_s, count))
    prompt = rng.integers(20, 1500, count)
    output = rng.integers(1, 120, count)
    return Trace("made", arrival_s, prompt, output, np.zeros(count, dtype=np.int64), duration_s)


class Restless:
    """Moves the clock up and down; holds nothing else."""

    name = "restless"
    guarded = True

    def __init__(self) -> None:
        self._step = 0
        self._clocks = 1

    def start_configuration(self, limits: Limits) -> Configuration:
        return limits.fastest

    def start(self, limits: Limits, n: int) -> None:
        assert n == 1
        self._step, self._clocks = 0, len(limits.sm_clocks_mhz)

    def decide(
        self, observation: NDArray[np.float32], rows: NDArray[np.float64], mask: NDArray[np.bool_]
    ) -> NDArray[np.int64]:
        assert len(observation) == len(rows) == len(mask) == 1
        self._step += 1
        return np.array([[self._step % self._clocks, 0, 0]], dtype=np.int64)


@pytest.fixture(scope="module")
def profile() -> Profile:
    return load_profile(PROFILE)


def hold_static(profile: Profile, trace: Trace, schedule: Schedule, configuration: Configuration) -> Figures:
    tables = build_tables(profile)
    batch = SimulationBatch(profile.limits(), 1, tables)
    return figures(hold(batch, trace, tables, schedule, configuration))


@given(
    from_s=st.floats(0.0, 40.0),
    length_s=st.floats(5.0, 20.0),
    rate_scale=st.sampled_from([0.5, 1.0, 3.0]),
    lead_in_s=st.none() | st.floats(0.0, 30.0),
)
def test_a_cut_counts_exactly_the_requests_of_its_span(
    from_s: float, length_s: float, rate_scale: float, lead_in_s: float | None
) -> None:
    trace = make_trace()
    part, schedule = cut(
        trace,
        interval_s=1.0,
        from_s=from_s,
        to_s=from_s + length_s,
        rate_scale=rate_scale,
        lead_in_s=lead_in_s,
    )
    wanted = (trace.arrival_s >= from_s) & (trace.arrival_s < from_s + length_s)
    counted = part.arrival_s >= schedule.lead_s - 1e-9
    assert part.output_tokens[counted].tolist() == trace.output_tokens[wanted].tolist()
    assert schedule.lead_s == int(schedule.lead_s)
    assert schedule.lead_s <= from_s / rate_scale + 1e-6
    assert math.isclose(schedule.span_s, length_s / rate_scale, rel_tol=1e-9)
    gaps_s = np.diff(trace.arrival_s[wanted]) / rate_scale
    assert np.allclose(np.diff(part.arrival_s[counted]), gaps_s)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"from_s": 60.0}, "lasts 60 s"),
        ({"from_s": 30.0, "to_s": 20.0}, "lasts 60 s"),
        ({"rate_scale": 0.0}, "rate_scale"),
        ({"lead_in_s": -1.0}, "lead_in_s"),
    ],
)
def test_a_slice_that_cannot_be_cut_says_why(kwargs: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        cut(make_trace(), interval_s=1.0, **kwargs)


def test_a_slice_without_requests_is_refused() -> None:
    tokens = np.array([5])
    one = Trace("one", np.array([1.0]), tokens, tokens.copy(), np.array([0]), 60.0)
    with pytest.raises(ConfigError, match="no request"):
        cut(one, interval_s=1.0, from_s=10.0)


def test_the_sweep_equals_the_environment_for_a_static_setting(profile: Profile) -> None:
    limits = profile.limits()
    setting = Configuration(limits.sm_clocks_mhz[4], limits.batch_caps[-1], limits.tp_degrees[-1])
    episode, schedule = cut(make_trace(), interval_s=limits.interval_s, from_s=20.0)
    deployment = SimulatedDeployment(profile, episode, start=setting)
    run = play(deployment, StaticPolicy(setting), schedule)
    assert figures(run) == hold_static(profile, episode, schedule, setting)


def test_the_lead_in_is_played_and_not_counted(profile: Profile) -> None:
    trace = make_trace()
    limits = profile.limits()
    episode, schedule = cut(trace, interval_s=1.0, from_s=20.0, to_s=50.0)
    run = play(SimulatedDeployment(profile, episode), Restless(), schedule)
    assert schedule.lead_s == 20.0
    assert run.rows[0, Column.START_S] == 0.0
    assert run.before.sm_clock_mhz != limits.fastest.sm_clock_mhz  # the policy had moved by then
    assert figures(run).arrivals == np.count_nonzero((trace.arrival_s >= 20.0) & (trace.arrival_s < 50.0))


def test_requests_cut_off_by_the_end_are_unserved_and_missed(profile: Profile) -> None:
    trace = make_trace(rate_per_s=30.0, duration_s=10.0)
    slowest = Configuration(profile.limits().sm_clocks_mhz[-1], profile.limits().batch_caps[-1], 1)
    episode, schedule = cut(trace, interval_s=1.0, drain_s=0.0)
    short = hold_static(profile, episode, schedule, slowest)
    episode, schedule = cut(trace, interval_s=1.0, drain_s=600.0)
    long = hold_static(profile, episode, schedule, slowest)
    assert short.unserved > 0
    assert short.served + short.unserved == short.arrivals == long.arrivals
    assert long.unserved == 0
    assert long.energy_j > short.energy_j  # the drain is paid for
    assert short.slo_attainment <= short.served / short.arrivals


def figures_with(energy_j: float, attainment: float) -> Figures:
    return Figures(energy_j, 1.0, attainment, 100, 100, 0, 0.1, 0.2, 0.01, 0.02, 0)


def test_the_best_static_saves_most_among_those_that_hold_the_target() -> None:
    points = [
        StaticPoint(Configuration(clock, 8, 1), figures_with(energy_j, attainment))
        for clock, energy_j, attainment in ((3, 100.0, 1.0), (2, 70.0, 0.99), (1, 40.0, 0.98))
    ]
    assert best_static(points, 0.99).configuration.sm_clock_mhz == 2
    assert best_static(points, 0.97).configuration.sm_clock_mhz == 1
    assert best_static(points[1:], 0.999).configuration.sm_clock_mhz == 2


@pytest.fixture(scope="module")
def spec() -> ReplaySpec:
    return ReplaySpec(trace="made", profile=PROFILE, policies=("random",), seeds=2, block_s=10.0)


@pytest.fixture(scope="module")
def result(spec: ReplaySpec) -> ReplayResult:
    return replay(spec, trace=make_trace())


def test_two_workers_give_the_digest_of_one(spec: ReplaySpec, result: ReplayResult) -> None:
    again = replay(replace(spec, workers=2), trace=make_trace())
    assert again.digest == result.digest
    assert again.to_json() == result.to_json()


def test_the_digest_depends_on_what_is_replayed(spec: ReplaySpec, result: ReplayResult) -> None:
    other = replay(replace(spec, seeds=1, slo_scale=0.6), trace=make_trace())
    assert other.digest != result.digest
    assert trace_digest(make_trace()) != trace_digest(make_trace(seed=4))


def test_the_references_are_added_and_savings_are_against_them(result: ReplayResult) -> None:
    rows = {row.name: row for row in result.policies}
    assert list(rows) == ["random", FASTEST, BEST_STATIC]
    assert rows[FASTEST].saving_vs_fastest == rows[BEST_STATIC].saving_vs_best_static == 0.0
    assert rows["random"].saving_vs_fastest == 1 - rows["random"].energy_j / rows[FASTEST].energy_j
    assert rows[BEST_STATIC].saving_vs_fastest > 0.0
    assert rows[FASTEST].saving_vs_best_static < 0.0


def test_the_best_static_is_the_one_the_sweep_found(result: ReplayResult) -> None:
    row = next(row for row in result.policies if row.name == BEST_STATIC)
    point = next(p for p in result.statics if p.configuration == result.best_static)
    assert row.energy_j == point.figures.energy_j
    assert row.slo_attainment == point.figures.slo_attainment >= result.spec.target_attainment
    sizes = result.limits.axis_sizes
    assert len(result.statics) == sizes[0] * sizes[1] * sizes[2]


def test_intervals_hold_their_points(result: ReplayResult) -> None:
    for row in result.policies:
        for key in ("energy_j", "slo_attainment", "saving_vs_fastest", "saving_vs_best_static"):
            interval = getattr(row, f"{key}_ci")
            assert interval is not None
            assert interval[0] <= getattr(row, key) <= interval[1]


def test_other_draws_of_the_physics_differ_and_carry_their_own_references(result: ReplayResult) -> None:
    nominal, drawn = ({d.name: d for d in result.draws if d.seed == seed} for seed in (0, 1))
    assert nominal[FASTEST].figures.energy_j != drawn[FASTEST].figures.energy_j
    assert drawn[FASTEST].saving_vs_fastest == drawn[BEST_STATIC].saving_vs_best_static == 0.0


def test_an_unknown_policy_is_refused_before_any_work(spec: ReplaySpec) -> None:
    with pytest.raises(ConfigError, match="fastest"):
        replay(replace(spec, policies=("fastets",)), trace=make_trace())


@pytest.mark.parametrize(
    "wrong", [{"seeds": 0}, {"workers": 0}, {"slo_scale": 0.0}, {"target_attainment": 1.5}]
)
def test_a_spec_names_the_field_it_cannot_use(spec: ReplaySpec, wrong: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        replace(spec, **wrong)  # type: ignore[arg-type]  # wrong values are the point


@pytest.fixture
def journal(profile: Profile, tmp_path: Path) -> Journal:
    episode, _ = cut(make_trace(duration_s=20.0), interval_s=1.0, drain_s=5.0)
    path = tmp_path / "run.jsonl"
    deployment = RecordedDeployment(SimulatedDeployment(profile, episode), path)
    env = ServingEnv(deployment, recorder=deployment)
    policy = Restless()
    observation, info = env.reset(seed=0)
    policy.start(env.limits, 1)
    for _ in range(15):
        asked = policy.decide(observation[None], info["window"].to_row()[None], info["action_mask"][None])
        observation, _, _, _, info = env.step(asked[0])
    env.close()
    return read_journal(path)


def test_a_recorded_run_decides_the_same_again(journal: Journal) -> None:
    audit = audit_journal(journal, Restless())
    assert audit.equal
    assert audit.audit.count(Outcome.EQUAL) == audit.observations_compared == 15
    assert audit.reasons_changed() == 0


def test_another_policy_diverges_and_the_axis_is_named(journal: Journal) -> None:
    audit = audit_journal(journal, StaticPolicy(None))
    assert not audit.equal
    assert audit.divergences_by_axis()["sm_clock_mhz"] == audit.audit.count(Outcome.DIVERGED) > 5
    assert audit.divergences_by_axis()["tp_degree"] == 0
    document = audit.to_json()
    assert document["equal"] is False
    assert document["digest"] != audit_journal(journal, Restless()).to_json()["digest"]
