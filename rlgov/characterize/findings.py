"""What the points say: fronts, best configurations, what energy goes with, two clocks side by side. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np
import pandas as pd
from scipy import stats

from rlgov.characterize.tables import CONFIGURATION, LOAD, clock_label

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from rlgov.characterize.tables import Results

PUBLISHED_CLOCKS_MHZ: Final = (1600.0, 2000.0)
"""The founding paper's pair: 1.6 GHz instead of 2.0 GHz."""
PUBLISHED_ENERGY: Final = 0.8
"""Its figure for that pair: less than 80 % of the energy at about the same throughput."""
CLOSE: Final = 0.06
"""Clocks within this share of the wanted ones stand for them."""
NEAR: Final = 0.01
"""Configurations within this share of the least energy, or within the error of that, are equally good."""
FEWEST: Final = 4
"""Configurations that a rank correlation needs at least."""

COMPANIONS: Final = {
    "power_w": "power of all GPUs",
    "gpu_s_per_token": "cost (GPU-seconds a token)",
    "tpot_p99_s": "TPOT p99",
    "ttft_p99_s": "TTFT p99",
    "output_tokens_per_s": "throughput",
}
"""What energy per token is ranked against."""


def front(x: NDArray[np.float64], y: NDArray[np.float64]) -> NDArray[np.intp]:
    """Positions that no other beats in both (smaller is better), in order of ``x``; NaN is never among them.

    Of equals the first one stays.
    """
    known = np.flatnonzero(np.isfinite(x) & np.isfinite(y))
    ordered = known[np.lexsort((y[known], x[known]))]
    lowest = np.minimum.accumulate(np.concatenate(([np.inf], y[ordered])))[:-1]
    return ordered[y[ordered] < lowest]


def best_configurations(results: Results) -> pd.DataFrame:
    """The configuration of least energy per token that holds the SLO, for every workload and load.

    A row a workload and load, its best configuration's columns (missing where none holds the SLO), and
    ``measured``, ``holding``: configurations that were usable, and those of them within the SLO;
    ``as_good``: other ones within the larger of 1 % and the error of the comparison;
    ``fastest``, ``cheapest``, ``frugal``, ``highest``: energy per token, relative to the best, of the
    configuration with the least TPOT p99, the one with the fewest GPU-seconds a token within the SLO, the one
    of least power within the SLO, and the highest clock, cap and TP degree.
    """
    known = results.points[results.points["usable"] & results.points["j_per_output_token"].notna()]
    repeats = results.rows.pivot_table(index="point_id", columns="repeat", values="j_per_output_token")
    rows = [
        _best(group, repeats) | dict(zip(LOAD, key, strict=True))
        for key, group in known.groupby(LOAD, dropna=False, sort=False)
    ]
    names = [*LOAD, "load", "measured", "holding", *CONFIGURATION, *_BEST, *_RIVALS, "as_good"]
    return _in_order(pd.DataFrame(rows, columns=names))


def _in_order(table: pd.DataFrame) -> pd.DataFrame:
    """By workload, as they were planned, then by load."""
    ranks = {name: rank for rank, name in enumerate(dict.fromkeys(table["workload"]))}
    return table.sort_values(
        LOAD, key=lambda column: column.map(ranks) if column.name == "workload" else column,
        kind="stable", ignore_index=True,
    )  # fmt: skip


_BEST: Final = [
    "j_per_output_token",
    "j_per_output_token_error",
    "power_w",
    "tpot_p99_s",
    "ttft_p99_s",
    "output_tokens_per_s",
]
_RIVALS: Final = ["fastest", "cheapest", "frugal", "highest"]


