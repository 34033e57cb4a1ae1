"""Deterministic replay: one slice of a trace through any set of policies, with one digest.

Equal inputs give an equal digest on every machine and with any number of workers: each (policy, draw)
is an independent job, results are put in the order of the jobs, sums round once, and nothing that a
clock or a machine adds enters. Intervals follow from the digested numbers and are left out of it.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field
from itertools import product
from typing import TYPE_CHECKING, Final, TypeVar

import numpy as np

from rlgov.agents import statistics
from rlgov.agents.baselines.registry import by_name
from rlgov.agents.baselines.space import PolicyContext
from rlgov.agents.baselines.static import every_static
from rlgov.agents.bundle import BundlePolicy
from rlgov.agents.playback import DRAIN_S, Figures, Run, Schedule, cut, figures, hold, play
from rlgov.agents.workers import Pool
from rlgov.deployments.simulated import SimulatedDeployment
from rlgov.envs.guard import GuardSettings, Reason
from rlgov.errors import ConfigError
from rlgov.records import Column, Configuration, Limits
from rlgov.simulation.batch import SimulationBatch
from rlgov.simulation.physics import build_tables, draw_parameters
from rlgov.simulation.profile import Profile, load_profile
from rlgov.workload.readers import read_trace

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from rlgov.agents.statistics import Interval
    from rlgov.simulation.tables import PhysicsTables
    from rlgov.workload.trace import Trace

SCHEMA: Final = 1
FASTEST: Final = "fastest"
BEST_STATIC: Final = "best-static"
DEFAULT_PROFILE: Final = "h100-qwen3-32b"
_DRAW_STREAM: Final = 0x7E91A  # keeps the physics draws apart from any other use of the same seeds
_BOOTSTRAP_SEED: Final = 0xB007

_R = TypeVar("_R")


@dataclass(frozen=True, slots=True)
class ReplaySpec:
    """What to replay. Two specs with equal values give equal digests, whatever ``workers`` is."""

    trace: str | Path
    """Trace file, in any format that ``read_trace`` knows."""
    profile: str = DEFAULT_PROFILE
    """Profile name or file."""
    policies: tuple[str, ...] = (FASTEST, BEST_STATIC)
    """Names of policies, or bundle files. The two references are added where they are not named."""
    from_s: float = 0.0
    """Begin of the counted span, in the trace's own time."""
    to_s: float | None = None
    """End of the counted span; by default the trace's."""
    rate_scale: float = 1.0
    """How many times as fast the requests arrive."""
    lead_in_s: float | None = None
    """Played but uncounted time before the span; by default what the trace has, up to 300 s."""
    drain_s: float = DRAIN_S
    """How long after the span unserved requests may still finish."""
    slo_scale: float = 1.0
    """Both latency objectives times this."""
    seeds: int = 1
    """Draws of the physics: the first is nominal, the others vary every prior within its range."""
    workers: int = 1
    """Processes to work in."""
    target_attainment: float = 0.99
    """Share of requests within the objectives that the best static setting has to reach."""
    block_s: float = statistics.BLOCK_S
    """Length of the blocks of time behind the confidence intervals."""
    guard: GuardSettings = field(default_factory=GuardSettings)
    """How policies that want a guard are held."""

    def __post_init__(self) -> None:
        checks = (
            (self.seeds >= 1, f"seeds must be at least 1, got {self.seeds}"),
            (self.workers >= 1, f"workers must be at least 1, got {self.workers}"),
            (self.slo_scale > 0, f"slo_scale must be above 0, got {self.slo_scale}"),
            (
                0 < self.target_attainment <= 1,
                f"target_attainment must lie in 0..1, got {self.target_attainment}",
            ),
        )
        for passed, msg in checks:
            if not passed:
                raise ConfigError(msg)


@dataclass(frozen=True, slots=True)
class PolicyRow:
    """One line of the report; ``*_ci`` are 95 % intervals over blocks of time, None if too few."""

    name: str
    energy_j: float
    j_per_output_token: float | None
    slo_attainment: float
    served: int
    unserved: int
    ttft_p50_s: float | None
    ttft_p99_s: float | None
    tpot_p50_s: float | None
    tpot_p99_s: float | None
    switches: int
    saving_vs_fastest: float
    saving_vs_best_static: float
    energy_j_ci: tuple[float, float] | None
    slo_attainment_ci: tuple[float, float] | None
    saving_vs_fastest_ci: tuple[float, float] | None
    saving_vs_best_static_ci: tuple[float, float] | None


@dataclass(frozen=True, slots=True)
class StaticPoint:
    """What one static setting did with the slice."""

    configuration: Configuration
    figures: Figures


