"""A learned policy that steps aside where it has never been: a baseline decides in its place (simplex).

How far an observation lies from what training saw is one number, 1 at the threshold: the worse of the
Mahalanobis distance to the training observations and of how far a single feature lies outside its box of
quantiles. The bundle holds both statistics. The baseline follows the deployment all the time, so it is ready
when it is called.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np

from rlgov.agents.baselines.ecofreq import EcoFreqPolicy, EcoFreqSettings
from rlgov.agents.bundle import RIDGE
from rlgov.envs.action import TP, ActionTable
from rlgov.errors import ConfigError
from rlgov.records import Column

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from rlgov.agents.bundle import BundlePolicy, ObservationStatistics
    from rlgov.agents.policy import Policy
    from rlgov.records import Configuration, Limits
    from rlgov.simulation.tables import PhysicsTables

STD_FLOOR: Final = 0.05
"""Features that hardly moved in training count as if they had moved this much."""


@dataclass(frozen=True, slots=True)
class FallbackSettings:
    """When the baseline takes over, and when it gives back. Windows count as they come."""

    distance: float = 3.0
    """Mahalanobis distance of score 1, in units of the square root of the number of features."""
    outside: float = 10.0
    """Score 1 for a single feature: so many standard deviations outside its box of quantiles."""
    at_once: float = 2.0
    """The baseline takes over at once above this score ..."""
    enter_windows: int = 5
    """... and after so many windows in a row above 1."""
    leave_score: float = 0.8
    """The learned policy comes back after ..."""
    leave_windows: int = 30
    """... so many windows in a row below that score."""

    def __post_init__(self) -> None:
        if not (
            self.distance > 0
            and self.outside > 0
            and self.at_once >= 1
            and 0 < self.leave_score <= 1
            and self.enter_windows >= 1
            and self.leave_windows >= 1
        ):
            msg = f"fallback settings must be above 0, leave_score at most 1, at_once at least 1: {self}"
            raise ConfigError(msg)


class Novelty:
    """Scores observations by the statistics of a bundle; 1 is the threshold.

    Args:
        statistics: Of the training observations.
        settings: What score 1 means.
    """

    def __init__(self, statistics: ObservationStatistics, settings: FallbackSettings) -> None:
        size = statistics.mean.size
        self._mean, self._low, self._high = statistics.mean, statistics.low, statistics.high
        self._inverse = np.linalg.inv(statistics.covariance + RIDGE * np.eye(size))
        self._far = settings.distance * math.sqrt(size)
        self._per_std = 1.0 / (np.maximum(statistics.std, STD_FLOOR) * settings.outside)

    def score(self, observation: NDArray[np.float32]) -> NDArray[np.float64]:
        """Of each row; infinite where a row is not finite."""
        values = observation.astype(np.float64)
        sound: NDArray[np.bool_] = np.asarray(np.isfinite(values).all(axis=1))
        values = np.where(sound[:, None], values, self._mean)
        centred = values - self._mean
        squared = np.maximum(((centred @ self._inverse) * centred).sum(axis=1), 0.0)
        outside = np.maximum(np.maximum(self._low - values, values - self._high), 0.0) * self._per_std
        score: NDArray[np.float64] = np.maximum(np.sqrt(squared) / self._far, outside.max(axis=1))
        score[~sound] = np.inf
        return score

    def farthest(self, observation: NDArray[np.float32]) -> int:
        """The feature of one observation that lies farthest outside its box of quantiles."""
        values = observation.astype(np.float64)
        outside = np.maximum(self._low - values, values - self._high) * self._per_std
        return int(np.nanargmax(np.where(np.isfinite(outside), outside, np.inf)))


class FallbackPolicy:
    """The learned policy where it is at home, the baseline elsewhere, with hysteresis.

    Args:
        learned: Decides as long as observations resemble its training.
        baseline: Decides otherwise, but leaves the TP degree alone.
        settings: When they take turns.
    """

    guarded = True

    def __init__(
        self,
        learned: BundlePolicy,
        baseline: Policy,
        settings: FallbackSettings = FallbackSettings(),
    ) -> None:
        self.learned = learned
        self.baseline = baseline
        self.settings = settings
        self.novelty = Novelty(learned.bundle.statistics, settings)
        self.score: NDArray[np.float64] = np.zeros(0)
        """Of each row of the last decision; 1 is the threshold."""
        self.fallen_back: NDArray[np.bool_] = np.zeros(0, dtype=np.bool_)
        """Rows in which the baseline decided last."""
        self.probability: NDArray[np.float64] = np.zeros(0)
        """Of each decision under the learned policy; NaN where the baseline decided."""
        self._table: ActionTable | None = None
        self._above: NDArray[np.int64] = np.zeros(0, dtype=np.int64)
        self._below: NDArray[np.int64] = np.zeros(0, dtype=np.int64)

    @property
    def name(self) -> str:
        """The learned policy's."""
        return self.learned.name

    @property
    def digest(self) -> str:
        """The bundle's, for ``Decision.policy_digest``."""
        return self.learned.digest

    def adapt(self, time_scale: float) -> None:
        """Let the baseline predict times by this factor; the learned policy is left as it is."""
        if isinstance(self.baseline, EcoFreqPolicy):
            self.baseline.time_scale = time_scale

    def start_configuration(self, limits: Limits) -> Configuration:
        """The learned policy's."""
        return self.learned.start_configuration(limits)

    def start(self, limits: Limits, n: int) -> None:
        """Forget the last episode; the learned policy is in charge.

        Raises:
            BundleError: The deployment offers other actions than the policy was trained on.
        """
        self.learned.start(limits, n)
        self.baseline.start(limits, n)
        self._table = ActionTable(limits)
        self.score = np.zeros(n)
        self.fallen_back = np.zeros(n, dtype=np.bool_)
        self.probability = np.full(n, np.nan)
        self._above = np.zeros(n, dtype=np.int64)
        self._below = np.zeros(n, dtype=np.int64)

    def decide(
        self, observation: NDArray[np.float32], rows: NDArray[np.float64], mask: NDArray[np.bool_]
    ) -> NDArray[np.int64]:
        """Index per axis, shape (n, 3)."""
        if self._table is None:
            msg = f"{self.name}: call start(limits, n) before decide()"
            raise ConfigError(msg)
        self._take_turns(observation, rows)
        asked, probability = self.learned.act(observation, mask)
        plain = self.baseline.decide(observation, rows, mask)
        plain[:, TP] = self._table.in_force(rows)[:, TP]
        self.probability = np.where(self.fallen_back, np.nan, probability)
        return np.where(self.fallen_back[:, None], plain, asked)

    def _take_turns(self, observation: NDArray[np.float32], rows: NDArray[np.float64]) -> None:
        settings = self.settings
        # A window that was not seen repeats the last observation: that is no news either way.
        seen = (rows[:, Column.BLIND] == 0.0) & ~np.isnan(rows[:, Column.ENERGY_J])
        self.score = self.novelty.score(observation)
        above, below = self.score > 1.0, self.score < settings.leave_score
        self._above = np.where(seen, np.where(above, self._above + 1, 0), self._above)
        self._below = np.where(seen, np.where(below, self._below + 1, 0), self._below)
        enter = seen & ((self._above >= settings.enter_windows) | (self.score > settings.at_once))
        leave = self._below >= settings.leave_windows
        self.fallen_back = enter | (self.fallen_back & ~leave)


def with_fallback(
    learned: BundlePolicy,
    tables: PhysicsTables,
    limits: Limits,
    settings: FallbackSettings = FallbackSettings(),
) -> FallbackPolicy:
    """The learned policy with EcoFreq over the profile's tables behind it, at the largest batch cap.

    EcoFreq keeps a fifth of both limits in reserve: it steps in where nobody knows what comes.
    """
    lowest_mhz = limits.sm_clocks_mhz[-1]
    baseline = EcoFreqPolicy(EcoFreqSettings(margin=-0.2, min_clock_mhz=lowest_mhz, guarded=True), tables)
    return FallbackPolicy(learned, baseline, settings)
