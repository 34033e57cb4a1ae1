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
from rlgov.calibration.table import (
    HEADER_FILE,
    ITERATIONS,
    POINTS,
    SCHEMA,
    RunHeader,
    frame_of,
    read_header,
    write_header,
    write_iterations,
    write_points,
)
from rlgov.characterize.journal import PointJournal
from rlgov.characterize.measure import iteration_rows, point_row, span_s
from rlgov.characterize.plan import Axes, build_points, choose, order_tasks
from rlgov.characterize.steady import find_span, warm_up_windows
from rlgov.config import DEFAULT_PROFILE
from rlgov.errors import CharacterizationError

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

ITERATIONS_FOLDER: Final = "iterations"
_PACKAGES: Final = ("numpy", "numba", "vllm")
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
    return build_points(axes, workloads)


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
        CharacterizationError: The folder holds another campaign, or a point cannot be measured.
        ConfigError: Something is asked for that the deployment does not offer.
    """
    points = plan_points(settings, bench, workloads)
    tasks = order_tasks(points, settings.repeats, settings.seed)
    header = _header(settings, bench, points)
    folder = settings.out
    folder.mkdir(parents=True, exist_ok=True)
    with PointJournal(folder) as journal:
        _claim(folder, header, journal)
        left = [task for task in tasks if task.key not in journal.rows]
        begin_s = clock.monotonic_s()
        keep = settings.deployment != "simulated" if settings.iterations is None else settings.iterations
        for done, task in enumerate(left):
            row, iterations = _measure(task, settings, bench)
            if keep and len(iterations):
                _keep_iterations(folder, task, iterations)
            journal.add(row)
            if progress is not None:
                spent_s = clock.monotonic_s() - begin_s
                left_s = spent_s / (done + 1) * (len(left) - done - 1)
                what = f"{task.point.label}; about {_duration(left_s)} left"
                progress(len(tasks) - len(left) + done + 1, len(tasks), what)
            if done + 1 < len(left):
                bench.rest(settings.cool_down_s)
        if left and bench.notes != header.notes:
            header = replace(header, notes=bench.notes)
            write_header(folder, header)
        rows = [journal.rows[point.point_id, r] for point in points for r in range(settings.repeats)]
        table = frame_of(rows, POINTS, str(folder))
        files = [folder / HEADER_FILE, *write_points(folder, table)]
        files += _gather_iterations(folder, rows)
    return Outcome(folder, header, table, len(left), tuple(files))


def _measure(task: Task, settings: CharacterizeSettings, bench: Bench) -> tuple[dict[str, Any], pd.DataFrame]:
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
    iterations = frame_of(list(iteration_rows(task, windows, span, evidence)), ITERATIONS, task.point.label)
    return row, iterations


_SLACK_S: Final = 120.0  # until the load comes, and for intervals that take longer than they should


def _claim(folder: Path, header: RunHeader, journal: PointJournal) -> None:
    """Write the header into a fresh folder, or see that the folder is this campaign's."""
    if not (folder / HEADER_FILE).is_file():
        if journal.rows:
            msg = f"{folder} holds finished points without {HEADER_FILE}; name another folder with --out"
            raise CharacterizationError(msg)
        write_header(folder, header)
        return
    there = read_header(folder)
    if there.digest == header.digest:
        return
    mine = {"deployment": header.deployment, **header.settings, **header.limits}
    theirs = {"deployment": there.deployment, **there.settings, **there.limits}
    other = [name for name in mine if name not in _UNDECIDING and mine[name] != theirs.get(name)]
    what = ", ".join(f"{name} {theirs.get(name)} there, {mine[name]} here" for name in other[:3])
    msg = (
        f"{folder} holds another campaign ({what or 'of another profile or model'}); "
        "name another folder with --out, or repeat the settings of that one to resume it"
    )
    raise CharacterizationError(msg)


def _header(settings: CharacterizeSettings, bench: Bench, points: Sequence[Point]) -> RunHeader:
    chosen = settings.model_dump(mode="json")
    deciding = {name: value for name, value in chosen.items() if name not in _UNDECIDING}
    identity = bench.identity
    told = json.dumps([deciding, identity, [point.point_id for point in points]], sort_keys=True)
    limits: Any = identity["limits"]
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
        limits=json.loads(json.dumps(limits)),
        versions=_versions(),
        notes=bench.notes,
    )


def _versions() -> dict[str, str]:
    known = {"python": platform.python_version(), "rlgov": __version__}
    for name in _PACKAGES:
        try:
            known[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return known


def _keep_iterations(folder: Path, task: Task, iterations: pd.DataFrame) -> None:
    place = folder / ITERATIONS_FOLDER
    place.mkdir(exist_ok=True)
    path = place / f"{task.point.point_id}-{task.repeat}.parquet"
    part = path.with_suffix(".part")
    iterations.to_parquet(part, index=False)
    part.replace(path)


def _gather_iterations(folder: Path, rows: Sequence[dict[str, Any]]) -> list[Path]:
    paths = [folder / ITERATIONS_FOLDER / f"{row['point_id']}-{row['repeat']}.parquet" for row in rows]
    frames = [pd.read_parquet(path) for path in paths if path.is_file()]
    return [write_iterations(folder, pd.concat(frames, ignore_index=True))] if frames else []


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
