"""What a replay leaves behind: JSON, CSV, plots, and a table for the terminal and for documents."""

from __future__ import annotations

import csv
import json
from dataclasses import asdict
from typing import TYPE_CHECKING

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

from rlgov.agents import plots
from rlgov.agents.plots import FrontPoint
from rlgov.agents.replay import BEST_STATIC, FASTEST, PolicyRow, ReplayResult
from rlgov.envs.guard import Reason
from rlgov.records import WINDOW_FIELDS

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from pathlib import Path

    from rlgov.agents.playback import Run

TABLE_WIDTH = 110
TIMELINE_POLICIES = 4  # more lines a panel cannot be told apart


def write_report(result: ReplayResult, out: Path, *, figures: bool = True) -> dict[str, Path]:
    """Write every file of a replay into ``out``, which is made if need be.

    Args:
        result: What ``replay`` returned.
        out: Folder to write to; files of an earlier replay in it are replaced.
        figures: Whether to draw the plots too.

    Returns:
        The paths written, by what they hold.
    """
    out.mkdir(parents=True, exist_ok=True)
    paths = {
        "json": out / "replay.json",
        "policies": out / "policies.csv",
        "statics": out / "statics.csv",
        "windows": out / "windows.csv",
    }
    text = json.dumps(result.to_json(), indent=2, allow_nan=False)
    paths["json"].write_text(text + "\n", encoding="utf-8")
    _write_csv(paths["policies"], [_flat(asdict(row)) for row in result.policies])
    _write_csv(paths["statics"], [{**asdict(p.configuration), **asdict(p.figures)} for p in result.statics])
    _write_windows(paths["windows"], result.runs)
    if figures:
        paths["front"] = out / "front.png"
        paths["timeline"] = out / "timeline.png"
        plots.save(
            plots.front_figure(
                front_points(result), target=result.spec.target_attainment, title=_title(result)
            ),
            paths["front"],
        )
        plots.save(plots.timeline_figure(shown_runs(result), title=_title(result)), paths["timeline"])
    return paths


def front_points(result: ReplayResult) -> list[FrontPoint]:
    """Every static setting and every policy, relative to the fastest setting's energy."""
    fastest_j = next(row.energy_j for row in result.policies if row.name == FASTEST)
    statics = [
        FrontPoint(
            "static",
            point.figures.energy_j / fastest_j,
            point.figures.slo_attainment,
            "static",
            point.configuration.tp_degree,
        )
        for point in result.statics
    ]
    named = [
        FrontPoint(
            row.name,
            row.energy_j / fastest_j,
            row.slo_attainment,
            "learned" if row.name in result.learned else "rule",
        )
        for row in _learned_first(result)
    ]
    return statics + named


def shown_runs(result: ReplayResult) -> list[Run]:
    """The runs of the timeline: learned policies first, then rules, then the two references."""
    by_name = {run.policy: run for run in result.runs}
    order = [row.name for row in _learned_first(result)]
    others = [name for name in order if name not in (FASTEST, BEST_STATIC)]
    names = [*others[: TIMELINE_POLICIES - 2], BEST_STATIC, FASTEST]
    return [by_name[name] for name in names]


def policies_table(result: ReplayResult) -> Table:
    """The report for a terminal; every line holds one policy, with half-widths of 95 % intervals."""
    chosen = result.best_static
    caption = (
        f"best static: {chosen.sm_clock_mhz} MHz, batch cap {chosen.batch_cap}, TP {chosen.tp_degree}"
        f"{'' if result.best_static_meets_target else ' (misses the target)'}; digest {result.digest[:16]}"
    )
    table = Table(title=_title(result), caption=caption, box=box.SIMPLE_HEAD, title_justify="left")
    table.add_column("policy", overflow="fold")
    for name in (
        "energy\nkJ",
        "J per\ntoken",
        "in SLO\n%",
        "TTFT s\np50  p99",
        "TPOT ms\np50 p99",
        "TP\nmoves",
        "saved, %:\nvs fastest",
        "saved, %:\nvs best static",
    ):
        table.add_column(name, justify="right", no_wrap=True)
    for row in _learned_first(result):
        table.add_row(
            row.name,
            f"{row.energy_j / 1000.0:.1f}",
            _number(row.j_per_output_token, 3),
            f"{100.0 * row.slo_attainment:.2f}",
            f"{_number(row.ttft_p50_s, 2)} {_number(row.ttft_p99_s, 2):>5}",
            f"{_milli(row.tpot_p50_s)} {_milli(row.tpot_p99_s):>3}",
            str(row.switches),
            _half_width(row.saving_vs_fastest, row.saving_vs_fastest_ci),
            _half_width(row.saving_vs_best_static, row.saving_vs_best_static_ci),
            style="bold" if row.name in result.learned else None,
        )
    return table


