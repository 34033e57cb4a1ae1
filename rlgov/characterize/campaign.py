"""A characterisation from its settings to its tables: one task after another, resumable at any moment."""

from __future__ import annotations

import hashlib
import json
import math
import platform
from dataclasses import dataclass, replace
from importlib import metadata
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import pandas as pd

from rlgov import __version__
from rlgov.calibration.durable import replace_file, told_plainly
from rlgov.calibration.table import (
    HEADER_FILE,
    ITERATIONS,
    JOURNAL_FILE,
    POINTS,
    SCHEMA,
    RunHeader,
    frame_of,
    read_header,
    read_points,
    write_header,
    write_iterations,
    write_points,
)
from rlgov.characterize.journal import PointJournal
from rlgov.characterize.measure import iteration_rows, point_row, span_s
from rlgov.characterize.plan import Axes, build_points, choose, order_tasks
from rlgov.characterize.steady import find_span, warm_up_windows
from rlgov.config import DEFAULT_PROFILE
from rlgov.errors import CharacterizationError, DeploymentError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from rlgov.characterize.bench import Bench
    from rlgov.characterize.plan import Point, Task
    from rlgov.characterize.workloads import Lengths
    from rlgov.clock import Clock
    from rlgov.config import CharacterizeSettings
    from rlgov.records import Window

PATIENCE: Final = 3
"""A point that is not steady is held for at most so many times the measured time after its warm-up, and its
warm-up takes at most as long beyond what was asked for."""

ATTEMPTS: Final = 2
"""A point that fails is tried once more: an engine may just have been restarted. Then the campaign ends."""

ITERATIONS_FOLDER: Final = "iterations"
_PACKAGES: Final = ("numpy", "numba", "pandas", "pyarrow")
_UNDECIDING: Final = frozenset(
    {"out", "control", "url", "gpus", "token_env", "api_key_env", "switch_timeout_s"}
)
"""Settings that say where things are, not what is measured."""


@dataclass(frozen=True, slots=True, eq=False)
class Outcome:
    """What a campaign left."""

    folder: Path
    header: RunHeader
    points: pd.DataFrame
    measured: int  # repetitions measured now; the others were there already
    files: tuple[Path, ...]


def plan_points(
    settings: CharacterizeSettings, bench: Bench, workloads: Sequence[Lengths]
) -> tuple[Point, ...]:
    """The points of a campaign on a deployment.

    Raises:
        ConfigError: Something is asked for that the deployment does not offer.
        CharacterizationError: Clocks are asked for where none can be set.
    """
    limits = bench.limits
    clocks: tuple[int | None, ...] = (None,)
    if bench.clocks_present:
        clocks = choose(settings.clocks, limits.sm_clocks_mhz, "SM clocks (MHz)")
    elif settings.clocks:
        msg = "SM clocks are asked for, and cannot be set here; leave clocks out, or see `rlgov doctor`"
        raise CharacterizationError(msg)
    axes = Axes(
        clocks,
        choose(settings.caps, limits.batch_caps, "batch caps"),
        choose(settings.tp, limits.tp_degrees, "TP degrees"),
        settings.closed,
        tuple(sorted(set(settings.concurrency), reverse=True)),
        tuple(sorted(set(settings.rates))),
    )
    points = build_points(axes, workloads)
    _check_lengths(points, workloads, bench)
    return points


def _check_lengths(points: Sequence[Point], workloads: Sequence[Lengths], bench: Bench) -> None:
    """See before the first point that every one can be served."""
    longest = {lengths.name: lengths.longest_tokens for lengths in workloads}
    for name, degree in sorted({(point.workload, point.tp_degree) for point in points}):
        room = bench.most_tokens(degree)
        if room is not None and longest[name] > room:
            msg = (
                f"{name}: its longest request takes {longest[name]} tokens, at TP {degree} one may take "
                f"{room}; leave out this workload or this degree, or shorten the classes with --length-scale"
            )
            raise CharacterizationError(msg)


