"""The PPO model: its head start, its masks, its checkpoints."""

from __future__ import annotations

import base64
import io
import json
import pickle
import zipfile
from typing import TYPE_CHECKING, Any, cast

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces
from sb3_contrib import MaskablePPO
from stable_baselines3 import PPO
from stable_baselines3.common.vec_env import DummyVecEnv

from rlgov.agents.ppo import Checkpoint, build_ppo, load_checkpoint, predict, save_checkpoint
from rlgov.agents.train_config import PpoSettings
from rlgov.errors import ConfigError

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

AXES = [5, 3, 2]
SETTINGS = PpoSettings(rollout_steps=16, batch_size=32, epochs=1, hidden=(8,))
CHECKPOINT = Checkpoint(
    steps=64,
    updates=3,
    multipliers={"all": {"miss_weight": 5.0}},
    return_scale=(1.0, 2.0, 3.0),
    best=None,
)


class Noise(gym.Env[Any, Any]):
    """Random observations; only the last clock, the middle cap and the first TP degree are allowed."""

    def __init__(self) -> None:
        self.observation_space = spaces.Box(-1.0, 1.0, (4,), np.float32)
        self.action_space = spaces.MultiDiscrete(AXES)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, Any]:
        super().reset(seed=seed, options=options)
        return self._observe(), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        return self._observe(), -float(action[0]), False, False, {}

    def _observe(self) -> NDArray[np.float32]:
        return self.np_random.uniform(-1.0, 1.0, 4).astype(np.float32)

    def action_masks(self) -> NDArray[np.bool_]:
        return np.array([0, 0, 0, 0, 1, 0, 1, 0, 1, 0], dtype=bool)


@pytest.fixture
def env() -> DummyVecEnv:
    return DummyVecEnv([Noise, Noise])


def parameters(model: MaskablePPO | PPO) -> dict[str, NDArray[np.float32]]:
    return {name: value.numpy().copy() for name, value in model.policy.state_dict().items()}


def test_a_fresh_policy_favours_the_fastest_setting_by_the_given_logits(env: DummyVecEnv) -> None:
    model = build_ppo(
        env, SETTINGS.model_copy(update={"masked": False, "fastest_bias": (0.0, 1.0, 3.0)}), seed=0
    )
    observation = torch.zeros((1, 4))
    distribution = cast("Any", model.policy.get_distribution(observation)).distribution
    head_starts = [(d.logits[0, 0] - d.logits[0, 1]).item() for d in distribution]
    assert head_starts == pytest.approx([0.0, 1.0, 3.0], abs=0.1)


def test_a_masked_model_asks_only_for_what_is_allowed(env: DummyVecEnv) -> None:
    model = build_ppo(env, SETTINGS, seed=0)
    assert isinstance(model, MaskablePPO)
    env.seed(1)
    observations = cast("NDArray[np.float32]", env.reset())
    np.testing.assert_array_equal(predict(model, observations, env), [[4, 1, 0], [4, 1, 0]])
    model.learn(32)
    np.testing.assert_array_equal(np.unique(model.rollout_buffer.actions.reshape(-1, 3), axis=0), [[4, 1, 0]])


def test_an_unmasked_model_is_plain_ppo(env: DummyVecEnv) -> None:
    model = build_ppo(env, SETTINGS.model_copy(update={"masked": False}), seed=0)
    assert type(model) is PPO
    model.learn(32)
    assert len(np.unique(model.rollout_buffer.actions.reshape(-1, 3), axis=0)) > 1


def test_the_learning_rate_falls_to_its_final_value(env: DummyVecEnv) -> None:
    settings = SETTINGS.model_copy(update={"learning_rate": 1e-3, "final_learning_rate": 1e-5})
    model = build_ppo(env, settings, seed=0)
    assert [model.lr_schedule(left) for left in (1.0, 0.5, 0.0)] == pytest.approx([1e-3, 5.05e-4, 1e-5])


def test_another_action_space_is_refused(env: DummyVecEnv) -> None:
    env.action_space = spaces.MultiDiscrete([5, 3])
    with pytest.raises(ConfigError, match="3 axes"):
        build_ppo(env, SETTINGS, seed=0)


def test_a_checkpoint_restores_weights_optimizer_and_state(env: DummyVecEnv, tmp_path: Path) -> None:
    model = build_ppo(env, SETTINGS, seed=0)
    model.learn(64)
    path = tmp_path / "rl_model_64_steps.zip"
    save_checkpoint(model, path, CHECKPOINT)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    other = build_ppo(env, SETTINGS, seed=1)
    assert load_checkpoint(other, path) == CHECKPOINT
    assert other.num_timesteps == 64
    for name, value in parameters(model).items():
        np.testing.assert_array_equal(value, parameters(other)[name])
    left, right = (m.policy.optimizer.state_dict()["state"] for m in (model, other))
    for key in left:
        assert torch.equal(left[key]["exp_avg_sq"], right[key]["exp_avg_sq"])


def test_a_checkpoint_of_another_network_is_refused(env: DummyVecEnv, tmp_path: Path) -> None:
    path = tmp_path / "a.zip"
    save_checkpoint(build_ppo(env, SETTINGS, seed=0), path, CHECKPOINT)
    with pytest.raises(ConfigError, match="not a checkpoint of this configuration"):
        load_checkpoint(build_ppo(env, SETTINGS.model_copy(update={"hidden": (9,)}), seed=0), path)
    path.write_bytes(b"not a zip")
    with pytest.raises(ConfigError, match=r"a\.zip"):
        load_checkpoint(build_ppo(env, SETTINGS, seed=0), path)


class _Bomb:
    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return pytest.fail, ("a checkpoint executed code",)


def test_loading_a_checkpoint_executes_nothing(env: DummyVecEnv, tmp_path: Path) -> None:
    path = tmp_path / "a.zip"
    save_checkpoint(build_ppo(env, SETTINGS, seed=0), path, CHECKPOINT)
    with zipfile.ZipFile(path) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    data = json.loads(entries["data"])
    data["gamma"] = {":type:": "bomb", ":serialized:": base64.b64encode(pickle.dumps(_Bomb())).decode()}
    entries["data"] = json.dumps(data).encode()
    tampered = io.BytesIO()
    with zipfile.ZipFile(tampered, "w") as archive:
        for name, content in entries.items():
            archive.writestr(name, content)
    path.write_bytes(tampered.getvalue())
    assert load_checkpoint(build_ppo(env, SETTINGS, seed=0), path) == CHECKPOINT
