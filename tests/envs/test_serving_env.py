from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env
from numpy.typing import NDArray
from stable_baselines3.common import env_checker as sb3_checker

from rlgov.deployments.recorded import RecordedDeployment, TraceArrivals
from rlgov.deployments.replayed import Outcome, ReplayedDeployment, recorded_trace
from rlgov.envs.guard import Guard, GuardSettings, Reason
from rlgov.envs.observation import FEATURES, ObservationEncoder
from rlgov.envs.registration import REPLAYED_ID, SIMULATED_ID
from rlgov.envs.reward import TERM_NAMES, Reference
from rlgov.envs.serving_env import ServingEnv, measure_reference
from rlgov.errors import ConfigError, DeploymentError
from rlgov.journal import observation_digest, read_journal
from rlgov.records import Configuration, Limits, ServiceLevel, Window
from rlgov.workload.trace import Trace

MakeToy = Callable[..., Any]
Step = tuple[NDArray[np.float32], float, bool, bool, dict[str, Any]]


def rollout(env: ServingEnv, seed: int, actions_seed: int = 0) -> list[Step]:
    rng = np.random.default_rng(actions_seed)
    env.reset(seed=seed)
    steps: list[Step] = []
    while not steps or not steps[-1][3]:
        steps.append(env.step(rng.integers(0, env.limits.axis_sizes)))
    return steps


def assert_same(a: list[Step], b: list[Step]) -> None:
    assert len(a) == len(b)
    for first, second in zip(a, b, strict=True):
        assert np.array_equal(first[0], second[0])
        assert first[1:4] == second[1:4]
        assert first[4]["window"] == second[4]["window"]


