"""One policy over one stretch of traffic: lead-in, counted span, drain.

The lead-in is played first and not counted, so that an adaptive policy has left its fastest start when
counting begins. After the span no request arrives; the run goes on until nothing is left to serve, at
most ``drain_s``, and its energy counts. What is unserved by then never finished, and is a miss.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

import numpy as np

from rlgov.agents.baselines.static import static_name
from rlgov.agents.statistics import quantile
from rlgov.envs.guard import GuardSettings, Reason
from rlgov.envs.serving_env import ServingEnv
from rlgov.errors import ConfigError
from rlgov.records import Column
from rlgov.workload.trace import Trace

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from rlgov.agents.policy import Policy
    from rlgov.deployments.base import Deployment
    from rlgov.records import Configuration, Limits
    from rlgov.simulation.batch import SimulationBatch
    from rlgov.simulation.tables import PhysicsTables

DRAIN_S = 120.0
LEAD_IN_S = 300.0
_SLACK = 1e-6  # of an interval: absorbs the rounding of window starts


class RequestLog(Protocol):
    """What became of every request of an episode; aligned arrays in order of arrival, NaN: never."""

    @property
    def arrival_s(self) -> NDArray[np.float64]:
        """Arrivals on the time axis of the windows."""
        ...

    @property
    def first_token_s(self) -> NDArray[np.float64]:
        """First tokens."""
        ...

    @property
    def finish_s(self) -> NDArray[np.float64]:
        """Last tokens."""
        ...

    @property
    def output_tokens(self) -> NDArray[np.int64]:
        """Tokens asked for."""
        ...

    @property
    def missed(self) -> NDArray[np.bool_]:
        """SLO misses found so far."""
        ...


@dataclass(frozen=True, slots=True)
class Schedule:
    """When an episode counts. Times are of the episode, after rate scaling."""

    lead_s: float
    span_s: float
    drain_s: float = DRAIN_S

    def __post_init__(self) -> None:
        if not (self.lead_s >= 0 and self.span_s > 0 and self.drain_s >= 0):
            msg = f"an episode needs lead_s >= 0, span_s > 0 and drain_s >= 0, got {self}"
            raise ConfigError(msg)

    @property
    def span_end_s(self) -> float:
        """When the last counted request may arrive."""
        return self.lead_s + self.span_s

    @property
    def end_s(self) -> float:
        """When the episode is cut off."""
        return self.span_end_s + self.drain_s


def cut(
    trace: Trace,
    *,
    interval_s: float,
    from_s: float = 0.0,
    to_s: float | None = None,
    rate_scale: float = 1.0,
    lead_in_s: float | None = None,
    drain_s: float = DRAIN_S,
) -> tuple[Trace, Schedule]:
    """The traffic of an episode and its schedule.

    Args:
        trace: Source of requests.
        interval_s: The control interval; the lead-in is a whole number of intervals.
        from_s: Begin of the counted span, in the trace's own time.
        to_s: Its end; by default the end of the trace.
        rate_scale: How many times as fast the requests arrive.
        lead_in_s: Played time before the span; by default as much as the trace has, up to 300 s.
        drain_s: How long to go on after the span at most.

    Returns:
        The requests of lead-in and span, and when what counts.
    """
    end_s = trace.duration_s if to_s is None else min(to_s, trace.duration_s)
    if not (math.isfinite(rate_scale) and rate_scale > 0):
        msg = f"rate_scale must be above 0, got {rate_scale}"
        raise ConfigError(msg)
    if not 0 <= from_s < end_s:
        msg = (
            f"trace {trace.name} lasts {trace.duration_s:g} s: cannot replay {from_s:g} s to {end_s:g} s; "
            "give 0 <= from_s < to_s within it"
        )
        raise ConfigError(msg)
    available_s = from_s / rate_scale
    wanted_s = min(available_s, LEAD_IN_S if lead_in_s is None else lead_in_s)
    if wanted_s < 0:
        msg = f"lead_in_s must not be negative, got {lead_in_s}"
        raise ConfigError(msg)
    lead_s = math.floor(wanted_s / interval_s + _SLACK) * interval_s
    part = trace.slice(max(0.0, from_s - lead_s * rate_scale), end_s).scaled(rate_scale)
    schedule = Schedule(lead_s, (end_s - from_s) / rate_scale, drain_s)
    if part.arrival_s.size == 0 or part.arrival_s[-1] < lead_s:
        msg = f"no request of {trace.name} arrives between {from_s:g} s and {end_s:g} s; choose another slice"
        raise ConfigError(msg)
    # The trace lasts until the end of the drain, so that the deployment does not end before it.
    episode = Trace(
        part.name,
        part.arrival_s.copy(),
        part.prompt_tokens.copy(),
        part.output_tokens.copy(),
        part.prefix_hit_tokens.copy(),
        schedule.end_s,
    )
    return episode, schedule


@dataclass(frozen=True, slots=True, eq=False)
class Requests:
    """Counted requests; times from the begin of the span, NaN where it never happened."""

    arrival_s: NDArray[np.float64]
    first_token_s: NDArray[np.float64]
    finish_s: NDArray[np.float64]
    output_tokens: NDArray[np.int64]
    missed: NDArray[np.bool_]

    @property
    def ttft_s(self) -> NDArray[np.float64]:
        """Arrival to first token."""
        return self.first_token_s - self.arrival_s

    @property
    def tpot_s(self) -> NDArray[np.float64]:
        """Mean time per output token after the first; NaN for answers of one token."""
        steps = np.where(self.output_tokens > 1, self.output_tokens - 1.0, np.nan)
        return (self.finish_s - self.first_token_s) / steps

    def digest(self) -> str:
        """sha256 over every request's fate, to the last bit."""
        sha = hashlib.sha256()
        for array in (self.arrival_s, self.first_token_s, self.finish_s):
            # one bit pattern for NaN, and one byte order, on every machine
            sha.update(np.where(np.isnan(array), np.nan, array).astype("<f8").tobytes())
        sha.update(self.output_tokens.astype("<i8").tobytes())
        sha.update(self.missed.astype("u1").tobytes())
        return sha.hexdigest()


