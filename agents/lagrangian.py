"""The Lagrange multiplier that turns "save energy at 99 % attainment" into one reward.

PI control of ln(multiplier) after Stooke, Achiam and Abbeel (Responsive Safety in Reinforcement
Learning by PID Lagrangian Methods, 2020). The error is relative to the allowed misses, so that 0.9 %
and 1.1 % misses pull equally hard whatever the target.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rlgov.agents.train_config import LagrangianSettings


@dataclass(slots=True)
class LagrangeMultiplier:
    """The weight of misses in the reward, and what it has seen."""

    settings: LagrangianSettings
    miss_weight: float = 0.0
    log_integral: float = 0.0
    recent: deque[tuple[float, float]] = field(default_factory=deque)  # (arrivals, misses) per rollout

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
        error = min(max((1.0 - attainment) / allowed - 1.0, lowest), highest)
        low, high = (math.log(bound) for bound in self.settings.miss_weight_bounds)
        self.log_integral = min(max(self.log_integral + self.settings.integral_gain * error, low), high)
        exponent = self.log_integral + self.settings.proportional_gain * error
        self.miss_weight = math.exp(min(max(exponent, low), high))
        return self.miss_weight

    def state(self) -> dict[str, object]:
        """JSON-serialisable state for a checkpoint."""
        return {
            "miss_weight": self.miss_weight,
            "log_integral": self.log_integral,
            "recent": [list(pair) for pair in self.recent],
        }

    @classmethod
    def restored(cls, settings: LagrangianSettings, state: dict[str, object]) -> LagrangeMultiplier:
        """Inverse of :meth:`state`."""
        recent = state["recent"]
        if not isinstance(recent, list):
            msg = f"recent must be a list of pairs, got {recent!r}"
            raise TypeError(msg)
        return cls(
            settings,
            float(str(state["miss_weight"])),
            float(str(state["log_integral"])),
            deque((float(a), float(m)) for a, m in recent),
        )
