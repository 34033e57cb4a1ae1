"""From the tables of characterisation runs to what a fit needs: mean iterations with their time and power.

A point gives the mean composition of its iterations (sequences decoded, tokens attended to, prompt tokens)
and their mean duration. Where the run kept single iterations, those without prompts and those with are told
apart, which is what separates prefill from decode.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Final

import numpy as np
import pandas as pd

from rlgov.calibration.table import read_header, read_iterations, read_points
from rlgov.errors import CalibrationError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from rlgov.simulation.profile import Profile

    Floats = NDArray[np.float64]
    Counts = NDArray[np.int64]

_NEEDED: Final = (
    "iterations",
    "busy_s",
    "generated_tokens",
    "prefill_tokens",
    "prompt_tokens_mean",
    "served",
)
_LEAST_ITERATIONS = 20  # in a point or a kind of iterations: a mean of fewer says little


@dataclass(frozen=True, slots=True)
class Mean:
    """Mean iterations, one a row. ``point`` says which point a row is of."""

    point: Counts
    tp: Counts
    clock_mhz: Floats
    decodes: Floats
    context_tokens: Floats  # over all decoding sequences
    prefill_tokens: Floats
    pairs: Floats  # (query, key) pairs of the prefill
    step_s: Floats

    def take(self, chosen: NDArray[np.bool_] | Counts) -> Mean:
        """The chosen rows."""
        return Mean(**{f.name: getattr(self, f.name)[chosen] for f in fields(self)})

    def __len__(self) -> int:
        return len(self.step_s)


@dataclass(frozen=True, slots=True)
class Observations:
    """Usable points of one or more runs."""

    names: tuple[str, ...]  # of the points, by number
    means: Mean  # one row a point, and in this order
    details: Mean  # one or two rows a point, for fits of time
    busy_share: Floats  # of each point's time
    power_w: Floats  # of all measured GPUs; NaN where there was no meter
    measured_gpus: Floats
    left_out: dict[str, int]  # reasons and rows

    @property
    def with_power(self) -> Counts:
        """Points whose power was measured."""
        return np.flatnonzero(np.isfinite(self.power_w))


def read_observations(folders: Sequence[Path], profile: Profile) -> Observations:
    """Read runs of one deployment.

    Args:
        folders: run folders of ``rlgov characterize``.
        profile: whose GPU and model they must be of.

    Returns:
        What can be used, and why how many rows cannot.

    Raises:
        CharacterizationError: A folder is no run.
        CalibrationError: A run is of another GPU or model, or no row can be used.
    """
    if not folders:
        msg = "there is no run to calibrate from; name folders that `rlgov characterize --out` wrote"
        raise CalibrationError(msg)
    points, iterations = [], []
    for number, folder in enumerate(folders):
        header = read_header(folder)
        _check_place(folder, header.gpu, header.model, profile)
        table = read_points(folder)
        points.append(table.assign(run=number))
        single = read_iterations(folder)
        if single is not None:
            iterations.append(single.assign(run=number))
    table = pd.concat(points, ignore_index=True)
    usable, left_out = _usable(table, profile)
    if usable.empty:
        reasons = "; ".join(f"{count} rows: {why}" for why, count in left_out.items())
        msg = f"no row of {', '.join(map(str, folders))} can be used ({reasons})"
        raise CalibrationError(msg)
    means = _means(usable, profile)
    singles = pd.concat(iterations, ignore_index=True) if iterations else None
    return Observations(
        names=tuple(f"{row.point_id}/{row.repeat}" for row in usable.itertuples()),
        means=means,
        details=means if singles is None else _details(usable, means, singles),
        busy_share=np.clip(_numbers(usable, "busy_s") / _numbers(usable, "duration_s"), 0.0, 1.0),
        power_w=_numbers(usable, "power_w_per_gpu") * _numbers(usable, "allotted_gpus"),
        measured_gpus=_numbers(usable, "allotted_gpus"),
        left_out=left_out,
    )


def _check_place(folder: Path, gpu: str | None, model: str, profile: Profile) -> None:
    if gpu is None:
        msg = f"{folder}: the run does not say which GPU it is of; characterise with --gpus"
        raise CalibrationError(msg)
    # A driver's name of a card is longer or shorter than a data sheet's: H100 is what both share.
    if gpu != profile.gpu.name and not _same_card(gpu, profile.gpu.name):
        msg = (
            f"{folder} is of the GPU {gpu!r}, profile {profile.name} of {profile.gpu.name!r}; give a profile "
            "of that card (`rlgov profile create --gpu ...` writes one)"
        )
        raise CalibrationError(msg)
    if model not in {profile.model.name, profile.model.name.split("/")[-1]}:
        msg = (
            f"{folder} is of the model {model!r}, profile {profile.name} of {profile.model.name!r}; give a "
            "profile of that model (`rlgov profile create --model config.json` writes one)"
        )
        raise CalibrationError(msg)


def _same_card(driver: str, sheet: str) -> bool:
    words = {w.lower() for w in driver.replace("-", " ").split()}
    return sheet.lower().split()[0] in words


def _numbers(frame: pd.DataFrame, name: str) -> Floats:
    return np.asarray(frame[name].to_numpy(dtype=np.float64, na_value=np.nan))


def _usable(table: pd.DataFrame, profile: Profile) -> tuple[pd.DataFrame, dict[str, int]]:
    left_out: dict[str, int] = {}
    keep = np.ones(len(table), dtype=np.bool_)

    def drop(bad: NDArray[np.bool_], why: str) -> None:
        mine = keep & bad
        if mine.any():
            left_out[why] = int(mine.sum())
        keep[mine] = False

    for name in _NEEDED:
        drop(~np.isfinite(_numbers(table, name)), f"no {name}")
    clock = np.where(
        np.isfinite(_numbers(table, "measured_clock_mhz")),
        _numbers(table, "measured_clock_mhz"),
        _numbers(table, "sm_clock_mhz"),
    )
    drop(~np.isfinite(clock), "no sm_clock_mhz and no measured_clock_mhz")
    drop(_numbers(table, "iterations") < _LEAST_ITERATIONS, f"fewer than {_LEAST_ITERATIONS} iterations")
    drop(~table["steady"].to_numpy(dtype=np.bool_, na_value=False), "not steady")
    known = set(profile.deployment.tp_degrees)
    odd = ~np.isin(_numbers(table, "tp_degree"), sorted(known))
    drop(odd, f"a TP degree that profile {profile.name} lacks (it has {sorted(known)})")
    return table[keep].reset_index(drop=True).assign(clock=clock[keep]), left_out


def _means(frame: pd.DataFrame, profile: Profile) -> Mean:
    iterations = _numbers(frame, "iterations")
    # The first token of a request comes out of its prefill, the others are decoded.
    decodes = np.maximum(_numbers(frame, "generated_tokens") - _numbers(frame, "served"), 0.0) / iterations
    context = _numbers(frame, "context_tokens_mean")
    guessed = _numbers(frame, "prompt_tokens_mean") + _numbers(frame, "output_tokens_mean") / 2.0
    context = np.where(np.isfinite(context), context, guessed)
    prefill = _numbers(frame, "prefill_tokens") / iterations
    return Mean(
        point=np.arange(len(frame), dtype=np.int64),
        tp=np.array(
            [profile.deployment.tp_degrees.index(int(tp)) for tp in frame["tp_degree"]], dtype=np.int64
        ),
        clock_mhz=_numbers(frame, "clock"),
        decodes=decodes,
        context_tokens=decodes * np.nan_to_num(context),
        prefill_tokens=prefill,
        pairs=prefill * _numbers(frame, "prompt_tokens_mean") / 2.0,
        step_s=_numbers(frame, "busy_s") / iterations,
    )


def _details(frame: pd.DataFrame, means: Mean, singles: pd.DataFrame) -> Mean:
    """Iterations without and with prompts apart; the mean of a point whose iterations were not kept."""
    by_point = dict(tuple(singles.groupby(["run", "point_id", "repeat"])))
    parts: list[dict[str, float]] = []
    prompt = _numbers(frame, "prompt_tokens_mean")
    for i, row in enumerate(frame.itertuples()):
        mine = by_point.get((row.run, row.point_id, row.repeat))
        found = 0
        if mine is not None:
            columns = ("step_s", "decode_tokens", "context_tokens", "prefill_tokens")
            whole = mine[np.isfinite(mine[list(columns)].to_numpy(np.float64)).all(axis=1)]
            for some in (whole[whole["prefill_tokens"] == 0], whole[whole["prefill_tokens"] > 0]):
                if len(some) >= _LEAST_ITERATIONS:
                    found += 1
                    step, decodes, context, prefill = (float(some[c].mean()) for c in columns)
                    pairs = prefill * float(prompt[i]) / 2.0
                    parts.append({"point": i, "decodes": decodes, "context_tokens": context,
                                  "prefill_tokens": prefill, "pairs": pairs, "step_s": step})  # fmt: skip
        if not found:
            names = ("decodes", "context_tokens", "prefill_tokens", "pairs", "step_s")
            parts.append({"point": i} | {name: float(getattr(means, name)[i]) for name in names})
    point = np.array([int(part["point"]) for part in parts], dtype=np.int64)

    def column(name: str) -> Floats:
        return np.array([part[name] for part in parts], dtype=np.float64)

    return Mean(
        point=point,
        tp=means.tp[point],
        clock_mhz=means.clock_mhz[point],
        decodes=column("decodes"),
        context_tokens=column("context_tokens"),
        prefill_tokens=column("prefill_tokens"),
        pairs=column("pairs"),
        step_s=column("step_s"),
    )