def print_table(result: ReplayResult, console: Console | None = None) -> None:
    """Print :func:`policies_table`; to standard output by default."""
    if console is None:
        console = Console()
        # a file or a narrow terminal would cut words; a long line there can still be read
        console.width = max(console.width, TABLE_WIDTH)
    console.print(policies_table(result))


def savings_table(results: Mapping[str, ReplayResult], policies: Sequence[str] | None = None) -> str:
    """A Markdown table over several replays: one line a policy and replay, savings with intervals.

    Args:
        results: Replays by the name of their line, e.g. ``"conversation, 40 %"``.
        policies: Which policies to list; by default all but the fastest setting.
    """
    lines = [
        "| replay | policy | attainment | energy saved against fastest | against best static |",
        "|---|---|---:|---:|---:|",
    ]
    for name, result in results.items():
        wanted = policies or [row.name for row in result.policies if row.name != FASTEST]
        lines += [
            f"| {name} | {_label(result, row)} | {100.0 * row.slo_attainment:.2f} % "
            f"| {_saving(row.saving_vs_fastest, row.saving_vs_fastest_ci)} "
            f"| {_saving(row.saving_vs_best_static, row.saving_vs_best_static_ci)} |"
            for row in result.policies
            if row.name in wanted
        ]
    return "\n".join(lines) + "\n"


def _learned_first(result: ReplayResult) -> list[PolicyRow]:
    def rank(row: PolicyRow) -> int:
        if row.name in result.learned:
            return 0
        return 2 + (row.name == FASTEST) if row.name in (FASTEST, BEST_STATIC) else 1

    return sorted(result.policies, key=rank)


def _label(result: ReplayResult, row: PolicyRow) -> str:
    if row.name != BEST_STATIC:
        return row.name
    chosen = result.best_static
    short = "" if result.best_static_meets_target else ", misses the target"
    return f"{row.name} ({chosen.sm_clock_mhz} MHz, {chosen.batch_cap}, TP {chosen.tp_degree}{short})"


def _title(result: ReplayResult) -> str:
    level = result.limits.service_level
    rate = f"rate \N{MULTIPLICATION SIGN}{result.spec.rate_scale:g}"
    return (
        f"{result.trace_name}, {result.schedule.span_s / 60.0:.0f} min at {rate} on {result.spec.profile}; "
        f"TTFT {level.ttft_s:g} s, TPOT {1000.0 * level.tpot_s:g} ms"
    )


def _write_csv(path: Path, records: Sequence[Mapping[str, object]]) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(records[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(records)


def _write_windows(path: Path, runs: Iterable[Run]) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["policy", "reason", *WINDOW_FIELDS])
        for run in runs:
            reasons = [Reason(reason).name.lower() for reason in run.reasons.tolist()]
            for reason, row in zip(reasons, run.rows.tolist(), strict=True):
                # nothing measured stays an empty cell
                writer.writerow([run.policy, reason, *("" if np.isnan(value) else value for value in row)])


def _flat(record: Mapping[str, object]) -> dict[str, object]:
    """Intervals as two columns."""
    flat: dict[str, object] = {}
    for key, value in record.items():
        if key.endswith("_ci"):
            low, high = value if isinstance(value, tuple) else (None, None)
            flat[f"{key}_low"], flat[f"{key}_high"] = low, high
        else:
            flat[key] = value
    return flat


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _milli(value_s: float | None) -> str:
    return "-" if value_s is None else f"{1000.0 * value_s:.0f}"


def _saving(value: float, interval: tuple[float, float] | None) -> str:
    point = f"{100.0 * value:.1f} %"
    if interval is None or value == 0.0:
        return point
    return f"{point} ({100.0 * interval[0]:.1f} to {100.0 * interval[1]:.1f})"


def _half_width(value: float, interval: tuple[float, float] | None) -> str:
    point = f"{100.0 * value:.1f}"
    if interval is None or value == 0.0:
        return point
    return f"{point} \N{PLUS-MINUS SIGN}{50.0 * (interval[1] - interval[0]):.1f}"
