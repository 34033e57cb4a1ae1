"""What every figure of the report has in common: style, colours, grid of panels, origin of the numbers.

Figures are made without pyplot, so that nothing global is touched and no window can open.
"""

from __future__ import annotations

import textwrap
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Literal

import numpy as np
from matplotlib import colormaps, rc_context
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from numpy.typing import NDArray

    from rlgov.characterize.tables import Results

STYLE: Final[dict[Any, object]] = {
    "font.size": 9.5,
    "axes.titlesize": 9.5,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e3e3e3",
    "grid.linewidth": 0.8,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "savefig.dpi": 110,
}
LIMIT_COLOUR: Final = "#b22222"
COLOURS: Final = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8b6914")  # Okabe-Ito
MARKERS: Final = ("o", "s", "^", "D", "v", "P", "X", "h")
MOST_LINES: Final = 7
FILLED: Final = 0.9
"""Below this share of the level the batch did not fill: memory or load held it back."""
_NARROW: Final = 12.0  # times from the lower to the upper end
_COARSE: Final = (1.0, 2.0, 5.0)
_FINE: Final = (1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0)
_CHARACTERS_AN_INCH: Final = 9.8
_FOOT_IN: Final = 0.26


@dataclass(frozen=True, eq=False)
class Drawing:
    """A figure, and what stands beside it."""

    name: str
    title: str  # the finding, with its numbers
    caption: str  # how to read it
    figure: Figure


@dataclass(frozen=True, slots=True)
class Gap:
    """A figure that cannot be drawn, and why."""

    name: str
    title: str
    reason: str


def grid(
    rows: int,
    columns: int,
    size_in: tuple[float, float],
    *,
    share_x: bool = False,
    share_y: Literal["row", "none"] = "row",
) -> tuple[Figure, list[list[Axes]]]:
    """A figure with a grid of panels, each ``size_in`` inches.

    The extra width is for the legend.
    """
    width, height = size_in
    figure = Figure(figsize=(columns * width + 1.9, rows * height + 0.7), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False, sharex=share_x, sharey=share_y)
    return figure, [list(row) for row in panels]


def finish(figure: Figure, title: str, results: Results) -> None:
    """Put the finding above and the origin of the numbers below."""
    width, height = figure.get_size_inches()
    wrapped = textwrap.fill(title, int(width * _CHARACTERS_AN_INCH))
    figure.suptitle(wrapped, x=0.008, ha="left", fontweight="bold", fontsize=11.0)
    foot = _FOOT_IN / height
    engine = figure.get_layout_engine()
    if engine is not None:
        engine.set(rect=(0.0, foot, 1.0, 1.0 - foot))  # type: ignore[call-arg]  # of the constrained engine
    simulated = results.simulated
    figure.text(
        0.008,
        0.35 * foot,
        results.origin,
        fontsize=9.0,
        color=LIMIT_COLOUR if simulated else "#555555",
        fontweight="bold" if simulated else "normal",
    )


def save(drawing: Drawing, path: Path) -> None:
    """Write a figure as PNG, without the version that would make two runs differ."""
    with rc_context(STYLE):
        drawing.figure.savefig(path, metadata={"Software": None})


def shades(count: int) -> list[Any]:
    """Colours of an ordered axis, the first one darkest; told apart also without colour vision."""
    return [colormaps["viridis"](value) for value in np.linspace(0.0, 0.86, max(count, 1))]


def some(values: Iterable[float], most: int = MOST_LINES) -> list[float]:
    """At most so many of the distinct values, spread evenly, both ends among them; largest first."""
    known = sorted({value for value in values if np.isfinite(value)}, reverse=True)
    if len(known) <= most:
        return known
    return [known[int(at)] for at in np.linspace(0, len(known) - 1, most).round()]


def numbers(table: pd.DataFrame, column: str) -> NDArray[np.float64]:
    """A column as floats."""
    return table[column].to_numpy(dtype=np.float64, na_value=np.nan)


