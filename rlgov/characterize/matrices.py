"""Two figures that are tables: the best configuration by workload and load, and rank correlations."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import numpy as np
from matplotlib import colormaps, rc_context
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from rlgov.characterize.drawing import STYLE, Drawing, Gap, finish, span
from rlgov.characterize.findings import COMPANIONS
from rlgov.characterize.tables import clock_label

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from numpy.typing import NDArray

    from rlgov.characterize.findings import Variety
    from rlgov.characterize.tables import Results

BEST: Final = "The best configuration by workload and load"
CORRELATIONS: Final = "What energy per token goes with"
FOLLOWS: Final = 0.8
PARTLY: Final = 0.5
"""Rank correlations from which one measure is said to follow another, and to follow it in part."""
MOST_LOADS: Final = 12
_DARK: Final = 0.55  # share of the colour scale above which letters are white


def best_figure(results: Results, best: pd.DataFrame, told: Variety | None) -> Drawing | Gap:
    """A table as a picture: the best configuration of every workload (row) and load (column)."""
    name = "best"
    if results.service_level is None:
        return Gap(name, BEST, "the run names no SLO")
    if best["j_per_output_token"].notna().sum() == 0:
        reason = "no configuration held the SLO at any load" if len(best) else "energy was not measured"
        return Gap(name, BEST, reason)
    loads = list(dict.fromkeys(best.sort_values(["mode", "concurrency", "rate_per_s"])["load"]))
    shown = loads[:MOST_LOADS]
    workloads = list(dict.fromkeys(best["workload"]))
    caps = results.points.groupby(["workload", "load"])["batch_cap"].nunique().max() > 1
    saved = 1.0 - 1.0 / best["highest"].astype("float64")
    most = max(float(saved.max()), 0.01)
    scale = colormaps["viridis_r"]
    with rc_context({**STYLE, "axes.grid": False}):
        figure = Figure(
            figsize=(1.9 + 1.12 * max(len(shown), 5), 1.5 + 0.72 * len(workloads)), layout="constrained"
        )
        axes = figure.subplots()
        for row, share in zip(best.itertuples(), saved, strict=True):
            if row.load not in shown:
                continue
            x, y = shown.index(str(row.load)), workloads.index(str(row.workload))
            _cell(axes, (x, y), row, float(share), most, caps=bool(caps))
        axes.set_xlim(-0.5, max(len(shown), 1) - 0.5)
        axes.set_ylim(len(workloads) - 0.5, -0.5)
        axes.set_xticks(range(len(shown)), shown)
        axes.set_yticks(range(len(workloads)), workloads)
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
        bar = figure.colorbar(_mappable(scale, most), ax=axes, aspect=25, pad=0.01)
        bar.set_label("Energy saved, %")
        title = _best_finding(told, saved)
        finish(figure, title, results)
    rest = len(loads) - len(shown)
    more = f" {rest} more loads are in the table." if rest else ""
    caption = (
        "In every cell the clock and TP degree" + (" and cap" if caps else "") + " of least energy per token "
        "with TTFT and TPOT p99 within the SLO, and the energy it saves per token against the highest clock, "
        f"cap and TP degree at the same load. Idle GPUs beside a smaller degree are not counted.{more}"
    )
    return Drawing(name, title, caption, figure)


def correlations_figure(results: Results, table: pd.DataFrame) -> Drawing | Gap:
    """Rank correlations of energy per token with power, cost, latency and throughput, a row a workload."""
    name = "correlations"
    names = [each for each in COMPANIONS if table[each].notna().any()]
    if not names:
        reason = "it takes energy of at least four configurations at one load that differ in it"
        return Gap(name, CORRELATIONS, reason)
    known = set(table.loc[table[names].notna().any(axis=1), "workload"])
    workloads = [each for each in results.planned if each in known]
    with rc_context({**STYLE, "axes.grid": False}):
        figure = Figure(
            figsize=(2.4 + 1.75 * max(len(names), 4), 1.7 + 0.52 * len(workloads)), layout="constrained"
        )
        axes = figure.subplots()
        for y, workload in enumerate(workloads):
            for x, each in enumerate(names):
                values = table.loc[table["workload"] == workload, each].dropna().to_numpy(dtype=np.float64)
                _correlation_cell(axes, (x, y), values)
        axes.set_xlim(-0.5, len(names) - 0.5)
        axes.set_ylim(len(workloads) - 0.5, -0.5)
        axes.set_xticks(range(len(names)), [COMPANIONS[each].replace(" (", "\n(") for each in names])
        axes.xaxis.tick_top()
        axes.set_yticks(range(len(workloads)), workloads)
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
        bar = figure.colorbar(_mappable(colormaps["PuOr"], 1.0, -1.0), ax=axes, shrink=0.9, pad=0.01)
        bar.set_label("Rank correlation")
        title = correlation_finding(table)
        finish(figure, title, results)
    caption = (
        "Spearman's rank correlation over all usable configurations at one workload and load: at 1 a "
        "configuration that uses more energy per token always has more of the other, at -1 always less, at 0 "
        "the one says nothing of the other. In the title: follows or opposes from 0.8, partly from 0.5. "
        "The median over the loads, and their range. Cost is GPUs held times seconds a token."
    )
    return Drawing(name, title, caption, figure)


def correlation_finding(table: pd.DataFrame) -> str:
    """Which measures energy per token follows, by the median over workloads and loads."""
    medians = {name: float(table[name].median()) for name in COMPANIONS if table[name].notna().any()}
    verbs: dict[str, list[str]] = {}
    for name, rho in medians.items():
        verb = "does not follow"
        if abs(rho) >= PARTLY:
            verb = ("" if abs(rho) >= FOLLOWS else "partly ") + ("follows" if rho > 0 else "opposes")
        verbs.setdefault(verb, []).append(f"{COMPANIONS[name].partition(' (')[0]} ({_signed(rho)})")
    told = [f"{verb} {', '.join(names)}" for verb, names in verbs.items()]
    return "Energy per token " + "; it ".join(told)


def _best_finding(told: Variety | None, saved: pd.Series[float]) -> str:
    range_ = f"{span(100 * saved)} %"
    if told is None:
        return f"In the only case the best setting saves {100 * saved.max():.0f} % against the highest"
    if told.distinct == 1:
        return f"{told.most_common} is the best in all {told.cases} cases; it saves {range_}"
    return (
        f"{told.distinct} different settings are the best in {told.cases} cases; "
        f"they save {range_} against the highest setting"
    )


def _cell(axes: Axes, at: tuple[int, int], row: Any, share: float, most: float, *, caps: bool) -> None:  # noqa: ANN401  # a named tuple of pandas
    if not np.isfinite(row.j_per_output_token):
        _rectangle(axes, at, "#eeeeee")
        axes.text(*at, "none holds\nthe SLO", ha="center", va="center", color="#777777", fontsize=8.0)
        return
    level = max(share, 0.0) / most
    _rectangle(axes, at, colormaps["viridis_r"](level))
    clock = clock_label(row.sm_clock_mhz).replace("clock not locked", "no lock")
    setting = f"TP {row.tp_degree:.0f}" + (f", cap {row.batch_cap:.0f}" if caps else "")
    text = f"{clock}\n{setting}\n{round(-100 * share):+d} %".replace("+0 %", "0 %").replace("-", "−")  # noqa: RUF001  # a minus sign is as wide as the plus
    axes.text(
        *at, text, ha="center", va="center", fontsize=8.0, color="white" if level > _DARK else "black"
    )  # fmt: skip


def _correlation_cell(axes: Axes, at: tuple[int, int], values: NDArray[np.float64]) -> None:
    if not values.size:
        _rectangle(axes, at, "#eeeeee")
        axes.text(*at, "not known", ha="center", va="center", color="#777777", fontsize=8.0)
        return
    middle = float(np.median(values))
    _rectangle(axes, at, colormaps["PuOr"]((middle + 1.0) / 2.0))
    text = _signed(middle)
    if values.size > 1 and _signed(values.min()) != _signed(values.max()):
        text += f"\n{_signed(values.min())} to {_signed(values.max())}"
    axes.text(
        *at, text, ha="center", va="center", fontsize=8.0, color="white" if abs(middle) > _DARK else "black"
    )  # fmt: skip


def _signed(value: float) -> str:
    return f"{round(value, 2) + 0.0:+.2f}"  # no -0.00


def _rectangle(axes: Axes, at: tuple[int, int], colour: Any) -> None:  # noqa: ANN401  # as matplotlib takes it
    x, y = at
    axes.fill(
        [x - 0.48, x + 0.48, x + 0.48, x - 0.48], [y - 0.46, y - 0.46, y + 0.46, y + 0.46], color=colour
    )


def _mappable(scale: Any, high: float, low: float = 0.0) -> Any:  # noqa: ANN401  # as matplotlib takes it
    factor = 100.0 if low == 0 else 1.0
    return ScalarMappable(Normalize(factor * low, factor * high), scale)
