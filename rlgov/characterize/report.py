"""The report of a characterisation: what its points say, as one HTML page and as figures.

The founding paper's three experiments come first: clocks, batch sizes, tensor parallelism. Then what follows
from them: fronts, best configurations, what energy goes with, and the paper's own pair of clocks. Every
number in a title or a sentence is computed from the points; what was not measured is said.
"""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import pandas as pd

from rlgov.characterize import figures, fronts, matrices
from rlgov.characterize.drawing import Drawing, Gap, numbers, save
from rlgov.characterize.findings import (
    COMPANIONS,
    best_configurations,
    clock_pair,
    rank_correlations,
    variety,
)
from rlgov.characterize.page import (
    Experiment,
    Field,
    Picture,
    TextTable,
    cell,
    inline,
    render,
    significant,
    table_of,
)
from rlgov.characterize.tables import FAILED_SHARE, read_results

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from rlgov.characterize.findings import ClockPair, Variety
    from rlgov.characterize.tables import Results

REPORT_FILE: Final = "report.html"
FIGURES_FOLDER: Final = "figures"

_CONFIGURATION: Final = [
    Field("sm_clock_mhz", "SM clock, MHz", 0),
    Field("batch_cap", "cap", 0),
    Field("tp_degree", "TP", 0),
]
_LATENCY: Final = [Field("tpot_p99_s", "TPOT p99, ms", per=1000.0), Field("ttft_p99_s", "TTFT p99, s")]
_BEST: Final = [
    Field("workload", "workload"),
    Field("load", "load"),
    *_CONFIGURATION,
    Field("j_per_output_token", "J/token", 4),
    Field("j_per_output_token_error", "±"),
    Field("power_w", "power, W"),
    *_LATENCY,
    Field("output_tokens_per_s", "tokens/s"),
    Field("as_good", "equally good", 0),
    Field("holding", "within SLO", 0),
    Field("measured", "measured", 0),
    Field("fastest", "fastest"),
    Field("cheapest", "cheapest"),
    Field("frugal", "least power"),
    Field("highest", "highest setting"),
]
_CORRELATIONS: Final = [
    Field("workload", "workload"),
    Field("load", "load"),
    Field("configurations", "configurations", 0),
    *(Field(name, about, 2) for name, about in COMPANIONS.items()),
]
_PAIR: Final = [
    Field("workload", "workload"),
    Field("tp_degree", "TP", 0),
    Field("level", "level", 3),
    *(
        field
        for name, about in (
            ("throughput", "throughput"),
            ("energy", "energy per token"),
            ("tpot", "TPOT p50"),
        )
        for field in (Field(name, about), Field(f"{name}_error", "±", 2))
    ),
]
_POINTS: Final = [
    Field("workload", "workload"),
    Field("load", "load"),
    *_CONFIGURATION,
    Field("repeats", "repeats", 0),
    Field("steady", "steady"),
    Field("within_slo", "within SLO"),
    Field("running_mean", "running"),
    Field("output_tokens_per_s", "tokens/s"),
    Field("ttft_p50_s", "TTFT p50, s"),
    _LATENCY[1],
    Field("tpot_p50_s", "TPOT p50, ms", per=1000.0),
    _LATENCY[0],
    Field("itl_p99_s", "ITL p99, ms", per=1000.0),
    Field("e2e_p50_s", "E2E p50, s"),
    Field("e2e_p99_s", "E2E p99, s"),
    Field("power_w_per_gpu", "W/GPU"),
    Field("j_per_output_token", "J/token", 4),
    Field("j_per_output_token_error", "±"),
    Field("j_per_request", "J/request"),
    Field("measured_clock_mhz", "clock measured, MHz", 0),
    Field("throttled_fraction", "throttled, %", per=100.0),
    Field("throttle_reasons", "reasons"),
    Field("failed", "failed", 0),
]
_SPREADS: Final = {
    "j_per_output_token": "Energy per token (with the meter's resolution)",
    "output_tokens_per_s": "Throughput",
    "tpot_p99_s": "TPOT p99",
    "ttft_p99_s": "TTFT p99",
}
_CONTENTS: Final = (
    ("short", "In short"),
    ("missing", "Not measured"),
    ("experiment-1", "Clocks"),
    ("experiment-2", "Batch sizes"),
    ("experiment-3", "Tensor parallelism"),
    ("front", "Fronts"),
    ("best-configuration", "Best configurations"),
    ("energy", "Correlations"),
    ("clocks", "Two clocks"),
    ("uncertainty", "Uncertainty"),
    ("conditions", "Conditions"),
    ("points", "Points"),
)


