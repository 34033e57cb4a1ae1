"""A run's points as the report reads them: repeats merged, spreads kept, loads named. Pure but for reading.

A point's value is the mean of its repeats. Its error is one standard deviation of the repeats and, of
energies and powers, what the meter's resolution leaves open, added in quadrature. With one repeat only the
latter is known; where that is nothing either, the error is missing.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from rlgov.calibration.table import read_header, read_points
from rlgov.records import ServiceLevel

if TYPE_CHECKING:
    from pathlib import Path

    import pandas as pd

    from rlgov.calibration.table import RunHeader

CONFIGURATION: Final = ["sm_clock_mhz", "batch_cap", "tp_degree"]
LOAD: Final = ["workload", "mode", "concurrency", "rate_per_s"]
_IDENTITY: Final = [*LOAD, *CONFIGURATION, "allotted_gpus", "gpu", "model", "source"]
_MEASURES: Final = [
    *(f"{name}_p{q}_s" for name in ("ttft", "tpot", "itl", "e2e") for q in (50, 90, 99)),
    "prompt_tokens_mean",
    "output_tokens_mean",
    "output_tokens_per_s",
    "power_w_per_gpu",
    "j_per_output_token",
    "j_per_request",
    "running_mean",
    "kv_usage_mean",
    "measured_clock_mhz",
    "throttled_fraction",
    "energy_error",
]
_OF_ENERGY: Final = frozenset({"power_w_per_gpu", "j_per_output_token", "j_per_request"})
FAILED_SHARE: Final = 0.01
"""Largest share of failed requests at which a point can be within the SLO."""
_MIDDLE: Final = "medium-in/medium-out"
_EXAMPLES: Final = {
    "power_w_per_gpu": "power",
    "j_per_output_token": "energy",
    "ttft_p99_s": "time to the first token",
    "tpot_p99_s": "time per output token",
    "itl_p99_s": "time between tokens (needs an engine with the plugin)",
    "measured_clock_mhz": "clock as it really was",
    "sm_clock_mhz": "a locked SM clock (clocks cannot be set here)",
}


@dataclass(frozen=True, eq=False)
class Results:
    """A run folder, read.

    ``rows`` has a row a repeat, as written. ``points`` has a row a point: the identity columns, the mean of
    every measure, its ``*_error``, and

    ``level``
        what limits the batch: the smaller of users and cap in a closed loop, the rate in an open one.
    ``load``
        users or rate, in words.
    ``power_w``, ``gpu_s_per_token``
        of all GPUs of the engine.
    ``usable``
        tokens came, and every repeat was steady.
    ``within_slo``
        the 99th percentiles of TTFT and TPOT hold the limits, and at most 1 % of the requests failed.
    """

    header: RunHeader
    rows: pd.DataFrame
    points: pd.DataFrame
    service_level: ServiceLevel | None

    @property
    def simulated(self) -> bool:
        """Whether any of it comes from the simulator."""
        return self.header.deployment == "simulated" or bool((self.rows["source"] == "simulated").any())

    @property
    def origin(self) -> str:
        """Where the numbers come from, for every figure."""
        what = f"{self.header.model} on {self.header.gpu or 'a machine without a known GPU'}"
        if self.simulated:
            return f"SIMULATED, not measured: profile {self.header.profile}, {what}"
        return f"Measured ({self.header.deployment}): {what}"

    @cached_property
    def planned(self) -> list[str]:
        """Names of the workloads in the order of the table."""
        return [str(name) for name in self.points["workload"].unique()]

    @cached_property
    def workloads(self) -> list[str]:
        """Names, the one to look at first in front: most usable points, then the middle class."""
        counts = self.points.groupby("workload", sort=False)["usable"].sum()
        return sorted(self.planned, key=lambda name: (-int(counts[name]), name != _MIDDLE))

    @cached_property
    def series(self) -> pd.DataFrame:
        """The points of the three experiments: one a workload, TP degree, clock and level.

        The closed loop where there is one: of those with one level, the one with the least queue. Else the
        open loop at the largest cap.
        """
        points = self.points[_floats(self.points, "output_tokens_per_s") > 0]
        closed = points[points["mode"] == "closed"]
        if closed.empty:
            largest: pd.DataFrame = points[points["batch_cap"] == points["batch_cap"].max()]
            return largest
        ordered = closed.sort_values(["concurrency", "batch_cap"], kind="stable")
        one_each: pd.DataFrame = ordered.drop_duplicates(["workload", "tp_degree", "sm_clock_mhz", "level"])
        return one_each

    @cached_property
    def level_name(self) -> str:
        """What the series' level is, in words."""
        return "batch size" if (self.series["mode"] == "closed").any() else "requests/s"

    def has(self, column: str) -> bool:
        """Whether anything is known of a measure."""
        return bool(np.isfinite(_floats(self.points, column)).any())

    @property
    def has_energy(self) -> bool:
        """Whether there was a meter."""
        return self.has("j_per_output_token")

    def missing(self) -> list[str]:
        """What was not measured, or too little for a comparison, each a sentence."""
        told = [f"Not measured: {about}." for name, about in _EXAMPLES.items() if not self.has(name)]
        for column, what in (("sm_clock_mhz", "SM clock"), ("tp_degree", "TP degree"), ("level", "load")):
            seen = np.unique(_floats(self.points, column))
            if seen.size == 1 and np.isfinite(seen[0]):
                told.append(f"One {what} only ({seen[0]:g}): nothing can be said about others.")
        if self.points["repeats"].max() == 1:
            told.append("Every point was measured once: how far repeats differ is not known.")
        if not (self.points["mode"] == "open").any():
            told.append(
                "No open loop: latency is that of clients that ask again at once, not of traffic at a rate."
            )
        if self.service_level is None:
            told.append("The run names no SLO: nothing can be said about what holds it.")
        served = _floats(self.rows, "output_tokens_per_s") > 0
        if not served.all():
            told.append(f"{int((~served).sum())} of {len(served)} rows have no throughput and are not drawn.")
        unsteady = int((~self.rows["steady"].astype(bool)).sum())
        if unsteady:
            kept = self.points["steady"].any()
            what = "left out of fronts and best configurations" if kept else "taken all the same: no other is"
            told.append(f"{unsteady} of {len(self.rows)} rows did not get steady: drawn hollow, and {what}.")
        if len(self.rows) < self.header.points:
            told.append(f"{len(self.rows)} of {self.header.points} planned rows are there.")
        return told


