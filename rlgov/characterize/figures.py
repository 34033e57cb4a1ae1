"""The founding paper's three experiments, drawn for one workload: clocks, batch sizes, tensor parallelism."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import numpy as np
from matplotlib import rc_context

from rlgov.characterize.drawing import (
    STYLE,
    Drawing,
    Gap,
    draw_line,
    filled,
    finish,
    grid,
    legend,
    limit_line,
    log_axis,
    nothing,
    numbers,
    shades,
    some,
    span,
)
from rlgov.characterize.tables import clock_label

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

    from rlgov.characterize.tables import Results

CLOCKS: Final = "Power and energy per token across clocks"
BATCHES: Final = "Latency against throughput across batch sizes"
PARALLEL: Final = "Energy per token of one GPU against tensor parallelism"
_PAIR: Final = 2
_FEW_PANELS: Final = 2


def clocks_figure(results: Results, workload: str) -> Drawing | Gap:
    """Power per GPU and energy per token over the clock, a line a batch size, a column a TP degree."""
    name = f"clocks-{slug(results, workload)}"
    table = _of(results, workload)
    if not np.isfinite(numbers(table, "j_per_output_token")).any():
        return Gap(name, CLOCKS, "energy was not measured for this workload")
    if table["sm_clock_mhz"].nunique() < _PAIR:
        return Gap(name, CLOCKS, "it takes at least two locked clocks, and there are none or one")
    degrees, levels = some(table["tp_degree"], 4)[::-1], some(table["level"])
    colours = shades(len(levels))
    most_w = float(np.nanmax(numbers(table, "power_w_per_gpu"), initial=0.0))
    tdp_w = _tdp_w(results)
    near_tdp = tdp_w is not None and most_w > tdp_w / 2
    with rc_context(STYLE):
        figure, panels = grid(2, len(degrees), _size(len(degrees)), share_x=True)
        for column, degree in enumerate(degrees):
            power, energy = panels[0][column], panels[1][column]
            here = table[table["tp_degree"] == degree].sort_values("sm_clock_mhz", kind="stable")
            for level, colour in zip(levels, colours, strict=True):
                line = here[here["level"] == level]
                draw_line(power, line, "sm_clock_mhz", "power_w_per_gpu", colour)
                draw_line(energy, line, "sm_clock_mhz", "j_per_output_token", colour)
                _ring_least(energy, line, colour)
            power.set_title(f"TP {degree:g}", fontweight="bold")
            energy.set_title(_least_energy(here))
            energy.set_xlabel("SM clock, MHz")
            if tdp_w is not None and near_tdp:
                limit_line(power, tdp_w, f"TDP {tdp_w:g} W")
        panels[0][0].set_ylim(0.0, 1.08 * max(most_w, tdp_w or 0.0 if near_tdp else 0.0, 1.0))
        log_axis(panels[1][0].yaxis)
        panels[0][0].set_ylabel("Power, W per GPU")
        panels[1][0].set_ylabel("Energy, J per output token")
        title = f"{workload}: {_clock_finding(table)}"
        legend(figure, _level_labels(levels), colours, _level_title(results), table)
        finish(figure, title, results)
    caption = (
        "Every line is one batch size, saturated. Rings mark the clock of least energy per token; "
        f"energy is of all GPUs of the engine, prefill included. {_bars(results)}"
    )
    return Drawing(name, title, caption, figure)


def batches_figure(results: Results, workload: str) -> Drawing | Gap:
    """TPOT and TTFT over throughput, a line a clock, a column a TP degree, a marker a batch size."""
    name = f"batches-{slug(results, workload)}"
    table = _of(results, workload)
    rows = [column for column in ("tpot_p99_s", "ttft_p99_s") if np.isfinite(numbers(table, column)).any()]
    if not rows:
        return Gap(name, BATCHES, "no latency was measured for this workload")
    degrees = some(table["tp_degree"], 4)[::-1]
    every = table["sm_clock_mhz"].fillna(np.inf)  # not locked: as high as it gets
    finite = every.replace(np.inf, -1.0)
    clocks = some(finite, 6)
    colours = shades(len(clocks))
    with rc_context(STYLE):
        figure, panels = grid(len(rows), len(degrees), _size(len(degrees)), share_x=True)
        for column, degree in enumerate(degrees):
            here = table[table["tp_degree"] == degree].sort_values("level", kind="stable")
            for row, measure in enumerate(rows):
                for clock, colour in zip(clocks, colours, strict=True):
                    line = here[finite[here.index] == clock]
                    _latency_line(panels[row][column], line, measure, colour, named=clock == clocks[0])
                _latency_limit(panels[row][column], measure, results)
            panels[0][column].set_title(_batch_panel(here, degree, finite, clocks[0]))
            panels[-1][column].set_xlabel("Throughput, output tokens/s")
        for row, measure in enumerate(rows):
            panels[row][0].set_ylabel("TPOT p99, ms" if measure == "tpot_p99_s" else "TTFT p99, s")
        for row in range(len(rows)):
            log_axis(panels[row][0].yaxis)
            for axes in panels[row]:
                log_axis(axes.xaxis)
        title = f"{workload}: {_batch_finding(table, finite, clocks[0], results)}"
        words = [clock_label(np.nan if clock < 0 else clock) for clock in clocks]
        legend(figure, words, colours, "SM clock", table)
        finish(figure, title, results)
    left_out = finite.nunique() - len(clocks)
    more = f" {left_out} more clocks are in the table of points." if left_out else ""
    caption = (
        f"Along a line the {results.level_name} grows; its values stand at the line of the highest clock."
        f"{more} {_bars(results)}"
    )
    return Drawing(name, title, caption, figure)


def parallel_figure(results: Results, workload: str) -> Drawing | Gap:
    """Energy per token, latency and throughput per GPU over the TP degree, a line a batch size."""
    name = f"parallel-{slug(results, workload)}"
    table = _of(results, workload)
    degrees = sorted(table["tp_degree"].unique())
    if len(degrees) < _PAIR:
        return Gap(name, PARALLEL, "it takes at least two TP degrees, and there is one")
    energy = bool(np.isfinite(numbers(table, "j_per_output_token")).any())
    highest = _highest_clock(table)
    least = table.sort_values("j_per_output_token", kind="stable").drop_duplicates(["tp_degree", "level"])
    at = "" if np.isnan(_top(table)) else f", at {clock_label(_top(table))}"
    per_gpu = highest.assign(
        per_gpu=highest["output_tokens_per_s"] / highest["tp_degree"],
        per_gpu_error=highest["output_tokens_per_s_error"] / highest["tp_degree"],
    )
    parts: list[tuple[pd.DataFrame, str, float, str, str]] = [
        (highest, "tpot_p99_s", 1000.0, "TPOT p99, ms", f"Latency{at}"),
        (per_gpu, "per_gpu", 1.0, "Output tokens/s per GPU", f"Throughput per GPU{at}"),
    ]
    if energy:
        what = "Energy, J per output token"
        first = (highest, "j_per_output_token", 1.0, what, f"Energy{at}")
        own = (least, "j_per_output_token", 1.0, what, "Energy, each at its own best clock")
        parts = [first, *([own] if not np.isnan(_top(table)) else []), *parts]
    levels = some(table["level"])
    colours = shades(len(levels))
    with rc_context(STYLE):
        figure, panels = grid(1, len(parts), (3.1, 3.7), share_y="none")
        for axes, (data, measure, scale, label, heading) in zip(panels[0], parts, strict=True):
            for level, colour in zip(levels, colours, strict=True):
                line = data[data["level"] == level].sort_values("tp_degree", kind="stable")
                draw_line(axes, line, "tp_degree", measure, colour, scale)
            if not np.isfinite(numbers(data, measure)).any():
                nothing(axes)
            axes.set_xscale("log", base=2)
            axes.set_xticks(degrees, [f"{degree:g}" for degree in degrees])
            axes.minorticks_off()
            axes.set_xlim(min(degrees) / 1.25, max(degrees) * 1.25)
            log_axis(axes.yaxis)
            axes.set_xlabel("TP degree, GPUs")
            axes.set_ylabel(label)
            axes.set_title(heading)
        if energy and len(parts) == 4:  # noqa: PLR2004  # both panels of energy, side by side
            ends = [end for axes in panels[0][:2] for end in axes.get_ylim()]
            for axes in panels[0][:2]:
                axes.set_ylim(min(ends), max(ends))
        title = f"{workload}: {_parallel_finding(highest, least, results.level_name)}"
        legend(figure, _level_labels(levels), colours, _level_title(results), table)
        finish(figure, title, results)
    missing = "" if energy else " Energy was not measured: the panels for it are missing."
    caption = (
        "Energy is of all GPUs of the engine. Where memory keeps a degree from filling its batch, its point "
        f"is crossed.{missing} {_bars(results)}"
    )
    return Drawing(name, title, caption, figure)


def _latency_line(axes: Axes, line: pd.DataFrame, measure: str, colour: Any, *, named: bool) -> None:  # noqa: ANN401  # as matplotlib takes it
    scale = _scale(measure)
    draw_line(axes, line, "output_tokens_per_s", measure, colour, scale)
    if named:
        _name_levels(axes, line, measure, scale)
    axes.margins(0.07, 0.1)


def _latency_limit(axes: Axes, measure: str, results: Results) -> None:
    limits = results.service_level
    if limits is not None:
        value = _scale(measure) * (limits.tpot_s if measure == "tpot_p99_s" else limits.ttft_s)
        limit_line(axes, value, f"SLO {value:g} {'ms' if measure == 'tpot_p99_s' else 's'}")


def _scale(measure: str) -> float:
    return 1000.0 if measure == "tpot_p99_s" else 1.0


def slug(results: Results, workload: str) -> str:
    """A workload's number and name for a file; the number because two names may differ only in a sign."""
    letters = "".join(letter if letter.isalnum() else "-" for letter in workload).strip("-").lower()
    return f"{results.planned.index(workload) + 1}-{letters}"


