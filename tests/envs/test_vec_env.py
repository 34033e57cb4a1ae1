"""N simulations stepped in one call behave as N single environments, over automatic resets too."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from stable_baselines3.common.vec_env import VecEnv

from rlgov.deployments.scenario import FixedScenario, Scenario
from rlgov.deployments.simulated import SimulatedDeployment
from rlgov.envs.guard import GuardSettings, Reason
from rlgov.envs.observation import FEATURES
from rlgov.envs.reward import Reference
from rlgov.envs.serving_env import ServingEnv
from rlgov.envs.vec_env import ServingVecEnv
from rlgov.errors import ConfigError, DeploymentError
from rlgov.records import Column, Window
from rlgov.simulation.physics import build_tables, draw_parameters
from rlgov.simulation.profile import load_profile
from rlgov.workload.synthesis import SPECS, synthesize

PROFILE = load_profile("h100-qwen3-32b")
LIMITS = PROFILE.limits()
TABLES = build_tables(PROFILE)
WINDOWS = 25


@dataclass
class Episodes:
    """Draws small episodes of every kind, and remembers which stream drew what."""

    groups: tuple[str, ...] = ("light", "heavy")
    drawn: dict[int, list[Scenario]] = field(default_factory=dict)  # by generator
    generators: list[np.random.Generator] = field(default_factory=list)  # kept, so that ids stay unique

    def sample(self, rng: np.random.Generator) -> Scenario:
        group = int(rng.integers(2))
        spec = replace(
            SPECS["conversation"],
            rate_per_s=float(rng.uniform(0.5, 4.0)) * (1 + 3 * group),
            duration_s=float(rng.uniform(10.0, 40.0)),
        )
        scenario = Scenario(
            synthesize(spec, rng),
            build_tables(PROFILE, draw=draw_parameters(PROFILE, rng)),
            LIMITS.service_level.scaled(float(rng.choice([0.6, 1.0, 2.0]))),
            (0, 0, int(rng.integers(3))),
            group,
        )
        if id(rng) not in self.drawn:
            self.drawn[id(rng)] = []
            self.generators.append(rng)
        self.drawn[id(rng)].append(scenario)
        return scenario

    def of(self, i: int) -> list[Scenario]:
        """What simulation i has played, in order."""
        return self.drawn[id(self.generators[i])]


def make(n: int, episodes: Episodes | None = None, **options: Any) -> ServingVecEnv:
    chosen: dict[str, Any] = {"windows": WINDOWS, "seed": 7, "stagger": False} | options
    return ServingVecEnv(LIMITS, Episodes() if episodes is None else episodes, TABLES, n, **chosen)


def reference_of(scenario: Scenario) -> Reference:
    """The fastest setting on the episode, also after its last request, as the episode goes on."""
    from_fastest = FixedScenario(scenario.trace, scenario.tables, scenario.service_level)
    deployment = SimulatedDeployment(PROFILE, from_fastest)
    deployment.start(0)
    rows = deployment.hold(LIMITS.fastest, WINDOWS)
    arrivals = max(float(rows[:, Column.ARRIVALS].sum()), 1.0)
    return Reference(float(rows[:, Column.ENERGY_J].mean()), arrivals / WINDOWS)


class Single:
    """A single environment over the very same episode, and what it has seen of it."""

    def __init__(self, scenario: Scenario, guard: GuardSettings | None) -> None:
        episode = FixedScenario(scenario.trace, scenario.tables, scenario.service_level, scenario.start)
        self.deployment = SimulatedDeployment(PROFILE, episode)
        self.reference = reference_of(scenario)
        self.env = ServingEnv(self.deployment, guard=guard, reference=self.reference, max_windows=WINDOWS)
        self.observation, info = self.env.reset(seed=0)
        self.window: Window = info["window"]
        self.windows: list[Window] = []
        self.reward = 0.0
        self.total_reward = 0.0
        self.truncated = False

    def step(self, action: NDArray[np.int64]) -> None:
        self.observation, self.reward, _, self.truncated, info = self.env.step(action)
        self.window = info["window"]
        self.windows.append(self.window)
        self.total_reward += self.reward

    def check_figures(self, figures: dict[str, float]) -> None:
        log = self.deployment.request_log()
        arrivals, misses, energy_j = (
            sum(getattr(window, name) for window in self.windows)
            for name in ("arrivals", "misses", "energy_j")
        )
        expected = {
            "r": self.total_reward,
            "l": len(self.windows),
            "t": 0.0,
            "arrivals": arrivals,
            "attainment": 1.0 - min(misses / arrivals, 1.0) if arrivals else 1.0,
            "energy_ratio": energy_j / (self.reference.energy_j_per_window * len(self.windows)),
        }
        for name, values in (("ttft_p99_s", log.ttft_s), ("tpot_p99_s", log.tpot_s)):
            known = values[~np.isnan(values)]
            expected[name] = float(np.quantile(known, 0.99)) if known.size else np.nan
        for name, value in expected.items():
            assert figures[name] == pytest.approx(value, rel=1e-9, nan_ok=True), name


def random_actions(rng: np.random.Generator, n: int) -> NDArray[np.int64]:
    """Mostly near the fastest, now and then anything: the guard finds something to do, and so do queues."""
    actions = rng.integers(0, LIMITS.axis_sizes, (n, 3))
    return np.where(rng.random((n, 3)) < (0.5, 0.5, 0.2), actions, 0)


@pytest.mark.parametrize("guard", [GuardSettings(), None], ids=["guarded", "free"])
@pytest.mark.parametrize("stagger", [False, True], ids=["in step", "staggered"])
def test_rows_equal_single_environments(guard: GuardSettings | None, stagger: bool) -> None:  # noqa: FBT001
    n, steps = 5, 3 * WINDOWS + 4
    episodes = Episodes()
    vec = make(n, episodes, guard=guard, stagger=stagger)
    rng = np.random.default_rng(11)
    observations = vec.reset()
    singles = [Single(episodes.of(i)[0], guard) for i in range(n)]
    resets = 0
    for _ in range(steps):
        for i, one in enumerate(singles):
            np.testing.assert_array_equal(observations[i], one.observation)
            # the configuration in force is among the columns
            np.testing.assert_array_equal(vec.window_rows[i], one.window.to_row())
            np.testing.assert_array_equal(vec.action_masks()[i], one.env.action_masks())
        actions = random_actions(rng, n)
        vec.step_async(actions)
        observations, rewards, dones, infos = vec.step_wait()
        for i, one in enumerate(singles):
            one.step(actions[i])
            assert rewards[i] == pytest.approx(one.reward, rel=1e-6)
            if not dones[i]:
                assert infos[i] == {}
                continue
            assert infos[i]["TimeLimit.truncated"] is True
            assert one.truncated or stagger
            np.testing.assert_array_equal(infos[i]["terminal_observation"], one.observation)
            one.check_figures(infos[i]["episode"])
            singles[i] = Single(episodes.of(i)[-1], guard)
            resets += 1
    assert resets >= 3 * n


class AtFullSpeed(Episodes):
    """Episodes that begin at the fastest setting."""

    def sample(self, rng: np.random.Generator) -> Scenario:
        return replace(super().sample(rng), start=(0, 0, 0))


def test_the_fastest_setting_costs_what_the_reference_says() -> None:
    vec = make(4, AtFullSpeed())
    vec.reset()
    for _ in range(WINDOWS):
        _, _, _, infos = vec.step(np.zeros((4, 3), dtype=np.int64))
    for info in infos:
        assert info["episode"]["energy_ratio"] == pytest.approx(1.0, rel=1e-9)


def test_the_control_variate_takes_away_what_the_fastest_setting_costs() -> None:
    plain, varied = make(4, AtFullSpeed()), make(4, AtFullSpeed(), control_variate=True)
    actions = np.zeros((4, 3), dtype=np.int64)
    for vec in (plain, varied):
        vec.miss_weight = 0.0
        vec.reset()
    for _ in range(WINDOWS):
        costs, nothing = plain.step(actions), varied.step(actions)
        assert (costs[1] < -0.1).all()
        np.testing.assert_allclose(nothing[1], 0.0, atol=1e-6)
    for with_cost, without in zip(costs[3], nothing[3], strict=True):  # records keep the reward itself
        assert without["episode"]["r"] == with_cost["episode"]["r"]


class Rising(Episodes):
    """Episodes that say their load doubles, then falls."""

    def sample(self, rng: np.random.Generator) -> Scenario:
        return replace(super().sample(rng), loads=(0.2, 0.4, 0.3))


def test_the_present_load_follows_the_episode_s_curve() -> None:
    vec = make(3, Rising())
    vec.reset()
    for step in range(WINDOWS):
        group, present, peak = vec.present_load()
        assert present == pytest.approx(np.interp(2 * step / WINDOWS, [0, 1, 2], [0.2, 0.4, 0.3]))
        assert (peak == 0.4).all()
        assert group.tolist() == [scenario.group for scenario in vec._scenarios if scenario is not None]
        vec.step(np.zeros((3, 3), dtype=np.int64))
    np.testing.assert_allclose(vec.present_load()[1], 0.2)  # another episode has begun


# ---------------------------------------------------------------- seeds


def rollout(vec: ServingVecEnv, steps: int = 2 * WINDOWS) -> tuple[NDArray[Any], NDArray[Any]]:
    rng = np.random.default_rng(1)
    observations, rewards = [vec.reset()], []
    for _ in range(steps):
        vec.step_async(random_actions(rng, vec.num_envs))
        observation, reward, _, _ = vec.step_wait()
        observations.append(observation.copy())
        rewards.append(reward.copy())
    return np.stack(observations), np.stack(rewards)


def test_the_seed_decides_everything() -> None:
    one, again, other = (rollout(make(4, seed=seed, stagger=True)) for seed in (3, 3, 4))
    np.testing.assert_array_equal(one[0], again[0])
    np.testing.assert_array_equal(one[1], again[1])
    assert not np.array_equal(one[0], other[0])


def test_seeding_restarts_the_streams_at_the_next_reset() -> None:
    vec = make(3)
    first, _ = rollout(vec)
    going_on, _ = rollout(vec)
    assert not np.array_equal(first, going_on)
    assert vec.seed(7) == [7, 7, 7]
    np.testing.assert_array_equal(rollout(vec)[0], first)


def test_a_simulation_does_not_depend_on_how_many_there_are() -> None:
    few, many = (rollout(make(n)) for n in (2, 6))
    # only the first observation: later actions are drawn for all simulations together
    np.testing.assert_array_equal(few[0][0], many[0][0, :2])


def test_simulations_have_episodes_of_their_own() -> None:
    first = make(6).reset()
    assert len(np.unique(first, axis=0)) == 6


def test_staggered_episodes_do_not_end_together() -> None:
    vec = make(8, stagger=True)
    vec.reset()
    ends = [vec.step(np.zeros((8, 3), dtype=np.int64))[2].sum() for _ in range(WINDOWS)]
    assert sum(ends) >= 8
    assert max(ends) <= 4


# ---------------------------------------------------------------- totals


def test_totals_count_since_the_last_call() -> None:
    vec = make(4)
    vec.reset()
    rng = np.random.default_rng(2)
    sums = np.zeros(len(Column))
    for _ in range(WINDOWS - 1):  # before any reset, while the rows show the window of the step
        vec.step(random_actions(rng, 4))
        sums += np.nansum(vec.window_rows, axis=0)
    totals = vec.totals()
    for name in ("arrivals", "misses", "energy_j", "output_tokens"):
        assert totals[name] == pytest.approx(sums[Column[name.upper()]])
    assert totals["misses"] > 0
    reasons = {name: value for name, value in totals.items() if name.startswith("reason_")}
    assert set(reasons) == {f"reason_{reason.name.lower()}" for reason in Reason}
    assert sum(reasons.values()) == 4 * (WINDOWS - 1)
    assert sum(value > 0 for value in reasons.values()) >= 3
    assert set(vec.totals().values()) == {0.0}


def test_group_totals_weigh_episodes_alike() -> None:
    episodes = Episodes()
    vec = make(6, episodes, guard=None)
    vec.reset()
    assert vec.groups == episodes.groups
    slow = np.tile(np.array([11, 5, 0]), (6, 1))
    shares = np.zeros(2)
    for _ in range(WINDOWS - 1):
        vec.step(slow)
        for i in range(6):
            scenario = episodes.of(i)[0]
            counted = (scenario.trace.arrival_s > 1.0) & (scenario.trace.arrival_s <= WINDOWS + 1)
            arrivals_per_window = max(counted.sum(), 1) / WINDOWS
            shares[scenario.group] += vec.window_rows[i, Column.MISSES] / arrivals_per_window
    windows, misses = vec.group_totals()
    groups = np.array([episodes.of(i)[0].group for i in range(6)])
    np.testing.assert_array_equal(windows, (WINDOWS - 1) * np.bincount(groups, minlength=2))
    np.testing.assert_allclose(misses, shares)
    assert misses[1] > 0
    assert not np.concatenate(vec.group_totals()).any()


def test_the_miss_weight_of_a_group_prices_its_misses() -> None:
    free, dear = make(6, guard=None), make(6, guard=None)
    free.miss_weight = 0.0
    dear.miss_weights[:] = (0.0, 50.0)
    assert dear.miss_weight == 25.0
    free.reset()
    dear.reset()
    groups = np.array([scenario.group for scenario in dear._scenarios if scenario is not None])
    slow = np.tile(np.array([11, 5, 0]), (6, 1))
    total = np.zeros((2, 6))
    for _ in range(WINDOWS - 1):
        total += np.stack([free.step(slow)[1], dear.step(slow)[1]])
    assert (total[0] == total[1])[groups == 0].all()
    assert (total[1] < total[0] - 1)[groups == 1].any()
    assert set(groups) == {0, 1}


# ---------------------------------------------------------------- the VecEnv around it


def test_it_is_a_vec_env_with_masks_for_each_simulation() -> None:
    vec = make(3)
    assert isinstance(vec, VecEnv)
    assert vec.observation_space.shape == (len(FEATURES),)
    observations = vec.reset()
    assert observations.dtype == np.float32
    assert all(vec.observation_space.contains(observation) for observation in observations)
    masks = np.stack(vec.env_method("action_masks"))
    np.testing.assert_array_equal(masks, vec.action_masks())
    np.testing.assert_array_equal(vec.env_method("action_masks", indices=[2])[0], masks[2])
    assert vec.get_attr("num_envs") == [3, 3, 3]
    assert vec.env_is_wrapped(ServingEnv) == [False] * 3
    assert vec.service_levels.shape == (3, 2)
    with pytest.raises(AttributeError, match="no method 'render'"):
        vec.env_method("render")


def test_wrong_use_is_refused() -> None:
    with pytest.raises(DeploymentError, match="reset"):
        make(2).step(np.zeros((2, 3), dtype=np.int64))
    for n, windows in ((0, 5), (2, 0)):
        with pytest.raises(ConfigError, match="n >= 1 and windows >= 1"):
            make(n, windows=windows)