@dataclass(frozen=True, slots=True)
class Draw:
    """One policy under one draw of the physics, against the references under the same draw."""

    name: str
    seed: int
    best_static: Configuration
    figures: Figures
    saving_vs_fastest: float
    saving_vs_best_static: float
    requests_sha256: str


@dataclass(frozen=True, slots=True, eq=False)
class ReplayResult:
    """Everything a report needs. ``runs`` are nominal and aligned with ``policies``."""

    spec: ReplaySpec
    trace_name: str
    trace_sha256: str
    limits: Limits
    schedule: Schedule
    digest: str
    policies: tuple[PolicyRow, ...]
    runs: tuple[Run, ...]
    statics: tuple[StaticPoint, ...]
    best_static: Configuration
    best_static_meets_target: bool
    draws: tuple[Draw, ...]
    learned: frozenset[str]  # names of the policies that come from a bundle

    def to_json(self) -> dict[str, object]:
        """The report as plain values, ``digest`` first."""
        spec, level = self.spec, self.limits.service_level
        document: dict[str, object] = {
            "digest": self.digest,
            "schema": SCHEMA,
            "profile": spec.profile,
            "trace": {"name": self.trace_name, "sha256": self.trace_sha256},
            "from_s": spec.from_s,
            "to_s": spec.to_s,
            "rate_scale": spec.rate_scale,
            "lead_in_s": self.schedule.lead_s,
            "span_s": self.schedule.span_s,
            "service_level": {"ttft_s": level.ttft_s, "tpot_s": level.tpot_s},
            "target_attainment": spec.target_attainment,
            "best_static": {**asdict(self.best_static), "meets_target": self.best_static_meets_target},
            "policies": [asdict(row) for row in self.policies],
            "interventions": {run.policy: interventions(run) for run in self.runs},
            "statics": [{**asdict(p.configuration), **asdict(p.figures)} for p in self.statics],
        }
        if spec.seeds > 1:
            document["model_uncertainty"] = model_uncertainty(self.draws)
        return document


def interventions(run: Run) -> dict[str, int]:
    """Windows by the reason their configuration was chosen for."""
    counts = np.bincount(run.reasons, minlength=len(Reason))
    return {reason.name.lower(): int(counts[reason]) for reason in Reason if counts[reason]}


def model_uncertainty(draws: Sequence[Draw]) -> list[dict[str, object]]:
    """Per policy: mean, range and interval over the draws of the physics."""
    report: list[dict[str, object]] = []
    for name in dict.fromkeys(draw.name for draw in draws):
        mine = [draw for draw in draws if draw.name == name]
        entry: dict[str, object] = {"name": name, "seeds": [draw.seed for draw in mine]}
        series = {
            "energy_j": [draw.figures.energy_j for draw in mine],
            "slo_attainment": [draw.figures.slo_attainment for draw in mine],
            "saving_vs_fastest": [draw.saving_vs_fastest for draw in mine],
            "saving_vs_best_static": [draw.saving_vs_best_static for draw in mine],
        }
        for key, values in series.items():
            entry[key] = {
                "mean": float(np.mean(values)),
                "low": min(values),
                "high": max(values),
                "mean_ci": _pair(statistics.mean_interval(values, _rng())),
                "values": values,
            }
        report.append(entry)
    return report


def best_static(points: Sequence[StaticPoint], target_attainment: float) -> StaticPoint:
    """In hindsight: least energy among those that reach the target, else the highest attainment.

    Ties go to the earlier, that is faster, setting.
    """
    reaching = [point for point in points if point.figures.slo_attainment >= target_attainment]
    if reaching:
        return min(reaching, key=lambda point: point.figures.energy_j)
    return min(points, key=lambda point: (-point.figures.slo_attainment, point.figures.energy_j))


