"""Training on a toy environment: determinism, resume, the run folder, the choice of the best model."""

from __future__ import annotations

import os
import signal
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import pytest
import yaml
from gymnasium import spaces
from hypothesis import given
from hypothesis import strategies as st
from stable_baselines3.common.monitor import load_results
from stable_baselines3.common.vec_env import VecEnv

from rlgov.agents.callbacks import Evaluation, StopRequest, Validation, leg_seed, score
from rlgov.agents.lagrangian import LEAD_BOUND, LagrangeMultiplier, LagrangeMultipliers
from rlgov.agents.train import load_config, train
from rlgov.agents.train_config import EvaluationSettings, LagrangianSettings, PpoSettings, TrainConfig
from rlgov.errors import ConfigError
from rlgov.records import Limits, ServiceLevel

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from numpy.typing import NDArray

LIMITS = Limits(
    sm_clocks_mhz=(1980, 1380, 780),
    batch_caps=(64, 8),
    tp_degrees=(2, 1),
    interval_s=1.0,
    service_level=ServiceLevel(1.0, 0.075),
    allotted_gpus=2,
    tdp_w=700.0,
    kv_capacity_tokens=(100_000, 40_000),
    switch_s=(2.0, 2.0),
    max_num_batched_tokens=8192,
)
EPISODE_STEPS = 10
FEATURES = 4


