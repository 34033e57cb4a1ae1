"""Training: one call from a configuration to a run folder in RL Zoo's manner.

The folder holds ``best_model.zip``, ``evaluations.npz``, ``0.monitor.csv``, ``config.yml`` (everything,
ready to train again), ``args.yml`` (what differs from the defaults), ``command.txt``, ``checkpoints/``,
TensorBoard events and ``policy.safetensors``, the bundle.

Equal configurations give equal weights: episodes, initial weights and sampling all follow the seed, one
torch thread adds in one order, and evaluation draws no random numbers. A run resumed from a checkpoint
written on schedule continues bit for bit as if it had never stopped. After Ctrl-C it continues from the
last whole rollout with new episodes, which is as good but not bit-identical. Wall times (the monitor's
``t`` column, event time stamps) are never equal, and TensorBoard shows the steps that were run twice.
"""

from __future__ import annotations

import hashlib
import json
import shlex
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, cast

import numpy as np
import torch
import yaml
from pydantic import ValidationError
from stable_baselines3.common.callbacks import CallbackList
from stable_baselines3.common.logger import configure
from stable_baselines3.common.vec_env import VecNormalize

from rlgov.agents.bundle import Origin, export_bundle
from rlgov.agents.callbacks import (
    BoundaryCallback,
    MonitorCallback,
    ProgressCallback,
    RolloutCallback,
    RunState,
    StopCallback,
    checkpoints,
    restore_return_scale,
    run_episodes,
    stop_on_signals,
)
from rlgov.agents.episodes import ServableEpisodes
from rlgov.agents.lagrangian import LagrangeMultiplier
from rlgov.agents.ppo import build_ppo, load_checkpoint
from rlgov.agents.tensorboard import record_figures, record_hyperparameters
from rlgov.agents.train_config import TrainConfig
from rlgov.deployments.scenario import EpisodeSampler
from rlgov.envs.vec_env import ServingVecEnv
from rlgov.errors import ConfigError
from rlgov.simulation.profile import load_profile
from rlgov.workload.readers import read_trace

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    import matplotlib.figure
    from numpy.typing import NDArray
    from stable_baselines3.common.vec_env import VecEnv

    from rlgov.agents.ppo import Ppo
    from rlgov.workload.trace import Trace

__all__ = ["TrainConfig", "TrainResult", "train"]

BUNDLE_NAME = "policy.safetensors"
SYNTHETIC_PREFIX = "synthetic:"
# What may differ between a run and its continuation; all else would make it another run.
RESUMABLE = {"out", "resume", "total_steps", "keep_checkpoints"}


class EnvironmentMaker(Protocol):
    """Makes the vectorised environment of training (``validation`` False) or of evaluation."""

    def __call__(
        self, config: TrainConfig, slo_scales: tuple[float, ...], count: int, *, validation: bool
    ) -> VecEnv:
        """``count`` simulations over the fit span or the validation span, under these SLO scales."""
        ...


class BundleWriter(Protocol):
    """Exports a trained model; ``observations`` (n, features) are what it saw in training."""

    def __call__(
        self, model: Ppo, observations: NDArray[np.float32], config: TrainConfig, path: Path
    ) -> None:
        """Write the bundle to ``path``."""
        ...


class FigureMaker(Protocol):
    """Draws figures for TensorBoard from a finished bundle, by name."""

    def __call__(self, config: TrainConfig, bundle: Path) -> Mapping[str, matplotlib.figure.Figure]:
        """For instance the energy-attainment front and one replayed hour."""
        ...


@dataclass(frozen=True, slots=True)
class TrainResult:
    """What a training run ended with."""

    out: Path
    steps: int
    interrupted: bool
    best: Mapping[str, float] | None
    bundle: Path | None  # None after an interruption


