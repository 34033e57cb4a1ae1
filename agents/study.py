"""The study behind the claim: learned policies against every static setting and every tuned rule.

For each workload (the test span of a trace, a synthetic day) under each SLO, at several loads:

1. every static setting is run on the test span; the cheapest one that holds the target is the best
   static setting *in hindsight*, which no operator could have known;
2. each rule is tuned on the training span with the same budget, jointly over the loads;
3. rules and learned policies are run on the test span.

Nothing is tuned on a test span. Equal inputs give an equal digest, with any number of workers.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, fields
from importlib import resources
from typing import TYPE_CHECKING, Any, Final, TypeVar

import numpy as np

from rlgov.agents.baselines import FAMILIES, PolicyContext
from rlgov.agents.baselines.random_policy import RandomPolicy
from rlgov.agents.baselines.static import StaticPolicy, every_static
from rlgov.agents.baselines.tuned import TunedRecord
from rlgov.agents.bundle import BundlePolicy, load_bundle
from rlgov.agents.playback import Figures, figures, hold
from rlgov.agents.replay import StaticPoint, trace_digest
from rlgov.agents.side_by_side import Entry, play_side_by_side
from rlgov.agents.study_grid import Cell, NotHoldable, Scenario, day_cell, trace_cell
from rlgov.agents.study_result import RANDOM, TRAINED_STATIC, StudyResult, scenario_result
from rlgov.agents.study_rules import RULES, TrainingStatics, evaluate, training_statics, tune_rule
from rlgov.agents.tuning import Outcome
from rlgov.agents.workers import Pool
from rlgov.errors import ConfigError
from rlgov.records import Configuration
from rlgov.simulation.batch import SimulationBatch
from rlgov.simulation.physics import build_tables
from rlgov.simulation.profile import load_profile

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from rlgov.agents.policy import Policy
    from rlgov.config import StudySettings
    from rlgov.workload.trace import Trace

# A finished part is kept only as long as the code that shaped it stays as it was.
_PACKAGES_BEHIND: Final = ("rlgov.simulation", "rlgov.agents.baselines")
_MODULES_BEHIND: Final = (
    ("rlgov.envs", "guard.py"),
    ("rlgov.envs", "action.py"),
    ("rlgov.agents", "playback.py"),
    ("rlgov.agents", "side_by_side.py"),
    ("rlgov.agents", "study_rules.py"),
    ("rlgov.agents", "tuning.py"),
)

_J = TypeVar("_J")
_R = TypeVar("_R")


def run_study(
    settings: StudySettings,
    traces: Sequence[Trace],
    say: Callable[[str], None] = lambda _: None,
) -> StudyResult:
    """Run the whole study; finished parts are kept under ``settings.out`` and not run again.

    Args:
        settings: What to study, and with how much effort.
        traces: One for each of ``settings.trace``.
        say: Told about each finished part.
    """
    profile = load_profile(settings.profile)
    limits = profile.limits()
    bundles = _bundles(settings.bundle)
    for name, path in bundles.items():
        BundlePolicy(load_bundle(path), name).start(limits, 1)  # refuses one of other limits before the work
    names = [trace.name for trace in traces]
    if len(set(names)) < len(names):
        msg = f"traces of equal name cannot be told apart in a report: {', '.join(names)}"
        raise ConfigError(msg)
    store = _Store(settings.out, _code_digest())
    with Pool(settings.workers) as pool:
        # One cell a load: rules are tuned for the very load they are tested at.
        grid = [
            _Grid(settings, trace, slo, load)
            for slo in settings.slo_scales
            for trace in traces
            for load in settings.loads
        ]
        if settings.day:
            grid += [_Grid(settings, None, slo, None) for slo in settings.slo_scales]
        found = list(pool.map(_cell, grid))
        not_holdable = tuple(dict.fromkeys(cell for cell in found if isinstance(cell, NotHoldable)))
        cells = tuple(cell for cell in found if isinstance(cell, Cell))
        for lost in not_holdable:
            say(f"{lost.workload}, SLO x {lost.slo_scale:g}: cannot be held even at a 256th of its rate")
        say(f"{len(cells)} workloads under an SLO, {sum(len(c.scenarios) for c in cells)} test scenarios")

        run = _Phase(pool, say)
        static_jobs = [_StaticsJob(cell, k, store) for cell in cells for k in range(len(cell.scenarios))]
        statics = run(
            _test_statics,
            static_jobs,
            lambda job, _: f"static settings, test span: {_where(job.cell)}",
        )
        trained = run(
            _train_statics,
            [_CellJob(settings, cell, store) for cell in cells],
            lambda job, _: f"static settings, training span: {_where(job.cell)}",
        )
        tune_jobs = [
            _TuneJob(settings, cell, rule, training, store)
            for cell, training in zip(cells, trained, strict=True)
            for rule in RULES
        ]
        records = run(
            _tune,
            tune_jobs,
            lambda job, record: (
                f"tuned {job.rule}: {_where(job.cell)}, "
                f"{100 * (record.slo_attainment or 0.0):.2f} % in SLO in training"
            ),
        )
        tuned = [tuple(records[len(RULES) * k : len(RULES) * (k + 1)]) for k in range(len(cells))]
        play_jobs = [
            _PlayJob(settings, cell, mine, training.best, training.fastest_energy_j, bundles)
            for cell, mine, training in zip(cells, tuned, trained, strict=True)
        ]
        played = run(_play, play_jobs, lambda job, _: f"rules and learned policies: {_where(job.cell)}")
    points = iter(statics)
    scenarios = tuple(
        scenario_result(
            cell,
            scenario,
            next(points),
            {name: by_load[k] for name, by_load in by_policy.items()},
            tuple(bundles),
            target_attainment=settings.target_attainment,
        )
        for cell, by_policy in zip(cells, played, strict=True)
        for k, scenario in enumerate(cell.scenarios)
    )
    return StudyResult(
        settings=settings,
        digest="",
        traces={trace.name: trace_digest(trace) for trace in traces},
        bundles={name: load_bundle(path).digest for name, path in bundles.items()},
        capacities=tuple(dict.fromkeys((cell.workload, cell.slo_scale, cell.capacity) for cell in cells)),
        not_holdable=not_holdable,
        tuned={
            f"{_where(job.cell)}: {job.rule}": record for job, record in zip(tune_jobs, records, strict=True)
        },
        scenarios=scenarios,
    ).sealed()


def _where(cell: Cell) -> str:
    loads = ", ".join(scenario.label for scenario in cell.scenarios)
    return f"{cell.workload} at {loads}, SLO x {cell.slo_scale:g}"


def _bundles(paths: Sequence[Path]) -> dict[str, Path]:
    """The bundles under short names that tell them apart."""
    by_folder = {path.resolve().parent.name: path for path in paths}
    if len(by_folder) == len(paths):
        return by_folder
    by_file = {f"{path.resolve().parent.name}/{path.stem}": path for path in paths}
    if len(by_file) == len(paths):
        return by_file
    msg = f"two bundles of equal folder and file name: {', '.join(map(str, paths))}; rename one"
    raise ConfigError(msg)


def _code_digest() -> str:
    files = [
        file
        for package in _PACKAGES_BEHIND
        for file in sorted(resources.files(package).iterdir(), key=lambda entry: entry.name)
        if file.name.endswith(".py")
    ]
    files += [resources.files(package) / name for package, name in _MODULES_BEHIND]
    sha = hashlib.sha256()
    for file in files:
        sha.update(file.read_bytes())
    return sha.hexdigest()


def _cell_digest(cell: Cell) -> str:
    """sha256 over all that is played and its physics; the names of workloads do not matter."""
    sha = hashlib.sha256(json.dumps(asdict(cell.limits), sort_keys=True).encode())
    for field in fields(cell.tables):
        sha.update(np.ascontiguousarray(getattr(cell.tables, field.name)).tobytes())
    for scenario in cell.scenarios:
        for episode in (scenario.test, *scenario.training):
            sha.update(f"{trace_digest(episode.trace)}{episode.schedule}".encode())
    return sha.hexdigest()


@dataclass(frozen=True, slots=True)
class _Phase:
    """Jobs that do not depend on each other; each is reported when it and those before it are done."""

    pool: Pool
    say: Callable[[str], None]

    def __call__(
        self, work: Callable[[_J], _R], jobs: Sequence[_J], what: Callable[[_J, _R], str]
    ) -> list[_R]:
        results = []
        for job, result in zip(jobs, self.pool.map(work, jobs), strict=True):
            results.append(result)
            self.say(what(job, result))
        return results


# Jobs: everything below runs in worker processes -----------------------------------------------------


@dataclass(frozen=True, slots=True, eq=False)
class _Grid:
    settings: StudySettings
    trace: Trace | None  # None: the synthetic day
    slo_scale: float
    load: float | None


@dataclass(frozen=True, slots=True)
class _Store:
    """Finished parts on disk, in files named after all that they depend on."""

    out: Path
    code_digest: str

    def path(self, cell: Cell, name: str, *depends: object) -> Path:
        """Where a part of a cell is kept."""
        key = json.dumps([self.code_digest, _cell_digest(cell), name, *map(str, depends)])
        digest = hashlib.sha256(key.encode()).hexdigest()[:12]
        return self.out / "tuned" / f"{cell.workload}-slo{cell.slo_scale:g}" / f"{name}-{digest}.json"


@dataclass(frozen=True, slots=True, eq=False)
class _StaticsJob:
    cell: Cell
    k: int
    store: _Store

    @property
    def scenario(self) -> Scenario:
        return self.cell.scenarios[self.k]


@dataclass(frozen=True, slots=True, eq=False)
class _CellJob:
    settings: StudySettings
    cell: Cell
    store: _Store


@dataclass(frozen=True, slots=True, eq=False)
class _TuneJob:
    settings: StudySettings
    cell: Cell
    rule: str
    statics: TrainingStatics
    store: _Store


@dataclass(frozen=True, slots=True, eq=False)
class _PlayJob:
    settings: StudySettings
    cell: Cell
    records: tuple[TunedRecord, ...]
    trained_static: Configuration
    fastest_energy_j: tuple[float, ...]
    bundles: dict[str, Path]


def _cell(job: _Grid) -> Cell | NotHoldable:
    settings = job.settings
    profile = load_profile(settings.profile)
    limits, tables = profile.limits(), build_tables(profile)
    if job.trace is None or job.load is None:
        return day_cell(job.slo_scale, limits, tables)
    return trace_cell(
        job.trace,
        job.slo_scale,
        limits,
        tables,
        loads=(job.load,),
        train_fraction=settings.train_fraction,
    )


def _test_statics(job: _StaticsJob) -> tuple[StaticPoint, ...]:
    cell, episode = job.cell, job.scenario.test
    path = job.store.path(cell, f"statics-{job.k}")
    kept = _read(path)
    if kept is not None:
        return tuple(StaticPoint(Configuration(**p["configuration"]), Figures(**p["figures"])) for p in kept)
    batch = SimulationBatch(cell.limits, 1, cell.tables, capacity=max(1, len(episode.trace)))
    points = []
    for static in every_static(cell.limits):
        configuration = static.start_configuration(cell.limits)
        run = hold(batch, episode.trace, cell.tables, episode.schedule, configuration)
        points.append(StaticPoint(configuration, figures(run)))
    _write(path, [asdict(point) for point in points])
    return tuple(points)


def _train_statics(job: _CellJob) -> TrainingStatics:
    path = job.store.path(job.cell, "training-statics", job.settings.target_attainment)
    kept = _read(path)
    if kept is not None:
        return TrainingStatics(
            Configuration(**kept["best"]), Outcome(**kept["outcome"]), tuple(kept["fastest_energy_j"])
        )
    found = training_statics(job.cell, job.settings.target_attainment)
    _write(path, asdict(found))
    return found


def _tune(job: _TuneJob) -> TunedRecord:
    settings = job.settings
    effort = (settings.budget, settings.seed, settings.target_attainment)
    path = job.store.path(job.cell, job.rule, *effort)
    kept = _read(path)
    if kept is not None:
        return TunedRecord.model_validate(kept)
    record = tune_rule(
        job.cell,
        job.rule,
        job.statics,
        budget=settings.budget,
        seed=settings.seed,
        target_attainment=settings.target_attainment,
        profile=settings.profile,
    )
    _write(path, record.model_dump(mode="json"))
    return record


def _play(job: _PlayJob) -> dict[str, tuple[Figures, ...]]:
    cell = job.cell
    context = PolicyContext(cell.limits, cell.tables, job.trained_static, job.settings.seed)
    policies: dict[str, Policy] = {
        TRAINED_STATIC: StaticPolicy(job.trained_static),
        RANDOM: RandomPolicy(job.settings.seed),
    }
    policies |= {
        record.family: FAMILIES[record.family].build(record.parameters, context) for record in job.records
    }
    policies |= _learned(job)
    episodes = tuple(scenario.test for scenario in cell.scenarios)
    entries = [Entry(policy, episodes) for policy in policies.values()]
    return dict(zip(policies, play_side_by_side(entries, cell.limits, cell.tables), strict=True))


def _learned(job: _PlayJob) -> dict[str, Policy]:
    """The bundles, each started at the TP degree that serves it best on the training stretches.

    Rules have their TP degree tuned on these stretches too. A learned policy may leave its start, but
    leaving it costs held requests, so an operator starts a deployment where its usual load belongs.
    """
    cell = job.cell
    degrees = cell.limits.tp_degrees
    chosen: dict[str, Policy] = {}
    for name, path in job.bundles.items():
        bundle = load_bundle(path)
        candidates: list[Policy] = [BundlePolicy(bundle, name, start_tp=degree) for degree in degrees]
        outcomes = evaluate(cell, candidates, job.fastest_energy_j, observe=True)
        best = min(range(len(degrees)), key=lambda k: outcomes[k].rank(job.settings.target_attainment))
        chosen[name] = BundlePolicy(bundle, name, start_tp=degrees[best])
    return chosen


def _read(path: Path) -> Any:  # noqa: ANN401  # what JSON holds
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def _write(path: Path, value: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".part")
    partial.write_text(json.dumps(value, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    partial.replace(path)  # whole or not at all: a study may be stopped at any time
