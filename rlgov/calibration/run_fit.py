"""Fit a profile's parameters to characterisation runs; keep, and name, what the runs cannot tell.

Every parameter has a prior: value and range of the base profile. The fit weighs all of them against the
measurements at once (maximum a posteriori, residuals robust, bounds physical), beside corrections of decode
work at measured batch sizes where physics alone does not hold. What the measurements hardly narrow is then
given back to its prior, and the others are fitted again.

Ranges hold 90 % (1.645 standard deviations of the posterior, by its curvature). They count in what is not
known of all other parameters, those that keep their priors included, and, with corrections, how much these
moved a parameter.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Final

import numpy as np
from scipy.optimize import least_squares

from rlgov.calibration.fitting import Bound
from rlgov.calibration.predict import ALL_REDUCE, NO_KNOTS, Knots, Work, tables_of
from rlgov.calibration.run_reasons import CLOCK_TIME, POWER, TIME, not_asked, reason
from rlgov.errors import CalibrationError
from rlgov.simulation.profile import Parameter

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from numpy.typing import NDArray

    from rlgov.calibration.runs import Observations
    from rlgov.simulation.profile import Profile
    from rlgov.simulation.tables import PhysicsTables

    Floats = NDArray[np.float64]
    Counts = NDArray[np.int64]

LEVEL: Final = 0.90
_DEVIATES: Final = 1.645  # of a standard deviation: LEVEL of a normal distribution
_FIRST_NOISE: Final = 0.01  # relative
_LEAST_NOISE, _MOST_NOISE = 0.001, 0.1  # no mean iteration is known better; worse is no measurement
_OUTLIER: Final = 3.0  # standard deviations from which a row counts linearly
_NARROWED: Final = 0.5  # of the prior's: a posterior deviation above it tells nothing new
_PLAIN_IS_ENOUGH: Final = 0.01  # relative: physics that is off by less needs no corrections
_CORRECTIONS: Final = "what physics lacks at the measured batch sizes"
_BETTER: Final = 0.9  # of the residual left: less of a gain is no reason to correct
_TIME_OFF, _POWER_OFF = 0.05, 0.08  # how far physics may be off at a batch size, one standard deviation
_KNOT_SPACING: Final = 1.25
_DECODE_SHARE: Final = 0.5  # of an iteration's time at least: others say little about decode
_EDGES: Final = {"voltage_knee": (0.3, 0.9), "voltage_at_max": (1.02, 1.8), "memory_knee": (0.1, 0.95)}
_KINKED: Final = frozenset({"voltage_knee", "memory_knee"})
"""A fit that starts at one side of a measured clock does not find its way to the other."""

_SHARES: Final = frozenset({
    "weight_efficiency", "kv_efficiency", "gemm_mfu", "prefill_mfu", "attention_mfu", "memory_clocked_share",
    *CLOCK_TIME,
})  # fmt: skip


@dataclass(frozen=True, slots=True, eq=False)
class Correction:
    """What decode is multiplied by at measured batch sizes; nothing where physics is good enough."""

    knots: Knots = field(default_factory=lambda: NO_KNOTS)
    ratio: Floats = field(default_factory=lambda: np.array([]))


@dataclass(frozen=True, slots=True, eq=False)
class RunFit:
    """What runs say of a profile's parameters."""

    base: Profile
    values: Mapping[str, float]
    spread: Mapping[str, float]  # half of the range that holds LEVEL
    kept: Mapping[str, str]  # parameters that keep their prior, with the reason
    time: Correction
    power: Correction
    noise: Mapping[str, float]  # of ``time`` and ``power``: relative deviation of a row from the fit
    at_bound: frozenset[str]

    def value(self, name: str) -> float:
        """Fitted, or the prior."""
        return self.values.get(name, prior_of(self.base, name).value)


def prior_of(base: Profile, name: str) -> Parameter:
    """Value and range before any measurement."""
    if name == ALL_REDUCE:
        return Parameter(
            value=1.0, low=0.5, high=1.5, kind="prior", source="the profile's table of bandwidths"
        )
    known: Parameter = getattr(base.parameters, name)
    return known


