"""The result as a table, files and a figure."""

from __future__ import annotations

import csv
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from tests.fidelity.analyse import Analysis, Cell
from tests.fidelity.compare import METRICS, QUANTILES, distance
from tests.fidelity.measured import Measured

TITLES = {"ttft": "time to first token", "tpot": "time per further token", "e2e": "end to end"}


def print_tables(measured: Measured, analysis: Analysis, console: Console) -> None:
    """One line a cell, then one a bar."""
    fit, frontend = analysis.calibration.fit, analysis.calibration.frontend
    console.print(
        f"{measured.machine['processor']}, {measured.machine['cores']} cores, {measured.machine['apart']}, "
        f"load average {measured.machine['load at the beginning']} at the beginning"
    )
    console.print(
        f"calibration: {fit.rows} iterations, mean absolute error {fit.error:.1%}, bias {fit.bias:+.1%}, "
        f"{fit.stalled} stalled; outside the engine {1e3 * frontend.before_s:.2f} ms before, "
        f"{1e3 * frontend.first_s:.2f} ms after the first token, {1e3 * frontend.last_s:.2f} ms at the end"
    )
    table = Table(title="simulated over measured, error in % (measured, in ms)")
    for name in (
        "cap",
        "load",
        "req/s",
        "requests",
        *(f"{m} p{q}" for m in METRICS for q in QUANTILES),
        "runs",
    ):
        table.add_column(name, justify="right")
    for cell in analysis.cells:
        table.add_row(*_line(cell, analysis))
    console.print(table)
    bars = Table(title="median absolute error over the cells")
    for name in ("metric", "quantile", "error", "bar", "met", "worst cell", "repeats differ by"):
        bars.add_column(name, justify="right")
    for verdict in analysis.verdicts:
        bars.add_row(
            verdict.metric,
            f"p{verdict.percent}",
            f"{verdict.median_error:.1%}",
            f"{verdict.bar:.0%}",
            "yes" if verdict.met else "MISSED",
            f"{verdict.largest_error:+.1%}",
            f"{verdict.median_spread:.1%}",
        )
    console.print(bars)


def _line(cell: Cell, analysis: Analysis) -> list[str]:
    first = cell.runs[0]
    mine = {
        (c.metric, c.percent): c
        for c in analysis.comparisons
        if (c.batch_cap, c.load) == (first.batch_cap, first.load)
    }
    disturbed = sum(bool(run.disturbance.reasons()) for run in cell.runs)
    return [
        str(first.batch_cap),
        f"{first.load:.0%}",
        f"{first.rate_per_s:.1f}",
        str(len(first.requests)),
        *(
            f"{100 * mine[m, q].error:+.1f} ({1e3 * mine[m, q].measured_s:.1f})"
            for m in METRICS
            for q in QUANTILES
        ),
        f"{len(cell.runs)}" + (f", {disturbed} disturbed" if disturbed else ""),
    ]


