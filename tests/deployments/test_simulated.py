"""The simulated deployment behind the seam: order of use, seeds, episodes and their end."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from rlgov.deployments.base import Deployment
from rlgov.deployments.scenario import Scenario
from rlgov.deployments.simulated import SimulatedDeployment
from rlgov.errors import ConfigError, DeploymentError
from rlgov.records import Column, Configuration, ServiceLevel, Window
from rlgov.simulation.physics import build_tables, draw_parameters
from rlgov.simulation.profile import load_profile
from rlgov.workload.synthesis import SPECS, synthesize
from rlgov.workload.trace import Trace

PROFILE = load_profile("h100-qwen3-32b")
LIMITS = PROFILE.limits()
TABLES = build_tables(PROFILE)


def conversation(rate_per_s: float = 4.0, duration_s: float = 30.0, seed: int = 0) -> Trace:
    spec = replace(SPECS["conversation"], rate_per_s=rate_per_s, duration_s=duration_s)
    return synthesize(spec, np.random.default_rng(seed))


class Fresh:
    """Every episode has its own requests, physics, SLO and start."""

    def sample(self, rng: np.random.Generator) -> Scenario:
        return Scenario(
            conversation(duration_s=20.0, seed=int(rng.integers(1000))),
            build_tables(PROFILE, draw=draw_parameters(PROFILE, rng)),
            LIMITS.service_level.scaled(float(rng.choice([0.6, 1.0, 2.0]))),
            (0, 0, int(rng.integers(3))),
        )


def play(deployment: Deployment, seed: int, configuration: Configuration, windows: int) -> list[Window]:
    """Through the protocol's own types: a type checker sees that the simulation conforms."""
    first = deployment.start(seed)
    return [first, *(deployment.advance(configuration) for _ in range(windows))]


def test_windows_follow_each_other_and_report_what_was_asked() -> None:
    deployment = SimulatedDeployment(PROFILE, conversation())
    slower = Configuration(1380, 64, 4)
    windows = play(deployment, 0, slower, 10)
    assert [window.start_s for window in windows] == list(range(11))
    assert {window.duration_s for window in windows} == {LIMITS.interval_s}
    assert windows[0].configuration == LIMITS.fastest
    assert {window.configuration for window in windows[1:]} == {slower}
    assert {window.age_s for window in windows} == {window.blind for window in windows} == {0.0}
    assert windows[0].measured_clock_mhz > windows[-1].measured_clock_mhz


def test_what_was_not_measured_is_none_and_what_did_not_happen_is_zero() -> None:
    trace = conversation(0.5, 30.0).slice(20.0, 30.0)
    deployment = SimulatedDeployment(
        PROFILE, replace(trace, arrival_s=trace.arrival_s + 5.0, duration_s=30.0)
    )
    quiet = play(deployment, 0, LIMITS.fastest, 3)
    assert [window.ttft_p50_s for window in quiet] == [None] * 4
    assert [window.itl_mean_s for window in quiet] == [None] * 4
    assert sum(window.arrivals + window.served + window.misses for window in quiet) == 0
    assert all(window.energy_j is not None and window.energy_j > 0 for window in quiet)


def test_order_of_use_is_enforced() -> None:
    deployment = SimulatedDeployment(PROFILE, conversation())
    assert not deployment.finished
    with pytest.raises(DeploymentError, match=r"start\(\)"):
        deployment.advance(LIMITS.fastest)
    with pytest.raises(DeploymentError, match=r"start\(\)"):
        deployment.hold(LIMITS.fastest, 3)
    deployment.start(0)
    with pytest.raises(ConfigError, match="not offered"):
        deployment.advance(Configuration(1980, 256, 3))
    deployment.close()
    deployment.close()
    with pytest.raises(DeploymentError):
        deployment.advance(LIMITS.fastest)
    assert deployment.start(0).start_s == 0.0


def test_a_start_configuration_holds_for_the_first_window() -> None:
    start = Configuration(1230, 32, 2)
    first = SimulatedDeployment(PROFILE, conversation(), start=start).start(0)
    assert first.configuration == start
    assert first.measured_clock_mhz == pytest.approx(1230)
    assert first.switching == 0