class ToyVecEnv(VecEnv):
    """Misses happen when the clock index is above what the load allows; a low clock saves energy."""

    render_mode = None

    def __init__(self, count: int) -> None:
        super().__init__(
            count,
            spaces.Box(-1.0, 1.0, (FEATURES,), np.float32),
            spaces.MultiDiscrete(list(LIMITS.axis_sizes)),
        )
        self.limits = LIMITS
        self.groups = ("all",)
        self.miss_weights = np.ones(1)
        self._group_totals = np.zeros((2, 1))
        self.on_step: Callable[[], None] = lambda: None
        self._rng = np.random.default_rng(0)
        self._totals = dict.fromkeys(
            ("arrivals", "misses", "energy_j", "reference_energy_j", "reason_policy"), 0.0
        )
        self._step = 0

    def reset(self) -> NDArray[np.float32]:
        if self._seeds[0] is not None:
            self._rng = np.random.default_rng(self._seeds[0])
            self._reset_seeds()
        self._step = 0
        self._sums = np.zeros((3, self.num_envs))
        return self._observe()

    def _observe(self) -> NDArray[np.float32]:
        self._load = self._rng.integers(0, 3, self.num_envs)
        noise = self._rng.uniform(-1.0, 1.0, (self.num_envs, FEATURES - 1))
        return np.column_stack([self._load - 1.0, noise]).astype(np.float32)

    def step_async(self, actions: NDArray[np.int64]) -> None:
        self._actions = actions

    def step_wait(
        self,
    ) -> tuple[NDArray[np.float32], NDArray[np.float64], NDArray[np.bool_], list[dict[str, Any]]]:
        self.on_step()
        clock = self._actions[:, 0]
        misses = (clock > self._load).astype(np.float64)
        energy_j = 100.0 - 30.0 * clock
        reward = -energy_j / 100.0 - self.miss_weights[0] * misses
        self._sums += np.stack([reward, misses, energy_j])
        for name, value in (
            ("arrivals", 1.0),
            ("misses", misses),
            ("energy_j", energy_j),
            ("reference_energy_j", 100.0),
            ("reason_policy", 1.0),
        ):
            self._totals[name] += float(np.sum(np.broadcast_to(value, misses.shape)))
        self._group_totals[:, 0] += self.num_envs, misses.sum()
        self._step += 1
        done = self._step == EPISODE_STEPS
        observations = self._observe()
        infos: list[dict[str, Any]] = [{} for _ in range(self.num_envs)]
        if done:
            for i, info in enumerate(infos):
                total, missed, spent_j = self._sums[:, i]
                info["terminal_observation"] = observations[i]
                info["TimeLimit.truncated"] = True
                info["episode"] = {
                    "r": float(total),
                    "l": EPISODE_STEPS,
                    "arrivals": float(EPISODE_STEPS),
                    "t": 0.0,
                    "attainment": 1.0 - missed / EPISODE_STEPS,
                    "energy_ratio": spent_j / (100.0 * EPISODE_STEPS),
                }
            observations = self.reset()
        return observations, reward, np.full(self.num_envs, done), infos

    def totals(self) -> Mapping[str, float]:
        totals = dict(self._totals)
        self._totals = dict.fromkeys(self._totals, 0.0)
        return totals

    def group_totals(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        arrivals, misses = self._group_totals.copy()
        self._group_totals[:] = 0.0
        return arrivals, misses

    def action_masks(self) -> NDArray[np.bool_]:
        return np.ones((self.num_envs, sum(LIMITS.axis_sizes)), dtype=bool)

    def close(self) -> None:
        pass

    def get_attr(self, attr_name: str, indices: Any = None) -> list[Any]:
        return [getattr(self, attr_name)] * len(list(self._get_indices(indices)))

    def set_attr(self, attr_name: str, value: Any, indices: Any = None) -> None:  # noqa: ARG002
        setattr(self, attr_name, value)

    def env_method(self, method_name: str, *args: Any, indices: Any = None, **kwargs: Any) -> list[Any]:  # noqa: ARG002
        return list(getattr(self, method_name)(*args, **kwargs))

    def env_is_wrapped(self, wrapper_class: Any, indices: Any = None) -> list[bool]:  # noqa: ARG002
        return [False] * self.num_envs


@dataclass
class Toy:
    """The seams of ``train``, with a hook that is called at every training step."""

    on_step: Callable[[], None] = lambda: None
    bundled: NDArray[np.float32] | None = None

    def training(self) -> VecEnv:
        env = ToyVecEnv(4)
        env.on_step = self.on_step
        return env

    def validation(self) -> Validation:
        return Validation(ToyVecEnv(6), ("one", "two"), np.array([0, 0, 1, 1, 1, 1]))

    def write_bundle(
        self, model: Any, observations: NDArray[np.float32], config: TrainConfig, path: Path
    ) -> None:
        del model, config
        self.bundled = observations
        path.write_bytes(b"bundle")


def tiny(out: Path, **changes: Any) -> TrainConfig:
    values: dict[str, Any] = {
        "out": out,
        "environments": 4,
        "total_steps": 128 * 6,
        "checkpoint_steps": 128 * 2,
        "slo_scales": (1.0,),
        "ppo": PpoSettings(rollout_steps=32, batch_size=64, epochs=2, hidden=(8,), learning_rate=0.01),
        "evaluation": EvaluationSettings(every_steps=128 * 2, episodes=2),
        "figure_span_s": 0.0,
    }
    return TrainConfig(**(values | changes))


def run(config: TrainConfig, toy: Toy | None = None) -> Any:
    toy = toy or Toy()
    return train(
        config,
        environments=toy,
        write_bundle=toy.write_bundle,
        say=lambda _: None,
        terminal=False,
        command="train",
    )


def weights(folder: Path, name: str) -> dict[str, NDArray[np.float32]]:
    from stable_baselines3.common.save_util import load_from_zip_file

    _, parameters, _ = load_from_zip_file(str(folder / name), load_data=False)
    state = cast("dict[str, Any]", parameters["policy"])
    return {k: v.numpy() for k, v in state.items()}


def assert_equal_weights(one: Path, other: Path, name: str) -> None:
    left, right = weights(one, name), weights(other, name)
    assert left.keys() == right.keys()
    for key, value in left.items():
        np.testing.assert_array_equal(value, right[key], err_msg=key)


LAST = "checkpoints/rl_model_768_steps.zip"


def test_equal_seeds_give_equal_weights_and_other_seeds_do_not(tmp_path: Path) -> None:
    run(tiny(tmp_path / "a", seed=1))
    run(tiny(tmp_path / "b", seed=1))
    run(tiny(tmp_path / "c", seed=2))
    assert_equal_weights(tmp_path / "a", tmp_path / "b", LAST)
    with pytest.raises(AssertionError):
        assert_equal_weights(tmp_path / "a", tmp_path / "c", LAST)


def test_a_resumed_run_equals_one_that_never_stopped(tmp_path: Path) -> None:
    run(tiny(tmp_path / "whole", keep_checkpoints=9))
    stopped = tmp_path / "stopped"
    run(tiny(stopped, keep_checkpoints=9))
    for steps in (512, 768):
        (stopped / f"checkpoints/rl_model_{steps}_steps.zip").unlink()
    result = run(tiny(stopped, resume=True))
    assert result.steps == 768
    assert_equal_weights(tmp_path / "whole", stopped, LAST)
    assert_equal_weights(tmp_path / "whole", stopped, "best_model.zip")
    with np.load(tmp_path / "whole/evaluations.npz") as left, np.load(stopped / "evaluations.npz") as right:
        assert left["timesteps"].tolist() == [0, 256, 512, 768]
        for name in left:
            np.testing.assert_array_equal(left[name], right[name])
    np.testing.assert_array_equal(load_results(str(tmp_path / "whole"))["r"], load_results(str(stopped))["r"])


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_the_last_whole_rollout_and_the_run_can_go_on(
    tmp_path: Path, number: signal.Signals
) -> None:
    calls = 0

    def interrupt_in_fourth_rollout() -> None:
        nonlocal calls
        calls += 1
        if calls == 3 * 32 + 5:
            os.kill(os.getpid(), number)

    before = signal.getsignal(number)
    result = run(tiny(tmp_path), Toy(on_step=interrupt_in_fourth_rollout))
    assert signal.getsignal(number) is before
    assert result.interrupted
    assert result.bundle is None
    assert result.steps == 3 * 128
    resumed = run(tiny(tmp_path, resume=True))
    assert not resumed.interrupted
    assert resumed.steps == 768
    assert resumed.bundle.read_bytes() == b"bundle"


def test_a_second_signal_interrupts_at_once() -> None:
    stop = StopRequest()
    stop.on_signal(signal.SIGINT, None)
    with pytest.raises(KeyboardInterrupt):
        stop.on_signal(signal.SIGINT, None)


def test_the_run_folder_is_complete(tmp_path: Path) -> None:
    toy = Toy()
    result = run(tiny(tmp_path), toy)
    names = {path.name for path in tmp_path.iterdir()}
    assert {
        "best_model.zip",
        "evaluations.npz",
        "0.monitor.csv",
        "config.yml",
        "args.yml",
        "command.txt",
        "checkpoints",
        "policy.safetensors",
    } <= names
    assert any(name.startswith("events.out.tfevents") for name in names)
    assert not any(path.suffix == ".part" for path in tmp_path.rglob("*"))
    assert load_config(tmp_path / "config.yml") == tiny(tmp_path)
    assert "profile" not in yaml.safe_load((tmp_path / "args.yml").read_text())
    assert len(list((tmp_path / "checkpoints").iterdir())) == 3
    assert set(load_results(str(tmp_path)).columns) >= {"r", "l", "t", "attainment", "energy_ratio"}
    assert result.best is not None
    assert toy.bundled is not None
    assert toy.bundled.shape == (4 * EPISODE_STEPS, FEATURES)


def test_tensorboard_shows_figures_of_merit_and_distributions(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run(tiny(tmp_path))
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    tags = events.Tags()
    assert {
        "serving/attainment",
        "serving/energy_ratio",
        "constraint/miss_weight",
        "guard/policy_share",
        "eval/saving",
        "episode/attainment",
    } <= set(tags["scalars"])
    assert {"asked/sm_clock_mhz", "asked/batch_cap", "asked/tp_degree"} <= set(tags["histograms"])


def test_training_learns_the_toy(tmp_path: Path) -> None:
    config = tiny(
        tmp_path,
        total_steps=128 * 80,
        checkpoint_steps=128 * 80,
        ppo=PpoSettings(
            rollout_steps=32, batch_size=32, epochs=4, hidden=(16,), learning_rate=0.01, gamma=0.5
        ),
        lagrangian=LagrangianSettings(kind="fixed", miss_weight=5.0),
        evaluation=EvaluationSettings(every_steps=128 * 10, episodes=8),
    )
    result = run(config)
    assert result.best["shortfall"] <= 0.03
    assert (
        result.best["saving"] > 0.2
    )  # the optimum saves 0.3, serving every load at the fastest clock nothing


def test_a_folder_is_never_overwritten(tmp_path: Path) -> None:
    run(tiny(tmp_path, total_steps=128))
    with pytest.raises(ConfigError, match="already holds a run"):
        run(tiny(tmp_path))
    with pytest.raises(ConfigError, match="differs in seed"):
        run(tiny(tmp_path, seed=5, resume=True))
    with pytest.raises(ConfigError, match="no checkpoint"):
        run(tiny(tmp_path / "new", resume=True))


def test_a_damaged_checkpoint_is_refused(tmp_path: Path) -> None:
    run(tiny(tmp_path, total_steps=128))
    newest = tmp_path / "checkpoints/rl_model_128_steps.zip"
    newest.write_bytes(newest.read_bytes()[:-200])
    with pytest.raises(ConfigError, match="rl_model_128_steps"):
        run(tiny(tmp_path, resume=True))


def evaluation(attainment: list[float], energy_ratio: float) -> Evaluation:
    n = len(attainment)
    return Evaluation(
        steps=0,
        reward=np.zeros(n),
        length=np.ones(n, dtype=np.int64),
        attainment=np.array(attainment),
        energy_ratio=np.full(n, energy_ratio),
        arrivals=np.full(n, 100.0),
        group=np.arange(n),
    )


def test_the_best_model_saves_most_and_pays_for_what_its_worst_group_lacks() -> None:
    demanded = np.array([0.99, 0.95])  # the second group cannot be served better by anybody
    holds = evaluation([0.991, 0.951], 0.7)
    thriftier = evaluation([1.0, 0.95], 0.6)
    nearly = evaluation([0.989, 1.0], 0.58)
    careless = evaluation([0.9, 1.0], 0.4)
    assert holds.figures(demanded)["shortfall"] == 0.0
    assert nearly.figures(demanded)["shortfall"] == pytest.approx(0.001)
    scores = [score(e.figures(demanded), 25.0) for e in (careless, holds, nearly, thriftier)]
    assert scores == sorted(scores)
    assert score(nearly.figures(demanded), 0.0) > score(thriftier.figures(demanded), 0.0)


def test_attainment_counts_requests_not_episodes() -> None:
    mixed = replace(
        evaluation([1.0, 0.5], 0.7), arrivals=np.array([300.0, 100.0]), group=np.zeros(2, dtype=np.int64)
    )
    assert mixed.mean_attainment == pytest.approx(0.875)
    np.testing.assert_allclose(mixed.group_attainments(), [0.875])


@given(st.lists(st.tuples(st.floats(0, 1e4), st.floats(0, 1)), min_size=1, max_size=40))
def test_the_multiplier_stays_in_bounds_and_survives_a_checkpoint(
    rollouts: list[tuple[float, float]],
) -> None:
    settings = LagrangianSettings()
    multiplier = LagrangeMultiplier(settings)
    for arrivals, miss_share in rollouts:
        multiplier.update(arrivals, arrivals * miss_share)
        low, high = settings.miss_weight_bounds
        assert low * (1 - 1e-9) <= multiplier.miss_weight <= high * (1 + 1e-9)
    copy = LagrangeMultiplier.restored(settings, multiplier.state())
    assert copy == multiplier
    assert copy.update(100.0, 1.0) == multiplier.update(100.0, 1.0)


def test_the_multiplier_rises_on_misses_and_falls_without() -> None:
    settings = LagrangianSettings()
    missing, serving = LagrangeMultiplier(settings), LagrangeMultiplier(settings)
    for _ in range(5):
        missing.update(1000.0, 50.0)
        serving.update(1000.0, 0.0)
    assert missing.miss_weight > settings.miss_weight > serving.miss_weight
    idle = LagrangeMultiplier(settings)
    assert idle.update(0.0, 0.0) == pytest.approx(settings.miss_weight)


def test_validation_moves_the_constraint_to_the_policy_as_it_will_serve() -> None:
    settings = LagrangianSettings()
    plain, ahead, behind = (LagrangeMultiplier(settings) for _ in range(3))
    ahead.calibrate(1.0)
    assert ahead.lead == 0.0  # nothing explored yet, nothing to compare with
    for multiplier, validated in ((plain, None), (ahead, 0.997), (behind, 0.970)):
        multiplier.update(1000.0, 10.0)
        for _ in range(8):
            if validated is not None:
                multiplier.calibrate(validated)
        multiplier.update(1000.0, 10.0)
    assert ahead.lead == pytest.approx(0.007, abs=1e-3)
    assert behind.lead == pytest.approx(-LEAD_BOUND, abs=1e-3)  # a noisy number moves it only so far
    assert ahead.miss_weight < plain.miss_weight < behind.miss_weight
    assert LagrangeMultiplier.restored(settings, ahead.state()) == ahead


def test_each_group_has_its_own_multiplier() -> None:
    settings = LagrangianSettings()
    multipliers = LagrangeMultipliers(settings, ("calm", "burning", "idle"))
    weights = multipliers.update(np.array([100.0, 100.0, 0.0]), np.array([0.0, 50.0, 0.0]))
    assert weights[0] < weights[2] < weights[1]
    assert multipliers.attainments == {"calm": 1.0, "burning": 0.5}
    copy = LagrangeMultipliers(settings, multipliers.groups)
    copy.restore(settings, multipliers.state())
    np.testing.assert_array_equal(copy.miss_weights, weights)


def test_restarts_differ_by_seed_and_step() -> None:
    assert len({leg_seed(seed, steps) for seed in range(20) for steps in range(0, 2000, 100)}) == 400


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"environments": 3}, "does not divide"),
        ({"load_range": (0.8, 0.1)}, "reversed"),
        ({"traces": ()}, "at least one"),
        ({"unknown": 1}, "unknown"),
    ],
)
def test_settings_that_cannot_work_are_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny(tmp_path, **changes)


def test_progress_is_plain_lines_without_a_terminal(tmp_path: Path) -> None:
    toy, lines = Toy(), list[str]()
    train(
        tiny(tmp_path),
        environments=toy,
        write_bundle=toy.write_bundle,
        say=lines.append,
        terminal=False,
        command="train",
    )
    assert len(lines) == 6
    assert lines[-1].startswith("768 of 768 steps  worst attainment ")
    assert "best: saves" in lines[-1]
