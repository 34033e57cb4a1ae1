"""Simulated episodes by the name of their workload: what the registered environment plays."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from rlgov.deployments.scenario import FixedScenario, Scenario
from rlgov.errors import ConfigError
from rlgov.simulation.physics import build_tables
from rlgov.workload.readers import read_trace
from rlgov.workload.synthesis import SPECS, synthesize
from rlgov.workload.trace import Trace

if TYPE_CHECKING:
    import numpy as np

    from rlgov.deployments.scenario import ScenarioSampler
    from rlgov.records import ServiceLevel
    from rlgov.simulation.profile import Profile
    from rlgov.simulation.tables import PhysicsTables
    from rlgov.workload.synthesis import SynthesisSpec


@dataclass(frozen=True, slots=True, eq=False)
class FreshEpisodes:
    """Every episode draws its own requests from a synthetic workload; physics and SLO stay."""

    spec: SynthesisSpec
    tables: PhysicsTables
    service_level: ServiceLevel

    def sample(self, rng: np.random.Generator) -> Scenario:
        """The scenario of one episode."""
        return Scenario(synthesize(self.spec, rng), self.tables, self.service_level)


def named_episodes(
    profile: Profile, trace: str | Trace, *, slo_scale: float, rate_scale: float, episode_s: float
) -> ScenarioSampler:
    """Episodes of ``episode_s`` seconds of a workload given by name, by path or as a trace.

    Raises:
        ConfigError: Nothing is known by that name, or a scale is not above 0.
    """
    if not (slo_scale > 0 and rate_scale > 0 and episode_s > 0):
        msg = f"slo_scale, rate_scale and episode_s must be above 0: {slo_scale}, {rate_scale}, {episode_s}"
        raise ConfigError(msg)
    tables = build_tables(profile)
    service_level = profile.limits().service_level.scaled(slo_scale)
    if isinstance(trace, str) and trace in SPECS:
        spec = SPECS[trace]
        spec = replace(spec, rate_per_s=spec.rate_per_s * rate_scale, duration_s=episode_s)
        return FreshEpisodes(spec, tables, service_level)
    if not isinstance(trace, Trace):
        if not Path(trace).exists():
            msg = f"trace {trace!r} is neither a file nor one of {', '.join(sorted(SPECS))}"
            raise ConfigError(msg)
        trace = read_trace(Path(trace))
    played = trace.slice(0.0, episode_s * rate_scale).scaled(rate_scale)
    return FixedScenario(played, tables, service_level)