@dataclass(frozen=True, slots=True, eq=False)
class Run:
    """What one policy did with the counted span and the drain after it."""

    policy: str
    limits: Limits
    schedule: Schedule
    rows: NDArray[np.float64]  # (T, len(WINDOW_FIELDS)); start_s counts from the begin of the span
    reasons: NDArray[np.int8]  # (T,) why the configuration of each window was chosen
    before: Configuration  # in force when the span began
    requests: Requests

    @property
    def energy_j(self) -> float:
        """Energy of all allotted GPUs, drain included."""
        # fsum rounds once, so the sum does not depend on the order of additions
        return math.fsum(self.rows[:, Column.ENERGY_J])

    def renamed(self, policy: str) -> Run:
        """The same run under another name."""
        return replace(self, policy=policy)


@dataclass(frozen=True, slots=True)
class Figures:
    """The figures of one run. Latencies are over the requests that reached the point in question."""

    energy_j: float
    j_per_output_token: float | None
    slo_attainment: float
    arrivals: int
    served: int
    unserved: int
    ttft_p50_s: float | None
    ttft_p99_s: float | None
    tpot_p50_s: float | None
    tpot_p99_s: float | None
    switches: int


def figures(run: Run) -> Figures:
    """Reduce a run to its figures."""
    requests = run.requests
    tokens = math.fsum(run.rows[:, Column.OUTPUT_TOKENS])
    arrivals = int(requests.arrival_s.size)
    served = int(np.count_nonzero(np.isfinite(requests.finish_s)))
    degrees: NDArray[np.float64] = np.append(float(run.before.tp_degree), run.rows[:, Column.TP_DEGREE])
    degrees = degrees[np.isfinite(degrees)]
    return Figures(
        energy_j=run.energy_j,
        j_per_output_token=run.energy_j / tokens if tokens > 0 else None,
        slo_attainment=(arrivals - int(np.count_nonzero(requests.missed))) / arrivals,
        arrivals=arrivals,
        served=served,
        unserved=arrivals - served,
        ttft_p50_s=quantile(requests.ttft_s, 0.5),
        ttft_p99_s=quantile(requests.ttft_s, 0.99),
        tpot_p50_s=quantile(requests.tpot_s, 0.5),
        tpot_p99_s=quantile(requests.tpot_s, 0.99),
        switches=int(np.count_nonzero(np.diff(degrees))),
    )


def play(
    deployment: Deployment,
    policy: Policy,
    schedule: Schedule,
    *,
    seed: int = 0,
    guard: GuardSettings | None = None,
    name: str | None = None,
) -> Run:
    """Put one episode through a policy.

    Args:
        deployment: Must offer ``request_log()`` once the episode has been played.
        policy: Asked once an interval.
        schedule: What counts.
        seed: Handed to the deployment.
        guard: Settings for policies that want a guard; the default ones if None. A policy that says it
            is not guarded is never held.
        name: Name of the run; the policy's by default.

    Returns:
        The counted part of the episode.
    """
    held = (guard or GuardSettings()) if policy.guarded else None
    env = ServingEnv(deployment, guard=held)
    try:
        rows, reasons = _roll(env, policy, schedule, seed)
        log = _request_log(deployment)
        limits = deployment.limits
    finally:
        env.close()
    return counted(name or policy.name, limits, schedule, rows, reasons, log)


