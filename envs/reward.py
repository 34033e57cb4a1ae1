"""The reward: minus energy, minus lambda times SLO misses, minus the cost of switching.

Pure functions over window rows. Misses are counted by the deployment when they happen, requests past
their TTFT limit included, so deferring work never pays.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from rlgov.envs.action import CLOCK, TP
from rlgov.errors import ConfigError, DeploymentError
from rlgov.records import Column

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from rlgov.records import Limits

TERM_NAMES = ("energy", "miss", "switch", "clip")
"""Terms of the reward, which add up to it."""

UNMETERED = (
    "the deployment's windows hold no energy, so there is nothing to save: its GPUs have no meter; install "
    "the NVIDIA driver and nvidia-ml-py where it runs (rlgov doctor tells what is missing)"
)
"""What to do about windows without energy."""

DEFAULT_MISS_WEIGHT = 5.0
"""Lambda when nothing else is said: one missed request in a hundred costs as much as 5 % energy."""


@dataclass(frozen=True, slots=True)
class RewardSettings:
    """Scales and bounds of the reward."""

    switch_cost: float = 0.5
    """Cost of a TP switch, in mean windows of reference energy. (Its energy is metered besides.)"""
    clock_change_cost: float = 0.002
    """Cost of changing the clock."""
    miss_bound: float = 3.0
    """Misses of one window count up to so many times the mean arrivals of a window."""
    bound: float = 20.0
    """The reward lies within plus or minus this."""

    def __post_init__(self) -> None:
        if min(self.switch_cost, self.clock_change_cost) < 0 or min(self.miss_bound, self.bound) <= 0:
            msg = f"reward costs must not be negative and its bounds must be above 0, got {self}"
            raise ConfigError(msg)


@dataclass(frozen=True, slots=True, eq=False)
class Reference:
    """What the reward is relative to, of one episode or, as arrays of shape (n,), of n."""

    energy_j_per_window: NDArray[np.float64] | float
    """Mean energy of a window at the fastest configuration on the same episode."""
    arrivals_per_window: NDArray[np.float64] | float
    """Mean arrivals in a window of the episode."""

    def __post_init__(self) -> None:
        values = (self.energy_j_per_window, self.arrivals_per_window)
        if not all(np.all(np.asarray(value) > 0) for value in values):
            msg = f"a reward reference must be above 0, got {self}; an episode without load needs another one"
            raise ConfigError(msg)

    @classmethod
    def nominal(cls, limits: Limits) -> Reference:
        """A stand-in where no reference run was made: all GPUs at half their TDP, one arrival a second."""
        return cls(0.5 * limits.tdp_w * limits.allotted_gpus * limits.interval_s, limits.interval_s)


def reward(
    rows: NDArray[np.float64],
    previous_index: NDArray[np.int64],
    applied_index: NDArray[np.int64],
    reference: Reference,
    settings: RewardSettings,
    miss_weight: NDArray[np.float64] | float,
) -> tuple[NDArray[np.float64], dict[str, NDArray[np.float64]]]:
    """Reward of the windows in ``rows``, shape (n,), and its terms by name.

    Args:
        rows: Windows in which the applied configuration was held, shape (n, len(WINDOW_FIELDS)).
        previous_index: Indices applied in the window before, shape (n, 3).
        applied_index: Indices applied in this window.
        reference: What energy and misses are relative to.
        settings: Scales and bounds.
        miss_weight: Lambda, the price of missing as many requests as arrive in a mean window.

    A blind window has no energy and no misses that anybody knows of: its terms are 0.

    Raises:
        DeploymentError: A window that is not blind has no energy, because nothing meters the deployment.
    """
    missing = rows[:, Column.BLIND] != 0.0
    if (np.isnan(rows[:, Column.ENERGY_J]) & ~missing).any():
        raise DeploymentError(UNMETERED)
    energy = rows[:, Column.ENERGY_J] / reference.energy_j_per_window
    np.negative(energy, out=energy)
    miss = np.minimum(rows[:, Column.MISSES] / reference.arrivals_per_window, settings.miss_bound)
    miss *= -miss_weight
    changed = previous_index != applied_index
    switch = settings.switch_cost * changed[:, TP]
    switch += settings.clock_change_cost * changed[:, CLOCK]
    np.negative(switch, out=switch)
    if missing.any():
        for term in (energy, miss, switch):
            term[missing] = 0.0
    total = energy + miss
    total += switch
    bounded = np.minimum(np.maximum(total, -settings.bound), settings.bound)
    return bounded, {"energy": energy, "miss": miss, "switch": switch, "clip": bounded - total}
