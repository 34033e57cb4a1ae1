"""Fit a profile's parameters to characterisation runs; keep, and name, what the runs cannot tell.

Every parameter has a prior: its value and range in the base profile. A fit may move a parameter as far as
physics allows, but what moves it must be data: a parameter whose standard error is not clearly below the half
width of its prior range keeps the prior, and the others are fitted again without it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np

from rlgov.calibration.fitting import Bound, Solution, solve
from rlgov.calibration.predict import power_w, step_s, tables_of

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from numpy.typing import NDArray

    from rlgov.calibration.runs import Observations
    from rlgov.simulation.profile import DecodeRow, Parameter, Profile

    Floats = NDArray[np.float64]
    Counts = NDArray[np.int64]

_CLOCK_TIME: Final = (
    "layer_overhead_clock_share", "sequence_overhead_clock_share", "kv_clock_share", "memory_knee",
)  # fmt: skip
_TIME: Final = (
    "weight_efficiency", "kv_efficiency", "gemm_mfu", "prefill_mfu", "attention_mfu", "layer_overhead_s",
    "sequence_overhead_s", *_CLOCK_TIME, "host_floor_s", "all_reduce_latency_s",
)  # fmt: skip
_CLOCK_POWER: Final = ("voltage_knee", "voltage_at_max", "memory_clocked_share", "clocked_w", "idle_low_w")
_POWER: Final = (
    "constant_w", "weight_j_per_byte", "kv_j_per_byte", "flop_j", "idle_high_w", *_CLOCK_POWER,
)  # fmt: skip
_SHARES: Final = frozenset({
    "weight_efficiency", "kv_efficiency", "gemm_mfu", "prefill_mfu", "attention_mfu", *_CLOCK_TIME,
    "memory_clocked_share",
})  # fmt: skip
_EDGES: Final = {"voltage_knee": (0.3, 0.9), "voltage_at_max": (1.02, 1.8), "memory_knee": (0.1, 0.95)}
_NOISE: Final = 0.01  # relative: what a mean iteration is good to
_NARROWED: Final = 0.5  # of the prior's half width: a standard error above it tells nothing new
_LEAST_CLOCKS, _LEAST_DEGREES = 2, 2


@dataclass(frozen=True, slots=True)
class RunFit:
    """What runs say of a profile's parameters."""

    values: dict[str, float]
    standard_error: dict[str, float]
    kept: dict[str, str]  # parameters that keep their prior, with the reason
    base: Profile

    def value(self, name: str) -> float:
        """Fitted, or the prior."""
        known: Parameter = getattr(self.base.parameters, name)
        return self.values.get(name, known.value)


def fit_run(
    base: Profile, observed: Observations, points: Counts | None = None, rows: tuple[DecodeRow, ...] = ()
) -> RunFit:
    """Fit time, then power, on some points of the runs (all, if not said).

    Args:
        base: priors, model and card.
        observed: the runs.
        points: which to fit.
        rows: measured decode at the highest clock that the tables shall reproduce, whatever the parameters;
            those of the base profile are not used.

    Raises:
        CalibrationError: There are fewer measurements than parameters.
    """
    chosen = np.arange(len(observed.means), dtype=np.int64) if points is None else points
    plain = base.model_copy(update={"decode_rows": rows})
    kept = dict(_untold(base, observed, chosen))
    time_names = [n for n in _TIME if n not in kept]
    means = observed.details.take(np.isin(observed.details.point, chosen))
    most = float(observed.details.decodes.max())

    def time_residual(p: Mapping[str, float]) -> Floats:
        return np.log(step_s(tables_of(plain, p, most), means) / means.step_s)

    time = _fit(base, time_names, time_residual, kept)
    with_power = np.intersect1d(chosen, observed.with_power)

    def power_residual(p: Mapping[str, float]) -> Floats:
        tables = tables_of(plain, {**time.values, **p}, most)
        return np.log(power_w(tables, observed, with_power) / observed.power_w[with_power])

    power_names = [n for n in _POWER if n not in kept]
    power = _fit(base, power_names, power_residual, kept) if power_names else Solution({}, {}, frozenset())
    errors = {**time.standard_error, **power.standard_error}
    return RunFit({**time.values, **power.values}, errors, kept, base)