def draw_line(axes: Axes, table: pd.DataFrame, x: str, y: str, colour: Any, scale: float = 1.0) -> None:  # noqa: ANN401  # a colour as matplotlib takes it
    """One line with error bars, in order of ``table``; hollow where not steady, crossed where not filled."""
    across, up = numbers(table, x), scale * numbers(table, y)
    error = scale * numbers(table, f"{y}_error")
    known = np.isfinite(across) & np.isfinite(up)
    axes.plot(across[known], up[known], color=colour, linewidth=1.4)
    barred = known & (error > 0)
    if barred.any():
        axes.errorbar(
            across[barred],
            up[barred],
            yerr=np.minimum(error, 0.999 * up)[barred],  # a logarithmic axis has no place for zero
            fmt="none",
            ecolor=colour,
            elinewidth=1.0,
            capsize=2.5,
        )
    steady = table["steady"].to_numpy(dtype=bool)
    full = filled(table)
    for chosen, marker, face in (
        (known & steady & full, "o", colour),
        (known & steady & ~full, "X", colour),
        (known & ~steady, "o", "white"),
    ):
        if chosen.any():
            axes.plot(
                across[chosen],
                up[chosen],
                linestyle="none",
                marker=marker,
                markersize=5.5 if marker == "X" else 4.5,
                markerfacecolor=face,
                markeredgecolor=colour if marker == "o" else "white",
                markeredgewidth=1.0 if marker == "o" else 0.4,
                zorder=3,
            )


def filled(table: pd.DataFrame) -> NDArray[np.bool_]:
    """Whether the batch reached its level; true in an open loop, and where it is not known."""
    closed = (table["mode"] == "closed").to_numpy()
    return ~(closed & (numbers(table, "running_mean") < FILLED * numbers(table, "level")))


def legend(
    figure: Figure, labels: Sequence[str], colours: Sequence[Any], title: str, shown: pd.DataFrame
) -> None:
    """Lines by colour, and the meaning of the markers that occur in what is shown."""
    handles = [
        Line2D([], [], color=colour, marker="o", markersize=4.5, label=label)
        for label, colour in zip(labels, colours, strict=True)
    ]
    grey = "#555555"
    steady = shown["steady"].to_numpy(dtype=bool)
    if (steady & ~filled(shown)).any():
        handles.append(
            Line2D([], [], linestyle="none", marker="X", color=grey, label="batch not filled\n(below 90 %)")
        )
    if not steady.all():
        handles.append(
            Line2D([], [], linestyle="none", marker="o", mfc="white", mec=grey, label="not steady")
        )
    figure.legend(handles=handles, loc="outside right center", title=title, alignment="left")


def log_axis(axis: Axis) -> None:
    """A logarithmic axis that is labelled with plain numbers. Call it when everything is drawn.

    Where nothing above zero is drawn on it or on those it is shared with, it stays as it is.
    """
    axes, name = axis.axes, axis.axis_name  # type: ignore[attr-defined]  # the stubs leave them out
    shared = axes.get_shared_x_axes() if name == "x" else axes.get_shared_y_axes()
    if not any(np.isfinite(getattr(other.dataLim, f"minpos{name}")) for other in shared.get_siblings(axes)):
        return
    axes.set(**{f"{name}scale": "log"})
    low, high = axis.get_view_interval()
    narrow = high < _NARROW * low
    axis.set_major_locator(LogLocator(subs=_FINE if narrow else _COARSE, numticks=20))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_locator(NullLocator())


def limit_line(axes: Axes, value: float, text: str, *, vertical: bool = False) -> None:
    """A limit, dashed and named."""
    pen: dict[str, Any] = {"color": LIMIT_COLOUR, "linewidth": 1.1, "linestyle": "--", "zorder": 1}
    (axes.axvline if vertical else axes.axhline)(value, **pen)
    place: dict[str, Any] = {"xy": (0.01, value), "xycoords": ("axes fraction", "data"), "va": "bottom"}
    if vertical:
        place = {"xy": (value, 0.99), "xycoords": ("data", "axes fraction"), "va": "top"}
        place |= {"rotation": 90, "ha": "right"}
    axes.annotate(text, color=LIMIT_COLOUR, fontsize=8.0, **place)


def span(values: Iterable[float]) -> str:
    """Smallest and largest of some values in words, without digits after the point."""
    known = [value for value in values if np.isfinite(value)]
    low, high = f"{min(known):.0f}", f"{max(known):.0f}"
    return low if low == high else f"{low} to {high}"


def nothing(axes: Axes, text: str = "nothing known") -> None:
    """Say in an empty panel that it is empty."""
    axes.set_yticks([])
    axes.text(0.5, 0.5, text, transform=axes.transAxes, ha="center", va="center", color="#777777")