def _of(results: Results, workload: str) -> pd.DataFrame:
    series = results.series
    return series[series["workload"] == workload]


def _size(columns: int) -> tuple[float, float]:
    return (3.6, 2.75) if columns > _FEW_PANELS else (4.6, 2.75)


def _level_labels(levels: list[float]) -> list[str]:
    return [f"{level:g}" for level in levels]


def _level_title(results: Results) -> str:
    return "Batch size" if results.level_name == "batch size" else "Requests/s"


def _bars(results: Results) -> str:
    if results.points["repeats"].max() > 1:
        return "Bars: one standard deviation of the repeats, and the meter's resolution."
    if (numbers(results.points, "energy_error") > 0).any():
        return "Bars: the meter's resolution; every point was measured once."
    return "No bars: every point was measured once, and the energy has no resolution to allow for."


def _tdp_w(results: Results) -> float | None:
    value = results.header.limits.get("tdp_w")
    return float(value) if isinstance(value, int | float) and value > 0 else None


def _top(table: pd.DataFrame) -> float:
    return float(table["sm_clock_mhz"].max())


def _highest_clock(table: pd.DataFrame) -> pd.DataFrame:
    top = _top(table)
    return table if np.isnan(top) else table[table["sm_clock_mhz"] == top]


def _least_rows(table: pd.DataFrame) -> pd.DataFrame:
    """The clock of least energy of every TP degree and level, with ``saved`` against the highest clock."""
    known = table[np.isfinite(numbers(table, "j_per_output_token"))]
    keys = ["tp_degree", "level"]
    least = known.sort_values("j_per_output_token", kind="stable").drop_duplicates(keys)
    highest = _highest_clock(known)[[*keys, "j_per_output_token"]]
    both = least.merge(highest, on=keys, suffixes=("", "_highest"))
    return both.assign(saved=1.0 - both["j_per_output_token"] / both["j_per_output_token_highest"])