def _best(group: pd.DataFrame, repeats: pd.DataFrame) -> dict[str, object]:
    holding = group[group["within_slo"]]
    row: dict[str, object] = {
        "load": group["load"].iloc[0],
        "measured": len(group),
        "holding": len(holding),
    }
    if holding.empty:
        return row
    best = holding.sort_values("j_per_output_token", kind="stable").iloc[0]
    row |= {name: best[name] for name in [*CONFIGURATION, *_BEST]}
    least = float(best["j_per_output_token"])
    row["as_good"] = _as_good(holding, str(best["point_id"]), repeats)
    rivals = {
        "fastest": group.sort_values("tpot_p99_s", kind="stable"),
        "cheapest": holding.sort_values("gpu_s_per_token", kind="stable"),
        "frugal": holding.sort_values("power_w", kind="stable"),
        "highest": group.sort_values(CONFIGURATION, ascending=False, kind="stable"),
    }
    return row | {name: float(table["j_per_output_token"].iloc[0]) / least for name, table in rivals.items()}


def _as_good(holding: pd.DataFrame, best_id: str, repeats: pd.DataFrame) -> int:
    """How many others are as good as the best: repeat by repeat, because equal repeats had equal requests."""
    ids = [name for name in holding["point_id"] if name != best_id]
    ratios = repeats.loc[ids] / repeats.loc[best_id]
    resolution = holding.set_index("point_id")["energy_error"].fillna(0.0)
    margin = ratios.std(axis=1, ddof=1).fillna(0.0) + resolution.loc[ids] + float(resolution.loc[best_id])
    return int((ratios.mean(axis=1) - 1.0 <= np.maximum(NEAR, margin)).sum())


@dataclass(frozen=True, slots=True)
class OneForAll:
    """The one setting that suits all workloads and loads best."""

    label: str
    cases: int
    median_excess: float
    worst_excess: float


@dataclass(frozen=True, slots=True)
class Variety:
    """How much the best configuration depends on workload and load."""

    cases: int
    distinct: int
    most_common: str
    most_common_cases: int
    one_for_all: OneForAll | None  # None where no setting holds the SLO in every case


def variety(results: Results, best: pd.DataFrame) -> Variety | None:
    """How the best configurations differ; None where there are no two cases with one.

    The batch cap is part of a configuration where a load was measured at several caps.
    """
    found = best.dropna(subset=["j_per_output_token"])
    if len(found) < 2:  # noqa: PLR2004  # one case has nothing to differ from
        return None
    points = results.points
    caps = points.groupby(LOAD, dropna=False)["batch_cap"].nunique()
    parts = ["sm_clock_mhz", "tp_degree", *(["batch_cap"] if caps.max() > 1 else [])]
    labels = found[parts].apply(_label, axis=1)
    counts = labels.value_counts()
    return Variety(
        len(found), len(counts), str(counts.index[0]), int(counts.iloc[0]), _one_for_all(points, found, parts)
    )


def _one_for_all(points: pd.DataFrame, found: pd.DataFrame, parts: list[str]) -> OneForAll | None:
    holding = points[points["usable"] & points["within_slo"] & points["j_per_output_token"].notna()]
    least = found[[*LOAD, "j_per_output_token"]].rename(columns={"j_per_output_token": "least"})
    joined = holding.merge(least, on=LOAD)  # a missing number equals a missing number here
    joined["excess"] = joined["j_per_output_token"] / joined["least"] - 1.0
    groups = joined.groupby(parts, dropna=False, sort=False)["excess"]
    summary = groups.agg(["size", "median", "max"]).reset_index()
    everywhere = summary[summary["size"] == len(found)]
    if everywhere.empty:
        return None
    chosen = everywhere.sort_values("median", kind="stable").iloc[0]
    return OneForAll(_label(chosen), len(found), float(chosen["median"]), float(chosen["max"]))


def _label(values: pd.Series[float]) -> str:
    words = [clock_label(values["sm_clock_mhz"]), f"TP {values['tp_degree']:.0f}"]
    if "batch_cap" in values.index:
        words.append(f"cap {values['batch_cap']:.0f}")
    return ", ".join(words)


