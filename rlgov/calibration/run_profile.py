"""A profile calibrated from runs: parameters with ranges, measured decode rows, errors of points left out."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final

import numpy as np

from rlgov.calibration.dense_rows import rounded
from rlgov.calibration.predict import power_w, step_s, tables_of
from rlgov.calibration.run_fit import RunFit, fit_run
from rlgov.simulation.profile import DecodeRow, Parameter, Parameters, Profile

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from rlgov.calibration.runs import Mean, Observations

    Floats = NDArray[np.float64]
    Counts = NDArray[np.int64]

_FOLDS: Final = 5
_ROUNDS: Final = 2
_NEAR_HIGHEST: Final = 0.98  # of the highest clock: what counts as measured at it
_SAME_BATCH: Final = 0.05  # relative; rows closer than this become one
_LEAST_ROWS: Final = 2  # of a TP degree: one alone has no neighbour to be interpolated with
_DECODE_SHARE: Final = 0.5  # of an iteration's work at least: rows of less say little about decode


@dataclass(frozen=True, slots=True)
class Calibrated:
    """A calibrated profile and how well it holds."""

    profile: Profile
    fit: RunFit
    time_error: float  # of the points it was fitted to, mean absolute, relative
    power_error: float  # NaN without power
    time_error_left_out: float  # of points that a fit did not see
    power_error_left_out: float
    points: int
    left_out: dict[str, int]


def calibrate_profile(
    base: Profile, observed: Observations, name: str, say: Callable[[str], None] = lambda _: None
) -> Calibrated:
    """Fit a profile to runs, with every fifth of the points left out once.

    Args:
        base: priors, model and card; its measured rows are replaced by those of the runs.
        observed: the runs.
        name: of the new profile.
        say: is told what is being fitted.

    Raises:
        CalibrationError: There are fewer measurements than parameters.
    """
    say(f"{len(observed.means)} points")
    every = np.arange(len(observed.means), dtype=np.int64)
    fit, nominal = _fit_and_assemble(base, observed, every, name)
    time, power = point_errors(nominal, observed, every)
    folds = np.argsort(np.argsort([_shuffled(n) for n in observed.names])) % _FOLDS
    outside_time, outside_power, fits = [], [], []
    for fold in range(min(_FOLDS, len(every)) if len(every) > _FOLDS else 0):
        say(f"points left out, part {fold + 1} of {_FOLDS}")
        seen, unseen = every[folds != fold], every[folds == fold]
        other, profile = _fit_and_assemble(base, observed, seen, name)
        fits.append(other)
        errors = point_errors(profile, observed, unseen)
        outside_time.append(errors[0])
        outside_power.append(errors[1])
    left_time = _mean(outside_time)
    left_power = _mean(outside_power)
    told = f"fit {_percent(time)}, points left out {_percent([np.array([left_time])])}"
    notes = {
        "time": f"iteration time: {told}",
        "power": f"power: fit {_percent(power)}, points left out {left_power:.1%}",
    }
    parameters = _parameters(base, fit, fits, notes, len(every))
    profile = nominal.model_copy(update={"parameters": parameters})
    return Calibrated(
        profile=Profile.model_validate(profile.model_dump()),
        fit=fit,
        time_error=_mean([time]),
        power_error=_mean([power]),
        time_error_left_out=left_time,
        power_error_left_out=left_power,
        points=len(every),
        left_out=observed.left_out,
    )


def _fit_and_assemble(
    base: Profile, observed: Observations, points: Counts, name: str
) -> tuple[RunFit, Profile]:
    """Fit; make rows of what is unexplained at the highest clock; fit again beside them, and make them anew.

    The second fit is left with what rows cannot hold: how clocks and prompts change an iteration.
    """
    fit = fit_run(base, observed, points)
    profile = assemble(base, fit, observed, points, name)
    for _ in range(_ROUNDS):
        fit = fit_run(base, observed, points, profile.decode_rows)
        profile = assemble(base, fit, observed, points, name)
    return fit, profile


def point_errors(profile: Profile, observed: Observations, points: Counts) -> tuple[Floats, Floats]:
    """Absolute relative errors of mean iteration time and of power, where it was measured."""
    tables = tables_of(profile, {}, float(observed.details.decodes.max()))
    means = observed.means.take(points)
    time = np.abs(step_s(tables, means) / means.step_s - 1.0)
    with_power = np.intersect1d(points, observed.with_power)
    power = np.abs(power_w(tables, observed, with_power) / observed.power_w[with_power] - 1.0)
    return time, power


def assemble(base: Profile, fit: RunFit, observed: Observations, points: Counts, name: str) -> Profile:
    """The base profile with nominal fitted values, and decode rows from what the fit leaves unexplained."""
    known = {
        n: p.model_copy(
            update={
                "value": fit.values[n],
                "low": min(p.low, fit.values[n]),
                "high": max(p.high, fit.values[n]),
            }
        )
        if n in fit.values else p
        for n, p in base.parameters.items()
    }  # fmt: skip
    changes = {
        "name": name,
        "description": f"{base.gpu.name} with {base.model.name}, calibrated from {len(points)} points",
        "parameters": Parameters.model_validate(known),
        "decode_rows": (),
    }
    plain = base.model_copy(update=changes)
    return plain.model_copy(update={"decode_rows": _decode_rows(plain, observed, points)})


def _decode_rows(plain: Profile, observed: Observations, points: Counts) -> tuple[DecodeRow, ...]:
    """Pure decode at the highest clock: the fit's prediction times measured over predicted."""
    most = float(observed.details.decodes.max())
    tables = tables_of(plain, {}, most)
    highest = float(plain.gpu.sm_clock_max_mhz)
    details = observed.details
    usable = (
        np.isin(details.point, points)
        & (details.clock_mhz >= _NEAR_HIGHEST * highest)
        & (details.decodes >= 1.0)
    )
    # Of a point that tells its iterations without prompts, those with prompts add nothing.
    alone = set(details.point[usable & (details.prefill_tokens == 0)].tolist())
    mixed = np.array([p in alone for p in details.point.tolist()], dtype=np.bool_) & (
        details.prefill_tokens > 0
    )
    rows = details.take(usable & ~mixed)
    if not len(rows):
        return ()
    pure = _without_prefill(rows, highest)
    alone_s, predicted_s = step_s(tables, pure), step_s(tables, rows)
    good = alone_s >= _DECODE_SHARE * predicted_s
    ratio = rows.step_s / predicted_s
    watts = _row_power(plain, observed, tables_power=(rows, pure, alone_s))
    found: list[DecodeRow] = []
    for j in sorted(set(rows.tp.tolist())):
        mine = np.flatnonzero(good & (rows.tp == j))
        mine = mine[np.argsort(rows.decodes[mine], kind="stable")]
        groups: list[list[int]] = []
        for i in mine.tolist():
            if groups and rows.decodes[i] <= rows.decodes[groups[-1][0]] * (1.0 + _SAME_BATCH):
                groups[-1].append(i)
            else:
                groups.append([i])
        if len(groups) < _LEAST_ROWS:
            continue
        for group in groups:
            batch = float(np.mean(rows.decodes[group]))
            found.append(
                DecodeRow(
                    tp_degree=plain.deployment.tp_degrees[j],
                    batch=rounded(batch),
                    context_tokens=rounded(max(float(np.mean(rows.context_tokens[group])) / batch, 1.0)),
                    iteration_s=rounded(float(np.mean(alone_s[group] * ratio[group]))),
                    power_w=rounded(float(np.mean(watts[group]))),
                    source=f"characterisation at {highest:g} MHz, mean of {len(group)} rows, without prefill",
                )
            )
    return tuple(found)


