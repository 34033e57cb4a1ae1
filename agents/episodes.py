"""Which episodes are worth learning from."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from itertools import chain
from typing import TYPE_CHECKING

from rlgov.deployments.scenario import attainment_at_full_clock
from rlgov.errors import ConfigError

if TYPE_CHECKING:
    import numpy as np

    from rlgov.deployments.scenario import EpisodeSampler, Scenario
    from rlgov.records import Limits
    from rlgov.simulation.tables import PhysicsTables


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


@dataclass(slots=True, eq=False)
class FixedEpisodes:
    """The same episodes in the same order, over and over.

    An environment of as many simulations as there are episodes, all of one length, plays every episode
    once between two resets.
    """

    scenarios: tuple[Scenario, ...]
    groups: tuple[str, ...]
    _next: int = field(default=0, init=False)

    def sample(self, rng: np.random.Generator) -> Scenario:  # noqa: ARG002  # nothing to draw
        """The next episode."""
        scenario = self.scenarios[self._next]
        self._next = (self._next + 1) % len(self.scenarios)
        return scenario


def fixed_episodes(
    episodes: ServableEpisodes, tables: PhysicsTables, per_group: int, rng: np.random.Generator
) -> FixedEpisodes:
    """``per_group`` episodes of every group, in the order of the groups, all with the physics ``tables``.

    Raises ConfigError when a group hardly ever comes up.
    """
    found: list[list[Scenario]] = [[] for _ in episodes.groups]
    for _ in range(_DRAWS_PER_EPISODE * per_group * len(found)):
        scenario = episodes.sample(rng)
        if len(found[scenario.group]) < per_group:
            found[scenario.group].append(replace(scenario, tables=tables))
        if all(len(chosen) == per_group for chosen in found):
            return FixedEpisodes(tuple(chain.from_iterable(found)), episodes.groups)
    scarce = [name for name, chosen in zip(episodes.groups, found, strict=True) if len(chosen) < per_group]
    msg = f"too few validation episodes of {', '.join(scarce)}; ask for fewer, or leave the workload out"
    raise ConfigError(msg)


_DRAWS_PER_EPISODE = 50