def write_report(measured: Measured, analysis: Analysis, folder: Path) -> list[Path]:
    """Everything but ``measured.json``, which was written before."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = {name: folder / name for name in ("fidelity.json", "cells.csv", "requests.csv", "profile.yaml",
                                              "fidelity.md", "fidelity.png")}  # fmt: skip
    paths["fidelity.json"].write_text(
        json.dumps(_document(measured, analysis), indent=2) + "\n", encoding="utf-8"
    )
    with paths["cells.csv"].open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        for number, comparison in enumerate(analysis.comparisons):
            row = asdict(comparison) | {"error": comparison.error}
            if not number:
                writer.writerow(row)
            writer.writerow([f"{v:.6g}" if isinstance(v, float) else v for v in row.values()])
    _write_requests(analysis, paths["requests.csv"])
    paths["profile.yaml"].write_text(analysis.calibration.profile.to_yaml(), encoding="utf-8")
    with paths["fidelity.md"].open("w", encoding="utf-8") as file:
        print_tables(measured, analysis, Console(file=file, width=200))
    draw(analysis, paths["fidelity.png"])
    return list(paths.values())


def _document(measured: Measured, analysis: Analysis) -> dict[str, Any]:
    return {
        "machine": measured.machine,
        "plan": asdict(measured.plan),
        "model": measured.shape,
        "fit": asdict(analysis.calibration.fit),
        "frontend": asdict(analysis.calibration.frontend),
        "verdicts": [asdict(v) | {"met": v.met} for v in analysis.verdicts],
        "cells": [
            {
                "batch_cap": cell.runs[0].batch_cap,
                "load": cell.runs[0].load,
                "rate_per_s": cell.runs[0].rate_per_s,
                "runs": [
                    {
                        "repeat": run.repeat,
                        "busy_share": run.busy_share,
                        "running_peak": run.running_peak,
                        "disturbance": asdict(run.disturbance),
                        "disturbed": run.disturbance.reasons(),
                    }
                    for run in cell.runs
                ],
                "distance": {
                    m: distance(np.concatenate([x.of(m) for x in cell.measured]), cell.simulated.of(m))
                    for m in METRICS
                },
            }
            for cell in analysis.cells
        ],
        "comparisons": [asdict(c) | {"error": c.error} for c in analysis.comparisons],
    }


def _write_requests(analysis: Analysis, path: Path) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        names = [f"{m}_s" for m in METRICS]
        writer.writerow(["batch_cap", "load", "source", "request", "prompt_tokens", "output_tokens", *names])
        for cell in analysis.cells:
            first = cell.runs[0]
            sources = [
                (f"measured {run.repeat + 1}", one) for run, one in zip(cell.runs, cell.measured, strict=True)
            ]
            for source, latencies in (*sources, ("simulated", cell.simulated)):
                for i, request in enumerate(first.requests):
                    values = (getattr(latencies, name)[i] for name in names)
                    writer.writerow([
                        first.batch_cap, first.load, source, i, request.prompt_tokens, request.output_tokens,
                        *("" if np.isnan(value) else f"{value:.6f}" for value in values),
                    ])  # fmt: skip


def draw(analysis: Analysis, path: Path) -> None:
    """Distribution functions: measured (every repeat) and simulated, a row a metric and a column a load."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib import ticker

    loads = sorted({cell.runs[0].load for cell in analysis.cells})
    caps = sorted({cell.runs[0].batch_cap for cell in analysis.cells})
    colours = dict(zip(caps, plt.get_cmap("viridis")(np.linspace(0.0, 0.85, len(caps))), strict=True))
    figure, axes = plt.subplots(
        len(METRICS), len(loads), figsize=(4.0 * len(loads), 3.0 * len(METRICS)), squeeze=False
    )
    for cell in analysis.cells:
        first = cell.runs[0]
        for row, metric in enumerate(METRICS):
            axis = axes[row][loads.index(first.load)]
            for number, one in enumerate(cell.measured):
                label = f"cap {first.batch_cap}, measured" if not number else None
                _step(axis, one.of(metric), color=colours[first.batch_cap], lw=0.9, alpha=0.7, label=label)
            _step(axis, cell.simulated.of(metric), color=colours[first.batch_cap], lw=1.6, ls="--",
                  label=f"cap {first.batch_cap}, simulated")  # fmt: skip
    for row, metric in enumerate(METRICS):
        for column, load in enumerate(loads):
            axis = axes[row][column]
            axis.set(xscale="log", ylim=(0, 1), xlabel=f"{TITLES[metric]}, ms")
            axis.xaxis.set_major_locator(ticker.LogLocator(subs=(1.0, 2.0, 5.0)))
            axis.xaxis.set_major_formatter("{x:g}")
            axis.xaxis.set_minor_formatter(ticker.NullFormatter())
            axis.grid(alpha=0.3)
            if not row:
                axis.set_title(f"load {load:.0%}")
            if not column:
                axis.set_ylabel("share of requests")
    axes[0][0].legend(fontsize=7, loc="lower right")
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _step(axis: Any, values: np.ndarray, **style: Any) -> None:
    ordered = np.sort(values) * 1e3
    axis.step(ordered, np.arange(1, len(ordered) + 1) / len(ordered), where="post", **style)
