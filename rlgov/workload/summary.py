"""Describe a trace in figures and in one picture."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from rlgov.errors import TraceError
from rlgov.workload.measures import dispersion, peak_rate_per_s, rank_correlation

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from numpy.typing import NDArray

    from rlgov.workload.trace import Trace

PEAK_WINDOW_S = 60.0
_PLOT_BINS = 120
_NICE_BINS_S = (
    0.1,
    0.2,
    0.5,
    1.0,
    2.0,
    5.0,
    10.0,
    15.0,
    30.0,
    60.0,
    300.0,
    900.0,
    1800.0,
    3600.0,
    21600.0,
    86400.0,
)


@dataclass(frozen=True, slots=True)
class TokenSummary:
    """Distribution of one token count over the requests."""

    total: int
    mean: float
    minimum: int
    p10: float
    p50: float
    p90: float
    p99: float
    maximum: int


@dataclass(frozen=True, slots=True)
class TraceSummary:
    """Figures of a trace. Figures that the span is too short for are None."""

    name: str
    requests: int
    duration_s: float
    mean_rate_per_s: float
    peak_rate_per_s: float  # highest minute
    peak_to_mean: float
    prompt_tokens: TokenSummary
    output_tokens: TokenSummary
    prompt_tokens_per_s: float
    output_tokens_per_s: float
    prefix_hit_share: float  # of all prompt tokens
    prompt_output_rank_correlation: float | None
    dispersion_1s: float | None  # variance over mean of arrivals per window; 1 for a Poisson stream
    dispersion_10s: float | None
    dispersion_60s: float | None
    notes: tuple[str, ...]


def summarize(trace: Trace) -> TraceSummary:
    """Figures of a trace with at least one request."""
    if not len(trace):
        msg = f"trace {trace.name}: no requests to summarise; choose a wider span"
        raise TraceError(msg)
    prompt, output = _tokens(trace.prompt_tokens), _tokens(trace.output_tokens)
    peak = peak_rate_per_s(trace, PEAK_WINDOW_S)
    return TraceSummary(
        name=trace.name,
        requests=len(trace),
        duration_s=trace.duration_s,
        mean_rate_per_s=trace.mean_rate_per_s,
        peak_rate_per_s=peak,
        peak_to_mean=peak / trace.mean_rate_per_s if trace.duration_s else 1.0,
        prompt_tokens=prompt,
        output_tokens=output,
        prompt_tokens_per_s=prompt.mean * trace.mean_rate_per_s,
        output_tokens_per_s=output.mean * trace.mean_rate_per_s,
        prefix_hit_share=int(trace.prefix_hit_tokens.sum()) / prompt.total,
        prompt_output_rank_correlation=_or_none(rank_correlation(trace.prompt_tokens, trace.output_tokens)),
        dispersion_1s=_or_none(dispersion(trace, 1.0)),
        dispersion_10s=_or_none(dispersion(trace, 10.0)),
        dispersion_60s=_or_none(dispersion(trace, 60.0)),
        notes=trace.notes,
    )


def plot_trace(trace: Trace, path: str | Path) -> None:
    """Write one PNG: load over time, and the distributions of prompt and output lengths."""
    # The object interface with its own canvas leaves the caller's pyplot state alone.
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: PLC0415  # matplotlib is an extra
    from matplotlib.figure import Figure  # noqa: PLC0415  # as above

    summary = summarize(trace)
    figure = Figure(figsize=(11, 7.5), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(3, 2, height_ratios=(1, 1, 1.15))
    requests_axes = figure.add_subplot(grid[0, :])
    tokens_axes = figure.add_subplot(grid[1, :], sharex=requests_axes)
    _draw_load(trace, requests_axes, tokens_axes)
    _draw_lengths(figure.add_subplot(grid[2, 0]), trace.prompt_tokens, summary.prompt_tokens, "Prompt")
    _draw_lengths(figure.add_subplot(grid[2, 1]), trace.output_tokens, summary.output_tokens, "Output")
    figure.suptitle(
        f"{trace.name}: {summary.requests:,} requests in {_duration(trace.duration_s)}, "
        f"mean {summary.mean_rate_per_s:.2f}/s, busiest minute {summary.peak_rate_per_s:.2f}/s"
    )
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # No software version in the file: equal traces give equal files on one set of libraries.
    figure.savefig(path, dpi=120, format="png", metadata={"Software": None})


_PROMPT_COLOUR = "tab:blue"
_OUTPUT_COLOUR = "tab:orange"


def _draw_load(trace: Trace, requests_axes: Axes, tokens_axes: Axes) -> None:
    bin_s = next((b for b in _NICE_BINS_S if trace.duration_s / b <= _PLOT_BINS), _NICE_BINS_S[-1])
    edge_s = np.append(np.arange(0.0, trace.duration_s, bin_s), trace.duration_s)
    width_s = np.diff(edge_s)
    unit_s, unit = _time_unit(trace.duration_s)

    def rate(weights: NDArray[np.int64] | None) -> NDArray[np.float64]:
        total, _ = np.histogram(trace.arrival_s, bins=edge_s, weights=weights)
        per_s: NDArray[np.float64] = total / width_s
        return per_s

    requests_axes.stairs(rate(None), edge_s / unit_s, fill=True, color="tab:gray", alpha=0.6)
    requests_axes.axhline(trace.mean_rate_per_s, color="black", linewidth=1, linestyle="--", label="mean")
    requests_axes.set_title(f"Arrivals, mean of each {_duration(bin_s)}", loc="left", fontsize=10)
    requests_axes.set_ylabel("requests/s")
    requests_axes.tick_params(labelbottom=False)
    requests_axes.legend(loc="best", fontsize=8)
    tokens_axes.stairs(rate(trace.prompt_tokens), edge_s / unit_s, color=_PROMPT_COLOUR, label="prompt")
    tokens_axes.stairs(rate(trace.output_tokens), edge_s / unit_s, color=_OUTPUT_COLOUR, label="output")
    tokens_axes.set_title("Tokens of the arriving requests", loc="left", fontsize=10)
    tokens_axes.set_ylabel("tokens/s")
    tokens_axes.yaxis.set_major_formatter("{x:,.0f}")
    tokens_axes.set_xlabel(f"time from the start ({unit})")
    tokens_axes.legend(loc="best", fontsize=8)
    for axes in (requests_axes, tokens_axes):
        axes.set_xlim(0, trace.duration_s / unit_s)
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)


def _draw_lengths(axes: Axes, tokens: NDArray[np.int64], summary: TokenSummary, which: str) -> None:
    low, high = summary.minimum, max(summary.maximum, summary.minimum + 1)
    edges = np.geomspace(low, high, 50).tolist()
    colour = _PROMPT_COLOUR if which == "Prompt" else _OUTPUT_COLOUR
    share = np.full(len(tokens), 100.0 / len(tokens))
    axes.hist(tokens, bins=edges, weights=share, color=colour, alpha=0.6)
    for label, value, style in (("median", summary.p50, "-"), ("p99", summary.p99, ":")):
        axes.axvline(value, color="black", linewidth=1, linestyle=style, label=f"{label} {value:,.0f}")
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.set_title(f"{which} length, mean {summary.mean:,.0f} tokens", loc="left", fontsize=10)
    axes.set_xlabel("tokens (log scale)")
    axes.set_ylabel("share of requests (%)")
    axes.legend(loc="best", fontsize=8)
    axes.grid(alpha=0.3)


def _tokens(values: NDArray[np.int64]) -> TokenSummary:
    p10, p50, p90, p99 = (float(q) for q in np.quantile(values, [0.1, 0.5, 0.9, 0.99]))
    return TokenSummary(
        total=int(values.sum()),
        mean=float(values.mean()),
        minimum=int(values.min()),
        p10=p10,
        p50=p50,
        p90=p90,
        p99=p99,
        maximum=int(values.max()),
    )


def _or_none(value: float) -> float | None:
    return None if np.isnan(value) else value


def _time_unit(duration_s: float) -> tuple[float, str]:
    for unit_s, unit in ((86400.0, "days"), (3600.0, "hours"), (60.0, "minutes")):
        if duration_s >= 3 * unit_s:
            return unit_s, unit
    return 1.0, "seconds"


def _duration(duration_s: float) -> str:
    unit_s, unit = _time_unit(duration_s)
    return f"{duration_s / unit_s:.3g} {unit}"


def as_record(summary: TraceSummary) -> dict[str, Any]:
    """Plain values for JSON."""
    record = asdict(summary)
    record["notes"] = list(summary.notes)
    return record
