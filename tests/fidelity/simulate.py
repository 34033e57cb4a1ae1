"""The same traffic in the simulator, and what it says an engine could just serve."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from rlgov.deployments.simulated import SimulatedDeployment
from rlgov.records import Configuration
from rlgov.simulation.profile import Profile
from rlgov.workload.trace import Trace
from tests.fidelity.compare import Latencies
from tests.fidelity.profile import CLOCK_MHZ

DRAIN_S = 3600.0
WINDOWS = 10  # held at once


@dataclass(frozen=True, slots=True)
class Frontend:
    """Constant times outside the engine's loop, not in the simulator: HTTP, tokenising, the client."""

    before_s: float  # from the moment a request is due until the scheduler sees it
    first_s: float  # from the end of an iteration until the client has its token
    last_s: float  # from the end of the last iteration until the client has the end of the answer


def simulate(profile: Profile, trace: Trace, batch_cap: int, frontend: Frontend) -> Latencies:
    """Latencies as a client sees them.

    Raises:
        RuntimeError: The simulated engine does not get through the traffic.
    """
    shifted = Trace(
        trace.name,
        trace.arrival_s + frontend.before_s,
        trace.prompt_tokens.copy(),
        trace.output_tokens.copy(),
        trace.prefix_hit_tokens.copy(),
        trace.duration_s + frontend.before_s,
    )
    configuration = Configuration(CLOCK_MHZ, batch_cap, 1)
    deployment = SimulatedDeployment(profile, shifted, start=configuration, drain_s=DRAIN_S)
    deployment.start(0)
    while not deployment.finished:
        deployment.hold(configuration, WINDOWS)
    log = deployment.request_log()
    deployment.close()
    if np.isnan(log.finish_s).any():
        msg = f"{int(np.isnan(log.finish_s).sum())} requests of {trace.name} do not end in the simulator"
        raise RuntimeError(msg)
    first_s = log.first_token_s + frontend.first_s
    end_s = log.finish_s + frontend.last_s
    return Latencies(
        ttft_s=first_s - trace.arrival_s,
        tpot_s=np.where(trace.output_tokens > 1, end_s - first_s, np.nan)
        / np.maximum(trace.output_tokens - 1, 1),
        e2e_s=end_s - trace.arrival_s,
    )


def capacity_per_s(profile: Profile, trace: Trace, batch_cap: int) -> float:
    """Requests a second when all of them are there from the beginning."""
    together = Trace(
        trace.name,
        np.zeros(len(trace)),
        trace.prompt_tokens.copy(),
        trace.output_tokens.copy(),
        trace.prefix_hit_tokens.copy(),
        0.0,
    )
    ends = simulate(profile, together, batch_cap, Frontend(0.0, 0.0, 0.0)).e2e_s
    return len(trace) / float(ends.max())