def _untold(base: Profile, observed: Observations, points: Counts) -> dict[str, str]:
    """Parameters that no fit of these points can find, by how the points were chosen."""
    means = observed.means.take(points)
    reasons: dict[str, str] = {}
    clocks = sorted({round(c) for c in means.clock_mhz.tolist()})
    degrees = {base.deployment.tp_degrees[j] for j in means.tp.tolist()}
    if len(clocks) < _LEAST_CLOCKS:
        why = f"every point ran at {clocks[0]} MHz: nothing tells what a lower clock changes"
        reasons |= dict.fromkeys((*_CLOCK_TIME, *_CLOCK_POWER), why)
    if len(degrees) < _LEAST_DEGREES:
        (only,) = degrees
        reasons["all_reduce_latency_s"] = f"every point ran at TP {only}: communication has no counterpart"
    if not (means.prefill_tokens > 0).any():
        reasons |= dict.fromkeys(("prefill_mfu", "attention_mfu"), "no point prefilled a prompt")
    if not np.isin(points, observed.with_power).any():
        reasons |= dict.fromkeys(_POWER, "no point has a power: the run had no meter")
    for name, known in base.parameters.items():
        if name not in {*_TIME, *_POWER}:
            reasons[name] = "a characterisation holds configurations and does not time how they change"
        elif known.low == known.high == known.value and known.value == 0.0:
            reasons[name] = "zero by assumption"
    return reasons


def bound_of(name: str, known: Parameter) -> Bound:
    """How far a fit may move a parameter: three widths beyond its prior range, within what physics allows."""
    width = max(known.high - known.low, 0.2 * abs(known.value), 1e-12)
    low, high = _EDGES.get(name, (0.0, 1.0 if name in _SHARES else np.inf))
    lowest = max(low, known.low - 3.0 * width)
    if low == 0.0 and lowest == 0.0 and name not in _CLOCK_TIME:
        lowest = min(0.02 * abs(known.value), known.low)
    return Bound(known.value, lowest, min(high, known.high + 3.0 * width))


def _fit(
    base: Profile, names: list[str], residual: Callable[[Mapping[str, float]], Floats], kept: dict[str, str]
) -> Solution:
    """Fit; give back to the prior what was not narrowed down; repeat until all that is left was."""
    left = list(names)
    while left:
        bounds = {n: bound_of(n, getattr(base.parameters, n)) for n in left}
        half = {n: max((k.high - k.low) / 2.0, 0.1 * abs(k.value), 1e-12)
                for n, k in ((n, getattr(base.parameters, n)) for n in left)}  # fmt: skip

        def with_prior(
            p: Mapping[str, float], bounds: Mapping[str, Bound] = bounds, half: Mapping[str, float] = half
        ) -> Floats:
            pull = np.array([_NOISE * (p[n] - bounds[n].start) / half[n] for n in bounds])
            return np.concatenate([residual(p), pull])

        found = solve(bounds, with_prior)
        told = curvature_errors(found.values, half, residual)
        # Correlated parameters give each other back: the least certain goes first, the rest may then be told.
        worst = max(left, key=lambda n: told[n] / half[n])
        if told[worst] <= _NARROWED * half[worst]:
            return Solution(found.values, told, found.at_bound)
        kept[worst] = (
            f"not told by these points: standard error {told[worst]:.2g}, "
            f"half width of the prior {half[worst]:.2g}"
        )
        left.remove(worst)
    return Solution({}, {}, frozenset())


def curvature_errors(
    values: Mapping[str, float], scale: Mapping[str, float], residual: Callable[[Mapping[str, float]], Floats]
) -> dict[str, float]:
    """Standard errors of fitted values by the data alone, from the residual's slopes; infinite where flat."""
    names = list(values)
    here = residual(values)
    slopes = np.empty((len(here), len(names)))
    for i, name in enumerate(names):
        step = 1e-3 * scale[name]
        up, down = ({**values, name: values[name] + side * step} for side in (1.0, -1.0))
        slopes[:, i] = (residual(up) - residual(down)) / 2e-3
    freedom = max(1, len(here) - len(names))
    # Measurements are never taken to be better than a tenth of the assumed noise: exact ones (a simulation)
    # would call everything told.
    variance = max(float(np.sum(here**2)) / freedom, (_NOISE / 10.0) ** 2)
    _, singular, rotation = np.linalg.svd(slopes, full_matrices=False)
    strength = np.where(singular > 1e-12, singular, 0.0)  # noqa: PLR2004  # rounding
    with np.errstate(divide="ignore"):
        spread = np.where(strength > 0, variance / np.where(strength > 0, strength, 1.0) ** 2, np.inf)
    touched = np.abs(rotation.T) > 1e-9  # noqa: PLR2004  # rounding
    parts = np.where(touched, np.where(touched, rotation.T, 1.0) ** 2 * spread, 0.0)
    if len(here) < len(names):
        parts[:, 0] = np.inf
    errors = np.sqrt(parts.sum(axis=1))
    return {name: float(error) * scale[name] for name, error in zip(names, errors.tolist(), strict=True)}
