"""A governed run's own requests through the simulator: as it was, as decided, and at the fastest.

The recording is cut into stretches without gaps. Each begins empty, plays the configurations window by
window, and goes on until everything is served in all three runs, at most :data:`DRAIN_S`, so that what one of
them put off is paid for.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING, Final

import numpy as np

from rlgov.agents import statistics
from rlgov.agents.playback import DRAIN_S, Schedule, hold, is_over, play
from rlgov.deployments.replayed import recorded_trace
from rlgov.deployments.simulated import SimulatedDeployment
from rlgov.errors import ConfigError, JournalError
from rlgov.records import Column
from rlgov.simulation.batch import SimulationBatch
from rlgov.simulation.physics import build_tables, draw_parameters

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from numpy.typing import NDArray

    from rlgov.agents.policy import Policy
    from rlgov.agents.statistics import Interval
    from rlgov.journal import Interval as Recorded
    from rlgov.journal import Journal
    from rlgov.records import Configuration, Limits
    from rlgov.simulation.profile import Profile
    from rlgov.simulation.tables import PhysicsTables
    from rlgov.workload.trace import Trace

RUNS: Final = ("in force", "decided", "fastest")
_GAP: Final = 0.5  # of an interval: windows further apart than this belong to two stretches
_SHORTEST_WINDOWS: Final = 4
_TOO_SHORT: Final = f"no stretch of {_SHORTEST_WINDOWS} windows without a gap holds requests"
_STREAM: Final = 0x5AD1  # keeps these draws apart from any other use of the same seeds


@dataclass(frozen=True, slots=True)
class Estimate:
    """A share of energy saved, with its interval over the run's traffic; None if that was too short."""

    share: float
    low: float | None
    high: float | None

    @classmethod
    def of(cls, share: float, interval: Interval | None) -> Estimate:
        """From a value and its interval."""
        return cls(share, interval.low if interval else None, interval.high if interval else None)


@dataclass(frozen=True, slots=True)
class SimulatedSaving:
    """By simulation. ``decided``: against what was in force; ``in_force``: against the fastest.

    ``*_range`` is the lowest and the highest share over draws of the profile's uncertain parameters.
    """

    decided: Estimate
    decided_range: tuple[float, float] | None
    in_force: Estimate
    in_force_range: tuple[float, float] | None
    slo_attainment: dict[str, float]  # by run
    measured_over_predicted: float  # energy of the stretches at the configurations in force
    requests: int
    stretches: int
    draws: int

    @property
    def shown(self) -> dict[str, str]:
        """Attainments as people read them, rounded down."""
        return {run: f"{math.floor(1e4 * share) / 100:.2f} %" for run, share in self.slo_attainment.items()}


@dataclass(frozen=True, slots=True)
class ReplayedSaving:
    """A policy that decides anew on the recorded requests, in simulation, against the fastest."""

    policy: str
    saving: Estimate
    slo_attainment: float


@dataclass(frozen=True, slots=True, eq=False)
class _Stretch:
    trace: Trace
    index: dict[str, NDArray[np.int64]]  # by run: a setting a window, drain included
    windows: int  # before the drain
    measured_j: float | None  # None where a window was blind or not metered


@dataclass(frozen=True, slots=True, eq=False)
class _Outcome:
    energy_j: dict[str, NDArray[np.float64]]  # by run: by block
    windows_j: float  # in force, without the drain, where it was measured
    missed: dict[str, int]