def check_both(env: gymnasium.Env[Any, Any]) -> None:
    """Both checkers, where a warning is a failure."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_env(env.unwrapped)
        sb3_checker.check_env(env.unwrapped)


@pytest.fixture
def toy_id(make_toy: MakeToy) -> str:
    env_id = "rlgov-test/Toy-v0"
    if env_id not in gymnasium.registry:

        def build(**_: Any) -> ServingEnv:
            return ServingEnv(make_toy())

        gymnasium.register(env_id, entry_point=build)
    return env_id


def journal_of(make_toy: MakeToy, path: Path, windows: int = 30) -> list[Step]:
    deployment = RecordedDeployment(make_toy(windows), path)
    env = ServingEnv(deployment, recorder=deployment)
    steps = rollout(env, seed=3)
    env.close()
    return steps


def test_both_checkers_pass_on_a_toy(toy_id: str) -> None:
    check_both(gymnasium.make(toy_id))


def test_both_checkers_pass_on_a_replay(make_toy: MakeToy, tmp_path: Path) -> None:
    journal_of(make_toy, tmp_path / "run.jsonl")
    check_both(gymnasium.make(REPLAYED_ID, journal=tmp_path / "run.jsonl"))


def test_equal_seeds_give_equal_rollouts_and_others_do_not(make_toy: MakeToy) -> None:
    first = rollout(ServingEnv(make_toy()), seed=5)
    assert_same(first, rollout(ServingEnv(make_toy()), seed=5))
    other = rollout(ServingEnv(make_toy()), seed=6)
    assert any(a[4]["window"] != b[4]["window"] for a, b in zip(first, other, strict=True))


def test_an_env_starts_each_episode_afresh(make_toy: MakeToy) -> None:
    env = ServingEnv(make_toy())
    first = rollout(env, seed=5)
    rollout(env, seed=9, actions_seed=4)
    assert_same(first, rollout(env, seed=5))


def test_the_same_windows_give_the_same_decisions_by_hand(make_toy: MakeToy, limits: Limits) -> None:
    """Parity: what ServingEnv.step does, and what a service does with the encoder and the guard."""
    settings = GuardSettings(tp_dwell_s=8.0)
    env = ServingEnv(make_toy(60, 9.0), guard=settings)

    def policy(observation: NDArray[np.float32], mask: NDArray[np.bool_]) -> NDArray[np.int64]:
        # Any function of what a policy may see will do.
        score = int(1e4 * np.abs(observation).sum()) + int(mask.sum())
        return np.array([score % 6, score % 4, score % 3])

    observation, info = env.reset(seed=2)
    windows, applied, reasons, seen = [info["window"]], [], [], [observation]
    done = False
    while not done:
        action = policy(observation, env.action_masks())
        observation, _, _, done, info = env.step(action)
        windows.append(info["window"])
        applied.append(info["applied"])
        reasons.append(info["reason"])
        seen.append(observation)
    assert {"SLO_OVERRIDE", "RATE_LIMIT"} <= set(reasons), "the run is too tame to compare anything"

    encoder, guard = ObservationEncoder(limits, 1), Guard(settings, limits, 1)
    levels = np.array([[limits.service_level.ttft_s, limits.service_level.tpot_s]])
    for window, expected, reason, shown in zip(windows, applied, reasons, seen, strict=False):
        row = window.to_row()[None, :]
        by_hand = encoder.encode(row, levels)
        assert np.array_equal(by_hand[0], shown)
        asked = policy(by_hand[0], guard.mask(row)[0])
        index, why = guard.apply(asked[None, :], row)
        assert guard.table.configurations(index) == [expected]
        assert Reason(int(why[0])).name == reason


def test_info_explains_the_step(make_toy: MakeToy, limits: Limits) -> None:
    env = ServingEnv(make_toy())
    _, info = env.reset(seed=0)
    assert isinstance(info["window"], Window)
    assert info["action_mask"].shape == (sum(limits.axis_sizes),)
    observation, value, terminated, _, info = env.step(np.array([5, 0, 0]))
    assert observation.shape == (len(FEATURES),)
    assert not terminated
    assert info["reason"] == "RATE_LIMIT"
    assert info["asked_index"].tolist() == [5, 0, 0]
    assert info["applied_index"].tolist() == [3, 0, 0]
    assert info["applied"] == Configuration(1400, 256, 4)
    assert tuple(info["reward_terms"]) == TERM_NAMES
    assert sum(info["reward_terms"].values()) == pytest.approx(value)
    assert np.array_equal(info["action_mask"], env.action_masks())


def test_without_a_guard_the_action_is_applied(make_toy: MakeToy) -> None:
    env = ServingEnv(make_toy(), guard=None)
    env.reset(seed=0)
    for action in ([5, 3, 2], [0, 0, 0], [5, 3, 1]):
        info = env.step(np.array(action))[4]
        assert info["applied_index"].tolist() == action


def test_the_reference_may_depend_on_the_episode(make_toy: MakeToy) -> None:
    twin = make_toy()
    asked: list[int] = []

    def reference(seed: int) -> Reference:
        asked.append(seed)
        return measure_reference(twin, seed)

    env = ServingEnv(make_toy(), reference=reference)
    for seed in (1, 2, 1):
        env.reset(seed=seed)
        assert env.step(np.zeros(3, dtype=np.int64))[4]["reward_terms"]["energy"] == pytest.approx(-1.0)
    assert asked[0] == asked[2] != asked[1]


def test_an_episode_ends_with_its_workload_or_after_max_windows(make_toy: MakeToy) -> None:
    assert len(rollout(ServingEnv(make_toy(40)), seed=0)) == 39  # the first window comes with reset
    steps = rollout(ServingEnv(make_toy(40), max_windows=7), seed=0)
    assert len(steps) == 7
    assert not any(step[2] for step in steps)


def test_deferring_work_loses(make_toy: MakeToy) -> None:
    """The slowest setting lets the queue grow: overdue requests cost more than the energy saved."""

    def earned(action: list[int]) -> float:
        deployment = make_toy(60, 5.0)
        env = ServingEnv(deployment, guard=None, reference=measure_reference(deployment, 0))
        env.reset(seed=0)
        total, done = 0.0, False
        while not done:
            _, value, _, done, _ = env.step(np.array(action))
            total += value
        return total

    assert earned([5, 0, 2]) < earned([0, 0, 0]) < earned([2, 0, 0])


def test_the_reference_is_the_fastest_setting_of_the_same_episode(make_toy: MakeToy) -> None:
    reference = measure_reference(make_toy(), 0)
    assert reference.energy_j_per_window == pytest.approx(400.0 + 1200.0)
    with pytest.raises(DeploymentError, match="no window"):
        measure_reference(make_toy(), 0, max_windows=0)


def test_a_deployment_without_a_meter_is_refused_at_reset(make_toy: MakeToy) -> None:
    deployment = make_toy()
    unmetered = replace(deployment.start(0), energy_j=None)
    deployment.start = lambda _: unmetered
    with pytest.raises(DeploymentError, match="no meter; install"):
        ServingEnv(deployment).reset(seed=0)


def test_the_reference_leaves_blind_windows_out(make_toy: MakeToy) -> None:
    deployment = make_toy()
    advance, calls = deployment.advance, iter(range(1000))

    def now_and_then_blind(configuration: Configuration) -> Window:
        window: Window = advance(configuration)
        return replace(window, blind=1.0, energy_j=None) if next(calls) % 3 == 2 else window

    deployment.advance = now_and_then_blind
    assert measure_reference(deployment, 0).energy_j_per_window == pytest.approx(400.0 + 1200.0)
    deployment.advance = lambda configuration: replace(advance(configuration), energy_j=None)
    with pytest.raises(DeploymentError, match="no meter"):
        measure_reference(deployment, 0)


def test_an_episode_may_carry_its_own_slo(make_toy: MakeToy, limits: Limits) -> None:
    deployment = make_toy()
    env = ServingEnv(deployment)
    env.reset(seed=0)
    deployment.limits = limits.with_service_level(ServiceLevel(0.5, 0.05))
    env.reset(seed=0)
    assert env.limits.service_level == ServiceLevel(0.5, 0.05)
    names = [f.name for f in FEATURES]
    assert env.step(np.zeros(3, dtype=np.int64))[0][names.index("ttft_p50")] == pytest.approx(0.4)
    deployment.limits = replace(limits, sm_clocks_mhz=(1980, 1000))
    with pytest.raises(DeploymentError, match="axes changed"):
        env.reset(seed=0)


def test_step_before_reset_is_refused(make_toy: MakeToy) -> None:
    with pytest.raises(DeploymentError, match="reset"):
        ServingEnv(make_toy()).step(np.zeros(3, dtype=np.int64))


def test_close_closes_the_deployment(make_toy: MakeToy) -> None:
    deployment = make_toy()
    env = ServingEnv(deployment)
    env.close()
    env.close()
    assert deployment.closed == 2


def test_the_price_of_misses_may_change_between_steps(make_toy: MakeToy) -> None:
    env = ServingEnv(make_toy(60), guard=None, reference=Reference(1000.0, 1.0), miss_weight=0.0)
    env.reset(seed=0)
    for _ in range(30):
        terms = env.step(np.array([5, 0, 2]))[4]["reward_terms"]
    assert terms["miss"] == 0.0
    env.miss_weight = 2.0
    assert env.step(np.array([5, 0, 2]))[4]["reward_terms"]["miss"] < 0.0


def test_a_recorded_run_replays_equal_and_another_policy_diverges(make_toy: MakeToy, tmp_path: Path) -> None:
    steps = journal_of(make_toy, tmp_path / "run.jsonl")
    journal = read_journal(tmp_path / "run.jsonl")
    assert [entry.window for entry in journal.intervals][1:] == [step[4]["window"] for step in steps]
    decisions = [entry.decision for entry in journal.intervals[:-1]]
    assert [d.reason for d in decisions if d] == [step[4]["reason"] for step in steps]

    replayed = ReplayedDeployment(journal)
    env = ServingEnv(replayed)
    again = rollout(env, seed=99)
    assert replayed.audit().equal
    assert_same(steps, again)
    digests = [entry.observation_digest for entry in journal.intervals[1:-1]]
    assert digests == [observation_digest(step[0]) for step in again[:-1]]

    rollout(env, seed=0, actions_seed=1)
    audit = replayed.audit()
    assert audit.count(Outcome.DIVERGED) == len(audit.divergences) > 0
    assert not audit.equal


def test_a_recording_gives_back_the_trace_it_was_made_from(make_toy: MakeToy, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    arrival_s = np.sort(rng.uniform(0, 29.9, 50))
    trace = Trace(
        "t", arrival_s, rng.integers(2, 99, 50), rng.integers(1, 9, 50), np.ones(50, np.int64), 30.0
    )
    path = tmp_path / "run.jsonl"
    deployment = RecordedDeployment(make_toy(30), path, arrivals=TraceArrivals(trace))
    rollout(ServingEnv(deployment, recorder=deployment), seed=0)
    deployment.close()
    back = recorded_trace(read_journal(path), "t")
    for name in ("arrival_s", "prompt_tokens", "output_tokens", "prefix_hit_tokens"):
        assert np.array_equal(getattr(back, name), getattr(trace, name))
    assert back.duration_s == trace.duration_s


def test_both_checkers_pass_on_the_simulator() -> None:
    pytest.importorskip("rlgov.deployments.simulated")
    check_both(gymnasium.make(SIMULATED_ID, episode_s=20.0))


def test_the_simulated_env_is_deterministic_and_follows_its_arguments() -> None:
    pytest.importorskip("rlgov.deployments.simulated")
    env = gymnasium.make(SIMULATED_ID, episode_s=20.0, slo_scale=0.6).unwrapped
    assert isinstance(env, ServingEnv)
    env.reset(seed=0)
    assert env.limits.service_level == ServiceLevel(1.0, 0.075).scaled(0.6)
    assert_same(rollout(env, seed=1), rollout(env, seed=1))
    played = [env.reset(seed=seed)[1]["window"] for seed in (1, 2)]
    assert played[0] != played[1]  # a synthetic workload is drawn anew
    with pytest.raises(ConfigError, match="neither a file nor"):
        gymnasium.make(SIMULATED_ID, trace="no-such-trace")