def _ring_least(axes: Axes, line: pd.DataFrame, colour: Any) -> None:  # noqa: ANN401  # as matplotlib takes it
    energy = numbers(line, "j_per_output_token")
    if np.isfinite(energy).any():
        at = int(np.nanargmin(energy))
        axes.plot(
            numbers(line, "sm_clock_mhz")[at],
            energy[at],
            marker="o",
            markersize=10.5,
            markerfacecolor="none",
            markeredgecolor=colour,
            linestyle="none",
        )


def _least_energy(here: pd.DataFrame) -> str:
    rows = _least_rows(here)
    if rows.empty:
        return "energy not known"
    return f"least at {span(rows['sm_clock_mhz'])} MHz"


def _clock_finding(table: pd.DataFrame) -> str:
    rows = _least_rows(table)
    if rows.empty:
        return "the highest clock was not measured"
    return (
        f"least energy per token lies at {span(rows['sm_clock_mhz'])} MHz, "
        f"{span(100.0 * rows['saved'])} % below that at {clock_label(_top(table))}"
    )


def _name_levels(axes: Axes, line: pd.DataFrame, measure: str, scale: float) -> None:
    """Write the levels below the points of a line, leaving out what would lie on its neighbour."""
    last = -np.inf
    for x, y, level in zip(
        numbers(line, "output_tokens_per_s"),
        scale * numbers(line, measure),
        numbers(line, "level"),
        strict=True,
    ):
        if np.isfinite(x * y) and np.log(x) - last > 0.25:  # noqa: PLR2004  # the width of three digits
            place: dict[str, Any] = {"xytext": (4, -9), "textcoords": "offset points"}
            axes.annotate(f"{level:g}", (x, y), fontsize=7.5, color="#444444", **place)
            last = np.log(x)