def write_characterization_report(run_folder: Path) -> list[Path]:
    """Write ``report.html`` and ``figures/*.png`` into a run folder, in place of those of an earlier report.

    Returns:
        What was written, the page first.

    Raises:
        CharacterizationError: There is no run in the folder, or its tables cannot be read.
    """
    results = read_results(run_folder)
    folder = run_folder / FIGURES_FOLDER
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    files: list[Path] = []

    def picture(drawn: Drawing | Gap) -> Picture:
        if isinstance(drawn, Gap):
            return Picture(drawn.name, drawn.title, drawn.reason)
        path = folder / f"{drawn.name}.png"
        save(drawn, path)
        files.append(path)
        return Picture(drawn.name, drawn.title, drawn.caption, inline(path))

    page = render(_content(results, picture))
    target = run_folder / REPORT_FILE
    part = target.with_suffix(".part")
    part.write_text(page, encoding="utf-8")
    part.replace(target)
    return [target, *files]


def _content(results: Results, picture: Callable[[Drawing | Gap], Picture]) -> dict[str, Any]:
    best = best_configurations(results)
    told = variety(results, best)
    correlations = rank_correlations(results)
    pair = clock_pair(results)
    experiments = [
        Experiment(
            title,
            picture(draw(results, results.workloads[0])),
            tuple(picture(draw(results, workload)) for workload in results.workloads[1:]),
        )
        for title, draw in (
            (figures.CLOCKS, figures.clocks_figure),
            (figures.BATCHES, figures.batches_figure),
            (figures.PARALLEL, figures.parallel_figure),
        )
    ]
    pictures = {
        "fronts": picture(fronts.fronts_figure(results)),
        "best": picture(matrices.best_figure(results, best, told)),
        "correlations": picture(matrices.correlations_figure(results, correlations)),
        "pair": picture(fronts.pair_figure(results, pair)),
    }
    drawn = [*(experiment.first for experiment in experiments), *pictures.values()]
    return {
        "title": f"Characterisation of {results.header.model}",
        "origin": results.origin,
        "simulated": results.simulated,
        "contents": _CONTENTS,
        "short": [each.title for each in drawn if each.source] or ["No comparison could be drawn"],
        "missing": results.missing(),
        "experiments": experiments,
        "first_workload": results.workloads[0],
        "batches": _batches(results),
        **pictures,
        "slo": _slo(results),
        "variety": _variety(told),
        "best_table": table_of(best, _BEST),
        "correlation_table": table_of(correlations, _CORRELATIONS),
        "pair_table": _pair_table(pair),
        "level_name": results.level_name,
        "uncertainty": _uncertainty(results),
        "conditions": _conditions(results),
        "settings": _settings(results),
        "points": table_of(results.points, _POINTS),
    }


def _batches(results: Results) -> TextTable:
    series = results.series
    here = series[series["workload"] == results.workloads[0]]
    if here["sm_clock_mhz"].notna().any():
        here = here[here["sm_clock_mhz"] == here["sm_clock_mhz"].max()]
    degrees = sorted(here["tp_degree"].unique())
    rows = []
    for level, group in here.groupby("level"):
        running = group.drop_duplicates("tp_degree").set_index("tp_degree")["running_mean"]
        rows.append((cell(f"{float(str(level)):g}"), *(cell(float(running.get(d, np.nan))) for d in degrees)))
    return TextTable((results.level_name, *(f"TP {degree:g}" for degree in degrees)), tuple(rows))


