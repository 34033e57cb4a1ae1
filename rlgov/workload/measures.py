"""Figures of a trace that summaries, fits and tests share."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from rlgov.workload.trace import Trace


def counts_per_window(trace: Trace, window_s: float) -> NDArray[np.int64]:
    """Arrivals in each whole window of the span; a last window cut short is left out."""
    windows = int(trace.duration_s // window_s)
    index = (trace.arrival_s / window_s).astype(np.int64)
    return np.bincount(index[index < windows], minlength=windows).astype(np.int64)


def dispersion(trace: Trace, window_s: float) -> float:
    """Index of dispersion: variance over mean of the arrivals in a window; 1 for a Poisson stream.

    NaN when the span holds fewer than two windows, or no arrivals.
    """
    counts = counts_per_window(trace, window_s)
    if len(counts) < 2 or not counts.any():  # noqa: PLR2004  # a variance needs two values
        return float("nan")
    return float(counts.var() / counts.mean())


def empty_share(trace: Trace, window_s: float) -> float:
    """Share of windows without an arrival; NaN when no whole window fits in the span."""
    counts = counts_per_window(trace, window_s)
    return float((counts == 0).mean()) if len(counts) else float("nan")


def peak_rate_per_s(trace: Trace, window_s: float) -> float:
    """Highest rate over any whole window, or over the whole span where that is shorter."""
    counts = counts_per_window(trace, window_s)
    return float(counts.max() / window_s) if len(counts) else trace.mean_rate_per_s


def rank_correlation(x: NDArray[np.int64], y: NDArray[np.int64]) -> float:
    """Spearman's rank correlation, ties sharing their mean rank; NaN for a constant."""
    ranks = [_mean_ranks(values) for values in (x, y)]
    if any(rank.size == 0 or rank.min() == rank.max() for rank in ranks):
        return float("nan")
    return float(np.corrcoef(ranks[0], ranks[1])[0, 1])


def _mean_ranks(values: NDArray[np.int64]) -> NDArray[np.float64]:
    _, index, counts = np.unique(values, return_inverse=True, return_counts=True)
    last_rank = np.cumsum(counts)
    ranks: NDArray[np.float64] = (last_rank - (counts - 1) / 2)[index]
    return ranks
