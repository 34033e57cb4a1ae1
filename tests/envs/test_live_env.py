from __future__ import annotations

import warnings
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import gymnasium
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env
from stable_baselines3.common import env_checker as sb3_checker

from rlgov.deployments.live import LiveDeployment
from rlgov.deployments.replayed import Outcome, ReplayedDeployment
from rlgov.engine.samples import StackLimits
from rlgov.envs.action import TP
from rlgov.envs.guard import GuardSettings
from rlgov.envs.registration import LIVE_ID, REPLAYED_ID, SIMULATED_ID, make_live
from rlgov.envs.serving_env import ServingEnv
from rlgov.errors import ConfigError, DeploymentError, EngineError
from rlgov.journal import observation_digest, read_journal
from rlgov.records import Configuration

if TYPE_CHECKING:
    from tests.fakes.world import World

FASTEST = np.zeros(3, dtype=np.int64)


def make(fake: ModuleType, world: World, **more: Any) -> ServingEnv:
    return make_live(fake.FakeStack(world), clock=world.clock, hardware=fake.FakeGpus(world), **more)


def test_both_checkers_pass_without_a_warning(fake_stack: ModuleType) -> None:
    world = fake_stack.World()
    env = gymnasium.make(
        LIVE_ID,
        control=fake_stack.FakeStack(world),
        clock=world.clock,
        hardware=fake_stack.FakeGpus(world),
        episode_s=40.0,
    )
    assert env.spec is not None
    assert env.spec.nondeterministic
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_env(env.unwrapped)
        sb3_checker.check_env(env.unwrapped)
    env.close()
    assert (world.batch_cap, world.lock_mhz) == (256, None)


def test_only_the_live_environment_is_registered_as_unrepeatable() -> None:
    repeatable = {
        env_id: not gymnasium.spec(env_id).nondeterministic for env_id in (SIMULATED_ID, REPLAYED_ID)
    }
    assert all(repeatable.values())
    assert gymnasium.spec(LIVE_ID).nondeterministic


def test_a_step_takes_one_interval_and_the_guard_is_in_force(fake_stack: ModuleType) -> None:
    world = fake_stack.World()
    env = make(fake_stack, world, episode_s=10.0)
    env.reset(seed=0)
    begin_s = world.clock.monotonic_s()
    truncated, clocks = False, []
    while not truncated:
        _, _, terminated, truncated, info = env.step(np.array([11, 0, 0]))
        assert not terminated
        clocks.append(info["applied"].sm_clock_mhz)
    assert world.clock.monotonic_s() - begin_s == pytest.approx(10.0, abs=0.01)
    steps = [env.limits.sm_clocks_mhz.index(clock) for clock in clocks[:4]]
    assert steps == [3, 6, 9, 11]  # three settings an interval, as the guard allows
    env.close()


def test_a_degree_that_cannot_be_had_is_masked(fake_stack: ModuleType) -> None:
    world = fake_stack.World(tp_refused={2: "no free GPU"})
    env = make(fake_stack, world)
    _, info = env.reset(seed=0)
    assert info["action_mask"][-3:].tolist() == [True, False, True]
    _, _, _, _, info = env.step(np.array([0, 0, 1]))
    assert (info["reason"], int(info["applied_index"][TP])) == ("MASKED", 0)
    deployment = env.deployment
    assert isinstance(deployment, LiveDeployment)
    assert deployment.status.tp_refused == {2: "no free GPU"}
    assert world.switches == 0
    world.tp_refused.clear()
    env.step(FASTEST)
    assert env.action_masks()[-3:].all()
    env.close()


def test_blindness_leads_to_the_fastest_setting(fake_stack: ModuleType) -> None:
    world = fake_stack.World()
    env = make(fake_stack, world)
    env.reset(seed=0)
    for _ in range(4):
        env.step(np.array([3, 2, 0]))
    failing = [3]

    def hook(name: str) -> None:
        if name == "interval" and failing[0] > 0:
            failing[0] -= 1
            raise EngineError("gone")

    world.before_call = hook
    observation, value, _, _, info = env.step(np.array([3, 2, 0]))  # the answer to it is lost
    assert (info["window"].blind, value) == (1.0, 0.0)
    repeated, _, _, _, info = env.step(np.array([3, 2, 0]))
    assert np.array_equal(observation, repeated)
    assert (info["reason"], info["applied"]) == ("BLIND", Configuration(1980, 256, 4))
    assert (world.lock_mhz, world.batch_cap) == (1980, 256)
    env.close()


