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
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from functools import cached_property, partial
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
    Validation,
    checkpoints,
    restore_return_scale,
    run_episodes,
    stop_on_signals,
)
from rlgov.agents.episodes import ServableEpisodes, fixed_episodes
from rlgov.agents.lagrangian import LagrangeMultipliers
from rlgov.agents.plots import front_figure, timeline_figure
from rlgov.agents.ppo import build_ppo, load_checkpoint, predict
from rlgov.agents.replay import ReplaySpec, replay
from rlgov.agents.report import front_points, shown_runs
from rlgov.agents.tensorboard import record_figures, record_hyperparameters
from rlgov.agents.train_config import TrainConfig
from rlgov.agents.warm_start import imitate, sweep
from rlgov.deployments.scenario import EpisodeSampler, capacity_scale
from rlgov.envs.vec_env import ServingVecEnv
from rlgov.errors import ConfigError
from rlgov.simulation.physics import build_tables
from rlgov.simulation.profile import load_profile
from rlgov.workload.readers import read_trace
from rlgov.workload.synthesis import SPECS, synthesize

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    import matplotlib.figure
    from numpy.typing import NDArray
    from stable_baselines3.common.callbacks import BaseCallback
    from stable_baselines3.common.vec_env import VecEnv

    from rlgov.agents.callbacks import TrainingEnv
    from rlgov.agents.ppo import Ppo
    from rlgov.deployments.scenario import ScenarioSampler
    from rlgov.workload.trace import Trace

__all__ = ["TrainConfig", "TrainResult", "train"]

BUNDLE_NAME = "policy.safetensors"
SYNTHETIC_PREFIX = "synthetic:"
FIGURE_BASELINES = ("two-level", "ecofreq", "kv-threshold")
# What may differ between a run and its continuation; all else would make it another run.
RESUMABLE = {"out", "resume", "total_steps", "keep_checkpoints"}