def run_campaign(
    settings: CharacterizeSettings,
    bench: Bench,
    workloads: Sequence[Lengths],
    clock: Clock,
    progress: Callable[[int, int, str], None] | None = None,
) -> Outcome:
    """Measure every point that is not measured yet, and write the tables.

    Args:
        settings: What to measure.
        bench: On what; left open.
        workloads: With what lengths.
        clock: For the time left.
        progress: Called with repetitions done, all of them, and a word.

    Raises:
        CharacterizationError: The folder holds another campaign, a point cannot be measured, or the disk is
            full. What is finished is kept, and the same call goes on from there.
        ConfigError: Something is asked for that the deployment does not offer.
    """
    points = plan_points(settings, bench, workloads)
    tasks = order_tasks(points, settings.repeats, settings.seed)
    header = _header(settings, bench, points, workloads)
    folder = settings.out
    with told_plainly(folder):
        folder.mkdir(parents=True, exist_ok=True)
    with PointJournal(folder) as journal:
        header = _claim(folder, header, journal)
        left = [task for task in tasks if task.key not in journal.rows]
        keep = settings.deployment != "simulated" if settings.iterations is None else settings.iterations
        told = _Told(progress, clock, len(tasks), len(left))
        told(0, "begins" if len(left) == len(tasks) else "goes on")
        for done, task in enumerate(left, 1):
            row, iterations = _measure(task, settings, bench)
            if keep and len(iterations):
                _keep_iterations(folder, task, iterations)
            journal.add(row)
            told(done, task.point.label)
            if done < len(left):
                bench.rest(settings.cool_down_s)
        header = _with_notes(folder, header, bench.notes if left else ())
        rows = [journal.rows[point.point_id, r] for point in points for r in range(settings.repeats)]
        return _write_tables(folder, header, rows, len(left))


def gather(folder: Path) -> Outcome:
    """The tables of a run folder as far as it got, from its journal; nothing is measured.

    Raises:
        CharacterizationError: There is no campaign, it has no finished point, or it is under way.
    """
    header = read_header(folder)
    if not (folder / JOURNAL_FILE).is_file():  # its tables were copied somewhere
        return Outcome(folder, header, read_points(folder), 0, (folder / HEADER_FILE,))
    with PointJournal(folder) as journal:
        rows = list(journal.rows.values())
        if not rows:
            msg = f"{folder}: no point is finished; run the command that began it again, it goes on from here"
            raise CharacterizationError(msg)
        # Not in the order they were measured in, which is at random.
        rows.sort(key=lambda row: (-row["tp_degree"], row["workload"], row["point_id"], row["repeat"]))
        return _write_tables(folder, header, rows, 0)


def _write_tables(folder: Path, header: RunHeader, rows: list[dict[str, Any]], measured: int) -> Outcome:
    table = frame_of(rows, POINTS, str(folder))
    files = [folder / HEADER_FILE, *write_points(folder, table)]
    files += _gather_iterations(folder, rows)
    return Outcome(folder, header, table, measured, tuple(files))


class _Told:
    """Progress with the time that is left."""

    def __init__(
        self, progress: Callable[[int, int, str], None] | None, clock: Clock, total: int, left: int
    ) -> None:
        self._progress = progress
        self._clock = clock
        self._total = total
        self._left = left
        self._begin_s = clock.monotonic_s()

    def __call__(self, done: int, what: str) -> None:
        if self._progress is None or not self._total:
            return
        if 0 < done < self._left:
            left_s = (self._clock.monotonic_s() - self._begin_s) / done * (self._left - done)
            what = f"{what}; about {_duration(left_s)} left"
        self._progress(self._total - self._left + done, self._total, what)


def _measure(task: Task, settings: CharacterizeSettings, bench: Bench) -> tuple[dict[str, Any], pd.DataFrame]:
    for attempt in range(1, ATTEMPTS + 1):
        try:
            return _measure_once(task, settings, bench)
        except (CharacterizationError, DeploymentError):
            if attempt == ATTEMPTS:
                raise
            bench.rest(settings.cool_down_s)
    raise AssertionError  # the last attempt returns or raises