def replay(
    spec: ReplaySpec,
    *,
    trace: Trace | None = None,
    progress: Callable[[int, int, str], None] = lambda _done, _total, _what: None,
) -> ReplayResult:
    """Put a slice of a trace through policies and every static setting.

    Args:
        spec: What to replay.
        trace: An already loaded trace, instead of reading ``spec.trace``.
        progress: Called after each finished job with jobs done, jobs in all and what was finished.

    Returns:
        Figures, runs and digest. Raises ConfigError for what cannot be replayed.
    """
    profile = load_profile(spec.profile)
    limits = profile.limits()
    limits = limits.with_service_level(limits.service_level.scaled(spec.slo_scale))
    source = read_trace(spec.trace) if trace is None else trace
    episode, schedule = cut(
        source,
        interval_s=limits.interval_s,
        from_s=spec.from_s,
        to_s=spec.to_s,
        rate_scale=spec.rate_scale,
        lead_in_s=spec.lead_in_s,
        drain_s=spec.drain_s,
    )
    plan = _Plan(profile, limits, episode, schedule, spec.guard)
    names = tuple(dict.fromkeys((*spec.policies, FASTEST, BEST_STATIC)))
    # An unknown name or a damaged bundle is found before the work, not after it.
    context = PolicyContext(limits, plan.tables(0), limits.fastest, 0)
    bundles = {name for name in names if isinstance(by_name(name, context), BundlePolicy)}
    settings = [policy.start_configuration(limits) for policy in every_static(limits)]
    chunks = [tuple(settings[i : i + _CHUNK]) for i in range(0, len(settings), _CHUNK)]
    seeds = range(spec.seeds)
    sweeps = [_Sweep(plan, seed, chunk) for seed, chunk in product(seeds, chunks)]
    count = _Progress(progress, len(sweeps) + spec.seeds * len(names))
    with Pool(spec.workers) as pool:
        swept = [
            point for points in count.over(pool.map(_sweep, sweeps), "static settings") for point in points
        ]
        by_seed = [tuple(swept[i * len(settings) : (i + 1) * len(settings)]) for i in seeds]
        chosen = [best_static(points, spec.target_attainment) for points in by_seed]
        jobs = [_Job(plan, seed, name, chosen[seed].configuration) for seed, name in product(seeds, names)]
        runs = list(count.over(pool.map(_play, jobs), "policies"))
    draws = tuple(_draws(runs, len(names), chosen))
    nominal = _unique_names(runs[: len(names)])
    trace_sha256 = trace_digest(episode)
    return ReplayResult(
        spec=spec,
        trace_name=source.name,
        trace_sha256=trace_sha256,
        limits=limits,
        schedule=schedule,
        digest=_digest(plan, trace_sha256, by_seed, draws),
        policies=_rows(
            nominal, nominal[names.index(FASTEST)], nominal[names.index(BEST_STATIC)], spec.block_s
        ),
        runs=nominal,
        statics=by_seed[0],
        best_static=chosen[0].configuration,
        best_static_meets_target=chosen[0].figures.slo_attainment >= spec.target_attainment,
        draws=draws,
        learned=frozenset(run.policy for run, name in zip(nominal, names, strict=True) if name in bundles),
    )


def trace_digest(trace: Trace) -> str:
    """sha256 over what a trace asks for; its name and file do not matter."""
    sha = hashlib.sha256(repr(float(trace.duration_s)).encode())
    sha.update(trace.arrival_s.astype("<f8").tobytes())
    for tokens in (trace.prompt_tokens, trace.output_tokens, trace.prefix_hit_tokens):
        sha.update(tokens.astype("<i8").tobytes())
    return sha.hexdigest()


# Jobs: everything below runs in worker processes -----------------------------------------------------

_CHUNK = 10  # static settings a job: enough jobs to share out, each long enough to be worth sending


@dataclass(frozen=True, slots=True, eq=False)
class _Plan:
    profile: Profile
    limits: Limits
    trace: Trace
    schedule: Schedule
    guard: GuardSettings

    def tables(self, seed: int) -> PhysicsTables:
        if seed == 0:
            return build_tables(self.profile)
        draw = draw_parameters(self.profile, np.random.default_rng([_DRAW_STREAM, seed]))
        return build_tables(self.profile, draw=draw)


@dataclass(frozen=True, slots=True, eq=False)
class _Sweep:
    plan: _Plan
    seed: int
    configurations: tuple[Configuration, ...]


@dataclass(frozen=True, slots=True, eq=False)
class _Job:
    plan: _Plan
    seed: int
    policy: str
    best_static: Configuration


def _sweep(job: _Sweep) -> list[StaticPoint]:
    plan = job.plan
    tables = plan.tables(job.seed)
    batch = SimulationBatch(plan.limits, 1, tables, capacity=max(1, len(plan.trace)))
    return [
        StaticPoint(configuration, figures(hold(batch, plan.trace, tables, plan.schedule, configuration)))
        for configuration in job.configurations
    ]


def _play(job: _Job) -> Run:
    plan = job.plan
    tables = plan.tables(job.seed)
    # A rule that predicts latency knows the nominal physics, not the draw it meets.
    nominal = tables if job.seed == 0 else plan.tables(0)
    policy = by_name(job.policy, PolicyContext(plan.limits, nominal, job.best_static, job.seed))
    deployment = SimulatedDeployment(
        plan.profile,
        plan.trace,
        service_level=plan.limits.service_level,
        start=policy.start_configuration(plan.limits),
        tables=tables,
    )
    name = job.policy if job.policy in (FASTEST, BEST_STATIC) else policy.name
    return play(deployment, policy, plan.schedule, seed=job.seed, guard=plan.guard, name=name)


