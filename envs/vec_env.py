"""N simulated deployments as one Stable-Baselines3 ``VecEnv``, stepped in one compiled call.

Row i behaves as a :class:`~rlgov.envs.serving_env.ServingEnv` over a simulated deployment with the same
scenario would: the same encoder, guard and reward, applied to all rows at once. A test compares them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from gymnasium import spaces
from stable_baselines3.common.vec_env import VecEnv

from rlgov.envs.guard import Guard, GuardLike, GuardSettings, NullGuard, Reason
from rlgov.envs.observation import FEATURES, HIGH, LOW, ObservationEncoder
from rlgov.envs.reward import DEFAULT_MISS_WEIGHT, Reference, RewardSettings, reward
from rlgov.errors import ConfigError, DeploymentError
from rlgov.records import Column
from rlgov.simulation.batch import SimulationBatch

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from numpy.typing import NDArray

    from rlgov.deployments.scenario import Scenario, ScenarioSampler
    from rlgov.records import Limits
    from rlgov.simulation.tables import PhysicsTables

_TOTALS = (
    ("arrivals", Column.ARRIVALS),
    ("misses", Column.MISSES),
    ("energy_j", Column.ENERGY_J),
    ("output_tokens", Column.OUTPUT_TOKENS),
)


class ServingVecEnv(VecEnv):
    """``n`` simulations with automatic reset.

    Every episode lasts ``windows`` steps after its first window, then it is truncated (serving does not
    end by itself): ``infos[i]["TimeLimit.truncated"]`` is True and ``terminal_observation`` is given.
    ``infos[i]["episode"]`` of a finished episode holds ``r, l, t``, ``attainment``, ``energy_ratio``
    (energy relative to the fastest setting on the same episode), ``ttft_p99_s`` and ``tpot_p99_s``.

    Args:
        limits: The action table; its SLO is overridden by each scenario's.
        sampler: Gives every episode its scenario.
        tables: Any physics of the right shape, to size the simulation.
        n: Number of simulations.
        windows: Steps of an episode.
        guard: Settings of the guard; None for none.
        reward_settings: Scales and bounds of the reward.
        seed: Of the scenarios; simulation i draws from its own stream.
        control_variate: Add to the learner's reward what the fastest setting spends in the same window. It
            does not depend on the actions, so it changes no policy's rank, and takes away the part of
            the reward that is only the traffic's.
        stagger: Let first episodes begin at different points, so that their ends do not coincide.
    """

    def __init__(  # noqa: PLR0913  # keyword arguments with defaults, each documented
        self,
        limits: Limits,
        sampler: ScenarioSampler,
        tables: PhysicsTables,
        n: int,
        *,
        windows: int = 300,
        guard: GuardSettings | None = GuardSettings(),  # noqa: B008  # frozen
        reward_settings: RewardSettings = RewardSettings(),  # noqa: B008  # frozen
        seed: int = 0,
        stagger: bool = True,
        control_variate: bool = False,
    ) -> None:
        if n < 1 or windows < 1:
            msg = f"a vectorised environment needs n >= 1 and windows >= 1, got {n} and {windows}"
            raise ConfigError(msg)
        self.limits = limits
        self.groups: tuple[str, ...] = getattr(sampler, "groups", ("all",))
        self.miss_weights = np.full(len(self.groups), DEFAULT_MISS_WEIGHT)
        self._group = np.zeros(n, dtype=np.int64)
        self._sampler = sampler
        self._windows = windows
        self._stagger = stagger
        self._control_variate = control_variate
        self._fastest_energy_j = np.zeros((n, windows))
        self._every = np.arange(n)
        self._guard: GuardLike = NullGuard(limits, n) if guard is None else Guard(guard, limits, n)
        self._encoder = ObservationEncoder(limits, n)
        self._reward_settings = reward_settings
        self._batch = SimulationBatch(limits, n, tables)
        self._fastest = SimulationBatch(limits, 1, tables)
        self.render_mode = None
        super().__init__(
            n,
            spaces.Box(LOW, HIGH, shape=(len(FEATURES),), dtype=np.float32),
            spaces.MultiDiscrete(self._guard.table.nvec),
        )
        self._scenarios: list[Scenario | None] = [None] * n
        self._service_levels = np.ones((n, 2))
        self._reference_energy_j = np.ones(n)
        self._reference_arrivals = np.ones(n)
        self._rows = np.zeros((n, len(Column)))
        self._index = np.zeros((n, 3), dtype=np.int64)
        self._steps = np.zeros(n, dtype=np.int64)
        self._lengths = np.zeros(n, dtype=np.int64)
        self._sums = np.zeros((n, 4))  # of the episode: reward, energy, arrivals, misses
        self._totals = np.zeros(len(_TOTALS) + 1)
        self._group_windows = np.zeros(len(self.groups))
        self._group_misses = np.zeros(len(self.groups))
        self._reasons = np.zeros(len(Reason), dtype=np.int64)
        self._actions = np.zeros((n, 3), dtype=np.int64)
        self.seed(seed)

    # ------------------------------------------------------------------ episodes

    def seed(self, seed: int | None = None) -> Sequence[int | None]:
        """Restart every simulation's stream of scenarios; takes effect at the next reset."""
        root = np.random.SeedSequence(seed)
        self._rngs = [np.random.default_rng(child) for child in root.spawn(self.num_envs)]
        return [seed] * self.num_envs

    def reset(self) -> NDArray[np.float32]:
        """Start an episode in every simulation."""
        everything = np.ones(self.num_envs, dtype=np.bool_)
        for i in range(self.num_envs):
            self._load(i)
            if self._stagger:
                self._lengths[i] = self._rngs[i].integers(1, self._windows + 1)
        self._begin(everything)
        return self._encoder.encode(self._rows, self._service_levels)

    def _load(self, i: int) -> None:
        scenario = self._sampler.sample(self._rngs[i])
        self._scenarios[i] = scenario
        self._group[i] = scenario.group
        level = scenario.service_level
        self._service_levels[i] = level.ttft_s, level.tpot_s
        self._fastest.load(0, scenario.trace, scenario.tables, level)
        rows = self._fastest.advance_windows(0, np.zeros((self._windows + 1, 3), dtype=np.int64))[1:]
        self._fastest_energy_j[i] = rows[:, Column.ENERGY_J]
        self._reference_energy_j[i] = rows[:, Column.ENERGY_J].mean()
        self._reference_arrivals[i] = max(rows[:, Column.ARRIVALS].sum(), 1.0) / self._windows
        self._batch.load(i, scenario.trace, scenario.tables, level, scenario.start)
        self._rows[i] = self._batch.advance_only(i, scenario.start)
        self._index[i] = scenario.start
        self._lengths[i] = self._windows
        self._steps[i] = 0
        self._sums[i] = 0.0

    def _begin(self, which: NDArray[np.bool_]) -> None:
        self._encoder.reset(which)
        self._guard.reset(which, self._service_levels)
        self._reference = Reference(self._reference_energy_j, self._reference_arrivals)

    def step_async(self, actions: NDArray[np.int64]) -> None:
        """Remember what to do next."""
        self._actions = actions

    def step_wait(
        self,
    ) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.bool_], list[dict[str, Any]]]:
        """Hold the guarded actions for one interval in every simulation."""
        if self._scenarios[0] is None:
            msg = "step() before reset(): call reset() first"
            raise DeploymentError(msg)
        applied, reasons = self._guard.apply(self._actions, self._rows)
        self._rows[:] = self._batch.advance(applied)
        previous, self._index = self._index, applied
        rows = self._rows
        rewards, _ = reward(
            rows,
            previous,
            applied,
            self._reference,
            self._reward_settings,
            self.miss_weights[self._group],
        )
        self._reasons += np.bincount(reasons, minlength=len(Reason))
        for k, (_, column) in enumerate(_TOTALS):
            self._totals[k] += rows[:, column].sum()
        self._totals[-1] += self._reference_energy_j.sum()
        # Each episode counts alike, however many requests it has: misses in shares of its own arrivals.
        np.add.at(self._group_windows, self._group, 1.0)
        np.add.at(self._group_misses, self._group, rows[:, Column.MISSES] / self._reference_arrivals)
        self._sums[:, 0] += rewards
        self._sums[:, 1] += rows[:, Column.ENERGY_J]
        self._sums[:, 2] += rows[:, Column.ARRIVALS]
        self._sums[:, 3] += rows[:, Column.MISSES]
        learner = rewards
        if self._control_variate:
            learner = rewards + self._fastest_energy_j[self._every, self._steps] / self._reference_energy_j
        self._steps += 1
        dones = self._steps >= self._lengths
        observations = self._encoder.encode(rows, self._service_levels)
        infos: list[dict[str, Any]] = [{} for _ in range(self.num_envs)]
        if dones.any():
            observations = self._restart(dones, observations, infos)
        return observations, learner.astype(np.float32), dones, infos

    def _restart(
        self, dones: NDArray[np.bool_], observations: NDArray[np.float32], infos: list[dict[str, Any]]
    ) -> NDArray[np.float32]:
        for i in np.flatnonzero(dones):
            infos[i] = {
                "terminal_observation": observations[i].copy(),
                "TimeLimit.truncated": True,
                "episode": self._episode(int(i)),
            }
            self._load(int(i))
        self._begin(dones)
        # Encoding advances every row's averages; a blind row stands still and repeats its observation.
        rows = self._rows.copy()
        rows[~dones, Column.BLIND] = 1.0
        return self._encoder.encode(rows, self._service_levels)

    def _episode(self, i: int) -> dict[str, float]:
        total_reward, energy_j, arrivals, misses = self._sums[i]
        steps = int(self._steps[i])
        log = self._batch.request_log(i)
        figures = {
            "r": float(total_reward),
            "l": steps,
            "t": 0.0,  # wall time has no place in a reproducible record
            "arrivals": float(arrivals),
            "attainment": 1.0 - min(misses / arrivals, 1.0) if arrivals > 0 else 1.0,
            "energy_ratio": float(energy_j / (self._reference_energy_j[i] * steps)),
        }
        for name, values in (("ttft_p99_s", log.ttft_s), ("tpot_p99_s", log.tpot_s)):
            known = values[~np.isnan(values)]
            figures[name] = float(np.quantile(known, 0.99)) if known.size else float("nan")
        return figures

    # ------------------------------------------------------------------ what training asks

    @property
    def window_rows(self) -> NDArray[np.float64]:
        """The last window of every simulation, shape (N, columns)."""
        return self._rows

    @property
    def service_levels(self) -> NDArray[np.float64]:
        """``[ttft_s, tpot_s]`` of every simulation's episode, shape (N, 2)."""
        return self._service_levels.copy()

    def action_masks(self) -> NDArray[np.bool_]:
        """What the guard would let through, flat over the axes, shape (N, settings)."""
        return self._guard.mask(self._rows)

    def totals(self) -> dict[str, float]:
        """Counters since the last call, summed over simulations; guard reasons by name."""
        result = {name: float(self._totals[k]) for k, (name, _) in enumerate(_TOTALS)}
        result["reference_energy_j"] = float(self._totals[-1])
        result |= {f"reason_{reason.name.lower()}": float(self._reasons[reason]) for reason in Reason}
        self._totals[:] = 0.0
        self._reasons[:] = 0
        return result

    def group_totals(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Since the last call, for each constraint group: windows, and misses in windows' worth of arrivals.

        Their ratio is the share of requests missed, each episode counting alike.
        """
        result = self._group_windows.copy(), self._group_misses.copy()
        self._group_windows[:] = 0.0
        self._group_misses[:] = 0.0
        return result

    def present_load(self) -> tuple[NDArray[np.int64], NDArray[np.float64], NDArray[np.float64]]:
        """Constraint group, present load and greatest load of every simulation's episode, shape (N,) each."""
        present = np.empty(self.num_envs)
        peak = np.empty(self.num_envs)
        for i, scenario in enumerate(self._scenarios):
            loads = scenario.loads if scenario is not None else (1.0,)
            at = self._steps[i] / self._windows * (len(loads) - 1)
            present[i] = np.interp(at, np.arange(len(loads)), loads)
            peak[i] = max(loads)
        return self._group.copy(), present, peak

    @property
    def miss_weight(self) -> float:
        """Mean lambda of the constraint groups; setting it sets all of them."""
        return float(self.miss_weights.mean())

    @miss_weight.setter
    def miss_weight(self, value: float) -> None:
        self.miss_weights[:] = value

    # ------------------------------------------------------------------ VecEnv's other duties

    def close(self) -> None:
        """Nothing to release."""

    def get_attr(self, attr_name: str, indices: int | Iterable[int] | None = None) -> list[Any]:
        """An attribute of the whole, once for each index."""
        value = getattr(self, attr_name)
        return [value for _ in self._get_indices(indices)]

    def set_attr(self, attr_name: str, value: Any, indices: int | Iterable[int] | None = None) -> None:  # noqa: ANN401, ARG002  # VecEnv's signature
        """Set an attribute of the whole."""
        setattr(self, attr_name, value)

    def env_method(
        self,
        method_name: str,
        *method_args: Any,  # noqa: ANN401  # VecEnv's signature
        indices: int | Iterable[int] | None = None,
        **method_kwargs: Any,  # noqa: ANN401  # VecEnv's signature
    ) -> list[Any]:
        """``action_masks`` by simulation; nothing else is a method of one simulation."""
        if method_name != "action_masks" or method_args or method_kwargs:
            msg = f"simulations have no method {method_name!r} of their own"
            raise AttributeError(msg)
        masks = self.action_masks()
        return [masks[i] for i in self._get_indices(indices)]

    def env_is_wrapped(
        self,
        wrapper_class: type[Any],  # noqa: ARG002  # VecEnv's signature
        indices: int | Iterable[int] | None = None,
    ) -> list[bool]:
        """Simulations are never wrapped."""
        return [False for _ in self._get_indices(indices)]