def _measure_once(
    task: Task, settings: CharacterizeSettings, bench: Bench
) -> tuple[dict[str, Any], pd.DataFrame]:
    interval_s = bench.limits.interval_s
    warm_up = math.ceil(settings.warm_up_s / interval_s)
    measured = max(math.ceil(settings.measure_s / interval_s), 1)
    most = warm_up + 2 * PATIENCE * measured
    windows: list[Window] = []
    hold = bench.hold(task, (most + 1) * interval_s + _SLACK_S)
    try:
        while True:
            windows.append(hold.advance())
            warm = warm_up_windows(windows, warm_up, task.point.concurrency)
            if len(windows) < warm + measured and len(windows) < most:
                continue
            span = find_span(windows, min(warm, len(windows) - measured), measured)
            if len(windows) < warm + measured:  # not even warm
                span = type(span)(span.begin, span.end, steady=False)
            if span.steady or len(windows) >= min(warm + PATIENCE * measured, most):
                break
        evidence = hold.evidence(*span_s(windows, span))
    finally:
        hold.close()
    row = point_row(task, windows, span, evidence, bench.place)
    if row["failed"] and not row["served"]:
        msg = (
            f"{task.point.label}: none of {row['failed']} requests was served "
            f"({'; '.join(evidence.errors) or 'no reason was told'}); correct that and run the same command "
            "again, it goes on from here"
        )
        raise CharacterizationError(msg)
    iterations = frame_of(list(iteration_rows(task, windows, span, evidence)), ITERATIONS, task.point.label)
    return row, iterations


_SLACK_S: Final = 120.0  # until the load comes, and for intervals that take longer than they should


def _claim(folder: Path, header: RunHeader, journal: PointJournal) -> RunHeader:
    """Write the header into a fresh folder, or see that the folder is this campaign's; returns its header."""
    if not (folder / HEADER_FILE).is_file():
        if journal.rows:
            msg = f"{folder} holds finished points without {HEADER_FILE}; name another folder with --out"
            raise CharacterizationError(msg)
        write_header(folder, header)
        return header
    there = read_header(folder)
    if there.digest != header.digest:
        msg = (
            f"{folder} holds another campaign ({', '.join(_differences(there, header)[:3])}); "
            "name another folder with --out, or repeat the settings of that one to resume it"
        )
        raise CharacterizationError(msg)
    newer = [
        f"{name} {there.versions.get(name, 'none')}, then {version}"
        for name, version in header.versions.items()
        if there.versions.get(name) != version
    ]
    if newer and len(journal.rows) < there.points:
        return _with_notes(folder, there, (f"resumed with other versions: {'; '.join(newer)}",))
    return there


def _differences(there: RunHeader, mine: RunHeader) -> list[str]:
    """Which fields make two campaigns different ones, with both values."""

    def deciding(header: RunHeader) -> dict[str, Any]:
        told: dict[str, Any] = {"deployment": header.deployment, "model": header.model, "gpu": header.gpu}
        for part in (header.settings, header.limits, header.identity):
            told |= {name: value for name, value in part.items() if name not in _UNDECIDING}
        return told

    theirs, ours = deciding(there), deciding(mine)
    names = [name for name in {**ours, **theirs} if theirs.get(name) != ours.get(name)]
    found = [f"{name} {theirs.get(name)} there, {ours.get(name)} here" for name in names]
    return found or ["the same settings, but other points: it was begun by another version of rlgov"]


def _with_notes(folder: Path, header: RunHeader, notes: Sequence[str]) -> RunHeader:
    """The header with further notes, written if there are any."""
    more = tuple(note for note in notes if note not in header.notes)
    if not more:
        return header
    header = replace(header, notes=(*header.notes, *more))
    write_header(folder, header)
    return header