@dataclass(slots=True)
class _Progress:
    report: Callable[[int, int, str], None]
    total: int
    done: int = 0

    def over(self, results: Iterator[_R], what: str) -> Iterator[_R]:
        for result in results:
            self.done += 1
            self.report(self.done, self.total, what)
            yield result


# Reduction -------------------------------------------------------------------------------------------


def _unique_names(runs: Sequence[Run]) -> tuple[Run, ...]:
    seen: dict[str, int] = {}
    named: list[Run] = []
    for run in runs:
        seen[run.policy] = seen.get(run.policy, 0) + 1
        suffix = "" if seen[run.policy] == 1 else f"#{seen[run.policy]}"
        named.append(run.renamed(run.policy + suffix))
    return tuple(named)


def _draws(runs: Sequence[Run], policies: int, chosen: Sequence[StaticPoint]) -> Iterator[Draw]:
    for seed, point in enumerate(chosen):
        mine = _unique_names(runs[seed * policies : (seed + 1) * policies])
        energies = {run.policy: run.energy_j for run in mine}
        for run in mine:
            yield Draw(
                name=run.policy,
                seed=seed,
                best_static=point.configuration,
                figures=figures(run),
                saving_vs_fastest=1.0 - run.energy_j / energies[FASTEST],
                saving_vs_best_static=1.0 - run.energy_j / energies[BEST_STATIC],
                requests_sha256=run.requests.digest(),
            )


@dataclass(frozen=True, slots=True, eq=False)
class _Blocks:
    energy_j: NDArray[np.float64]
    misses: NDArray[np.float64]
    arrivals: NDArray[np.float64]

    @classmethod
    def of(cls, run: Run, block_s: float) -> _Blocks:
        span_s = run.schedule.span_s
        blocks = statistics.block_count(span_s, block_s)
        requests = run.requests

        def sums(at_s: NDArray[np.float64], values: NDArray[np.float64]) -> NDArray[np.float64]:
            return statistics.block_sums(at_s, values, span_s, blocks)

        return cls(
            sums(run.rows[:, Column.START_S], run.rows[:, Column.ENERGY_J]),
            sums(requests.arrival_s, requests.missed.astype(np.float64)),
            sums(requests.arrival_s, np.ones(requests.arrival_s.shape)),
        )


def _rows(runs: Sequence[Run], fastest: Run, static: Run, block_s: float) -> tuple[PolicyRow, ...]:
    fastest_blocks, static_blocks = (_Blocks.of(run, block_s).energy_j for run in (fastest, static))
    rows: list[PolicyRow] = []
    for run in runs:
        reduced = figures(run)
        blocks = _Blocks.of(run, block_s)
        rows.append(
            PolicyRow(
                name=run.policy,
                energy_j=reduced.energy_j,
                j_per_output_token=reduced.j_per_output_token,
                slo_attainment=reduced.slo_attainment,
                served=reduced.served,
                unserved=reduced.unserved,
                ttft_p50_s=reduced.ttft_p50_s,
                ttft_p99_s=reduced.ttft_p99_s,
                tpot_p50_s=reduced.tpot_p50_s,
                tpot_p99_s=reduced.tpot_p99_s,
                switches=reduced.switches,
                saving_vs_fastest=1.0 - reduced.energy_j / fastest.energy_j,
                saving_vs_best_static=1.0 - reduced.energy_j / static.energy_j,
                energy_j_ci=_pair(statistics.total_interval(blocks.energy_j, _rng())),
                slo_attainment_ci=_pair(
                    statistics.attainment_interval(blocks.misses, blocks.arrivals, _rng())
                ),
                saving_vs_fastest_ci=_pair(
                    statistics.saving_interval(blocks.energy_j, fastest_blocks, _rng())
                ),
                saving_vs_best_static_ci=_pair(
                    statistics.saving_interval(blocks.energy_j, static_blocks, _rng())
                ),
            )
        )
    return tuple(rows)


def _rng() -> np.random.Generator:
    # every interval draws the same resamples, so intervals of two policies can be compared
    return np.random.default_rng(_BOOTSTRAP_SEED)


def _pair(interval: Interval | None) -> tuple[float, float] | None:
    return None if interval is None else (interval.low, interval.high)


def _digest(
    plan: _Plan,
    trace_sha256: str,
    by_seed: Sequence[Sequence[StaticPoint]],
    draws: Sequence[Draw],
) -> str:
    content = {
        "schema": SCHEMA,
        "trace": trace_sha256,
        "limits": asdict(plan.limits),
        "schedule": asdict(plan.schedule),
        "guard": asdict(plan.guard),
        "statics": [[asdict(point) for point in points] for points in by_seed],
        "draws": [asdict(draw) for draw in draws],
    }
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()