def test_the_seed_decides_the_episode() -> None:
    deployment = SimulatedDeployment(PROFILE, Fresh())
    one, two, again = (play(deployment, seed, LIMITS.fastest, 15) for seed in (1, 2, 1))
    assert one == again
    assert one != two
    assert play(SimulatedDeployment(PROFILE, Fresh()), 1, LIMITS.fastest, 15) == one


def test_a_trace_is_the_same_under_every_seed() -> None:
    deployment = SimulatedDeployment(PROFILE, conversation())
    assert play(deployment, 1, LIMITS.fastest, 5) == play(deployment, 2, LIMITS.fastest, 5)


def test_limits_carry_the_episodes_service_level() -> None:
    deployment = SimulatedDeployment(PROFILE, Fresh())
    levels = set()
    for seed in range(12):
        deployment.start(seed)
        level = deployment.limits.service_level
        assert level == Fresh().sample(np.random.default_rng(seed)).service_level
        assert deployment.limits == LIMITS.with_service_level(level)
        levels.add(level)
    assert len(levels) == 3


def test_the_service_level_decides_what_is_a_miss() -> None:
    trace = conversation(6.0)
    misses = []
    for level in (ServiceLevel(1.0, 0.075), ServiceLevel(0.2, 0.075), ServiceLevel(0.2, 0.01)):
        deployment = SimulatedDeployment(PROFILE, trace, service_level=level)
        misses.append(sum(window.misses for window in play(deployment, 0, LIMITS.fastest, 60)))
    assert misses[0] < misses[1] < misses[2]
    # the physics does not look at the SLO
    assert play(SimulatedDeployment(PROFILE, trace), 0, LIMITS.fastest, 5)[-1].energy_j == pytest.approx(
        play(SimulatedDeployment(PROFILE, trace, service_level=level), 0, LIMITS.fastest, 5)[-1].energy_j,
        rel=0,
    )


def test_an_episode_ends_when_the_trace_is_over_and_everybody_is_served() -> None:
    trace = conversation(6.0, 30.0)
    deployment = SimulatedDeployment(PROFILE, trace)
    window = deployment.start(0)
    while not deployment.finished:
        window = deployment.advance(LIMITS.fastest)
    end_s = window.start_s + window.duration_s
    log = deployment.request_log()
    assert not np.isnan(log.finish_s).any()
    assert max(trace.duration_s, float(log.finish_s.max())) <= end_s
    assert end_s - 1 < max(trace.duration_s, float(log.finish_s.max()))


def test_an_episode_ends_after_its_drain_when_work_is_left() -> None:
    deployment = SimulatedDeployment(PROFILE, conversation(12.0, 20.0), drain_s=7.0)
    deployment.start(0)
    slow = Configuration(210, 8, 4)
    windows = 1
    while not deployment.finished:
        deployment.advance(slow)
        windows += 1
    assert windows == 27
    assert np.isnan(deployment.request_log().finish_s).any()


def test_holding_many_windows_equals_advancing_one_by_one() -> None:
    trace = conversation(6.0, 60.0)  # more than a batch's first capacity in both
    chosen = Configuration(1530, 128, 2)
    deployment = SimulatedDeployment(PROFILE, trace)
    one_by_one = np.stack([window.to_row() for window in play(deployment, 0, chosen, 40)[1:]])
    log = deployment.request_log()
    deployment.start(0)
    held = deployment.hold(chosen, 40)
    np.testing.assert_array_equal(held, one_by_one)
    np.testing.assert_array_equal(deployment.request_log().finish_s, log.finish_s)
    assert held[:, Column.SWITCHING].any()


def test_a_long_trace_outgrows_the_first_capacity() -> None:
    many = conversation(80.0, 30.0)
    assert len(many) > 2000

    class Growing:
        def sample(self, rng: np.random.Generator) -> Scenario:
            return Scenario(many if rng.random() < 0.5 else conversation(), TABLES, LIMITS.service_level)

    deployment = SimulatedDeployment(PROFILE, Growing())
    counts = set()
    for seed in range(6):
        deployment.start(seed)
        deployment.hold(LIMITS.fastest, 30)
        counts.add(len(deployment.request_log().arrival_s))
    assert counts == {len(many), len(conversation())}
