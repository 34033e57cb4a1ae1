"""A profile calibrated from runs: parameters with ranges, measured decode rows, errors of points left out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np

from rlgov.calibration.predict import ALL_REDUCE, Work, tables_of, with_bandwidth
from rlgov.calibration.run_fit import LEVEL, RunFit, fit_run, prior_of
from rlgov.calibration.run_reasons import POWER
from rlgov.simulation.physics import profile_physics
from rlgov.simulation.profile import DecodeRow, Parameter, Parameters, Profile

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from numpy.typing import NDArray

    from rlgov.calibration.runs import Observations

    Floats = NDArray[np.float64]
    Counts = NDArray[np.int64]

_FOLDS: Final = 5
_EACH_OF: Final = 12  # so few points are left out one by one
_LEAST_VALUES: Final = 2  # of a setting; a clock more, so that two are left to learn from
_MOST_VALUES: Final = 12  # of a setting: a fit each
_LEAST_POINTS: Final = 4  # that a fit still sees
_DIGITS: Final = 6


@dataclass(frozen=True, slots=True)
class Errors:
    """Mean absolute relative errors of points; NaN where nothing was measured."""

    what: str
    points: int
    time: float
    power: float


@dataclass(frozen=True, slots=True)
class Told:
    """What became of one parameter."""

    name: str
    prior: float
    value: float
    low: float
    high: float
    identified: bool
    note: str  # why it keeps its prior; what to mind otherwise


@dataclass(frozen=True, slots=True)
class Calibrated:
    """A calibrated profile and how well it holds."""

    profile: Profile
    fit: RunFit
    told: tuple[Told, ...]
    seen: Errors  # of the points it was fitted to
    unseen: tuple[Errors, ...]  # of points that a fit did not see; the first by chance, others by setting

    @property
    def unidentified(self) -> dict[str, str]:
        """Parameters that keep their prior, with the reason."""
        return {t.name: t.note for t in self.told if not t.identified}


def calibrate_profile(
    base: Profile, observed: Observations, name: str, say: Callable[[str], None] = lambda _: None
) -> Calibrated:
    """Fit a profile to runs; then without every fifth point, and without each clock, cap and TP degree.

    Args:
        base: priors, model and card; its measured rows are replaced by those of the runs.
        observed: the runs.
        name: of the new profile.
        say: is told what is being fitted.

    Raises:
        CalibrationError: A measurement is no finite number.
    """
    every = np.arange(len(observed.means), dtype=np.int64)
    say(f"{len(every)} points, {len(observed.details)} mean iterations")
    fit = fit_run(base, observed)
    profile = assemble(base, fit, len(every), name)
    time, power = point_errors(profile, observed, every)
    seen = Errors("seen by the fit", len(every), _mean([time]), _mean([power]))
    unseen = []
    for what, groups in _groups(observed):
        times, powers = [], []
        say(f"left out: {what} ({len(groups)} fits)")
        for out in groups:
            other = fit_run(base, observed, every[~np.isin(every, out)])
            errors = point_errors(assemble(base, other, len(every), name), observed, out)
            times.append(errors[0])
            powers.append(errors[1])
        unseen.append(Errors(what, sum(map(len, groups)), _mean(times), _mean(powers)))
    told = tuple(_told(base, fit))
    noted = _with_sources(profile, told, seen, unseen, len(every))
    return Calibrated(Profile.model_validate(noted.model_dump()), fit, told, seen, tuple(unseen))


def _groups(observed: Observations) -> Iterator[tuple[str, list[Counts]]]:
    """What is left out together: points by chance, then each value of each setting."""
    n = len(observed.means)
    # The same configuration in several repeats is left out as a whole.
    same = [name.rsplit("/", 1)[0] for name in observed.names]
    order = sorted(set(same), key=_shuffled)
    folds = len(order) if len(order) <= _EACH_OF else _FOLDS
    if folds > _LEAST_POINTS:
        fold = {name: i % folds for i, name in enumerate(order)}
        each = np.array([fold[name] for name in same])
        what = "each point" if folds == len(order) else "every fifth point"
        yield what, [np.flatnonzero(each == i) for i in range(folds)]
    for what, values in observed.settings.items():
        known = sorted(set(values.tolist()))
        groups = [np.flatnonzero(values == value) for value in known]
        least = _LEAST_VALUES + (what == "clock")
        if least <= len(known) <= _MOST_VALUES and all(n - len(g) >= _LEAST_POINTS for g in groups):
            yield f"each {what}", groups


def point_errors(profile: Profile, observed: Observations, points: Counts) -> tuple[Floats, Floats]:
    """Absolute relative errors of mean iteration time and of power, where it was measured."""
    tables = tables_of(profile, {}, float(observed.details.decodes.max()))
    means = observed.means.take(points)
    time = np.abs(Work(means).step_s(tables) / means.step_s - 1.0)
    powered = np.intersect1d(points, observed.with_power)
    spent = Work(observed.means.take(powered)).power_w(tables, observed)
    return time, np.abs(spent / observed.power_w[powered] - 1.0)


def assemble(base: Profile, fit: RunFit, points: int, name: str) -> Profile:
    """The base profile with fitted values and ranges, and decode rows where physics needed correction."""
    known: dict[str, Parameter] = {}
    for parameter, prior in base.parameters.items():
        if parameter not in fit.values:
            known[parameter] = prior
            continue
        value, spread = fit.values[parameter], fit.spread[parameter]
        lowest = 0.0 if value >= 0.0 else -np.inf
        low, high = max(value - spread, lowest), value + spread
        changes = {"value": value, "low": low, "high": high, "kind": "fitted"}
        known[parameter] = prior.model_copy(update=changes)
    changed = with_bandwidth(base, fit.value(ALL_REDUCE), "; scaled to a characterisation")
    plain = changed.model_copy(
        update={
            "name": name,
            "description": f"{base.gpu.name} with {base.model.name}, calibrated from {points} points",
            "parameters": Parameters.model_validate(known),
            "decode_rows": (),
        }
    )
    return plain.model_copy(update={"decode_rows": tuple(_decode_rows(plain, fit))})


def _decode_rows(plain: Profile, fit: RunFit) -> Iterator[DecodeRow]:
    """Pure decode at the highest clock as the corrected physics has it; the tables turn it back into it."""
    knots = fit.time.knots if len(fit.time.knots) else fit.power.knots
    one = np.ones(len(knots))
    slower = fit.time.ratio if len(fit.time.ratio) else one
    costlier = fit.power.ratio if len(fit.power.ratio) else one
    physics = profile_physics(plain)
    for i in range(len(knots)):
        tp = plain.deployment.tp_degrees[int(knots.tp[i])]
        batch = np.array([_rounded(float(knots.batch[i]))])
        work = physics.decode(tp, batch)
        context = 1.0  # a token a sequence: what more of them cost is physics
        tokens = context * float(batch[0])
        iteration_s = float(work.total_s[0]) * float(slower[i]) + physics.kv_s(tp) * tokens
        busy_w = float(physics.busy_w(tp, np.ones(1))[0])
        energy_j = float(work.total_j[0]) * float(costlier[i]) + physics.kv_j(tp) * tokens
        energy_j += busy_w * iteration_s
        yield DecodeRow(
            tp_degree=tp,
            batch=float(batch[0]),
            context_tokens=context,
            iteration_s=_rounded(iteration_s),
            power_w=_rounded(energy_j / iteration_s / tp),
            source="characterisation: the fitted physics and what it lacks at this batch size, contexts and "
            "prompts taken out, at the highest clock and without the limit of TDP",
        )


def _rounded(value: float) -> float:
    return float(f"{value:.{_DIGITS}g}")


def _told(base: Profile, fit: RunFit) -> Iterator[Told]:
    for name in [*(n for n, _ in base.parameters.items()), ALL_REDUCE]:
        prior = prior_of(base, name)
        if name in fit.values:
            value, spread = fit.values[name], fit.spread[name]
            low = max(value - spread, 0.0) if value >= 0.0 else value - spread
            note = "at the edge of what is possible" if name in fit.at_bound else ""
            yield Told(name, prior.value, value, low, value + spread, identified=True, note=note)
        else:
            why = fit.kept.get(name, "not fitted")
            yield Told(name, prior.value, prior.value, prior.low, prior.high, identified=False, note=why)


def _with_sources(
    profile: Profile, told: tuple[Told, ...], seen: Errors, unseen: list[Errors], points: int
) -> Profile:
    """The profile with where each number comes from and how well it holds."""
    known = dict(profile.parameters.items())
    for t in told:
        if t.name not in known:
            continue
        p = known[t.name]
        if not t.identified:
            kind = "prior" if p.kind == "fitted" else p.kind
            known[t.name] = p.model_copy(update={"kind": kind, "source": f"{p.source} [kept: {t.note}]"})
            continue
        axis = "power" if t.name in POWER else "time"
        errors = [f"{e.what} {_percent(getattr(e, axis))}" for e in (seen, *unseen)]
        update = {
            "source": f"{points} points of a characterisation; range: {LEVEL:.0%} of what they leave open"
            + (f"; {t.note}" if t.note else ""),
            "error": f"mean error of iteration {axis}: " + ", left out: ".join(errors[:2]) + "".join(
                f", {e}" for e in errors[2:]),
        }  # fmt: skip
        known[t.name] = p.model_copy(update=update)
    return profile.model_copy(update={"parameters": Parameters.model_validate(known)})


def _shuffled(text: str) -> int:
    return int.from_bytes(text.encode()[::-1], "big") * 2654435761 % 2**32


def _mean(errors: list[Floats]) -> float:
    values = np.concatenate(errors) if errors else np.array([])
    return float(np.mean(values)) if values.size else float("nan")


def _percent(value: float) -> str:
    return "unknown" if np.isnan(value) else f"{value:.1%}"