def hold(
    batch: SimulationBatch,
    trace: Trace,
    tables: PhysicsTables,
    schedule: Schedule,
    configuration: Configuration,
) -> Run:
    """One episode under one setting: nothing is decided in it, so it is a single compiled call.

    ``batch`` is scratch space of one simulation, whose limits say what is offered and the SLO.
    """
    limits = batch.limits
    index = limits.index(configuration)
    batch.load(0, trace, tables, limits.service_level, index)
    count = math.ceil(schedule.end_s / limits.interval_s - _SLACK)
    rows = batch.advance_windows(0, np.tile(np.array(index, dtype=np.int64), (count, 1)))
    ended = np.flatnonzero(is_over(rows, schedule.span_end_s, schedule.end_s))
    length = int(ended[0]) + 1 if ended.size else count
    reasons = np.zeros(length, dtype=np.int8)
    return counted(static_name(configuration), limits, schedule, rows[:length], reasons, batch.request_log(0))


def _roll(
    env: ServingEnv, policy: Policy, schedule: Schedule, seed: int
) -> tuple[NDArray[np.float64], NDArray[np.int8]]:
    observation, info = env.reset(seed=seed)
    policy.start(env.limits, 1)
    rows = [info["window"].to_row()]
    reasons = [Reason.POLICY]
    ended = False
    while not (ended or is_over(rows[-1], schedule.span_end_s, schedule.end_s)):
        asked = policy.decide(observation[None], rows[-1][None], info["action_mask"][None])
        observation, _, terminated, truncated, info = env.step(asked[0])
        ended = bool(terminated or truncated)
        rows.append(info["window"].to_row())
        reasons.append(Reason[info["reason"]])
    return np.array(rows), np.array(reasons, dtype=np.int8)


def is_over(
    rows: NDArray[np.float64],
    span_end_s: float | NDArray[np.float64],
    end_s: float | NDArray[np.float64],
) -> NDArray[np.bool_]:
    """Whether an episode ends with a window: cut off, or nothing left to serve after the span.

    Args:
        rows: Window rows, columns last.
        span_end_s: When the last counted request may arrive, for all rows or row by row.
        end_s: When the episode is cut off.
    """
    slack_s = _SLACK * rows[..., Column.DURATION_S]
    window_end_s = rows[..., Column.START_S] + rows[..., Column.DURATION_S]
    drained = (rows[..., Column.RUNNING] == 0) & (rows[..., Column.WAITING] == 0)
    over = (window_end_s >= end_s - slack_s) | ((window_end_s >= span_end_s - slack_s) & drained)
    return np.asarray(over)


def _request_log(deployment: Deployment) -> RequestLog:
    request_log = getattr(deployment, "request_log", None)
    if request_log is None:
        msg = f"{type(deployment).__name__} keeps no request log; replay needs a simulated deployment"
        raise ConfigError(msg)
    log: RequestLog = request_log()
    return log


def counted(
    name: str,
    limits: Limits,
    schedule: Schedule,
    rows: NDArray[np.float64],
    reasons: NDArray[np.int8],
    log: RequestLog,
) -> Run:
    """The counted part of an episode that was played from its first window to its last."""
    slack_s = _SLACK * limits.interval_s
    first = int(np.searchsorted(rows[:, Column.START_S], schedule.lead_s - slack_s))
    before = rows[max(first - 1, 0)]
    kept = rows[first:].copy()
    kept[:, Column.START_S] -= schedule.lead_s
    in_span = (log.arrival_s >= schedule.lead_s) & (log.arrival_s < schedule.span_end_s)
    finish_s = log.finish_s[in_span] - schedule.lead_s
    requests = Requests(
        log.arrival_s[in_span] - schedule.lead_s,
        log.first_token_s[in_span] - schedule.lead_s,
        finish_s,
        np.asarray(log.output_tokens[in_span], dtype=np.int64),
        log.missed[in_span] | np.isnan(finish_s),
    )
    if requests.arrival_s.size == 0:
        msg = "no request arrived in the counted span; choose another slice of the trace"
        raise ConfigError(msg)
    in_force = limits.configuration(
        (
            _index(limits.sm_clocks_mhz, before[Column.SM_CLOCK_MHZ]),
            _index(limits.batch_caps, before[Column.BATCH_CAP]),
            _index(limits.tp_degrees, before[Column.TP_DEGREE]),
        )
    )
    return Run(name, limits, schedule, kept, reasons[first:], in_force, requests)


def _index(settings: tuple[int, ...], value: float) -> int:
    return settings.index(int(value)) if value in settings else 0