def simulate_run(journal: Journal, profile: Profile, *, draws: int) -> SimulatedSaving:
    """Simulate a recording three times, and again for each draw of the profile's parameters.

    Args:
        journal: With requests.
        profile: Of the deployment.
        draws: How often to repeat with other parameters; 0 for none.

    Raises:
        ConfigError: The profile is of another deployment, or no stretch of the recording is long enough.
    """
    limits = journal.header.limits
    stretches = list(_stretches(journal))
    if not stretches:
        raise ConfigError(_TOO_SHORT)
    outcomes = [_play(stretches, tables, limits) for tables in _physics(profile, limits, draws)]
    nominal = outcomes[0]
    measured_j = [stretch.measured_j for stretch in stretches if stretch.measured_j is not None]
    count = sum(len(stretch.trace) for stretch in stretches)
    rng = np.random.default_rng(_STREAM)
    shares = [(_share(o, "decided", "in force"), _share(o, "in force", "fastest")) for o in outcomes]
    energy_j = nominal.energy_j
    return SimulatedSaving(
        decided=Estimate.of(
            shares[0][0], statistics.saving_interval(energy_j["decided"], energy_j["in force"], rng)
        ),
        decided_range=_range([share for share, _ in shares[1:]]),
        in_force=Estimate.of(
            shares[0][1], statistics.saving_interval(energy_j["in force"], energy_j["fastest"], rng)
        ),
        in_force_range=_range([share for _, share in shares[1:]]),
        slo_attainment={run: 1.0 - nominal.missed[run] / count for run in RUNS},
        measured_over_predicted=math.fsum(measured_j) / nominal.windows_j
        if nominal.windows_j > 0
        else math.nan,
        requests=count,
        stretches=len(stretches),
        draws=draws,
    )


def replay_policy(journal: Journal, profile: Profile, policy: Policy) -> ReplayedSaving:
    """Let a policy govern the recorded requests in simulation: what acting would have led to.

    Args:
        journal: With requests.
        profile: Of the deployment.
        policy: The one that was in shadow, or any other.

    Raises:
        ConfigError: No stretch of the recording is long enough.
        BundleError: The policy was trained on other actions than the profile offers.
    """
    limits = profile.limits().with_service_level(journal.header.limits.service_level)
    tables = build_tables(profile)
    batch = SimulationBatch(limits, 1, tables)
    spent: list[NDArray[np.float64]] = []
    unsaved: list[NDArray[np.float64]] = []
    missed = count = 0
    for stretch in _stretches(journal):
        schedule = Schedule(0.0, stretch.windows * limits.interval_s)
        trace = replace(stretch.trace, duration_s=schedule.end_s)
        deployment = SimulatedDeployment(profile, trace, service_level=limits.service_level, tables=tables)
        chosen = play(deployment, policy, schedule)
        fastest = hold(batch, trace, tables, schedule, limits.fastest)
        blocks = statistics.block_count(schedule.span_s)
        for run, into in ((chosen, spent), (fastest, unsaved)):
            at_s, energy_j = run.rows[:, Column.START_S], run.rows[:, Column.ENERGY_J]
            into.append(statistics.block_sums(at_s, energy_j, schedule.span_s, blocks))
        missed += int(np.count_nonzero(chosen.requests.missed))
        count += len(trace)
    if not spent:
        raise ConfigError(_TOO_SHORT)
    spent_j, unsaved_j = np.concatenate(spent), np.concatenate(unsaved)
    interval = statistics.saving_interval(spent_j, unsaved_j, np.random.default_rng(_STREAM))
    share = 1.0 - math.fsum(spent_j) / math.fsum(unsaved_j)
    return ReplayedSaving(policy.name, Estimate.of(share, interval), 1.0 - missed / count)


def _physics(profile: Profile, limits: Limits, draws: int) -> Iterator[PhysicsTables]:
    largest = limits.batch_caps[0]
    yield build_tables(profile, max_batch=largest)
    for seed in range(draws):
        draw = draw_parameters(profile, np.random.default_rng([_STREAM, seed]))
        yield build_tables(profile, max_batch=largest, draw=draw)


def _share(outcome: _Outcome, run: str, reference: str) -> float:
    return 1.0 - math.fsum(outcome.energy_j[run]) / math.fsum(outcome.energy_j[reference])


def _range(shares: Sequence[float]) -> tuple[float, float] | None:
    return (min(shares), max(shares)) if shares else None