def _header(
    settings: CharacterizeSettings, bench: Bench, points: Sequence[Point], workloads: Sequence[Lengths]
) -> RunHeader:
    chosen = settings.model_dump(mode="json")
    deciding = {name: value for name, value in chosen.items() if name not in _UNDECIDING}
    identity = json.loads(json.dumps(bench.identity))
    told = json.dumps([deciding, identity, [point.point_id for point in points]], sort_keys=True)
    limits = identity.pop("limits")
    return RunHeader(
        schema=SCHEMA,
        rlgov_version=__version__,
        deployment=settings.deployment,
        profile=settings.profile or (DEFAULT_PROFILE if settings.deployment == "simulated" else ""),
        model=bench.place.model,
        gpu=bench.place.gpu,
        seed=settings.seed,
        points=len(points) * settings.repeats,
        digest=hashlib.sha256(told.encode()).hexdigest()[:12],
        settings=chosen,
        limits=limits,
        versions=_versions() | bench.versions,
        identity=identity | {"lengths": {lengths.name: lengths.identity for lengths in workloads}},
        notes=bench.notes,
    )


def _versions() -> dict[str, str]:
    known = {"python": platform.python_version(), "rlgov": __version__, "system": platform.platform()}
    for name in _PACKAGES:
        try:
            known[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return known


def _iterations_file(folder: Path, point_id: str, repeat: int) -> Path:
    return folder / ITERATIONS_FOLDER / f"{point_id}-{repeat}.parquet"


def _keep_iterations(folder: Path, task: Task, iterations: pd.DataFrame) -> None:
    path = _iterations_file(folder, *task.key)
    replace_file(path, lambda part: iterations.to_parquet(part, index=False))


def _gather_iterations(folder: Path, rows: Sequence[dict[str, Any]]) -> list[Path]:
    frames = []
    for row in rows:
        path = _iterations_file(folder, row["point_id"], row["repeat"])
        if path.is_file():
            frames.append(_read_iterations(path))
    return [write_iterations(folder, pd.concat(frames, ignore_index=True))] if frames else []


def _read_iterations(path: Path) -> pd.DataFrame:
    try:
        return pd.read_parquet(path)
    except (OSError, ValueError) as error:
        msg = f"{path}: cannot be read as a table ({error}); remove it to go on without these iterations"
        raise CharacterizationError(msg) from error


def _duration(seconds: float) -> str:
    minutes = seconds / 60
    if minutes < 1.5:  # noqa: PLR2004  # below it, seconds are read more easily
        return f"{seconds:.0f} s"
    return f"{minutes:.0f} min" if minutes < 90 else f"{minutes / 60:.1f} h"  # noqa: PLR2004  # as above


def summary(outcome: Outcome) -> dict[str, Any]:
    """Figures of a finished campaign, as plain values."""
    points = outcome.points
    energy = points["j_per_output_token"].to_numpy(dtype=np.float64)
    known = np.isfinite(energy)
    best = points.iloc[int(np.nanargmin(energy))] if known.any() else None
    return {
        "out": str(outcome.folder),
        "deployment": outcome.header.deployment,
        "model": outcome.header.model,
        "gpu": outcome.header.gpu,
        "rows": len(points),
        "of": outcome.header.points,
        "measured_now": outcome.measured,
        "notes": list(outcome.header.notes),
        "not_steady": int((~points["steady"].astype(bool)).sum()),
        "failed_requests": int(points["failed"].fillna(0).sum()),
        "least_j_per_output_token": None if best is None else float(best["j_per_output_token"]),
        "at": None if best is None else {
            "workload": str(best["workload"]),
            "sm_clock_mhz": None if pd.isna(best["sm_clock_mhz"]) else float(best["sm_clock_mhz"]),
            "batch_cap": int(best["batch_cap"]),
            "tp_degree": int(best["tp_degree"]),
        },
        "files": [str(path) for path in outcome.files],
    }  # fmt: skip
