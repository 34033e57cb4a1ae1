"""Figures a person can read at a glance: the energy-attainment front, and one hour of serving.

Figures are made without pyplot, so that nothing global is touched and no window can open.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Literal

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter

from rlgov.records import Column

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from matplotlib.axes import Axes
    from numpy.typing import NDArray

    from rlgov.agents.playback import Run

STYLE: Final[dict[Any, object]] = {
    "font.size": 10.0,
    "axes.titlesize": 11.0,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e3e3e3",
    "grid.linewidth": 0.8,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "savefig.dpi": 130,
    "svg.hashsalt": "rlgov",
}
REFERENCE_COLOURS: Final = {"fastest": "#7f7f7f", "best-static": "#e69f00"}
POLICY_COLOURS: Final = ("#0072b2", "#009e73", "#cc79a7", "#d55e00", "#56b4e9", "#8b6914")  # Okabe-Ito
TP_COLOURS: Final = ("#8da0cb", "#a6d854", "#fc8d62", "#e78ac3", "#b3b3b3")
MARKERS: Final = ("*", "D", "s", "^", "v", "P", "X", "h")
MISS_FLOOR: Final = 4e-4  # where 100 % lies on the attainment scale, which is logarithmic in misses
LOWEST_ATTAINMENT: Final = 0.5
BINS: Final = 240  # points a line: as many as a screen can show apart
LEFT_OUT_S: Final = 3600.0


@dataclass(frozen=True, slots=True)
class FrontPoint:
    """One policy or setting on the front."""

    name: str
    energy_share: float  # of the fastest setting's energy
    attainment: float
    kind: Literal["static", "rule", "learned"] = "rule"
    tp_degree: int | None = None  # of a static setting


def save(figure: Figure, path: Path) -> None:
    """Write a figure as PNG or SVG, without the date and version that would make two runs differ."""
    empty = {"Software": None} if path.suffix == ".png" else {"Date": None}
    with rc_context(STYLE):
        figure.savefig(path, metadata=empty)


def front_figure(points: Sequence[FrontPoint], *, target: float = 0.99, title: str = "") -> Figure:
    """Energy against attainment: every static setting as a dot, policies as named markers.

    Up and to the left is better. Settings below 50 % attainment are counted in the legend only.
    """
    with rc_context(STYLE):
        figure = Figure(figsize=(10.0, 5.6), layout="constrained")
        axes = figure.subplots()
        handles = _draw_statics(axes, [p for p in points if p.kind == "static"])
        named = [p for p in points if p.kind != "static"]
        colours = _colours([p.name for p in named])
        for rank, point in enumerate(named):
            marker = MARKERS[rank % len(MARKERS)]
            size = 15.0 if marker == "*" else 9.0
            shown = max(point.attainment, LOWEST_ATTAINMENT)
            (handle,) = axes.plot(
                [100.0 * point.energy_share],
                [float(_height(np.array(shown)))],
                linestyle="none",
                marker=marker,
                markersize=size,
                color=colours[point.name],
                markeredgecolor="black" if point.kind == "learned" else "white",
                markeredgewidth=1.0,
                zorder=5,
                clip_on=False,
                label=_legend(point),
            )
            handles.append(handle)
        axes.axhline(
            float(_height(np.array(target))), color="#b22222", linewidth=1.2, linestyle="--", zorder=1
        )
        axes.annotate(
            f"target {100 * target:g} %",
            (1.0, float(_height(np.array(target)))),
            xycoords=("axes fraction", "data"),
            ha="right",
            va="bottom",
            color="#b22222",
        )
        ticks = np.array([0.5, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995, 0.999, 1.0])
        axes.set_yticks(_height(ticks), [f"{100 * tick:g} %" for tick in ticks])
        axes.set_ylim(float(_height(np.array(LOWEST_ATTAINMENT))), float(_height(np.array(1.0))) + 0.08)
        axes.set_xlabel("Energy of all allotted GPUs, % of the fastest setting's")
        axes.set_ylabel("Requests within TTFT and TPOT limits")
        figure.suptitle(title or "Energy and attainment", x=0.01, ha="left", fontweight="bold", fontsize=11.0)
        figure.legend(handles=handles, loc="outside right center", title="energy against fastest, attainment")
    return figure


def timeline_figure(
    runs: Sequence[Run], *, title: str = "", from_s: float = 0.0, length_s: float = LEFT_OUT_S
) -> Figure:
    """Load, configuration, power, tails and misses of several runs over the same traffic.

    The first run is drawn on top; bands show the range within a point's time.
    """
    level = runs[0].limits.service_level
    end_s = min(from_s + length_s, runs[0].schedule.span_s)
    with rc_context(STYLE):
        figure = Figure(figsize=(11.0, 13.5), layout="constrained")
        ratios = [1.2, 1.2, 0.9, 0.7, 1.2, 1.2, 1.2, 0.9]
        panels = figure.subplots(len(ratios), 1, sharex=True, height_ratios=ratios)
        colours = _colours([run.policy for run in runs])
        _draw_load(panels[0], _Binned(runs[0], from_s, end_s))
        for rank, run in reversed(list(enumerate(runs))):
            bins = _Binned(run, from_s, end_s)
            pen = _Pen(colours[run.policy], 1.8 if rank == 0 else 1.2, len(runs) - rank, band=rank == 0)
            _line(panels[1], bins, bins.mean(Column.SM_CLOCK_MHZ), pen, Column.SM_CLOCK_MHZ)
            _line(panels[2], bins, bins.last(Column.BATCH_CAP), pen)
            _line(panels[3], bins, bins.last(Column.TP_DEGREE), pen)
            _line(panels[4], bins, bins.total(Column.ENERGY_J) / bins.total(Column.DURATION_S), pen)
            _line(panels[5], bins, bins.highest(Column.TTFT_P99_S), pen)
            _line(panels[6], bins, 1000.0 * bins.highest(Column.TPOT_P99_S), pen)
            _line(panels[7], bins, np.cumsum(np.nan_to_num(bins.total(Column.MISSES))), pen)
        _name(panels[1], "SM clock", "MHz")
        _name(panels[2], "Batch cap", "requests")
        _name(panels[3], "TP degree", "GPUs")
        _name(panels[4], "Power of all allotted GPUs", "W")
        _name(panels[5], "Time to first token, worst p99", "s")
        _name(panels[6], "Time per output token, worst p99", "ms")
        _name(panels[7], "SLO misses so far", "requests")
        clocks = runs[0].limits.sm_clocks_mhz
        panels[1].set_ylim(min(clocks) - 80.0, max(clocks) + 80.0)
        panels[2].set_yscale("log", base=2)
        caps = runs[0].limits.batch_caps
        panels[2].set_yticks(caps, [str(cap) for cap in caps])
        panels[2].set_ylim(min(caps) / 1.4, max(caps) * 1.4)
        degrees = runs[0].limits.tp_degrees
        panels[3].set_yticks(degrees, [str(degree) for degree in degrees])
        panels[3].set_ylim(min(degrees) - 0.5, max(degrees) + 0.5)
        panels[4].set_ylim(bottom=0.0)
        panels[5].set_yscale("log")
        panels[5].yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        panels[6].set_ylim(bottom=0.0)
        panels[7].set_ylim(bottom=0.0)
        for panel, limit, text in (
            (panels[5], level.ttft_s, f"limit {level.ttft_s:g} s"),
            (panels[6], 1000.0 * level.tpot_s, f"limit {1000.0 * level.tpot_s:g} ms"),
        ):
            panel.axhline(limit, color="#b22222", linewidth=1.2, linestyle="--")
            panel.annotate(
                text,
                (1.006, limit),
                xycoords=("axes fraction", "data"),
                va="center",
                color="#b22222",
                fontsize=9,
            )
        panels[-1].set_xlim(from_s / 60.0, end_s / 60.0)
        panels[-1].set_xlabel("Time, minutes")
        figure.align_ylabels(panels)
        lines = [Line2D([], [], color=colours[run.policy], linewidth=2.4, label=run.policy) for run in runs]
        figure.legend(handles=lines, loc="outside upper center", ncols=min(6, len(runs)), title=title or None)
    return figure


@dataclass(frozen=True, slots=True)
class _Pen:
    colour: str
    width: float
    order: int
    band: bool


class _Binned:
    """The rows of a run within a stretch of time, reduced to at most ``BINS`` points."""

    def __init__(self, run: Run, from_s: float, end_s: float) -> None:
        start_s = run.rows[:, Column.START_S]
        self._rows = run.rows[(start_s >= from_s) & (start_s < end_s)]
        interval_s = run.limits.interval_s
        width_s = max(1, round((end_s - from_s) / BINS / interval_s)) * interval_s
        index = ((self._rows[:, Column.START_S] - from_s) / width_s + 1e-6).astype(np.int64)
        # the row at which each bin begins; rows are in order of time
        self._starts = np.flatnonzero(np.diff(index, prepend=-1))
        self.minutes = self._rows[self._starts, Column.START_S] / 60.0

    def _reduce(
        self, column: Column, how: Callable[[NDArray[np.float64], NDArray[np.int64]], NDArray[np.float64]]
    ) -> NDArray[np.float64]:
        return how(self._rows[:, column], self._starts)

    def total(self, column: Column) -> NDArray[np.float64]:
        return self._reduce(column, np.add.reduceat)

    def highest(self, column: Column) -> NDArray[np.float64]:
        return self._reduce(column, np.fmax.reduceat)

    def lowest(self, column: Column) -> NDArray[np.float64]:
        return self._reduce(column, np.fmin.reduceat)

    def mean(self, column: Column) -> NDArray[np.float64]:
        lengths = np.diff(np.append(self._starts, len(self._rows)))
        return self.total(column) / lengths

    def last(self, column: Column) -> NDArray[np.float64]:
        ends = np.append(self._starts[1:], len(self._rows)) - 1
        values: NDArray[np.float64] = self._rows[ends, column]
        return values


def _line(
    axes: Axes, bins: _Binned, values: NDArray[np.float64], pen: _Pen, band: Column | None = None
) -> None:
    if pen.band and band is not None:
        low, high = bins.lowest(band), bins.highest(band)
        axes.fill_between(
            bins.minutes, low, high, step="post", color=pen.colour, alpha=0.2, linewidth=0, zorder=pen.order
        )
    known = np.isfinite(values)  # a gap in time without a first token or a finish is bridged
    axes.step(
        bins.minutes[known],
        values[known],
        where="post",
        color=pen.colour,
        linewidth=pen.width,
        zorder=pen.order + 1,
        alpha=0.95,
    )


def _draw_load(axes: Axes, bins: _Binned) -> None:
    seconds = bins.total(Column.DURATION_S)
    axes.step(
        bins.minutes, bins.total(Column.ARRIVALS) / seconds, where="post", color="#444444", label="requests"
    )
    _name(axes, "Load", "requests/s")
    axes.set_ylim(bottom=0.0)
    right = axes.twinx()
    right.spines["right"].set_visible(True)
    right.grid(visible=False)
    tokens = bins.total(Column.PROMPT_TOKENS) / seconds / 1000.0
    right.step(bins.minutes, tokens, where="post", color="#c4a000", linewidth=1.0, label="prompt tokens")
    right.set_ylabel("1000 tokens/s", color="#8f7400")
    right.set_ylim(bottom=0.0)
    handles = [*axes.get_lines(), *right.get_lines()]
    right.legend(handles=handles, loc="lower right", bbox_to_anchor=(1.0, 0.98), ncols=2, fontsize=9)


def _name(axes: Axes, title: str, unit: str) -> None:
    axes.set_title(title)
    axes.set_ylabel(unit)


def _draw_statics(axes: Axes, statics: Sequence[FrontPoint]) -> list[Line2D]:
    handles: list[Line2D] = []
    degrees = sorted({p.tp_degree for p in statics if p.tp_degree is not None}, reverse=True)
    for rank, degree in enumerate(degrees):
        mine = [p for p in statics if p.tp_degree == degree]
        shown = [p for p in mine if p.attainment >= LOWEST_ATTAINMENT]
        hidden = len(mine) - len(shown)
        (handle,) = axes.plot(
            [100.0 * p.energy_share for p in shown],
            _height(np.array([p.attainment for p in shown])),
            linestyle="none",
            marker="o",
            markersize=4.5,
            color=TP_COLOURS[rank % len(TP_COLOURS)],
            markeredgewidth=0.0,
            alpha=0.8,
            clip_on=False,
            label=f"static, TP {degree}" + (f" ({hidden} below 50 %)" if hidden else ""),
        )
        handles.append(handle)
    return handles


def _height(attainment: NDArray[np.float64]) -> NDArray[np.float64]:
    """Attainment on a scale that is logarithmic in misses: 90, 99 and 99.9 % lie one step apart."""
    return np.asarray(-np.log10(1.0 - attainment + MISS_FLOOR))


def _colours(names: Sequence[str]) -> dict[str, str]:
    free = [name for name in names if name not in REFERENCE_COLOURS]
    chosen = {name: POLICY_COLOURS[i % len(POLICY_COLOURS)] for i, name in enumerate(free)}
    return {**REFERENCE_COLOURS, **chosen}


def _legend(point: FrontPoint) -> str:
    energy = _signed(100.0 * (point.energy_share - 1.0))
    return f"{point.name}: {energy} %, {_percent(point.attainment)}"


def _percent(share: float) -> str:
    return f"{100.0 * share:.2f} %"


def _signed(percent: float) -> str:
    return f"{round(percent, 1) + 0.0:+.1f}".replace("-", "\N{MINUS SIGN}")