def _without_prefill(rows: Mean, clock_mhz: float) -> Mean:
    nothing = np.zeros(len(rows))
    return type(rows)(
        point=rows.point, tp=rows.tp, clock_mhz=np.full(len(rows), clock_mhz), decodes=rows.decodes,
        context_tokens=rows.context_tokens, prefill_tokens=nothing, pairs=nothing, step_s=rows.step_s,
    )  # fmt: skip


def _row_power(plain: Profile, observed: Observations, tables_power: tuple[Mean, Mean, Floats]) -> Floats:
    """Watts per GPU of pure decode: predicted, times measured over predicted power of the whole point."""
    rows, pure, alone_s = tables_power
    tables = tables_of(plain, {}, float(observed.details.decodes.max()))
    predicted = power_w(tables, observed, rows.point)
    measured = observed.power_w[rows.point]
    ratio = np.where(np.isfinite(measured), measured / predicted, 1.0)
    gpus = tables.tp_degrees[rows.tp].astype(np.float64)
    alone = type(observed)(
        names=observed.names,
        means=_with_step(pure, alone_s),
        details=pure,
        busy_share=np.ones(len(rows)),
        power_w=measured,
        measured_gpus=gpus,
        left_out={},
    )
    watts = power_w(tables, alone, np.arange(len(rows), dtype=np.int64))
    return np.asarray(np.minimum(watts * ratio / gpus, plain.gpu.tdp_w))


def _with_step(mean: Mean, step: Floats) -> Mean:
    return replace(mean, step_s=step)


def _parameters(
    base: Profile, fit: RunFit, others: list[RunFit], notes: dict[str, str], points: int
) -> Parameters:
    found = {}
    for name, known in base.parameters.items():
        if name not in fit.values:
            reason = fit.kept.get(name, "not fitted")
            source = f"{known.source} [kept: {reason}]"
            kind = "prior" if known.kind == "fitted" else known.kind
            found[name] = known.model_copy(update={"source": source, "kind": kind})
            continue
        value, spread = fit.values[name], 2.0 * fit.standard_error[name]
        seen = [value - spread, value + spread, *(f.value(name) for f in others)]
        low, high = min(seen), max(seen)
        if value >= 0.0:
            low = max(low, 0.0)
        power = name.endswith(("_w", "_j", "_j_per_byte")) or name in {
            "voltage_knee",
            "voltage_at_max",
            "memory_clocked_share",
        }
        found[name] = Parameter(
            value=value, low=low, high=high, kind="fitted",
            source=f"{points} points of a characterisation; range: 2 standard errors and "
            "fits to four fifths of the points",
            error=notes["power" if power else "time"],
        )  # fmt: skip
    return Parameters.model_validate(found)


def _shuffled(text: str) -> int:
    return int.from_bytes(text.encode()[::-1], "big") * 2654435761 % 2**32


def _mean(errors: list[Floats]) -> float:
    values = np.concatenate(errors) if errors else np.array([])
    return float(np.mean(values)) if values.size else float("nan")


def _percent(errors: Floats | list[Floats]) -> str:
    value = _mean(errors if isinstance(errors, list) else [errors])
    return "unknown" if np.isnan(value) else f"{value:.1%}"