def test_without_a_meter_there_is_no_environment(fake_stack: ModuleType) -> None:
    world = fake_stack.World()
    stack, gpus = fake_stack.FakeStack(world), fake_stack.FakeGpus(world, metered=False)
    with pytest.raises(DeploymentError, match="no meter; install"):
        make_live(stack, clock=world.clock, hardware=gpus)
    assert (stack.closed, gpus.closed) == (1, 1)
    with pytest.raises(DeploymentError, match="no meter; install"):
        make_live(stack, clock=world.clock, hardware="none")


def test_the_reference_can_be_measured_first(fake_stack: ModuleType) -> None:
    world = fake_stack.World(rate_per_s=6.0)
    env = make(fake_stack, world, reference_windows=60)
    measured_s = world.clock.monotonic_s()
    env.reset(seed=0)
    assert measured_s == pytest.approx(1061.0, abs=0.1)
    energies = [-env.step(FASTEST)[4]["reward_terms"]["energy"] for _ in range(60)]
    assert np.mean(energies) == pytest.approx(1.0, rel=0.2)
    env.close()


def test_slo_and_interval_may_differ_from_the_profiles(fake_stack: ModuleType) -> None:
    world = fake_stack.World()
    env = make(fake_stack, world, slo_scale=0.5, interval_s=2.0, start_tp=2)
    _, info = env.reset(seed=0)
    assert (env.limits.service_level.ttft_s, info["window"].duration_s) == (0.5, pytest.approx(2.0))
    assert info["window"].tp_degree == 2.0
    env.step(FASTEST)
    assert world.leases_s[-1] == 6.0
    env.close()


def test_a_workload_needs_to_know_where_the_gateway_is(fake_stack: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="url of the gateway"):
        make(fake_stack, fake_stack.World(), workload="synthetic:code", out=tmp_path)


def test_a_profile_the_stack_cannot_serve_is_refused(fake_stack: ModuleType) -> None:
    world = fake_stack.World()
    stack = fake_stack.FakeStack(world)
    less = stack.limits()
    stack.limits = lambda: StackLimits(
        less.model, (64,), less.tp_degrees, less.gpu_uuids, 4, 8192, less.kv_capacity_tokens, less.switch_s,
        "restart",
    )  # fmt: skip
    with pytest.raises(DeploymentError, match="--max-num-seqs 256"):
        make_live(stack, clock=world.clock, hardware=fake_stack.FakeGpus(world))


def test_a_recorded_run_replays_to_the_same_decisions_and_observations(
    fake_stack: ModuleType, tmp_path: Path
) -> None:
    """Live and replay put the same windows through the same code: same observations, masks and decisions."""
    path = tmp_path / "run.jsonl"
    world = fake_stack.World(rate_per_s=8.0, switch_fails=True)
    guard = GuardSettings(tp_dwell_s=4.0)
    env = make(fake_stack, world, record=path, episode_s=80.0, guard=guard)
    lost = iter([False] * 30 + [True] * 3 + [False] * 1000)

    def hook(name: str) -> None:
        if name == "interval" and next(lost):
            raise EngineError("gone")

    world.before_call = hook
    rng = np.random.default_rng(0)
    actions = rng.integers(0, env.limits.axis_sizes, (80, 3))
    observation, info = env.reset(seed=5)
    digests, masks, reasons = [observation_digest(observation)], [info["action_mask"]], []
    for action in actions:
        observation, _, _, _, info = env.step(action)
        digests.append(observation_digest(observation))
        masks.append(info["action_mask"])
        reasons.append(info["reason"])
    env.close()
    assert {"BLIND", "DWELL", "RATE_LIMIT", "MASKED"} <= set(reasons)

    journal = read_journal(path)
    replayed = ServingEnv(ReplayedDeployment(journal), guard=guard)
    observation, info = replayed.reset(seed=0)
    for k, action in enumerate(actions):
        assert observation_digest(observation) == digests[k] == journal.intervals[k].observation_digest
        assert np.array_equal(info["action_mask"], masks[k])
        observation, _, _, _, info = replayed.step(action)
        assert info["reason"] == reasons[k]
    audit = replayed.deployment.audit()  # type: ignore[attr-defined]  # a ReplayedDeployment
    assert audit.equal
    assert audit.count(Outcome.EQUAL) == 80