def half_width(known: Parameter) -> float:
    """Of a prior, as its standard deviation. Another engine lets even a fitted value move by a tenth."""
    return max((known.high - known.low) / 2.0, 0.1 * abs(known.value), 1e-12)


def bound_of(name: str, known: Parameter) -> Bound:
    """How far a fit may move a parameter: three prior ranges, within what physics allows."""
    width = max(known.high - known.low, 0.2 * abs(known.value), 1e-12)
    low, high = _EDGES.get(name, (0.0, 1.0 if name in _SHARES else np.inf))
    lowest = max(low, known.low - 3.0 * width)
    if lowest == 0.0 and name not in CLOCK_TIME:
        lowest = min(0.02 * abs(known.value), known.low)
    return Bound(known.value, lowest, min(high, known.high + 3.0 * width))


def fit_run(base: Profile, observed: Observations, points: Counts | None = None) -> RunFit:
    """Fit time, then power, on some points of the runs (all, if not said).

    Args:
        base: priors, model and card; its measured rows are not used.
        observed: the runs.
        points: which to fit.

    Raises:
        CalibrationError: A measurement is no finite number.
    """
    chosen = np.arange(len(observed.means), dtype=np.int64) if points is None else points
    plain = base.model_copy(update={"decode_rows": ()})
    kept = not_asked(base, observed, chosen)
    known = {name for name, _ in base.parameters.items()} | {ALL_REDUCE}
    most = float(observed.details.decodes.max())
    cells = observed.details.take(np.isin(observed.details.point, chosen))
    work = Work(cells)
    degrees = np.array(base.deployment.tp_degrees, dtype=np.int64)
    knots = _knots(tables_of(plain, {}, most), work)
    time = _fit(
        _Problem(
            base, tuple(n for n in TIME if n not in kept and n in known), np.log(cells.step_s), cells.error,
            lambda p: tables_of(plain, p, most), work.step_s, knots, knots.shares(cells, degrees), _TIME_OFF,
        ),
        kept,
    )  # fmt: skip
    powered = np.intersect1d(chosen, observed.with_power)
    names = tuple(n for n in POWER if n not in kept)
    if not names:
        return RunFit(
            base, time.values, time.spread, kept, time.correction, Correction(), {"time": time.noise},
            time.at_bound,
        )  # fmt: skip
    means = observed.means.take(powered)
    spent = Work(means)
    power = _fit(
        _Problem(
            base, names, np.log(observed.power_w[powered]), observed.power_error[powered],
            lambda p: tables_of(plain, {**time.values, **p}, most),
            lambda tables, ratio: spent.power_w(tables, observed, ratio),
            knots, knots.shares(means, degrees), _POWER_OFF,
        ),
        kept,
    )  # fmt: skip
    return RunFit(
        base, {**time.values, **power.values}, {**time.spread, **power.spread}, kept, time.correction,
        power.correction, {"time": time.noise, "power": power.noise}, time.at_bound | power.at_bound,
    )  # fmt: skip


def _knots(tables: PhysicsTables, work: Work) -> Knots:
    """Batch sizes that were measured, those close together as one; of iterations that mostly decode."""
    mean = work.mean
    none = np.zeros(len(mean))
    bare = Work(replace(mean, prefill_tokens=none, pairs=none, prompts=none))
    decoding = (mean.decodes >= 1.0) & (bare.step_s(tables) >= _DECODE_SHARE * work.step_s(tables))
    tp: list[int] = []
    batch: list[float] = []
    for j in sorted(set(mean.tp.tolist())):
        group: list[float] = []
        for size in [*sorted(mean.decodes[decoding & (mean.tp == j)].tolist()), np.inf]:
            if group and size > group[0] * _KNOT_SPACING:
                tp.append(j)
                batch.append(float(np.exp(np.mean(np.log(group)))))
                group = []
            group.append(size)
    return Knots(np.array(tp, dtype=np.int64), np.array(batch))