class SimulatedEnvironments:
    """The default environments: simulations of the configured profile and traces.

    Of a trace file only the training span is kept, its last part for validation. The validation
    episodes are simulated with the profile's nominal physics, which is what a replay measures.
    """

    def __init__(self, config: TrainConfig) -> None:
        self._profile = load_profile(config.profile)
        self._sources: list[Trace | str] = []
        for name in config.traces:
            if name.startswith(SYNTHETIC_PREFIX):
                self._sources.append(name.removeprefix(SYNTHETIC_PREFIX))
            else:
                self._sources.append(read_trace(name).split(config.train_fraction)[0])

    def __call__(
        self, config: TrainConfig, slo_scales: tuple[float, ...], count: int, *, validation: bool
    ) -> VecEnv:
        """See :class:`EnvironmentMaker`."""
        spans = [
            source if isinstance(source, str) else source.split(1.0 - config.validation_fraction)[validation]
            for source in self._sources
        ]
        sampler = EpisodeSampler(
            self._profile,
            spans,
            load_range=config.load_range,
            slo_scales=slo_scales,
            episode_s=config.episode_s,
            randomize=config.randomize_physics and not validation,
        )
        return ServingVecEnv(
            sampler.limits,
            ServableEpisodes(sampler, sampler.limits, config.least_attainment),
            sampler.nominal,
            count,
            windows=max(round(config.episode_s / sampler.limits.interval_s), 1),
            guard=config.guard,
            reward_settings=config.reward,
            seed=config.seed,
            stagger=not validation,
        )


def export_trained(model: Ppo, observations: NDArray[np.float32], config: TrainConfig, path: Path) -> None:
    """The default bundle writer. Names and digests leave out where the run was written."""
    profile = load_profile(config.profile)
    recipe = json.dumps(config.model_dump(mode="json", exclude=RESUMABLE - {"total_steps"}), sort_keys=True)
    export_bundle(
        model,
        path,
        origin=Origin(
            name=f"ppo-seed{config.seed}",
            profile_name=profile.name,
            profile_digest=hashlib.sha256(profile.to_yaml().encode()).hexdigest(),
            training_digest=hashlib.sha256(recipe.encode()).hexdigest(),
        ),
        limits=profile.limits(),
        observations=observations,
    )


def no_figures(config: TrainConfig, bundle: Path) -> Mapping[str, matplotlib.figure.Figure]:  # noqa: ARG001  # null object
    """Draw nothing."""
    return {}


def say_on_stderr(line: str) -> None:
    """Progress goes to stderr: stdout belongs to results."""
    sys.stderr.write(line + "\n")
    sys.stderr.flush()


