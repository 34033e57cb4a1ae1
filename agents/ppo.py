"""PPO of Stable-Baselines3, set up for many simulations stepped in one call on one core."""

from __future__ import annotations

import json
import zipfile
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias, cast

import numpy as np
import torch
from gymnasium import spaces
from sb3_contrib import MaskablePPO
from sb3_contrib.common.maskable.utils import get_action_masks
from stable_baselines3 import PPO
from stable_baselines3.common.utils import LinearSchedule

from rlgov.errors import ConfigError

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray
    from stable_baselines3.common.vec_env import VecEnv

    from rlgov.agents.train_config import PpoSettings

Ppo: TypeAlias = MaskablePPO | PPO

STATE_ENTRY = "rlgov.json"  # in the checkpoint's zip; Stable-Baselines3 ignores entries it does not know


def build_ppo(env: VecEnv, settings: PpoSettings, seed: int) -> Ppo:
    """A fresh model with the settings' network, schedules and head start for the fastest setting."""
    common: dict[str, Any] = {
        "policy": "MlpPolicy",
        "env": env,
        "learning_rate": LinearSchedule(settings.learning_rate, settings.final_learning_rate, 1.0),
        "n_steps": settings.rollout_steps,
        "batch_size": settings.batch_size,
        "n_epochs": settings.epochs,
        "gamma": settings.gamma,
        "gae_lambda": settings.gae_lambda,
        "clip_range": settings.clip_range,
        "ent_coef": settings.entropy_weight,
        "vf_coef": settings.value_weight,
        "max_grad_norm": settings.max_gradient_norm,
        "target_kl": settings.target_kl,
        "policy_kwargs": {
            "net_arch": {"pi": list(settings.hidden), "vf": list(settings.hidden)},
            "activation_fn": torch.nn.Tanh,
        },
        "seed": seed,
        "device": "cpu",
    }
    model: Ppo = MaskablePPO(**common) if settings.masked else PPO(**common)
    _favour_fastest(model, settings.fastest_bias)
    return model


def _favour_fastest(model: Ppo, fastest_bias: tuple[float, ...]) -> None:
    """Add a head start to index 0 of each axis of the action layer."""
    space = model.action_space
    if not isinstance(space, spaces.MultiDiscrete) or len(space.nvec) != len(fastest_bias):
        msg = f"the action space must be MultiDiscrete with {len(fastest_bias)} axes, got {space}"
        raise ConfigError(msg)
    layer = cast("torch.nn.Linear", model.policy.action_net)
    firsts = np.concatenate([[0], np.cumsum(space.nvec)[:-1]])
    with torch.no_grad():
        for first, bias in zip(firsts, fastest_bias, strict=True):
            layer.bias[int(first)] += bias


def predict(model: Ppo, observations: NDArray[np.float32], env: VecEnv) -> NDArray[np.int64]:
    """Deterministic actions for every environment, under its mask if the model uses masks."""
    if isinstance(model, MaskablePPO):
        actions, _ = model.predict(observations, deterministic=True, action_masks=get_action_masks(env))
    else:
        actions, _ = model.predict(observations, deterministic=True)
    return np.asarray(actions, dtype=np.int64)


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """What is stored besides the weights and the optimizer."""

    steps: int
    updates: int
    multipliers: dict[str, Any]
    return_scale: tuple[float, float, float]  # running mean, variance and count of returns
    best: dict[str, float] | None


def save_checkpoint(model: Ppo, path: Path, checkpoint: Checkpoint) -> None:
    """Write weights, optimizer and state to one file, whole or not at all."""
    partial = path.with_suffix(".part")
    with partial.open("wb") as file:
        model.save(file)
    document = {
        "steps": checkpoint.steps,
        "updates": checkpoint.updates,
        "multipliers": checkpoint.multipliers,
        "return_scale": list(checkpoint.return_scale),
        "best": checkpoint.best,
    }
    with zipfile.ZipFile(partial, mode="a") as archive:
        archive.writestr(STATE_ENTRY, json.dumps(document, sort_keys=True))
    partial.replace(path)


def load_checkpoint(model: Ppo, path: Path) -> Checkpoint:
    """Put a checkpoint's weights and optimizer into a model built from the same settings.

    Only tensors are loaded (``weights_only``): nothing in the file is executed.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            document = json.loads(archive.read(STATE_ENTRY))
        checkpoint = Checkpoint(**document | {"return_scale": tuple(document["return_scale"])})
        model.set_parameters(str(path), exact_match=True, device="cpu")
    except (zipfile.BadZipFile, KeyError, TypeError, ValueError, RuntimeError) as error:
        msg = (
            f"{path}: not a checkpoint of this configuration ({error}); "
            "resume with the run's own settings, or delete the file to resume from an earlier one"
        )
        raise ConfigError(msg) from error
    model.num_timesteps = checkpoint.steps
    model._n_updates = checkpoint.updates  # noqa: SLF001  # Stable-Baselines3 offers no setter
    return checkpoint