@dataclass(frozen=True, slots=True, eq=False)
class _Problem:
    """One of the two fits: logarithms of what was measured, and how it is predicted."""

    base: Profile
    names: tuple[str, ...]
    measured: Floats
    error: Floats  # relative, of each row
    tables: Callable[[Mapping[str, float]], PhysicsTables]
    predict: Callable[[PhysicsTables, Floats], Floats]
    knots: Knots
    shares: Floats
    off: float


@dataclass(frozen=True, slots=True, eq=False)
class _Posterior:
    """Best values in prior deviations from the prior, knots behind parameters, and the curvature there."""

    names: tuple[str, ...]
    best: Floats
    curvature: Floats
    residual: Floats  # relative, of each row
    at_bound: frozenset[str]


@dataclass(frozen=True, slots=True, eq=False)
class _Fitted:
    values: Mapping[str, float]
    spread: Mapping[str, float]
    correction: Correction
    noise: float
    at_bound: frozenset[str]


def _fit(problem: _Problem, kept: dict[str, str]) -> _Fitted:
    """All parameters against the data; then without those that were not narrowed down.

    Adds the latter to ``kept``.
    """
    plain = found = _solve(problem, problem.names, _FIRST_NOISE, corrected=False)
    corrected = False
    if len(problem.knots) and _size(plain.residual) > _PLAIN_IS_ENOUGH:
        closer = _solve(problem, problem.names, _FIRST_NOISE, corrected=True, start=plain)
        # Otherwise it is noise that physics is off by, and corrections would follow it.
        corrected = _size(closer.residual) < _BETTER * _size(plain.residual)
        found = closer if corrected else plain
    noise = _noise(found.residual)
    found = _solve(problem, problem.names, noise, corrected=corrected, start=found)
    # Where physics is off, how to mend it is one more thing that is not known.
    moved = np.abs(plain.best - found.best[: len(plain.best)]) if corrected else np.zeros(len(plain.best))
    form = dict(zip(problem.names, (moved / _DEVIATES).tolist(), strict=True))
    left, deviation = _narrowed(found, form, kept)
    final = found
    if len(left) < len(problem.names):
        final = _solve(problem, left, noise, corrected=corrected, start=found)
    priors = [prior_of(problem.base, name) for name in left]
    values = {
        n: k.value + half_width(k) * z for n, k, z in zip(left, priors, final.best.tolist(), strict=False)
    }
    spread = {
        n: half_width(k) * _DEVIATES * float(np.hypot(deviation[n], form[n]))
        for n, k in zip(left, priors, strict=True)
    }
    ratio = np.exp(problem.off * final.best[len(left) :])
    correction = Correction(problem.knots, ratio) if corrected else Correction()
    return _Fitted(values, spread, correction, _noise(final.residual), final.at_bound)


def _narrowed(
    found: _Posterior, form: Mapping[str, float], kept: dict[str, str]
) -> tuple[tuple[str, ...], dict[str, float]]:
    """Give the least certain parameter to its prior until all that are left are narrowed down.

    Args:
        found: best values and curvature.
        form: how far corrections moved each parameter, as a deviation.
        kept: where parameters that go are noted, with the reason.
    """
    names = list(found.names)
    total = len(found.best)
    at = list(range(total))
    marginal: dict[str, float] = {}
    while True:
        spread = np.linalg.inv(found.curvature[np.ix_(at, at)])
        deviation = np.sqrt(np.diag(spread))
        if not marginal:
            marginal = dict(zip(names, deviation.tolist(), strict=False))
        if not names:
            return (), marginal
        whole = np.hypot(deviation[: len(names)], [form[name] for name in names])
        worst = int(np.argmax(whole))
        if whole[worst] <= _NARROWED:
            return tuple(names), marginal
        alone = 1.0 / np.sqrt(found.curvature[at[worst], at[worst]])
        beside = spread[worst] / deviation
        beside[worst] = 0.0
        other = int(np.argmax(np.abs(beside)))
        partner = names[other] if other < len(names) and deviation[worst] > _NARROWED else _CORRECTIONS
        kept[names[worst]] = reason(names[worst], float(whole[worst]), float(alone), partner, _NARROWED)
        del names[worst], at[worst]