def train(
    config: TrainConfig,
    *,
    make_environment: EnvironmentMaker | None = None,
    write_bundle: BundleWriter = export_trained,
    make_figures: FigureMaker = no_figures,
    say: Callable[[str], None] = say_on_stderr,
    terminal: bool | None = None,
    command: str | None = None,
) -> TrainResult:
    """Train a policy and write its run folder.

    Args:
        config: the run.
        make_environment: default: simulations of the configured profile and traces.
        write_bundle: default: the numpy bundle of :mod:`rlgov.agents.bundle`.
        make_figures: figures to add to TensorBoard at the end.
        say: takes progress lines.
        terminal: show a progress bar; default: whether stderr is a terminal.
        command: recorded in ``command.txt``; default: this process's command line.

    Raises:
        ConfigError: the folder holds another run, or there is nothing to resume.
    """
    terminal = sys.stderr.isatty() if terminal is None else terminal
    torch.set_num_threads(1)  # small matrices: threads cost more than they add, and change rounding
    make_environment = make_environment or SimulatedEnvironments(config)
    _prepare_folder(config, command or shlex.join(sys.argv))

    env = make_environment(config, config.slo_scales, config.environments, validation=False)
    validation = {
        scale: make_environment(config, (scale,), config.evaluation.episodes, validation=True)
        for scale in config.slo_scales
    }
    try:
        # Returns of unit variance: unscaled, the value loss would crowd the policy out of the common
        # gradient norm, the more the higher the miss weight.
        scaled = VecNormalize(env, norm_obs=False, norm_reward=True, gamma=config.ppo.gamma)
        model = build_ppo(scaled, config.ppo, config.seed)
        state = (
            _restore(model, scaled, config)
            if config.resume
            else RunState(LagrangeMultiplier(config.lagrangian))
        )
        boundary = BoundaryCallback(config, state, validation)
        boundary.log.restore(model.num_timesteps)
        logger = configure(str(config.out), ["tensorboard", "csv"])
        model.set_logger(logger)
        record_hyperparameters(logger, config)
        total_steps = config.whole_rollouts(config.total_steps)
        with stop_on_signals(say) as stop:
            model.learn(
                total_steps - model.num_timesteps,
                callback=CallbackList(
                    [
                        boundary,
                        MonitorCallback(config.out / "0.monitor.csv", model.num_timesteps),
                        RolloutCallback(config, state),
                        StopCallback(stop, state),
                        ProgressCallback(total_steps, state, say, terminal=terminal),
                    ]
                ),
                reset_num_timesteps=False,
            )
            if not state.interrupted:
                boundary.evaluate()
        boundary.checkpoint()
        bundle = None
        if state.interrupted:
            say(f"stopped after {model.num_timesteps:,} steps; continue with --resume in {config.out}")
        else:
            bundle = config.out / BUNDLE_NAME
            model.set_parameters(str(config.out / "best_model.zip"), device="cpu")
            write_bundle(model, _seen_observations(model, env, config), config, bundle)
            record_figures(logger, make_figures(config, bundle), model.num_timesteps)
        logger.close()
    finally:
        for each in (env, *validation.values()):
            each.close()
    return TrainResult(config.out, model.num_timesteps, state.interrupted, state.best, bundle)


def load_config(path: Path) -> TrainConfig:
    """A run's config.yml. Raises ConfigError with the file and field if it cannot be used."""
    try:
        return TrainConfig.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))
    except (OSError, yaml.YAMLError, ValidationError) as error:
        msg = f"{path}: {error}"
        raise ConfigError(msg) from error


def _prepare_folder(config: TrainConfig, command: str) -> None:
    recorded = config.out / "config.yml"
    if config.resume:
        if not checkpoints(config.out / "checkpoints"):
            msg = f"{config.out} holds no checkpoint to resume from; train without resume"
            raise ConfigError(msg)
        before, now = load_config(recorded).model_dump(), config.model_dump()
        changed = sorted(k for k in now if k not in RESUMABLE and before[k] != now[k])
        if changed:
            what = ", ".join(changed)
            msg = f"{recorded} differs in {what}; resume with the same settings or start another run"
            raise ConfigError(msg)
    elif recorded.exists():
        msg = f"{config.out} already holds a run; give another folder, or resume it"
        raise ConfigError(msg)
    (config.out / "checkpoints").mkdir(parents=True, exist_ok=True)
    for name, values in (
        ("config.yml", config.model_dump(mode="json", exclude={"resume"})),
        ("args.yml", config.model_dump(mode="json", exclude_defaults=True)),
    ):
        (config.out / name).write_text(yaml.safe_dump(values, sort_keys=False), encoding="utf-8")
    with (config.out / "command.txt").open("a", encoding="utf-8") as file:
        file.write(command + "\n")


def _restore(model: Ppo, env: VecNormalize, config: TrainConfig) -> RunState:
    checkpoint = load_checkpoint(model, checkpoints(config.out / "checkpoints")[-1])
    state = RunState(LagrangeMultiplier.restored(config.lagrangian, checkpoint.multiplier), checkpoint.best)
    restore_return_scale(env, checkpoint.return_scale)
    state.rerank(config.lagrangian.target_attainment)
    return state


def _seen_observations(model: Ppo, env: VecEnv, config: TrainConfig) -> NDArray[np.float32]:
    """What the model sees on training episodes: the range that a service may later be compared with."""
    seen: list[Any] = []
    run_episodes(model, env, config.seed, lambda observations: seen.append(observations.copy()))
    return cast("NDArray[np.float32]", np.concatenate(seen))