def _growth(line: pd.DataFrame) -> tuple[float, float, float, float] | None:
    """First and last level of a line, and by how much throughput and TPOT p99 grew between them."""
    known = line[np.isfinite(numbers(line, "tpot_p99_s")) & (numbers(line, "output_tokens_per_s") > 0)]
    if len(known) < _PAIR:
        return None
    first, last = known.iloc[0], known.iloc[-1]
    return (
        float(first["level"]),
        float(last["level"]),
        float(last["output_tokens_per_s"] / first["output_tokens_per_s"]),
        float(last["tpot_p99_s"] / first["tpot_p99_s"]),
    )


def _batch_panel(here: pd.DataFrame, degree: float, clocks: pd.Series[float], clock: float) -> str:
    growth = _growth(here[clocks[here.index] == clock])
    if growth is None:
        return f"TP {degree:g}"
    return f"TP {degree:g}: {growth[2]:.1f}x the tokens/s, {growth[3]:.1f}x the TPOT"


def _batch_finding(table: pd.DataFrame, clocks: pd.Series[float], clock: float, results: Results) -> str:
    top = table[clocks == clock].sort_values("level", kind="stable")
    found = []
    for degree in sorted(top["tp_degree"].unique()):
        growth = _growth(top[top["tp_degree"] == degree])
        if growth is not None:
            found.append((degree, *growth))
    if not found:
        return "too few loads to compare"
    degree, low, high, faster, later = found[-1]
    at = clock_label(np.nan if clock < 0 else clock)
    word = "tokens/s" if results.level_name == "batch size" else "tokens/s (set by the load)"
    return (
        f"from {_at(results.level_name, f'{low:g} to {high:g}')}, TP {degree:g} gives "
        f"{faster:.1f} times the {word} at {later:.1f} times the TPOT p99 ({at})"
    )


def _at(level_name: str, level: str) -> str:
    return f"batch size {level}" if level_name == "batch size" else f"{level} {level_name}"


def _parallel_finding(highest: pd.DataFrame, least: pd.DataFrame, level_name: str) -> str:
    """Compare the smallest with the largest TP degree at the largest level that both fill."""
    small, large = highest["tp_degree"].min(), highest["tp_degree"].max()
    full = highest[filled(highest)]
    levels = sorted(
        set(full.loc[full["tp_degree"] == small, "level"])
        & set(full.loc[full["tp_degree"] == large, "level"])
    )
    if not levels:
        return f"TP {small:g} and TP {large:g} share no load that both fill"
    level = levels[-1]
    found = []
    clocks = (
        [] if np.isnan(_top(highest)) else [(least, "j_per_output_token", "times each at its best clock")]
    )
    for table, measure, words in (
        (highest, "j_per_output_token", "times the energy per token"),
        *clocks,
        (highest, "tpot_p99_s", "times the TPOT p99"),
    ):
        at = table[table["level"] == level].drop_duplicates("tp_degree").set_index("tp_degree")[measure]
        ratio = float(at.get(large, np.nan)) / float(at.get(small, np.nan))
        if np.isfinite(ratio):
            found.append(f"{ratio:.2f} {words}")
    return f"TP {large:g} against TP {small:g} at {_at(level_name, f'{level:g}')}: " + (
        ", ".join(found) or "nothing to compare"
    )
