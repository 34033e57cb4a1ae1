"""The Lagrange multiplier that turns "save energy at 99 % attainment" into one reward.

PI control of ln(multiplier) after Stooke, Achiam and Abbeel (Responsive Safety in Reinforcement
Learning by PID Lagrangian Methods, 2020). The error is relative to the allowed misses, so that 0.9 %
and 1.1 % misses pull equally hard whatever the target.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from rlgov.agents.train_config import LagrangianSettings


LEAD_BOUND: Final = 0.01


@dataclass(slots=True)
class LagrangeMultiplier:
    """The weight of misses in the reward, and what it has seen."""

    settings: LagrangianSettings
    miss_weight: float = 0.0
    log_integral: float = 0.0
    recent: deque[tuple[float, float]] = field(default_factory=deque)  # (arrivals, misses) per rollout
    lead: float = 0.0  # attainment of the deterministic policy on validation minus that of exploration

    def __post_init__(self) -> None:
        if not self.miss_weight:
            self.miss_weight = self.settings.miss_weight
            self.log_integral = math.log(self.settings.miss_weight)

    @property
    def attainment(self) -> float | None:
        """Attainment over the recent rollouts, None while no request has arrived."""
        arrivals = sum(a for a, _ in self.recent)
        if arrivals <= 0:
            return None
        return 1.0 - min(sum(m for _, m in self.recent) / arrivals, 1.0)

    def update(self, arrivals: float, misses: float) -> float:
        """Account for one rollout and return the miss weight of the next one."""
        self.recent.append((arrivals, misses))
        while len(self.recent) > self.settings.window_rollouts:
            self.recent.popleft()
        attainment = self.attainment
        if self.settings.kind == "fixed" or attainment is None:
            return self.miss_weight
        allowed = 1.0 - (self.settings.target_attainment + self.settings.margin)
        lowest, highest = self.settings.error_bounds
        error = min(max((1.0 - attainment - self.lead) / allowed - 1.0, lowest), highest)
        low, high = (math.log(bound) for bound in self.settings.miss_weight_bounds)
        self.log_integral = min(max(self.log_integral + self.settings.integral_gain * error, low), high)
        exponent = self.log_integral + self.settings.proportional_gain * error
        self.miss_weight = math.exp(min(max(exponent, low), high))
        return self.miss_weight

    def calibrate(self, validated: float) -> None:
        """Take into account what the deterministic policy attains on validation episodes.

        Exploration misses more, and validation traffic is other traffic: the constraint is meant for the
        policy as it will serve. Half of the difference is taken over each time, and no more than
        ``LEAD_BOUND``, since a validation attainment is a noisy number.
        """
        if self.attainment is not None:
            gap = min(max(validated - self.attainment, -LEAD_BOUND), LEAD_BOUND)
            self.lead += 0.5 * (gap - self.lead)

    def state(self) -> dict[str, Any]:
        """JSON-serialisable state for a checkpoint."""
        return {
            "miss_weight": self.miss_weight,
            "log_integral": self.log_integral,
            "lead": self.lead,
            "recent": [list(pair) for pair in self.recent],
        }

    @classmethod
    def restored(cls, settings: LagrangianSettings, state: dict[str, Any]) -> LagrangeMultiplier:
        """Inverse of :meth:`state`."""
        recent = deque((float(a), float(m)) for a, m in state["recent"])
        return cls(
            settings, float(state["miss_weight"]), float(state["log_integral"]), recent, float(state["lead"])
        )


class LagrangeMultipliers:
    """One multiplier for each constraint group, so that no workload pays for another one's misses."""

    def __init__(self, settings: LagrangianSettings, groups: tuple[str, ...]) -> None:
        self.groups = groups
        self.each = [LagrangeMultiplier(settings) for _ in groups]

    def update(self, arrivals: NDArray[np.float64], misses: NDArray[np.float64]) -> NDArray[np.float64]:
        """Account for one rollout, shapes (groups,); returns the miss weights of the next one."""
        for multiplier, arrived, missed in zip(self.each, arrivals, misses, strict=True):
            multiplier.update(float(arrived), float(missed))
        return self.miss_weights

    @property
    def miss_weights(self) -> NDArray[np.float64]:
        """Of every group."""
        return np.array([multiplier.miss_weight for multiplier in self.each])

    @property
    def attainments(self) -> dict[str, float]:
        """Recent attainment by group, without groups that had no request."""
        found = {group: m.attainment for group, m in zip(self.groups, self.each, strict=True)}
        return {group: attainment for group, attainment in found.items() if attainment is not None}

    def state(self) -> dict[str, Any]:
        """JSON-serialisable state for a checkpoint."""
        return {group: m.state() for group, m in zip(self.groups, self.each, strict=True)}

    def restore(self, settings: LagrangianSettings, state: dict[str, Any]) -> None:
        """Inverse of :meth:`state`. Raises KeyError when the groups differ."""
        self.each = [LagrangeMultiplier.restored(settings, state[group]) for group in self.groups]
