"""A simulated vLLM deployment: virtual time, exact, bit-reproducible."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from rlgov.deployments.scenario import FixedScenario
from rlgov.errors import DeploymentError
from rlgov.records import Window
from rlgov.simulation.batch import SimulationBatch
from rlgov.simulation.physics import build_tables
from rlgov.workload.trace import Trace

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from rlgov.deployments.scenario import Scenario, ScenarioSampler
    from rlgov.records import Configuration, Limits, ServiceLevel
    from rlgov.simulation.batch import RequestLog
    from rlgov.simulation.profile import Profile
    from rlgov.simulation.tables import PhysicsTables

DRAIN_S = 120.0


class SimulatedDeployment:
    """One simulated deployment of ``profile`` under a workload.

    Args:
        profile: GPU, model and engine.
        workload: A trace to play from its beginning, or a sampler that gives each episode its own
            trace, physics, SLO and start (drawn with the seed given to :meth:`start`).
        service_level: The SLO when ``workload`` is a trace; by default the profile's.
        start: Configuration of the first window when ``workload`` is a trace; by default the fastest.
        tables: Physics when ``workload`` is a trace; by default the profile's nominal one.
        drain_s: How long to go on after the last arrival when requests are unfinished.
    """

    def __init__(
        self,
        profile: Profile,
        workload: Trace | ScenarioSampler,
        *,
        service_level: ServiceLevel | None = None,
        start: Configuration | None = None,
        tables: PhysicsTables | None = None,
        drain_s: float = DRAIN_S,
    ) -> None:
        base = profile.limits()
        self._limits = base if service_level is None else base.with_service_level(service_level)
        if isinstance(workload, Trace):
            tables = build_tables(profile) if tables is None else tables
            index = base.index(base.fastest if start is None else start)
            self._sampler: ScenarioSampler = FixedScenario(
                workload, tables, self._limits.service_level, index
            )
            capacity = max(len(workload), 1)
        else:
            self._sampler = workload
            tables = build_tables(profile)
            capacity = 1024
        self._drain_s = drain_s
        self._batch = SimulationBatch(base, 1, tables, capacity=capacity)
        self._scenario: Scenario | None = None

    @property
    def limits(self) -> Limits:
        """What may be asked for, under the SLO of the present episode."""
        return self._limits

    @property
    def finished(self) -> bool:
        """Whether the trace is over and every request done, or ``drain_s`` has passed since."""
        if self._scenario is None:
            return False
        over_s = float(self._batch.now_s[0]) - self._scenario.trace.duration_s
        return over_s >= 0 and (self._batch.unfinished[0] == 0 or over_s >= self._drain_s)

    def start(self, seed: int) -> Window:
        """Begin an episode and hold its start configuration for the first window."""
        self._scenario = self._sampler.sample(np.random.default_rng(seed))
        scenario = self._scenario
        self._limits = self._limits.with_service_level(scenario.service_level)
        self._batch.load(0, scenario.trace, scenario.tables, scenario.service_level, scenario.start)
        return Window.from_row(self._batch.advance_only(0, scenario.start))

    def advance(self, configuration: Configuration) -> Window:
        """Hold ``configuration`` for one interval."""
        if self._scenario is None:
            msg = "advance() before start(): call start() first"
            raise DeploymentError(msg)
        return Window.from_row(self._batch.advance_only(0, self._limits.index(configuration)))

    def close(self) -> None:
        """End the episode; a new one needs ``start``."""
        self._scenario = None

    def request_log(self) -> RequestLog:
        """What became of each request of the episode so far."""
        return self._batch.request_log(0)

    def hold(self, configuration: Configuration, windows: int) -> NDArray[np.float64]:
        """Hold one configuration for many windows in one compiled call; rows of shape (W, columns)."""
        if self._scenario is None:
            msg = "hold() before start(): call start() first"
            raise DeploymentError(msg)
        index = np.tile(np.array(self._limits.index(configuration), dtype=np.int64), (windows, 1))
        return self._batch.advance_windows(0, index)