def _play(stretches: Sequence[_Stretch], tables: PhysicsTables, limits: Limits) -> _Outcome:
    batch = SimulationBatch(limits, 1, tables)
    energy_j: dict[str, list[NDArray[np.float64]]] = {run: [] for run in RUNS}
    missed = dict.fromkeys(RUNS, 0)
    windows_j = 0.0
    for stretch in stretches:
        played = {}
        for run, index in stretch.index.items():
            clock, cap, tp = (int(value) for value in index[0])
            batch.load(0, stretch.trace, tables, limits.service_level, (clock, cap, tp))
            played[run] = batch.advance_windows(0, index)
            log = batch.request_log(0)
            missed[run] += int(np.count_nonzero(log.missed | np.isnan(log.finish_s)))
        span_s = stretch.windows * limits.interval_s
        over = [is_over(rows, span_s, math.inf) for rows in played.values()]
        ends = [int(np.flatnonzero(done)[0]) + 1 if done.any() else len(done) for done in over]
        length = max(ends)
        blocks = statistics.block_count(span_s)
        for run, rows in played.items():
            kept = rows[:length]
            energy = kept[:, Column.ENERGY_J]
            energy_j[run].append(statistics.block_sums(kept[:, Column.START_S], energy, span_s, blocks))
        if stretch.measured_j is not None:
            windows_j += math.fsum(played["in force"][: stretch.windows, Column.ENERGY_J])
    return _Outcome({run: np.concatenate(parts) for run, parts in energy_j.items()}, windows_j, missed)


def _stretches(journal: Journal) -> Iterator[_Stretch]:
    limits = journal.header.limits
    for recorded in _without_gaps(journal.intervals, limits.interval_s):
        start_s = recorded[0].window.start_s
        last = recorded[-1].window
        end_s = last.start_s + last.duration_s
        windows = round((end_s - start_s) / limits.interval_s)
        inside = tuple(r for r in journal.requests if start_s <= r.arrival_s < end_s)
        if windows < _SHORTEST_WINDOWS or not inside:
            continue
        try:
            trace = recorded_trace(replace(journal, intervals=recorded, requests=inside), "recorded")
        except JournalError:
            continue
        energies = [None if i.window.blind else i.window.energy_j for i in recorded]
        metered = [energy for energy in energies if energy is not None]
        yield _Stretch(
            trace=trace,
            index=_indices(recorded, limits, windows),
            windows=windows,
            measured_j=math.fsum(metered) if len(metered) == len(energies) else None,
        )


def _without_gaps(intervals: Sequence[Recorded], interval_s: float) -> Iterator[tuple[Recorded, ...]]:
    first = 0
    for number, (before, after) in enumerate(pairwise(intervals), start=1):
        gap_s = after.window.start_s - before.window.start_s - before.window.duration_s
        if abs(gap_s) > _GAP * interval_s:
            yield tuple(intervals[first:number])
            first = number
    yield tuple(intervals[first:])


def _indices(recorded: Sequence[Recorded], limits: Limits, windows: int) -> dict[str, NDArray[np.int64]]:
    """The settings of each run, one for each simulated window, which all have the same length."""
    in_force: list[tuple[int, int, int]] = []
    decided: list[tuple[int, int, int]] = []
    for number, interval in enumerate(recorded):
        window = interval.window
        seen = in_force[-1] if window.blind and in_force else None
        in_force.append(seen or (0, 0, 0) if window.blind else _nearest(window.configuration, limits))
        decision = recorded[number - 1].decision if number else None
        decided.append(_nearest(decision.applied, limits) if decision is not None else in_force[-1])
    starts_s = np.array([interval.window.start_s for interval in recorded])
    drain = math.ceil(DRAIN_S / limits.interval_s)
    middle_s = starts_s[0] + (np.arange(windows + drain) + 0.5) * limits.interval_s
    at = np.clip(np.searchsorted(starts_s, middle_s, side="right") - 1, 0, len(recorded) - 1)
    settings = {"in force": in_force, "decided": decided, "fastest": [(0, 0, 0)] * len(recorded)}
    return {run: np.array(chosen, dtype=np.int64)[at] for run, chosen in settings.items()}


def _nearest(configuration: Configuration, limits: Limits) -> tuple[int, int, int]:
    """The offered setting that is as fast or the next faster one, on each axis."""

    def index(axis: tuple[int, ...], value: int) -> int:
        return max((i for i, offered in enumerate(axis) if offered >= value), default=0)

    return (
        index(limits.sm_clocks_mhz, configuration.sm_clock_mhz),
        index(limits.batch_caps, configuration.batch_cap),
        index(limits.tp_degrees, configuration.tp_degree),
    )