def _slo(results: Results) -> str:
    level = results.service_level
    if level is None:
        return "The run names no SLO."
    return (
        f"The SLO: TTFT p99 at most {level.ttft_s:g} s, TPOT p99 at most {1000 * level.tpot_s:g} ms, and at "
        f"most {100 * FAILED_SHARE:g} % of the requests failed. Points that did not get steady are left out."
    )


def _variety(told: Variety | None) -> list[str]:
    if told is None:
        return ["Fewer than two cases have a best configuration: how it differs cannot be said."]
    lines = []
    if told.distinct > 1:
        lines.append(
            f"The best configuration differs by workload and load: {told.distinct} different ones in "
            f"{told.cases} cases, the most common ({told.most_common}) in {told.most_common_cases}."
        )
    else:
        lines.append(
            f"The best configuration is the same in all {told.cases} cases measured: {told.most_common}."
        )
    one = told.one_for_all
    if one is None:
        lines.append("No single setting holds the SLO in all of these cases.")
    else:
        lines.append(
            f"The one setting that suits all of them best ({one.label}) holds the SLO in every case and uses "
            f"{100 * one.median_excess:.0f} % more energy per token than the best in the median, "
            f"{100 * one.worst_excess:.0f} % more in the worst case."
        )
    return lines


def _pair_table(pair: ClockPair | None) -> TextTable:
    if pair is None:
        return TextTable((), ())
    return table_of(pair.table, _PAIR)


def _uncertainty(results: Results) -> list[str]:
    points = results.points
    fewest, most = int(points["repeats"].min()), int(points["repeats"].max())
    count = f"{most} repeat{'s' if most > 1 else ''}" if fewest == most else f"{fewest} to {most} repeats"
    lines = [f"{count} a point, {len(points)} points."]
    if most > 1:
        lines += [
            f"{words}: the repeats' standard deviation is {_share(points, f'{measure}_error', measure)}."
            for measure, words in _SPREADS.items()
            if results.has(measure)
        ]
    if results.simulated:
        lines.append(
            "Simulated energy has no measurement error. How far the simulator is from a real engine is "
            "another matter, and not in these numbers."
        )
    elif results.has("energy_error"):
        lines.append(f"The meter's resolution leaves open {_share(points, 'energy_error')} of the energy.")
    lines.append(
        "Equal repeats had equal requests, so configurations are compared repeat by repeat. Those closer "
        "than the spread of that, the meter's resolution, or 1 % are counted as equally good."
    )
    return lines


def _share(points: pd.DataFrame, column: str, of: str | None = None) -> str:
    """Median and largest of a share, in percent."""
    share = numbers(points, column) / (numbers(points, of) if of is not None else 1.0)
    known = 100.0 * share[np.isfinite(share)]
    if not known.size:
        return "an unknown share"
    middle, largest = (significant(float(value), 2) for value in (np.median(known), known.max()))
    return f"median {middle} %, at most {largest} %"


def _conditions(results: Results) -> TextTable:
    header = results.header
    rows = {
        "Model": header.model,
        "GPU": header.gpu or "not known",
        "Deployment": header.deployment,
        "Profile": header.profile or "none",
        "Seed": str(header.seed),
        "Rows": f"{len(results.rows)} of {header.points} planned",
        "Measured": f"{pd.to_numeric(results.rows['duration_s']).sum() / 3600.0:.2f} h, warm-up left out",
        "Energy": "of the GPUs of the engine; GPUs that a smaller TP degree leaves idle are not counted",
        "Campaign": header.digest,
        **{f"Version of {name}": version for name, version in header.versions.items()},
        **{f"Note {number}": note for number, note in enumerate(header.notes, start=1)},
    }
    return TextTable(("what", "value"), tuple((cell(name), cell(value)) for name, value in rows.items()))


def _settings(results: Results) -> list[tuple[str, str]]:
    told = {**results.header.settings, **results.header.limits}
    # Where the run was written or reached says nothing about it, and may name a person's folders.
    hidden = {"out", "control", "url"}
    return [(name, str(value)) for name, value in told.items() if name not in hidden]
