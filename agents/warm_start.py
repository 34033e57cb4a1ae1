"""A head start for PPO: imitate, for every load, the static setting that is best at that load.

Misses are rare and dear, energy differences between neighbouring clocks are small: from a random start
most of the training goes into finding out that low clocks are worth a try at all. So the policy first
learns by imitation what a lookup table knows that was filled by sweeping every (clock, TP) on training
traffic at a grid of loads. Targets are spread over neighbouring clocks, which leaves PPO room to explore
and tells the network that clocks are ordered. PPO then learns what no table has: to react.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING, cast

import numpy as np
import torch

from rlgov.records import Column
from rlgov.simulation.batch import SimulationBatch

if TYPE_CHECKING:
    from collections.abc import Iterator

    from gymnasium import spaces
    from numpy.typing import NDArray
    from torch.distributions import Categorical

    from rlgov.agents.ppo import Ppo
    from rlgov.deployments.scenario import EpisodeSampler
    from rlgov.envs.vec_env import ServingVecEnv
    from rlgov.records import ServiceLevel
    from rlgov.simulation.tables import PhysicsTables
    from rlgov.workload.trace import Trace

LOADS = (0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8)
SWEEP_S = (1200.0, 30_000.0)  # shortest and longest traffic of a sweep ...
SWEEP_REQUESTS = 2500  # ... which shall hold about so many requests
_STREAM = 0x57A12  # keeps sweeps apart from any other use of the same seed
_DRAIN_WINDOWS = 60


@dataclass(frozen=True, slots=True)
class ImitationSettings:
    """How the policy is fitted to the table."""

    windows: int = 600
    """Steps to follow the table, in every simulation."""
    epochs: int = 12
    """Passes over what was met."""
    learning_rate: float = 1e-3
    """Adam's, of this fit alone."""
    batch_size: int = 2048
    """Samples of a gradient step of this fit alone."""
    clock_spread: float = 0.7
    """Standard deviation of the clock target, in settings."""
    cap_share: float = 0.96
    """Probability that the target gives to the table's batch cap."""
    tp_share: float = 0.99
    """Probability that the target gives to the table's TP degree."""


@dataclass(frozen=True, slots=True, eq=False)
class ClockTable:
    """For each constraint group, load and TP degree the most frugal clock that holds the target.

    ``clock`` has shape (G, L, J) with the index of the clock, 0 where none holds the target;
    ``energy_j`` is what it spends, infinite where none holds it.
    """

    loads: NDArray[np.float64]
    clock: NDArray[np.int64]
    energy_j: NDArray[np.float64]

    def lookup(
        self, group: NDArray[np.int64], load: NDArray[np.float64], peak: NDArray[np.float64]
    ) -> NDArray[np.int64]:
        """Axis indices, shape (n, 3): TP by the peak load to come, clock by the present one."""
        present = np.argmin(np.abs(self.loads - load[:, None]), axis=1)
        highest = np.argmin(np.abs(self.loads - peak[:, None]), axis=1)
        energy_j = self.energy_j[group, highest]
        tp = np.where(np.isfinite(energy_j).any(axis=1), np.argmin(energy_j, axis=1), 0)
        index = np.zeros((group.size, 3), dtype=np.int64)
        index[:, 0] = self.clock[group, present, tp]
        index[:, 2] = tp
        return index


def sweep(sampler: EpisodeSampler, target_attainment: float, seed: int) -> ClockTable:
    """Try every (clock, TP) at every load of every group on training traffic."""
    limits = sampler.limits
    clocks, _, degrees = limits.axis_sizes
    shape = (len(sampler.groups), len(LOADS), degrees)
    best = np.zeros(shape, dtype=np.int64)
    energy_j = np.full(shape, np.inf)
    tried = np.zeros(shape[:2], dtype=np.bool_)
    batch = SimulationBatch(limits, 1, sampler.nominal)
    for group, level in _entries(sampler):
        rng = np.random.default_rng([_STREAM, seed])  # the same stretch of a trace at every load
        probe, _ = sampler.traffic(group, LOADS[level], SWEEP_S[0], rng)
        duration_s = min(max(SWEEP_REQUESTS / max(probe.mean_rate_per_s, 1e-6), SWEEP_S[0]), SWEEP_S[1])
        trace, service_level = sampler.traffic(group, LOADS[level], duration_s, rng)
        for clock, tp in product(range(clocks), range(degrees)):
            spent_j, attainment = _hold(batch, trace, sampler.nominal, service_level, (clock, 0, tp))
            if attainment >= target_attainment and spent_j < energy_j[group, level, tp]:
                energy_j[group, level, tp] = spent_j
                best[group, level, tp] = clock
        tried[group, level] = True
    _fill(best, energy_j, tried)
    return ClockTable(np.array(LOADS), best, energy_j)


