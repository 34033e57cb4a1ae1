"""From the tables of characterisation runs to what a fit needs: mean iterations with their time and power.

A point gives the mean composition of its iterations (sequences decoded, tokens attended to, prompt tokens)
and their mean duration. Where the run kept single iterations, those without and with prompts are told apart,
and each by its size: that is what separates prefill from decode.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import pandas as pd

from rlgov.calibration.table import RunHeader, read_header, read_iterations, read_points
from rlgov.errors import CalibrationError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from rlgov.simulation.profile import Profile

    Floats = NDArray[np.float64]
    Counts = NDArray[np.int64]
    Flags = NDArray[np.bool_]

_NEEDED: Final = (
    "iterations", "busy_s", "generated_tokens", "prefill_tokens", "prompt_tokens_mean", "served",
)  # fmt: skip
_LEAST_ITERATIONS: Final = 20  # in a point or a kind of iterations: a mean of fewer says little
_ALIKE: Final = 1.25  # iterations whose sizes differ by less than this factor are averaged over
_MOST_KINDS: Final = 4  # by size, of iterations with and without prompts each
_PAUSE: Final = 20.0  # times the distance of the 90th percentile from the median: no iteration, but a pause
_THROTTLE_DOUBT: Final = 0.5  # of the distance between asked and mean clock, as an error of time


@dataclass(frozen=True, slots=True, eq=False)
class Mean:
    """Mean iterations, one a row."""

    point: Counts  # which point a row is of
    tp: Counts  # index of the TP degree
    clock_mhz: Floats
    decodes: Floats  # sequences that decode
    context_tokens: Floats  # that they attend to, in total
    prefill_tokens: Floats
    pairs: Floats  # (query, key) pairs of the prefill
    prompts: Floats  # share of the iterations that compute prompt tokens
    step_s: Floats
    error: Floats  # relative standard error of step_s as far as it is known; 0 is allowed

    def take(self, chosen: Flags | Counts) -> Mean:
        """The chosen rows."""
        return Mean(**{f.name: getattr(self, f.name)[chosen] for f in fields(self)})

    def __len__(self) -> int:
        return len(self.step_s)


@dataclass(frozen=True, slots=True, eq=False)
class Observations:
    """Usable points of one or more runs."""

    names: tuple[str, ...]  # of the points, by number
    means: Mean  # one row a point, and in this order
    details: Mean  # one or more rows a point, for fits of time
    busy_share: Floats  # of each point's time
    power_w: Floats  # of all measured GPUs; NaN where there was no meter
    power_error: Floats  # relative
    measured_gpus: Floats
    settings: Mapping[str, Floats] = field(default_factory=dict)
    """What each point held, by what it is called, such as ``clock``: each value is left out once."""
    left_out: Mapping[str, int] = field(default_factory=dict)  # reasons and rows
    notes: tuple[str, ...] = ()  # what was assumed

    @property
    def with_power(self) -> Counts:
        """Points whose power was measured."""
        return np.flatnonzero(np.isfinite(self.power_w))


def without_power(
    cells: Mean, names: Sequence[str] = (), settings: Mapping[str, Floats] | None = None
) -> Observations:
    """Mean iterations of anything that tells no power, each a point of its own."""
    n = len(cells)
    cells = replace(cells, point=np.arange(n, dtype=np.int64))
    nothing = np.full(n, np.nan)
    return Observations(
        names=tuple(names) or tuple(map(str, range(n))), means=cells, details=cells, busy_share=np.ones(n),
        power_w=nothing, power_error=np.zeros(n), measured_gpus=np.ones(n), settings=settings or {},
    )  # fmt: skip


def read_observations(folders: Sequence[Path], profile: Profile) -> Observations:
    """Read runs of one deployment.

    Args:
        folders: run folders of ``rlgov characterize``.
        profile: whose GPU and model they must be of.

    Returns:
        What can be used, and why how many rows cannot.

    Raises:
        CharacterizationError: A folder is no run, or a damaged one.
        CalibrationError: A run is unfinished or there twice, it is of another GPU, model or deployment, or
            no row can be used.
    """
    if not folders:
        msg = "there is no run to calibrate from; name folders that `rlgov characterize --out` wrote"
        raise CalibrationError(msg)
    headers = [read_header(folder) for folder in folders]
    _check_together(folders, headers)
    notes: list[str] = []
    points, iterations = [], []
    for number, (folder, header) in enumerate(zip(folders, headers, strict=True)):
        notes += _check_place(folder, header, profile)
        table = read_points(folder)
        if len(table) != header.points:
            msg = (
                f"{folder} holds {len(table)} of the {header.points} rows of its campaign; resume it with "
                "the same `rlgov characterize --out`, then calibrate"
            )
            raise CalibrationError(msg)
        points.append(table.assign(run=number))
        single = read_iterations(folder)
        if single is not None:
            iterations.append(single.assign(run=number))
    table = pd.concat(points, ignore_index=True)
    clocks, note = _clocks(table, profile)
    notes += note
    usable, left_out = _usable(table.assign(clock=clocks), profile)
    if usable.empty:
        reasons = "; ".join(f"{count} rows: {why}" for why, count in left_out.items())
        msg = f"no row of {', '.join(map(str, folders))} can be used ({reasons})"
        raise CalibrationError(msg)
    means = _means(usable, profile)
    details = means
    if iterations:
        details, paused = _details(usable, means, pd.concat(iterations, ignore_index=True))
        left_out |= paused
    energy_error = np.nan_to_num(_numbers(usable, "energy_error"))
    settings = {name: _numbers(usable, column) for name, column in
                (("clock", "sm_clock_mhz"), ("cap", "batch_cap"), ("TP degree", "tp_degree"))}  # fmt: skip
    return Observations(
        names=tuple(f"{row.point_id}/{row.repeat}" for row in usable.itertuples()),
        means=means,
        details=details,
        busy_share=np.clip(_numbers(usable, "busy_s") / _numbers(usable, "duration_s"), 0.0, 1.0),
        power_w=_numbers(usable, "power_w_per_gpu") * _numbers(usable, "allotted_gpus"),
        power_error=np.hypot(energy_error, means.error),
        measured_gpus=_numbers(usable, "allotted_gpus"),
        settings={name: values for name, values in settings.items() if np.isfinite(values).all()},
        left_out=left_out,
        notes=tuple(dict.fromkeys(notes)),
    )


def _check_together(folders: Sequence[Path], headers: Sequence[RunHeader]) -> None:
    first = headers[0]
    seen: dict[str, Path] = {}
    for folder, header in zip(folders, headers, strict=True):
        for what, mine, its in (
            ("model", header.model, first.model),
            ("GPU", header.gpu, first.gpu),
            ("kind of deployment", header.deployment, first.deployment),
        ):
            if mine != its:
                msg = (
                    f"{folder} is of the {what} {mine!r}, {folders[0]} of {its!r}; a profile is of one "
                    "deployment: calibrate them one by one"
                )
                raise CalibrationError(msg)
        if header.digest in seen:
            msg = f"{folder} and {seen[header.digest]} hold the same campaign; name one of them"
            raise CalibrationError(msg)
        seen[header.digest] = folder


def _check_place(folder: Path, header: RunHeader, profile: Profile) -> list[str]:
    gpu, model = header.gpu, header.model
    if model not in {profile.model.name, profile.model.name.split("/")[-1]}:
        msg = (
            f"{folder} is of the model {model!r}, profile {profile.name} of {profile.model.name!r}; give a "
            "profile of that model with --profile (`rlgov profile create --model config.json` writes one)"
        )
        raise CalibrationError(msg)
    if gpu is None:
        return [f"{folder} does not say which GPU it is of: taken to be {profile.gpu.name}"]
    if not same_card(gpu, profile.gpu.name):
        msg = (
            f"{folder} is of the GPU {gpu!r}, profile {profile.name} of {profile.gpu.name!r}; give a profile "
            "of that card with --profile (`rlgov profile create --gpu NAME` writes one, `rlgov profile gpus` "
            "lists the cards it knows)"
        )
        raise CalibrationError(msg)
    return []


def same_card(driver: str, sheet: str) -> bool:
    """Whether a driver's name and a data sheet's are of one card.

    A driver's is longer or shorter (``NVIDIA H100 80GB HBM3``); its first word with a digit, such as H100 or
    4090, is what both share.
    """
    if driver == sheet:
        return True
    model = _card_word(sheet)
    return model is not None and model == _card_word(driver)


def _card_word(name: str) -> str | None:
    words = name.lower().replace("-", " ").replace("_", " ").split()
    named = (w for w in words if any(c.isdigit() for c in w) and not w.endswith("gb"))
    return next(named, None)


def _clocks(table: pd.DataFrame, profile: Profile) -> tuple[Floats, list[str]]:
    """The mean clock of each row: measured, or else as locked."""
    measured, locked = _numbers(table, "measured_clock_mhz"), _numbers(table, "sm_clock_mhz")
    clock = np.where(np.isfinite(measured), measured, locked)
    if np.isfinite(clock).any():
        return clock, []
    highest = float(profile.gpu.sm_clock_max_mhz)
    note = (
        f"no clock was locked or measured: every point is taken to have run at {highest:g} MHz, the highest"
    )
    return np.full(len(table), highest), [note]


def _numbers(frame: pd.DataFrame, name: str) -> Floats:
    return np.asarray(frame[name].to_numpy(dtype=np.float64, na_value=np.nan))


def _usable(table: pd.DataFrame, profile: Profile) -> tuple[pd.DataFrame, dict[str, int]]:
    left_out: dict[str, int] = {}
    keep = np.ones(len(table), dtype=np.bool_)

    def drop(bad: Flags, why: str) -> None:
        mine = keep & bad
        if mine.any():
            left_out[why] = int(mine.sum())
        keep[mine] = False

    for name in _NEEDED:
        why = f"no {name}"
        if name == "iterations":
            why += " (counted by the plugin in the engine, or lost in part)"
        drop(~np.isfinite(_numbers(table, name)), why)
    drop(~np.isfinite(_numbers(table, "clock")), "no sm_clock_mhz and no measured_clock_mhz")
    drop(_numbers(table, "iterations") < _LEAST_ITERATIONS, f"fewer than {_LEAST_ITERATIONS} iterations")
    drop(~(_numbers(table, "busy_s") > 0.0), "no time spent iterating")
    drop(~table["steady"].to_numpy(dtype=np.bool_, na_value=False), "not steady")
    known = set(profile.deployment.tp_degrees)
    odd = ~np.isin(_numbers(table, "tp_degree"), sorted(known))
    drop(odd, f"a TP degree that profile {profile.name} lacks (it has {sorted(known)})")
    return table[keep].reset_index(drop=True), left_out


def _means(frame: pd.DataFrame, profile: Profile) -> Mean:
    iterations = _numbers(frame, "iterations")
    # The first token of a request comes out of its prefill, the others are decoded.
    decodes = np.maximum(_numbers(frame, "generated_tokens") - _numbers(frame, "served"), 0.0) / iterations
    prompt = _numbers(frame, "prompt_tokens_mean")
    context = _numbers(frame, "context_tokens_mean")
    guessed = prompt + np.nan_to_num(_numbers(frame, "output_tokens_mean")) / 2.0
    context = np.where(np.isfinite(context), context, guessed)
    prefill = _numbers(frame, "prefill_tokens") / iterations
    pairs = _numbers(frame, "prompt_pairs_mean")
    asked = _numbers(frame, "sm_clock_mhz")
    # A mean clock below the asked one mixes iterations at two clocks.
    mixed = np.nan_to_num(np.abs(asked / _numbers(frame, "clock") - 1.0))
    return Mean(
        point=np.arange(len(frame), dtype=np.int64),
        tp=np.array(
            [profile.deployment.tp_degrees.index(int(tp)) for tp in frame["tp_degree"]], dtype=np.int64
        ),
        clock_mhz=_numbers(frame, "clock"),
        decodes=decodes,
        context_tokens=decodes * context,
        prefill_tokens=prefill,
        pairs=prefill * np.where(np.isfinite(pairs), pairs / prompt, prompt / 2.0),
        # As if no two prompts began together and none was cut in parts.
        prompts=np.minimum(_numbers(frame, "served") / iterations, 1.0) * (prefill > 0.0),
        step_s=_numbers(frame, "busy_s") / iterations,
        error=_THROTTLE_DOUBT * mixed,
    )


def _details(frame: pd.DataFrame, means: Mean, singles: pd.DataFrame) -> tuple[Mean, dict[str, int]]:
    """Iterations without and with prompts apart, each by size; the mean of a point that tells none."""
    by_point = dict(tuple(singles.groupby(["run", "point_id", "repeat"])))
    cells: list[dict[str, float]] = []
    dropped = {"iterations with a missing value": 0, "iterations that held a pause": 0}
    for i, row in enumerate(frame.itertuples()):
        mean = means.take(np.array([i]))
        values: dict[str, float] = {f.name: float(getattr(mean, f.name)[0]) for f in fields(mean)}
        mine: Any = by_point.get((row.run, row.point_id, row.repeat))
        found = [] if mine is None else _cells(mine, values, dropped)
        cells += found or [values]
    columns = {name: np.array([cell[name] for cell in cells]) for name in cells[0]}
    point = columns["point"].astype(np.int64)
    details = Mean(**columns | {"point": point, "tp": means.tp[point]})
    return details, {why: count for why, count in dropped.items() if count}


def _cells(
    mine: pd.DataFrame, values: Mapping[str, float], dropped: dict[str, int]
) -> list[dict[str, float]]:
    """Mean iterations of one point by kind and size."""
    step, decodes, context, prefill = (
        np.asarray(mine[c].to_numpy(dtype=np.float64, na_value=np.nan))
        for c in ("step_s", "decode_tokens", "context_tokens", "prefill_tokens")
    )
    whole = np.isfinite(step) & np.isfinite(decodes) & np.isfinite(context) & np.isfinite(prefill)
    dropped["iterations with a missing value"] += int((~whole).sum())
    pure, mixed = whole & (prefill == 0) & (decodes > 0), whole & (prefill > 0)
    # Engines count prompts under way among the tokens attended to: only pure iterations tell a sequence's.
    decoded = float(decodes[pure].sum())
    each = (
        float(context[pure].sum()) / decoded
        if decoded
        else _ratio(values["context_tokens"], values["decodes"])
    )
    per_token = _ratio(values["pairs"], values["prefill_tokens"])
    found = []
    for kind, size in ((pure, decodes), (mixed, prefill)):
        for chosen in _by_size(np.flatnonzero(kind), size):
            took = step[chosen]
            good = took <= _longest_s(took)
            dropped["iterations that held a pause"] += int((~good).sum())
            rows, took = chosen[good], took[good]
            if len(rows) < _LEAST_ITERATIONS or not took.any():
                continue
            mean_s = float(took.mean())
            tokens, sequences = float(prefill[rows].mean()), float(decodes[rows].mean())
            own = float(context[rows].mean()) if tokens == 0.0 else sequences * each
            error = float(np.hypot(took.std() / np.sqrt(len(rows)) / mean_s, values["error"]))
            cell = {
                "decodes": sequences,
                "context_tokens": own,
                "prefill_tokens": tokens,
                "pairs": tokens * per_token,
                "prompts": float(tokens > 0.0),
                "step_s": mean_s,
                "error": error,
            }
            found.append({**values, **cell})
    return found


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole > 0.0 else 0.0


def _by_size(rows: Counts, size: Floats) -> Iterable[Counts]:
    """Rows in groups of about equal size and number; all of them where they hardly differ."""
    if not len(rows):
        return
    low, high = np.percentile(size[rows], (10, 90))
    kinds = 1 if high <= _ALIKE * low else min(_MOST_KINDS, max(1, len(rows) // (2 * _LEAST_ITERATIONS)))
    edges = np.unique(np.percentile(size[rows], np.linspace(0, 100, kinds + 1))[1:-1])
    group = np.searchsorted(edges, size[rows], side="right")
    for number in range(len(edges) + 1):
        yield rows[group == number]


def _longest_s(took: Floats) -> float:
    """Above it lies no iteration but a pause.

    An iteration that came together with the one before took no time of its own, so medians may be low.
    """
    if not len(took):
        return 0.0
    usual, long = np.percentile(took, (50, 90))
    return float(max(3.0 * long, usual + _PAUSE * (long - usual)))