def read_results(folder: Path) -> Results:
    """The results of a run folder.

    Raises:
        CharacterizationError: There is no run, or its tables cannot be read.
    """
    return results_of(read_header(folder), read_points(folder))


def results_of(header: RunHeader, rows: pd.DataFrame) -> Results:
    """Results from a header and the table of points."""
    level = _service_level(header)
    return Results(header, rows, _with_derived(_merged(rows), level), level)


def configuration_label(row: Any) -> str:  # noqa: ANN401  # a row of a table, as a Series or a named tuple
    """Clock, cap and TP degree in words."""
    return f"{clock_label(row.sm_clock_mhz)}, cap {int(row.batch_cap)}, TP {int(row.tp_degree)}"


def clock_label(sm_clock_mhz: float) -> str:
    """A clock in words, also where none was locked."""
    return f"{sm_clock_mhz:.0f} MHz" if math.isfinite(sm_clock_mhz) else "clock not locked"


def _merged(rows: pd.DataFrame) -> pd.DataFrame:
    numbers = rows[_MEASURES].astype("float64")
    groups = numbers.groupby(rows["point_id"], sort=False)
    mean, spread = groups.mean(), groups.std(ddof=1)
    by_point = rows.groupby("point_id", sort=False)
    merged = by_point[_IDENTITY].first().join(mean)
    for name in ("concurrency", "rate_per_s", "sm_clock_mhz", "batch_cap", "tp_degree", "allotted_gpus"):
        merged[name] = merged[name].astype("float64")
    merged["repeats"] = by_point.size()
    merged["steady"] = by_point["steady"].all().astype(bool)
    merged["duration_s"] = by_point["duration_s"].sum()
    for name in ("served", "failed"):
        merged[name] = by_point[name].sum(min_count=1).astype("float64")
    merged["throttle_reasons"] = by_point["throttle_reasons"].agg(_reasons)
    resolution = mean["energy_error"].fillna(0.0)
    for name in _MEASURES:
        left_open = resolution * mean[name] if name in _OF_ENERGY else resolution * 0.0
        total = np.hypot(spread[name].fillna(0.0), left_open)
        merged[f"{name}_error"] = np.where(spread[name].notna() | (left_open > 0), total, np.nan)
    return merged.reset_index()


def _with_derived(points: pd.DataFrame, level: ServiceLevel | None) -> pd.DataFrame:
    closed = points["mode"] == "closed"
    limit = np.fmin(_floats(points, "concurrency"), _floats(points, "batch_cap"))
    points["level"] = np.where(closed, limit, _floats(points, "rate_per_s"))
    points["load"] = [
        f"{users:g} users" if is_closed else f"{rate:g} request{'' if rate == 1 else 's'}/s"
        for is_closed, users, rate in zip(closed, points["concurrency"], points["rate_per_s"], strict=True)
    ]
    tokens_per_s = _floats(points, "output_tokens_per_s")
    points["power_w"] = points["power_w_per_gpu"] * points["allotted_gpus"]
    points["gpu_s_per_token"] = points["tp_degree"] / np.where(tokens_per_s > 0, tokens_per_s, np.nan)
    steady = points["steady"] if points["steady"].any() else True
    points["usable"] = steady & (tokens_per_s > 0)
    ended = points["served"].fillna(0.0) + points["failed"].fillna(0.0)
    fine = points["failed"].fillna(0.0) <= FAILED_SHARE * ended
    points["within_slo"] = (
        fine & (points["ttft_p99_s"] <= level.ttft_s) & (points["tpot_p99_s"] <= level.tpot_s)
        if level is not None
        else False
    )
    return points


def _floats(frame: pd.DataFrame, column: str) -> np.ndarray[tuple[int, ...], np.dtype[np.float64]]:
    return frame[column].to_numpy(dtype=np.float64, na_value=np.nan)


def _reasons(seen: pd.Series[str]) -> str:
    names = {name for text in seen.dropna() for name in str(text).split("+")} - {"none"}
    return "+".join(sorted(names)) or ("none" if seen.notna().any() else "")


def _service_level(header: RunHeader) -> ServiceLevel | None:
    told = header.limits.get("service_level")
    if not isinstance(told, dict) or not {"ttft_s", "tpot_s"} <= set(told):
        return None
    return ServiceLevel(float(told["ttft_s"]), float(told["tpot_s"]))