class Environments(Protocol):
    """Makes the vectorised environments; see :class:`rlgov.agents.callbacks.TrainingEnv`."""

    def training(self) -> VecEnv:
        """All workloads and SLO scales together."""
        ...

    def validation(self) -> Validation:
        """Fixed episodes of each group that has to hold the target by itself."""
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
        self._config = config
        self._profile = load_profile(config.profile)
        self._fit: list[Trace | str] = []
        self._held_out: list[Trace | str] = []
        for name in config.traces:
            if name.startswith(SYNTHETIC_PREFIX):
                workload = name.removeprefix(SYNTHETIC_PREFIX)
                self._fit.append(workload)
                self._held_out.append(workload)
            else:
                training_span = read_trace(name).split(config.train_fraction)[0]
                fit, held_out = training_span.split(1.0 - config.validation_fraction)
                self._fit.append(fit)
                self._held_out.append(held_out)

    def training(self) -> VecEnv:
        """See :class:`Environments`."""
        sampler = self._training_sampler
        return self._environment(sampler, self._servable(sampler), self._config.environments, stagger=True)

    def validation(self) -> Validation:
        """See :class:`Environments`."""
        # Measuring the capacity of every workload takes seconds: do it again only for other spans.
        same = self._held_out == self._fit
        sampler = self._training_sampler if same else self._sampler(self._held_out, randomize=False)
        settings = self._config.evaluation
        rng = np.random.default_rng(settings.seed)
        episodes = fixed_episodes(self._servable(sampler), sampler.nominal, settings.episodes, rng)
        group = np.array([scenario.group for scenario in episodes.scenarios], dtype=np.int64)
        env = self._environment(sampler, episodes, group.size, stagger=False)
        return Validation(env, episodes.groups, group)

    @cached_property
    def _training_sampler(self) -> EpisodeSampler:
        return self._sampler(self._fit, randomize=self._config.randomize_physics)

    def _sampler(self, sources: list[Trace | str], *, randomize: bool) -> EpisodeSampler:
        return EpisodeSampler(
            self._profile,
            sources,
            load_range=self._config.load_range,
            slo_scales=self._config.slo_scales,
            episode_s=self._config.episode_s,
            randomize=randomize,
            load_bins=self._config.load_bins,
        )

    def head_start(self, model: Ppo, env: VecEnv) -> None:
        """Imitate the best static setting of each load; see :mod:`rlgov.agents.warm_start`."""
        config = self._config
        target = config.lagrangian.target_attainment + config.lagrangian.margin
        table = sweep(self._training_sampler, target, config.seed)
        imitate(model, cast("ServingVecEnv", env), table, config.seed)

    def _servable(self, sampler: EpisodeSampler) -> ServableEpisodes:
        return ServableEpisodes(sampler, sampler.limits, self._config.least_attainment)

    def _environment(
        self, sampler: EpisodeSampler, episodes: ScenarioSampler, count: int, *, stagger: bool
    ) -> VecEnv:
        config = self._config
        return ServingVecEnv(
            sampler.limits,
            episodes,
            sampler.nominal,
            count,
            windows=max(round(config.episode_s / sampler.limits.interval_s), 1),
            guard=config.guard,
            reward_settings=config.reward,
            stagger=stagger,
            control_variate=config.control_variate,
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


def replayed_figures(config: TrainConfig, bundle: Path) -> Mapping[str, matplotlib.figure.Figure]:
    """The default figures: a stretch of the first trace's training span, replayed with the baselines."""
    if config.figure_span_s <= 0:
        return {}
    profile = load_profile(config.profile)
    name = config.traces[0]
    if name.startswith(SYNTHETIC_PREFIX):
        spec = SPECS[name.removeprefix(SYNTHETIC_PREFIX)]
        rng = np.random.default_rng(config.evaluation.seed)
        trace = synthesize(replace(spec, duration_s=config.figure_span_s), rng)
    else:
        trace = read_trace(name).split(config.train_fraction)[0]
    limits = profile.limits()
    full = capacity_scale(limits, build_tables(profile), trace, limits.service_level)
    rate_scale = full * float(np.mean(config.load_range))
    spec_of_replay = ReplaySpec(
        trace=trace.name,
        profile=config.profile,
        policies=(str(bundle), *FIGURE_BASELINES),
        to_s=min(config.figure_span_s * rate_scale, trace.duration_s),
        rate_scale=rate_scale,
        target_attainment=config.lagrangian.target_attainment,
        guard=config.guard,
    )
    result = replay(spec_of_replay, trace=trace)
    return {
        "front": front_figure(front_points(result), target=config.lagrangian.target_attainment),
        "replay": timeline_figure(shown_runs(result)),
    }


def say_on_stderr(line: str) -> None:
    """Progress goes to stderr: stdout belongs to results."""
    sys.stderr.write(line + "\n")
    sys.stderr.flush()


def train(
    config: TrainConfig,
    *,
    environments: Environments | None = None,
    write_bundle: BundleWriter = export_trained,
    make_figures: FigureMaker = replayed_figures,
    say: Callable[[str], None] = say_on_stderr,
    terminal: bool | None = None,
    command: str | None = None,
) -> TrainResult:
    """Train a policy and write its run folder.

    Args:
        config: the run.
        environments: default: simulations of the configured profile and traces.
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
    environments = environments or SimulatedEnvironments(config)
    _prepare_folder(config, command or shlex.join(sys.argv))
    with ExitStack() as stack:
        env = stack.enter_context(closing(environments.training()))
        validation = environments.validation()
        stack.enter_context(closing(validation.env))
        # Returns of unit variance: unscaled, the value loss would crowd the policy out of the common
        # gradient norm, the more the higher the miss weight.
        scaled = VecNormalize(env, norm_obs=False, norm_reward=True, gamma=config.ppo.gamma)
        model = build_ppo(scaled, config.ppo, config.seed)
        state = RunState(LagrangeMultipliers(config.lagrangian, cast("TrainingEnv", env).groups))
        if config.resume:
            _restore(model, scaled, config, state)
        elif config.warm_start and isinstance(environments, SimulatedEnvironments):
            say("warm start: sweeping static settings and imitating the best of each load")
            environments.head_start(model, env)
        logger = stack.enter_context(closing(configure(str(config.out), ["tensorboard", "csv"])))
        model.set_logger(logger)
        record_hyperparameters(logger, config)
        boundary = BoundaryCallback(config, state, validation)
        boundary.log.restore(model.num_timesteps)
        _learn(model, config, state, boundary, say, terminal=terminal)
        bundle = None
        if state.interrupted:
            say(f"stopped after {model.num_timesteps:,} steps; continue with --resume in {config.out}")
        else:
            bundle = config.out / BUNDLE_NAME
            model.set_parameters(str(config.out / "best_model.zip"), device="cpu")
            write_bundle(model, seen_observations(model, env, config), config, bundle)
            record_figures(logger, make_figures(config, bundle), model.num_timesteps)
    return TrainResult(config.out, model.num_timesteps, state.interrupted, state.best, bundle)


def _learn(  # one step of train, split off for its length
    model: Ppo,
    config: TrainConfig,
    state: RunState,
    boundary: BoundaryCallback,
    say: Callable[[str], None],
    *,
    terminal: bool,
) -> None:
    total_steps = config.whole_rollouts(config.total_steps)
    with stop_on_signals(say) as stop:
        callbacks: list[BaseCallback] = [
            boundary,
            MonitorCallback(config.out / "0.monitor.csv", model.num_timesteps),
            RolloutCallback(config, state),
            StopCallback(stop, state),
            ProgressCallback(total_steps, state, say, terminal=terminal),
        ]
        model.learn(
            total_steps - model.num_timesteps, callback=CallbackList(callbacks), reset_num_timesteps=False
        )
        if not state.interrupted:
            boundary.evaluate()
    boundary.checkpoint()


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


def _restore(model: Ppo, env: VecNormalize, config: TrainConfig, state: RunState) -> None:
    path = checkpoints(config.out / "checkpoints")[-1]
    checkpoint = load_checkpoint(model, path)
    try:
        state.multipliers.restore(config.lagrangian, checkpoint.multipliers)
    except KeyError as error:
        msg = f"{path}: made for other workloads, {error} is missing; resume where the traces are the same"
        raise ConfigError(msg) from error
    state.best = checkpoint.best
    restore_return_scale(env, checkpoint.return_scale)


def seen_observations(model: Ppo, env: VecEnv, config: TrainConfig) -> NDArray[np.float32]:
    """What the model sees on training episodes: the range that a service may later be compared with."""
    seen: list[Any] = []
    run_episodes(env, config.seed, partial(predict, model), lambda batch: seen.append(batch.copy()))
    return cast("NDArray[np.float32]", np.concatenate(seen))
