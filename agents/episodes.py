"""Which episodes are worth learning from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from rlgov.deployments.scenario import attainment_at_full_clock

if TYPE_CHECKING:
    import numpy as np

    from rlgov.deployments.scenario import EpisodeSampler, Scenario
    from rlgov.records import Limits


@dataclass(frozen=True, slots=True, eq=False)
class ServableEpisodes:
    """Episodes that the fastest setting serves well enough.

    Misses that no policy can avoid teach nothing, drown the avoidable ones, and would drive the
    Lagrange multiplier to its bound. In service an overload is the guard's case, not the policy's.
    """

    sampler: EpisodeSampler
    limits: Limits
    least_attainment: float
    attempts: int = 16  # then the best draw so far is taken, so that a hopeless range still ends

    @property
    def groups(self) -> tuple[str, ...]:
        """Constraint groups, which stay what they are."""
        return self.sampler.groups

    def sample(self, rng: np.random.Generator) -> Scenario:
        """The first draw that is served well enough."""
        best: tuple[float, Scenario] | None = None
        for _ in range(self.attempts):
            scenario = self.sampler.sample(rng)
            attainment = self._attainment(scenario)
            if best is None or attainment > best[0]:
                best = attainment, scenario
            if attainment >= self.least_attainment:
                break
        if best is None:
            msg = f"attempts must be at least 1, got {self.attempts}"
            raise ValueError(msg)
        return best[1]

    def _attainment(self, scenario: Scenario) -> float:
        if len(scenario.trace) == 0:
            return 1.0
        return attainment_at_full_clock(self.limits, scenario.tables, scenario.trace, scenario.service_level)
