"""Over all workloads: fronts of energy and latency, and a lower clock against a higher one."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from matplotlib import rc_context
from matplotlib.lines import Line2D

from rlgov.characterize.drawing import (
    COLOURS,
    MARKERS,
    STYLE,
    Drawing,
    Gap,
    finish,
    grid,
    limit_line,
    log_axis,
    nothing,
    numbers,
    some,
)
from rlgov.characterize.findings import PUBLISHED_ENERGY, front
from rlgov.characterize.tables import clock_label

if TYPE_CHECKING:
    from collections.abc import Sequence

    import pandas as pd
    from matplotlib.axes import Axes

    from rlgov.characterize.findings import ClockPair
    from rlgov.characterize.tables import Results

FRONTS: Final = "Energy and latency: fronts"
PAIR: Final = "1.6 GHz instead of 2.0 GHz"
MOST_PANELS: Final = 12


def fronts_figure(results: Results) -> Drawing | Gap:
    """Energy per token over TPOT, every usable configuration, a panel a workload, with its front."""
    name = "fronts"
    points = _comparable(results)
    if points.empty:
        return Gap(name, FRONTS, "it takes energy and TPOT of steady points, and no point has both")
    workloads = [each for each in results.planned if (points["workload"] == each).any()]
    shown = workloads[:MOST_PANELS]
    degrees = sorted(points["tp_degree"].unique())
    columns = min(3, len(shown))
    level = results.service_level
    with rc_context(STYLE):
        figure, panels = grid(
            math.ceil(len(shown) / columns), columns, (3.7, 2.6), share_x=True, share_y="none"
        )
        flat = [axes for row in panels for axes in row]
        spans = []
        for axes, workload in zip(flat, shown, strict=False):
            here = points[points["workload"] == workload]
            spans.append(_draw_front(axes, here, degrees))
            axes.set_title(workload, fontweight="bold")
            if level is not None:
                limit_line(axes, 1000.0 * level.tpot_s, "SLO", vertical=True)
        for axes in flat[: len(shown)]:
            log_axis(axes.xaxis)
            log_axis(axes.yaxis)
        for axes in flat[len(shown) :]:
            axes.remove()
        for row in panels:
            row[0].set_ylabel("Energy, J per output token")
        for axes in flat[max(0, len(shown) - columns) : len(shown)]:
            axes.set_xlabel("TPOT p99, ms")
            axes.xaxis.set_tick_params(labelbottom=True)
        title = _front_finding(spans)
        figure.legend(
            handles=_front_handles(degrees),
            loc="outside right center",
            title="Configuration",
            alignment="left",
        )
        finish(figure, title, results)
    one_load = "" if (points["mode"] == "closed").any() else f" Load: {points['load'].iloc[0]}."
    rest = len(workloads) - len(shown)
    more = f" {rest} more workloads are not drawn." if rest else ""
    caption = (
        "Every dot is one clock, batch size and TP degree. No other configuration is better in both than one "
        f"on the front. The star has the least energy within the TTFT and TPOT limits.{one_load}{more}"
    )
    return Drawing(name, title, caption, figure)


def pair_figure(results: Results, pair: ClockPair | None) -> Drawing | Gap:
    """Throughput and energy per token at a lower clock relative to a higher one, over batch sizes."""
    if pair is None:
        reason = "it takes energy at two locked clocks at least, at equal load and configuration"
        return Gap("pair", PAIR, reason)
    table = pair.table
    degrees = some(table["tp_degree"], 4)[::-1]
    with rc_context(STYLE):
        figure, panels = grid(1, len(degrees), (3.7, 3.4))
        for axes, degree in zip(panels[0], degrees, strict=True):
            here = table[table["tp_degree"] == degree]
            for measure, colour in zip(("throughput", "energy"), COLOURS, strict=False):
                _ratio_lines(axes, here, measure, colour)
            axes.axhline(1.0, color="#555555", linewidth=0.9)
            limit_line(axes, PUBLISHED_ENERGY, f"{PUBLISHED_ENERGY:g}")
            axes.set_xscale("log", base=2)
            levels = some(here["level"])
            axes.set_xticks(levels, [f"{level:g}" for level in levels])
            axes.minorticks_off()
            axes.set_xlabel(results.level_name.capitalize())
            at = here["energy"].median()
            axes.set_title(f"TP {degree:g}: median energy {100 * at:.0f} %", fontweight="bold")
        panels[0][0].set_ylabel(f"{clock_label(pair.low_mhz)} relative to {clock_label(pair.high_mhz)}")
        title = pair_finding(pair)
        handles = [
            Line2D([], [], color=colour, marker=marker, label=label)
            for colour, marker, label in zip(
                COLOURS, MARKERS, ("throughput", "energy per token"), strict=False
            )
        ]
        handles.append(Line2D([], [], color="#999999", linewidth=0.8, label="one workload"))
        figure.legend(handles=handles, loc="outside right center", title="Median over\nworkloads")
        finish(figure, title, results)
    published = (
        "The founding paper's sentence: for most batch sizes 1.6 GHz instead of 2 GHz yields about the same "
        "throughput at less than 80 % of the energy. "
    )
    if not pair.as_published:
        published += "Those clocks were not measured here; these stand in nearly the same ratio. "
    return Drawing("pair", title, published + "Bars: one standard deviation over paired repeats.", figure)


def pair_finding(pair: ClockPair) -> str:
    """The comparison of two clocks in a sentence."""
    throughput, energy = (100.0 * pair.table[name].median() for name in ("throughput", "energy"))
    return (
        f"{clock_label(pair.low_mhz)} instead of {clock_label(pair.high_mhz)}: "
        f"in the median {throughput:.0f} % of the throughput at {energy:.0f} % of the energy per token; "
        f"below 80 % in {pair.holds} of {len(pair.table)} cases"
    )


def _comparable(results: Results) -> pd.DataFrame:
    """Usable points with energy and TPOT: of closed loops, whose batch is free, or of the highest rate."""
    points = results.points[results.points["usable"]]
    both = np.isfinite(numbers(points, "j_per_output_token")) & np.isfinite(numbers(points, "tpot_p99_s"))
    points = points[both]
    closed = points[points["mode"] == "closed"]
    return closed if len(closed) else points[points["rate_per_s"] == points["rate_per_s"].max()]


def _draw_front(axes: Axes, here: pd.DataFrame, degrees: Sequence[float]) -> tuple[float, float] | None:
    """Dots, front and star; how much energy and TPOT differ from end to end of the front."""
    tpot, energy = 1000.0 * numbers(here, "tpot_p99_s"), numbers(here, "j_per_output_token")
    degree = numbers(here, "tp_degree")
    for value, colour, marker in zip(degrees, _cycle(COLOURS), _cycle(MARKERS), strict=False):
        chosen = degree == value
        axes.scatter(
            tpot[chosen], energy[chosen], s=13, color=colour, marker=marker, alpha=0.45, linewidths=0
        )  # fmt: skip
    edge = front(tpot, energy)
    axes.step(tpot[edge], energy[edge], where="post", color="black", linewidth=1.3)
    for at in edge:
        rank = list(degrees).index(degree[at])
        look: dict[str, Any] = {"marker": _cycle(MARKERS)[rank], "color": _cycle(COLOURS)[rank]}
        axes.plot(tpot[at], energy[at], markersize=5.5, markeredgecolor="black", markeredgewidth=0.8, **look)
    error = numbers(here, "j_per_output_token_error")[edge]
    if (error > 0).any():
        axes.errorbar(tpot[edge], energy[edge], yerr=np.minimum(error, 0.999 * energy[edge]), fmt="none",
                      ecolor="black", elinewidth=0.9, capsize=2.0)  # fmt: skip
    holding = here["within_slo"].to_numpy(dtype=bool)
    if holding.any():
        at = int(np.flatnonzero(holding)[energy[holding].argmin()])
        axes.plot(tpot[at], energy[at], marker="*", markersize=15, color="#f0e442", markeredgecolor="black")
    axes.margins(0.06, 0.1)
    if edge.size < 2:  # noqa: PLR2004  # one point has no ends
        return None
    return float(energy[edge[0]] / energy[edge[-1]]), float(tpot[edge[-1]] / tpot[edge[0]])


def _front_handles(degrees: Sequence[float]) -> list[Line2D]:
    handles = [
        Line2D([], [], linestyle="none", marker=marker, color=colour, label=f"TP {degree:g}")
        for degree, colour, marker in zip(degrees, _cycle(COLOURS), _cycle(MARKERS), strict=False)
    ]
    handles.append(Line2D([], [], color="black", label="front"))
    star: dict[str, Any] = {"marker": "*", "markersize": 13, "markeredgecolor": "black", "color": "#f0e442"}
    handles.append(Line2D([], [], linestyle="none", label="least energy\nwithin the SLO", **star))
    return handles


def _cycle(values: Sequence[str]) -> list[str]:
    return list(values) * 4


def _front_finding(spans: Sequence[tuple[float, float] | None]) -> str:
    known = [span for span in spans if span is not None]
    if not known:
        return "One configuration is the best in energy and TPOT: there is nothing to trade"
    energy, tpot = np.median(np.array(known), axis=0)
    over = f" (median of {len(known)} workloads)" if len(known) > 1 else ""
    return (
        f"From end to end of the front energy per token falls to 1/{energy:.1f} while TPOT p99 grows "
        f"{tpot:.1f} times{over}"
    )


def _ratio_lines(axes: Axes, here: pd.DataFrame, measure: str, colour: str) -> None:
    for _, line in here.groupby("workload", sort=False):
        axes.plot(numbers(line, "level"), numbers(line, measure), color=colour, linewidth=0.7, alpha=0.4)
        error = numbers(line, f"{measure}_error")
        if (error > 0).any():
            axes.errorbar(
                numbers(line, "level"), numbers(line, measure), yerr=error, fmt="none", ecolor=colour,
                elinewidth=0.7, alpha=0.5, capsize=1.5,
            )  # fmt: skip
    middle = here.groupby("level")[measure].median()
    if middle.empty:
        nothing(axes)
    marker = MARKERS[COLOURS.index(colour)]
    axes.plot(middle.index.to_numpy(), middle.to_numpy(), color=colour, linewidth=2.0, marker=marker)