def _solve(
    problem: _Problem, names: Sequence[str], noise: float, *, corrected: bool, start: _Posterior | None = None
) -> _Posterior:
    """The best values of some parameters, and of the corrections; the others keep their priors."""
    priors = {name: prior_of(problem.base, name) for name in names}
    middle = np.array([k.value for k in priors.values()])
    half = np.array([half_width(k) for k in priors.values()])
    bounds = [bound_of(name, known) for name, known in priors.items()]
    knots = len(problem.knots) if corrected else 0
    low = np.concatenate([(np.array([b.low for b in bounds]) - middle) / half, np.full(knots, -20.0)])
    high = np.concatenate([(np.array([b.high for b in bounds]) - middle) / half, np.full(knots, 20.0)])
    weight = 1.0 / np.hypot(noise, problem.error)
    last: list[tuple[bytes, PhysicsTables]] = []

    def residual(z: Floats) -> Floats:
        theta, size = z[: len(names)], z[len(names) :]
        if not last or last[0][0] != theta.tobytes():
            values = dict(zip(names, (middle + half * theta).tolist(), strict=True))
            last[:] = [(theta.tobytes(), problem.tables(values))]
        ratio = problem.shares @ np.exp(problem.off * size) if knots else np.ones(1)
        relative = np.log(problem.predict(last[0][1], ratio)) - problem.measured
        return np.concatenate([relative * weight, z])

    starts = [np.clip(z, low + 1e-9, high - 1e-9) for z in _starts(names, knots, start)]
    first = starts[0]
    rows = len(problem.measured)
    bad = int(np.sum(~np.isfinite(residual(first)[:rows])))
    if bad:
        msg = f"{bad} of {rows} measurements give no finite residual; leave out rows without time or power"
        raise CalibrationError(msg)
    if not len(first):
        return _Posterior((), first, np.zeros((0, 0)), residual(first)[:rows] / weight, frozenset())
    results = [
        least_squares(residual, z, bounds=(low, high), loss="soft_l1", f_scale=_OUTLIER) for z in starts
    ]
    result = min(results, key=lambda each: float(each.cost))
    jacobian = np.asarray(
        result.jac, dtype=np.float64
    )  # of the robust cost: rows of outliers are scaled down
    near = np.minimum(result.x - low, high - result.x)[: len(names)] < 1e-3 * (high - low)[: len(names)]
    return _Posterior(
        tuple(names),
        np.asarray(result.x),
        jacobian.T @ jacobian,
        residual(result.x)[:rows] / weight,
        frozenset(n for n, at in zip(names, near.tolist(), strict=True) if at),
    )


def _starts(names: Sequence[str], knots: int, start: _Posterior | None) -> Iterator[Floats]:
    """Where to look from: an earlier fit, or the priors, kinked parameters at either side, too."""
    first = np.zeros(len(names) + knots)
    if start is not None:
        known = dict(zip(start.names, start.best.tolist(), strict=False))
        first[: len(names)] = [known[n] for n in names]
        if knots and len(start.best) > len(start.names):
            first[len(names) :] = start.best[len(start.names) :]
        yield first
        return
    kinked = [i for i, name in enumerate(names) if name in _KINKED]
    for side in (0.0, -1.0, 1.0) if kinked else (0.0,):
        first[kinked] = side
        yield first.copy()


def _size(residual: Floats) -> float:
    """Root mean square without the outermost tenth."""
    kept = np.sort(np.abs(residual))[: max(1, int(0.9 * len(residual)))]
    return float(np.sqrt(np.mean(kept**2)))


def _noise(residual: Floats) -> float:
    return float(np.clip(1.25 * _size(residual), _LEAST_NOISE, _MOST_NOISE))