def _entries(sampler: EpisodeSampler) -> Iterator[tuple[int, int]]:
    """Groups and the loads to try for each: those it covers, or all if it lies between two of the grid."""
    for group in range(len(sampler.groups)):
        covered = [level for level, load in enumerate(LOADS) if sampler.covers(group, load)]
        for level in covered or range(len(LOADS)):
            yield group, level


def _fill(best: NDArray[np.int64], energy_j: NDArray[np.float64], tried: NDArray[np.bool_]) -> None:
    """Give loads outside a group's range the entries of its nearest load."""
    for group in range(tried.shape[0]):
        known = np.flatnonzero(tried[group])
        for level in np.flatnonzero(~tried[group]):
            nearest = known[np.argmin(np.abs(known - level))]
            best[group, level] = best[group, nearest]
            energy_j[group, level] = energy_j[group, nearest]


def _hold(
    batch: SimulationBatch,
    trace: Trace,
    tables: PhysicsTables,
    service_level: ServiceLevel,
    held: tuple[int, int, int],
) -> tuple[float, float]:
    batch.load(0, trace, tables, service_level, held)
    windows = int(np.ceil(trace.duration_s / batch.limits.interval_s))
    rows = batch.advance_windows(0, np.tile(np.array(held, dtype=np.int64), (windows + _DRAIN_WINDOWS, 1)))
    log = batch.request_log(0)
    spent_j = float(rows[:windows, Column.ENERGY_J].sum())
    missed = log.missed | np.isnan(log.finish_s)
    return spent_j, 1.0 - float(missed.mean()) if missed.size else 1.0


def imitate(
    model: Ppo,
    env: ServingVecEnv,
    table: ClockTable,
    seed: int,
    settings: ImitationSettings = ImitationSettings(),
) -> float:
    """Fit the policy to the table on observations met while following it; returns the final loss.

    Args:
        model: A fresh PPO or MaskablePPO; only its policy network is changed.
        env: Training environment; it is left amid episodes, its counters at zero. Reset it before use.
        table: What to imitate.
        seed: Fixes episodes and the order of samples.
        settings: Of the fit.
    """
    clocks, caps, degrees = cast("spaces.MultiDiscrete", env.action_space).nvec.tolist()
    observations, labels = _follow(env, table, seed, settings.windows)
    x = torch.from_numpy(observations)
    targets = [
        torch.from_numpy(_soft(labels[:, 0], clocks, settings.clock_spread)),
        torch.from_numpy(_peaked(labels[:, 1], caps, settings.cap_share)),
        torch.from_numpy(_peaked(labels[:, 2], degrees, settings.tp_share)),
    ]
    parameters = [p for name, p in model.policy.named_parameters() if "value" not in name]
    optimizer = torch.optim.Adam(parameters, lr=settings.learning_rate)
    order = np.random.default_rng([_STREAM, seed])
    loss = torch.zeros(())
    for _ in range(settings.epochs):
        permutation = torch.from_numpy(order.permutation(x.shape[0]))
        for first in range(0, x.shape[0], settings.batch_size):
            chosen = permutation[first : first + settings.batch_size]
            heads = zip(targets, _heads(model, x[chosen]), strict=True)
            losses = (-(target[chosen] * head.logits).sum(dim=1).mean() for target, head in heads)
            loss = sum(losses, start=torch.zeros(()))
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            optimizer.step()
    return float(loss.detach())


def _heads(model: Ppo, observations: torch.Tensor) -> list[Categorical]:
    """The distribution of each axis, without a mask."""
    distribution = model.policy.get_distribution(observations)
    # MaskablePPO's name of the list, or PPO's
    heads = getattr(distribution, "distributions", None) or getattr(distribution, "distribution", None)
    return cast("list[Categorical]", heads)


def _follow(
    env: ServingVecEnv, table: ClockTable, seed: int, windows: int
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    env.seed(seed)
    observation = env.reset()
    observations, labels = [], []
    for _ in range(windows):
        wanted = table.lookup(*env.present_load())
        observations.append(observation.copy())
        labels.append(wanted)
        env.step_async(wanted)
        observation, _, _, _ = env.step_wait()
    env.totals()
    env.group_totals()
    return np.concatenate(observations), np.concatenate(labels)


def _soft(labels: NDArray[np.int64], size: int, spread: float) -> NDArray[np.float32]:
    distance = np.arange(size)[None, :] - labels[:, None]
    weight = np.exp(-0.5 * (distance / spread) ** 2) + 1e-3
    target: NDArray[np.float32] = (weight / weight.sum(axis=1, keepdims=True)).astype(np.float32)
    return target


def _peaked(labels: NDArray[np.int64], size: int, share: float) -> NDArray[np.float32]:
    if size == 1:
        return np.ones((labels.size, 1), dtype=np.float32)
    target = np.full((labels.size, size), (1 - share) / (size - 1), dtype=np.float32)
    target[np.arange(labels.size), labels] = share
    return target
