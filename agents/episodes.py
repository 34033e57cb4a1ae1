"""Which episodes are worth learning from."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from rlgov.deployments.scenario import attainment_of_fastest

if TYPE_CHECKING:
    import numpy as np

    from rlgov.deployments.scenario import Scenario, ScenarioSampler
    from rlgov.records import Limits


@dataclass(frozen=True, slots=True, eq=False)
class ServableEpisodes:
    """Episodes that the fastest setting serves well enough, begun at the fastest setting.

    Misses that no policy can avoid teach nothing, drown the avoidable ones, and would drive the
    Lagrange multiplier to its bound. In service an overload is the guard's case, not the policy's.
    """

    sampler: ScenarioSampler
    limits: Limits
    least_attainment: float
    attempts: int = 16  # then the best draw so far is taken, so that a hopeless range still ends

    def sample(self, rng: np.random.Generator) -> Scenario:
        """The first draw that is served well enough."""
        best: tuple[float, Scenario] | None = None
        for _ in range(self.attempts):
            scenario = replace(self.sampler.sample(rng), start=(0, 0, 0))
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
        return attainment_of_fastest(self.limits, scenario.tables, scenario.trace, scenario.service_level)
