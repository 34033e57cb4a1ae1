"""Bounded robust least squares with few parameters, and honest errors: whole groups left out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from scipy.optimize import least_squares

from rlgov.errors import CalibrationError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from numpy.typing import NDArray

    Floats = NDArray[np.float64]
    Values = Mapping[str, float]

_OUTLIER = 0.1  # relative residual from which a row counts linearly instead of quadratically
_FLAT = 1e-4  # singular values below this share of the largest leave a direction undetermined


@dataclass(frozen=True, slots=True)
class Bound:
    """Where a search starts and what is physically possible."""

    start: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Solution:
    """Fitted values, and how well the data determines each."""

    values: dict[str, float]
    standard_error: dict[str, float]  # by the curvature at the optimum; infinite where it is flat
    at_bound: frozenset[str]

    def identified(self, name: str, bound: Bound) -> bool:
        """Whether the data narrows the value down to less than its possible range."""
        return name not in self.at_bound and self.standard_error[name] < (bound.high - bound.low) / 4.0


def solve(
    bounds: Mapping[str, Bound], residual: Callable[[Values], Floats], *, outlier: float = _OUTLIER
) -> Solution:
    """Minimise relative residuals within bounds, outliers counted linearly.

    Raises:
        CalibrationError: There are fewer residuals than parameters, or one is no number.
    """
    names = list(bounds)
    start, low, high = (
        np.array([getattr(bounds[n], side) for n in names], dtype=np.float64)
        for side in ("start", "low", "high")
    )
    scale = high - low

    def scaled(z: Floats) -> Floats:
        return residual(dict(zip(names, (low + z * scale).tolist(), strict=True)))

    first = (start - low) / scale
    at_start = scaled(first)
    if len(at_start) < len(names):
        listed = ", ".join(names)
        msg = f"{len(at_start)} measurements cannot determine {len(names)} parameters ({listed}); take more"
        raise CalibrationError(msg)
    if not np.all(np.isfinite(at_start)):
        msg = f"{int(np.sum(~np.isfinite(at_start)))} of {len(at_start)} measurements give no finite residual"
        raise CalibrationError(msg)
    result = least_squares(scaled, first, bounds=(np.zeros(len(names)), np.ones(len(names))), loss="soft_l1",
                           f_scale=outlier)  # fmt: skip
    values = dict(zip(names, (low + result.x * scale).tolist(), strict=True))
    # soft_l1 scales the Jacobian rows of outliers down, so this is the curvature of the robust cost.
    jacobian = np.asarray(result.jac, dtype=np.float64)
    freedom = max(1, len(at_start) - len(names))
    variance = 2.0 * float(result.cost) / freedom
    _, singular, rotation = np.linalg.svd(jacobian, full_matrices=False)
    weak = singular < _FLAT * max(float(singular.max()), 1e-300)
    spread = np.where(weak, np.inf, variance / np.where(weak, 1.0, singular) ** 2)
    touched = np.abs(rotation.T) > 1e-9  # noqa: PLR2004  # rounding
    parts = np.where(touched, np.where(touched, rotation.T, 1.0) ** 2 * spread, 0.0)
    errors = np.sqrt(parts.sum(axis=1)) * scale
    edge = frozenset(n for n, z in zip(names, result.x.tolist(), strict=True) if min(z, 1.0 - z) < 1e-3)  # noqa: PLR2004  # of the range
    return Solution(values, dict(zip(names, errors.tolist(), strict=True)), edge)


@dataclass(frozen=True, slots=True)
class LeftOut:
    """A fit with every group left out once. Errors are relative and signed."""

    best: Solution
    fits: dict[str, Solution]  # by the group that was left out
    inside: Floats  # of every row, by the fit to all rows
    outside: Floats  # of every row, by the fit that did not see its group
    groups: NDArray[np.str_]

    @property
    def in_sample(self) -> float:
        """Mean absolute relative error of the rows the fit saw."""
        return float(np.mean(np.abs(self.inside)))

    @property
    def over_rows(self) -> float:
        """Mean absolute relative error of rows whose group was left out."""
        return float(np.mean(np.abs(self.outside)))

    @property
    def by_group(self) -> dict[str, float]:
        """The same for each group."""
        names = sorted(set(self.groups.tolist()))
        return {n: float(np.mean(np.abs(self.outside[self.groups == n]))) for n in names}

    @property
    def over_groups(self) -> float:
        """Mean over groups, whatever their number of rows."""
        return float(np.mean(list(self.by_group.values())))


def leave_groups_out(
    groups: NDArray[np.str_],
    fit: Callable[[NDArray[np.int64]], Solution],
    predict: Callable[[Values, NDArray[np.int64]], Floats],
    measured: Floats,
) -> LeftOut:
    """Fit to all rows, and without each group in turn.

    Args:
        groups: of each row.
        fit: parameters from the rows with these indices.
        predict: what these parameters say of the rows with these indices.
        measured: of all rows.

    Raises:
        CalibrationError: There are fewer than two groups, so nothing is left to learn from.
    """
    names = sorted(set(groups.tolist()))
    if len(names) < 2:  # noqa: PLR2004  # one to leave out, one to learn from
        msg = f"leaving one group out needs two or more, there is only {', '.join(names) or 'none'}"
        raise CalibrationError(msg)
    every = np.arange(len(measured), dtype=np.int64)
    best = fit(every)
    outside = np.empty(len(measured))
    fits = {}
    for name in names:
        mine = np.flatnonzero(groups == name)
        fits[name] = fit(np.flatnonzero(groups != name))
        outside[mine] = predict(fits[name].values, mine) / measured[mine] - 1.0
    return LeftOut(best, fits, predict(best.values, every) / measured - 1.0, outside, groups)