def rank_correlations(results: Results) -> pd.DataFrame:
    """Spearman's rank correlation of energy per token with power, cost, latency and throughput.

    Over the usable configurations of one workload and load, a row each: columns of ``LOAD``, ``load``,
    ``configurations``, and one for each of :data:`COMPANIONS` (missing where one of the two hardly varies, or
    with fewer than four configurations). Throughput and cost say nothing in an open loop, where the load sets
    the one and the GPUs the other: missing, too.
    """
    usable = results.points[results.points["usable"]]
    rows = []
    for key, group in usable.groupby(LOAD, dropna=False, sort=False):
        row: dict[str, object] = dict(zip(LOAD, key, strict=True))
        known = group[np.isfinite(group["j_per_output_token"].to_numpy(dtype=np.float64))]
        row |= {"load": group["load"].iloc[0], "configurations": len(known)}
        given = {"output_tokens_per_s", "gpu_s_per_token"} if row["mode"] == "open" else set()
        for name in COMPANIONS:
            row[name] = np.nan if name in given else _spearman(known, "j_per_output_token", name)
        rows.append(row)
    table = pd.DataFrame(rows, columns=[*LOAD, "load", "configurations", *COMPANIONS])
    return _in_order(table)


def _spearman(table: pd.DataFrame, first: str, second: str) -> float:
    both = table[[first, second]].astype("float64").dropna()
    if len(both) < FEWEST or (both.max() - both.min() <= NEAR * both.abs().max()).any():
        return float("nan")
    return float(stats.spearmanr(both[first], both[second]).statistic)


@dataclass(frozen=True, eq=False)
class ClockPair:
    """A lower clock against a higher one, everything else equal."""

    low_mhz: float
    high_mhz: float
    as_published: bool
    """Whether they are the founding paper's clocks, or only in the same ratio below the highest."""
    table: pd.DataFrame
    """A row a point of the series at both clocks: workload, tp_degree, level, and the ratios low to high
    ``throughput``, ``energy``, ``tpot`` with ``*_error`` (standard deviation over paired repeats, missing
    with one)."""

    @property
    def holds(self) -> int:
        """Rows with less than 80 % of the energy."""
        return int((self.table["energy"] < PUBLISHED_ENERGY).sum())


def clock_pair(results: Results) -> ClockPair | None:
    """The founding paper's comparison of 1.6 and 2.0 GHz, or of the nearest ratio; None without a pair."""
    series = results.series
    clocks = np.unique(series["sm_clock_mhz"].dropna().to_numpy(dtype=np.float64))
    if clocks.size < 2 or not results.has_energy:  # noqa: PLR2004  # a pair
        return None
    low, high = (float(clocks[np.abs(clocks - wanted).argmin()]) for wanted in PUBLISHED_CLOCKS_MHZ)
    pairs = zip((low, high), PUBLISHED_CLOCKS_MHZ, strict=True)
    as_published = low < high and all(abs(got - wanted) <= CLOSE * wanted for got, wanted in pairs)
    if not as_published:
        high = float(clocks[-1])
        wanted = high * PUBLISHED_CLOCKS_MHZ[0] / PUBLISHED_CLOCKS_MHZ[1]
        low = float(clocks[:-1][np.abs(clocks[:-1] - wanted).argmin()])
    table = _ratios(results, low, high)
    return ClockPair(low, high, as_published, table) if len(table) else None


def _ratios(results: Results, low: float, high: float) -> pd.DataFrame:
    kept = results.series[["point_id", "level"]]
    rows = results.rows.merge(kept, on="point_id")
    same = ["workload", "tp_degree", "batch_cap", "level", "repeat"]
    measures = {"throughput": "output_tokens_per_s", "energy": "j_per_output_token", "tpot": "tpot_p50_s"}
    columns = [*same, *measures.values()]
    sides = [rows.loc[rows["sm_clock_mhz"] == clock, columns] for clock in (low, high)]
    both = sides[0].merge(sides[1], on=same, suffixes=("_low", "_high"))
    for name, column in measures.items():
        both[name] = both[f"{column}_low"] / both[f"{column}_high"]
    groups = both.dropna(subset=["throughput", "energy"]).groupby(["workload", "tp_degree", "level"])
    mean = groups[list(measures)].mean()
    spread = groups[list(measures)].std(ddof=1).add_suffix("_error")
    return mean.join(spread).reset_index()
