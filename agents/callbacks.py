"""What happens around PPO's updates: restarts, evaluation, checkpoints, the constraint, progress.

Order within one rollout boundary: evaluate and keep the best, checkpoint, start episodes anew. All of it
runs at the start of a rollout, when the last update is complete, so that a checkpoint never holds half
of one.
"""

from __future__ import annotations

import csv
import json
import signal
import threading
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias, cast

import numpy as np
from stable_baselines3.common.callbacks import BaseCallback
from tqdm import tqdm

from rlgov.agents.ppo import Checkpoint, predict, save_checkpoint
from rlgov.agents.tensorboard import record_constraint, record_episodes, record_evaluation, record_rollout

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from pathlib import Path
    from types import FrameType

    from numpy.typing import NDArray
    from stable_baselines3.common.vec_env import VecEnv, VecNormalize

    from rlgov.agents.lagrangian import LagrangeMultipliers
    from rlgov.agents.ppo import Ppo
    from rlgov.agents.train_config import TrainConfig
    from rlgov.records import Limits

EVALUATION_ARRAYS = ("results", "ep_lengths", "attainment", "energy_ratio", "arrivals", "group")
EPISODE_FIGURES = ("attainment", "energy_ratio")  # of an episode's info, besides r, l and t


class TrainingEnv(Protocol):
    """What training needs of the vectorised environment besides Stable-Baselines3's VecEnv."""

    limits: Limits
    groups: tuple[str, ...]  # constraint groups
    miss_weights: NDArray[np.float64]  # of each group; written to between rollouts

    def totals(self) -> Mapping[str, float]:
        """Counters since the last call, summed over environments; at least arrivals and misses."""
        ...

    def group_totals(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Arrivals and misses since the last call, of each group, in any common unit."""
        ...


# ---------------------------------------------------------------------------------------------------
# Evaluation


@dataclass(frozen=True, slots=True, eq=False)
class Evaluation:
    """Deterministic episodes after ``steps`` training steps; arrays have one value per episode."""

    steps: int
    reward: NDArray[np.float64]
    length: NDArray[np.int64]
    attainment: NDArray[np.float64]
    energy_ratio: NDArray[np.float64]
    arrivals: NDArray[np.float64]
    group: NDArray[np.int64]

    def group_attainments(self) -> NDArray[np.float64]:
        """Share of requests served in time, by group."""
        groups = np.arange(int(self.group.max()) + 1)
        return np.array([self._attainment(self.group == group) for group in groups])

    @property
    def mean_attainment(self) -> float:
        """Share of all requests served in time."""
        return self._attainment(np.ones(self.attainment.shape, dtype=bool))

    def _attainment(self, which: NDArray[np.bool_]) -> float:
        arrivals = self.arrivals[which]
        if arrivals.sum() <= 0:
            return 1.0
        return float(np.average(self.attainment[which], weights=arrivals))

    @property
    def saving(self) -> float:
        """Energy saved against the fastest setting on the same episodes, as a share."""
        return 1.0 - float(self.energy_ratio.mean())

    def figures(self, demanded: NDArray[np.float64]) -> dict[str, float]:
        """The figures a model is chosen by, and a checkpoint remembers of the best one.

        ``demanded`` is the attainment asked of each group; ``shortfall`` is how far below it the worst
        group stays.
        """
        attained = self.group_attainments()
        return {
            "steps": float(self.steps),
            "shortfall": float(np.max(demanded - attained).clip(min=0.0)),
            "worst_attainment": float(attained.min()),
            "attainment": self.mean_attainment,
            "saving": self.saving,
            "reward": float(self.reward.mean()),
        }


def score(figures: Mapping[str, float], shortfall_price: float) -> float:
    """What the best model has most of: saving, less a price for what the worst group lacks."""
    return figures["saving"] - shortfall_price * figures["shortfall"]


Decide: TypeAlias = "Callable[[NDArray[np.float32], VecEnv], NDArray[np.int64]]"


def hold_fastest(_observations: NDArray[np.float32], env: VecEnv) -> NDArray[np.int64]:
    """What serving without a governor does."""
    return np.zeros((env.num_envs, 3), dtype=np.int64)


def run_episodes(
    env: VecEnv, seed: int, decide: Decide, observe: Callable[[NDArray[np.float32]], None] = lambda _: None
) -> list[dict[str, Any]]:
    """One episode in every environment; the ``episode`` info of each, in order.

    Environments start anew by themselves: what follows an environment's first episode is not counted.
    """
    env.seed(seed)
    observations = env.reset()
    episodes: list[dict[str, Any] | None] = [None] * env.num_envs
    while any(episode is None for episode in episodes):
        batch = cast("NDArray[np.float32]", observations)
        observe(batch)
        observations, _, dones, infos = env.step(decide(batch, env))
        for i in np.flatnonzero(dones):
            if episodes[i] is None:
                episodes[i] = infos[i]["episode"]
    return [episode for episode in episodes if episode is not None]


@dataclass(frozen=True, slots=True, eq=False)
class Validation:
    """The environment that models are judged in: one episode of each simulation, always the same ones."""

    env: VecEnv
    group_names: tuple[str, ...]
    group: NDArray[np.int64]  # of each simulation


def evaluate(steps: int, validation: Validation, seed: int, decide: Decide) -> Evaluation:
    """One episode in every simulation; the same ones for the same seed."""
    episodes = run_episodes(validation.env, seed, decide)

    def column(name: str) -> NDArray[np.float64]:
        return np.array([episode[name] for episode in episodes], dtype=np.float64)

    return Evaluation(
        steps=steps,
        reward=column("r"),
        length=column("l").astype(np.int64),
        attainment=column("attainment"),
        energy_ratio=column("energy_ratio"),
        arrivals=column("arrivals"),
        group=validation.group,
    )


class EvaluationLog:
    """evaluations.npz in Stable-Baselines3's layout, with attainment and energy beside the rewards."""

    def __init__(self, path: Path, group_names: Sequence[str]) -> None:
        self._path = path
        self._group_names = tuple(group_names)
        self._evaluations: list[Evaluation] = []

    def restore(self, until_steps: int) -> None:
        """Read back what was written up to a checkpoint; later evaluations will be run again."""
        if not self._path.exists():
            return
        with np.load(self._path) as data:
            for i, steps in enumerate(data["timesteps"]):
                if steps <= until_steps:
                    row = (data[name][i] for name in EVALUATION_ARRAYS)
                    self._evaluations.append(Evaluation(int(steps), *row))

    def __contains__(self, steps: int) -> bool:
        return any(e.steps == steps for e in self._evaluations)

    def append(self, evaluation: Evaluation) -> None:
        """Add one evaluation and write the file, whole or not at all."""
        self._evaluations.append(evaluation)
        unfinished = self._path.with_suffix(".part")
        with unfinished.open("wb") as file:
            np.savez(
                file,
                timesteps=np.array([e.steps for e in self._evaluations]),
                results=np.stack([e.reward for e in self._evaluations]),
                ep_lengths=np.stack([e.length for e in self._evaluations]),
                attainment=np.stack([e.attainment for e in self._evaluations]),
                energy_ratio=np.stack([e.energy_ratio for e in self._evaluations]),
                arrivals=np.stack([e.arrivals for e in self._evaluations]),
                group=np.stack([e.group for e in self._evaluations]),
                group_names=np.array(self._group_names),
            )
        unfinished.replace(self._path)


# ---------------------------------------------------------------------------------------------------
# Rollout boundaries


def leg_seed(seed: int, steps: int) -> int:
    """Seed of everything random from a restart after ``steps`` steps on."""
    return int(np.random.SeedSequence([seed, steps]).generate_state(1)[0] >> 1)  # Gymnasium wants 31 bits


@dataclass
class Milestones:
    """When a rollout starts: is an evaluation due, a checkpoint, a restart of the episodes?"""

    evaluation_steps: int
    checkpoint_steps: int

    @classmethod
    def of(cls, config: TrainConfig) -> Milestones:
        """Both periods in whole rollouts."""
        return cls(
            config.whole_rollouts(config.evaluation.every_steps),
            config.whole_rollouts(config.checkpoint_steps),
        )

    def evaluation_due(self, steps: int) -> bool:
        """Whether to evaluate after so many steps."""
        return steps % self.evaluation_steps == 0

    def checkpoint_due(self, steps: int) -> bool:
        """Whether to checkpoint, and to restart episodes, after so many steps."""
        return steps % self.checkpoint_steps == 0


@dataclass
class RunState:
    """What callbacks share and a checkpoint keeps."""

    multipliers: LagrangeMultipliers
    best: dict[str, float] | None = None
    rollout_start_steps: int = 0
    interrupted: bool = False


class BoundaryCallback(BaseCallback):
    """Evaluates, keeps the best model, checkpoints and restarts episodes between rollouts."""

    def __init__(self, config: TrainConfig, state: RunState, validation: Validation) -> None:
        super().__init__()
        self._config = config
        self._state = state
        self._validation = validation
        self._demanded: NDArray[np.float64] | None = None
        self._milestones = Milestones.of(config)
        self._started = False
        self.log = EvaluationLog(config.out / "evaluations.npz", validation.group_names)

    def _on_rollout_start(self) -> None:
        steps = self.model.num_timesteps
        self._state.rollout_start_steps = steps
        if self._milestones.evaluation_due(steps):
            self.evaluate()
        boundary = self._milestones.checkpoint_due(steps)
        if boundary and self._started:
            self.checkpoint()
        if boundary or not self._started:
            self._restart_episodes(steps)
        self._started = True

    def _restart_episodes(self, steps: int) -> None:
        """Everything random starts anew from (seed, steps): a resumed run repeats the same future."""
        model = self.model
        model.set_random_seed(leg_seed(self._config.seed, steps))
        env = cast("TrainingEnv", self.training_env)
        env.miss_weights[:] = self._state.multipliers.miss_weights
        model._last_obs = self.training_env.reset()  # type: ignore[assignment]  # noqa: SLF001  # as SB3's own _setup_learn does
        model._last_episode_starts = np.ones(self.training_env.num_envs, dtype=bool)  # noqa: SLF001
        env.totals()
        env.group_totals()

    def evaluate(self) -> None:
        """Evaluate once at the present step and keep the model if it is the best so far."""
        if self.model.num_timesteps in self.log:
            return
        model = cast("Ppo", self.model)
        seed = self._config.evaluation.seed
        if self._demanded is None:
            # Nobody can be asked for more than the fastest setting attains.
            reachable = evaluate(0, self._validation, seed, hold_fastest).group_attainments()
            self._demanded = np.minimum(reachable, self._config.lagrangian.target_attainment)
        outcome = evaluate(model.num_timesteps, self._validation, seed, partial(predict, model))
        self.log.append(outcome)
        attained = outcome.group_attainments()
        multipliers = self._state.multipliers.each
        if len(multipliers) == attained.size:  # a group may be too tight for the validation span
            for multiplier, validated in zip(multipliers, attained.tolist(), strict=True):
                multiplier.calibrate(validated)
        figures = outcome.figures(self._demanded)
        record_evaluation(self.logger, figures)
        price = self._config.evaluation.shortfall_price
        if self._state.best is None or score(figures, price) > score(self._state.best, price):
            self._state.best = figures
            unfinished = self._config.out / "best_model.part"
            with unfinished.open("wb") as file:
                model.save(file)
            unfinished.replace(self._config.out / "best_model.zip")

    def checkpoint(self) -> None:
        """Write a checkpoint of the present step and delete the oldest ones."""
        folder = self._config.out / "checkpoints"
        steps = self.model.num_timesteps
        save_checkpoint(
            cast("Ppo", self.model),
            folder / checkpoint_name(steps),
            Checkpoint(
                steps=steps,
                updates=self.model._n_updates,  # noqa: SLF001  # Stable-Baselines3 offers no getter
                multipliers=self._state.multipliers.state(),
                return_scale=return_scale(cast("VecNormalize", self.training_env)),
                best=self._state.best,
            ),
        )
        for old in checkpoints(folder)[: -self._config.keep_checkpoints]:
            old.unlink()

    def _on_step(self) -> bool:
        return True


def return_scale(env: VecNormalize) -> tuple[float, float, float]:
    """What rewards are divided by: running mean, variance and count of returns."""
    return float(env.ret_rms.mean), float(env.ret_rms.var), float(env.ret_rms.count)


def restore_return_scale(env: VecNormalize, scale: tuple[float, float, float]) -> None:
    """Inverse of :func:`return_scale`."""
    mean, variance, count = scale
    env.ret_rms.mean, env.ret_rms.var, env.ret_rms.count = np.array(mean), np.array(variance), count


def checkpoint_name(steps: int) -> str:
    """RL Zoo's name for a checkpoint."""
    return f"rl_model_{steps}_steps.zip"


def checkpoints(folder: Path) -> list[Path]:
    """All checkpoints, oldest first."""
    return sorted(folder.glob("rl_model_*_steps.zip"), key=lambda path: int(path.stem.split("_")[2]))


class RolloutCallback(BaseCallback):
    """Moves the Lagrange multiplier after each rollout and records what the rollout was like."""

    def __init__(self, config: TrainConfig, state: RunState) -> None:
        super().__init__()
        self._config = config
        self._state = state

    def _on_step(self) -> bool:
        return True

    def _on_rollout_end(self) -> None:
        env = cast("TrainingEnv", self.training_env)
        totals = {name: float(np.sum(value)) for name, value in env.totals().items()}
        multipliers = self._state.multipliers
        env.miss_weights[:] = multipliers.update(*env.group_totals())
        model = cast("Ppo", self.model)
        record_rollout(self.logger, totals, model.rollout_buffer.actions, env.limits)
        record_constraint(self.logger, multipliers)
        ppo = self._config.ppo
        done = min(model.num_timesteps / self._config.whole_rollouts(self._config.total_steps), 1.0)
        model.ent_coef = ppo.entropy_weight + done * (ppo.final_entropy_weight - ppo.entropy_weight)
        self.logger.record("train/entropy_weight", model.ent_coef)


class MonitorCallback(BaseCallback):
    """0.monitor.csv in Stable-Baselines3's layout: one row per finished training episode."""

    COLUMNS = ("r", "l", "t", *EPISODE_FIGURES, "steps")

    def __init__(self, path: Path, until_steps: int) -> None:
        super().__init__()
        self._path = path
        self._until_steps = until_steps
        self._episodes: list[dict[str, Any]] = []

    def _on_training_start(self) -> None:
        kept: list[dict[str, str]] = []
        if self._path.exists():
            with self._path.open(encoding="utf-8", newline="") as file:
                file.readline()
                kept = [row for row in csv.DictReader(file) if int(row["steps"]) <= self._until_steps]
        with self._path.open("w", encoding="utf-8", newline="") as file:
            file.write("#" + json.dumps({"t_start": 0.0, "env_id": "rlgov/SimulatedServing-v0"}) + "\n")
            writer = csv.DictWriter(file, self.COLUMNS)
            writer.writeheader()
            writer.writerows(kept)

    def _on_step(self) -> bool:
        dones: NDArray[np.bool_] = self.locals["dones"]
        if dones.any():
            for i in np.flatnonzero(dones):
                self._episodes.append({**self.locals["infos"][i]["episode"], "steps": self.num_timesteps})
        return True

    def _on_rollout_end(self) -> None:
        if not self._episodes:
            return
        with self._path.open("a", encoding="utf-8", newline="") as file:
            csv.DictWriter(file, self.COLUMNS, extrasaction="ignore").writerows(self._episodes)
        record_episodes(self.logger, self._episodes)
        self._episodes.clear()


# ---------------------------------------------------------------------------------------------------
# People


@dataclass
class StopRequest:
    """Set by the first Ctrl-C or SIGTERM; a second one interrupts at once."""

    requested: bool = False
    say: Callable[[str], None] = field(default=lambda _: None)

    def on_signal(self, signal_number: int, _frame: FrameType | None) -> None:
        """Signal handler."""
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
        name = signal.Signals(signal_number).name
        self.say(f"{name}: saving a checkpoint, then stopping; once more to stop at once")


@contextmanager
def stop_on_signals(say: Callable[[str], None]) -> Iterator[StopRequest]:
    """Catch SIGINT and SIGTERM while training runs in the main thread."""
    stop = StopRequest(say=say)
    if threading.current_thread() is not threading.main_thread():
        yield stop  # Python delivers signals to the main thread only
        return
    previous = {number: signal.signal(number, stop.on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


class StopCallback(BaseCallback):
    """Ends training at the next step once asked to; the started rollout is discarded."""

    def __init__(self, stop: StopRequest, state: RunState) -> None:
        super().__init__()
        self._stop = stop
        self._state = state

    def _on_step(self) -> bool:
        if self._stop.requested:
            self._state.interrupted = True
            # Steps without an update do not count: they would shift every later milestone.
            self.model.num_timesteps = self._state.rollout_start_steps
            return False
        return True


class ProgressCallback(BaseCallback):
    """A bar on a terminal, a plain line every twentieth of the run elsewhere."""

    LINES = 20

    def __init__(
        self, total_steps: int, state: RunState, say: Callable[[str], None], *, terminal: bool
    ) -> None:
        super().__init__()
        self._total_steps = total_steps
        self._state = state
        self._say = say
        self._terminal = terminal
        self._bar: tqdm[Any] | None = None
        self._lines_said = 0

    def _on_training_start(self) -> None:
        self._lines_said = self.LINES * self.model.num_timesteps // self._total_steps
        if self._terminal:
            done = self.model.num_timesteps
            self._bar = tqdm(
                total=self._total_steps, initial=done, unit="step", unit_scale=True, desc="train"
            )

    def _on_step(self) -> bool:
        return True

    def _on_rollout_end(self) -> None:
        steps = self.model.num_timesteps
        if self._bar is not None:
            self._bar.set_postfix_str(self._status(), refresh=False)
            self._bar.update(steps - self._bar.n)
            return
        due = self.LINES * steps // self._total_steps
        if due > self._lines_said:
            self._lines_said = due
            self._say(f"{steps:,} of {self._total_steps:,} steps  {self._status()}")

    def _status(self) -> str:
        attainments = self._state.multipliers.attainments
        weights = self._state.multipliers.miss_weights
        parts = [
            f"worst attainment {min(attainments.values()):.2%}" if attainments else "no requests yet",
            f"miss weights {weights.min():.1f} to {weights.max():.1f}",
        ]
        if self._state.best is not None:
            best = self._state.best
            parts.append(f"best: saves {best['saving']:.1%} at {best['attainment']:.2%}")
        return ", ".join(parts)

    def _on_training_end(self) -> None:
        if self._bar is not None:
            self._bar.close()
