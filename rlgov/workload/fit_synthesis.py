"""Fit the parameters of the synthetic generator to a trace.

Lengths: maximum likelihood of a bivariate lognormal mixture (expectation-maximisation). Burstiness:
least squares on the index of dispersion at eight windows and the share of empty seconds, for both of
which the model has closed forms. Callers give the training span of a trace only.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from rlgov.errors import TraceError
from rlgov.workload.lengths import LengthComponent, LengthMixture
from rlgov.workload.measures import dispersion, empty_share
from rlgov.workload.synthesis import Burstiness

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from rlgov.workload.trace import Trace

COMPONENTS = 8  # more follow single popular lengths and leave the tails alone
WINDOWS_S = (0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 30.0, 60.0)
EMPTY_WINDOW_S = 1.0
MIN_REQUESTS = 500
MIN_DURATION_S = 600.0  # ten of the longest windows

_STD_FLOOR = 0.004  # keeps a bump on one popular length from becoming a point mass
_MAX_ROUNDS = 300
_TOLERANCE = 1e-6
_EMPTY_WEIGHT = 4.0
_PRIOR_WEIGHT = 0.02  # settles directions that the figures leave open
_QUADRATURE_POINTS = 2000


def fit_lengths(trace: Trace, *, seed: int = 0, components: int = COMPONENTS) -> LengthMixture:
    """Fit the joint distribution of prompt and output tokens."""
    _check_size(trace)
    x = np.log(np.column_stack([trace.prompt_tokens, trace.output_tokens]).astype(np.float64))
    weights, means, covariances = _expectation_maximisation(x, components, np.random.default_rng(seed))
    max_prompt_tokens, max_output_tokens = int(trace.prompt_tokens.max()), int(trace.output_tokens.max())
    parts = []
    for weight, mean, covariance in zip(weights, means, covariances, strict=True):
        prompt_std, output_std = np.sqrt(np.diag(covariance))
        parts.append(
            LengthComponent(
                weight=float(weight),
                prompt_log_mean=float(mean[0]),
                prompt_log_std=float(prompt_std),
                output_log_mean=float(mean[1]),
                output_log_std=float(output_std),
                log_correlation=float(covariance[0, 1] / (prompt_std * output_std)),
                max_prompt_tokens=max_prompt_tokens,
                max_output_tokens=max_output_tokens,
            )
        )
    return LengthMixture(tuple(sorted(parts, key=lambda c: -c.weight)))


def fit_burstiness(trace: Trace) -> Burstiness:
    """Fit the variation of the arrival rate, the load curve being flat."""
    from scipy.optimize import least_squares  # noqa: PLC0415  # fitting is rare and scipy an extra

    _check_size(trace)
    rate_per_s = trace.mean_rate_per_s
    measured = np.log([dispersion(trace, window_s) for window_s in WINDOWS_S])
    measured_empty = empty_share(trace, EMPTY_WINDOW_S)

    def residuals(x: NDArray[np.float64], start: NDArray[np.float64]) -> NDArray[np.float64]:
        model = _from_unbounded(x)
        expected = [
            model_sample_dispersion(model, rate_per_s, window_s, trace.duration_s) for window_s in WINDOWS_S
        ]
        fit = np.log(expected) - measured
        empty = model_empty_share(model, rate_per_s, EMPTY_WINDOW_S) - measured_empty
        return np.concatenate([fit, [_EMPTY_WEIGHT * empty], _PRIOR_WEIGHT * (x - start)])

    lower = [-4.0, -6.0, math.log(0.2), math.log(0.01), math.log(30.0)]
    upper = [4.0, 3.0, math.log(30.0), math.log(1.2), math.log(900.0)]
    fits = []
    for busy_logit in (-2.0, 0.0):
        for drift_std in (0.2, 0.7):
            start = np.array([busy_logit, -2.0, math.log(5.0), math.log(drift_std), math.log(200.0)])
            fits.append(least_squares(residuals, start, bounds=(lower, upper), args=(start,)))
    best = min(fits, key=lambda fit: float(fit.cost))
    return _from_unbounded(np.asarray(best.x, dtype=np.float64))


def model_dispersion(model: Burstiness, rate_per_s: float, window_s: float) -> float:
    """Index of dispersion of the generator's arrivals at a flat load."""
    lag_s = (np.arange(_QUADRATURE_POINTS) + 0.5) / _QUADRATURE_POINTS * window_s
    share, ratio = model.busy_share, model.quiet_ratio
    busy_variance = share * (1 - share) * (1 - ratio) ** 2 / (share + (1 - share) * ratio) ** 2
    drift = np.exp(model.drift_std**2 * np.exp(-lag_s / model.drift_memory_s))
    covariance = (1 + busy_variance * np.exp(-lag_s / model.memory_s)) * drift - 1
    return 1.0 + 2 * rate_per_s * float(np.mean((1 - lag_s / window_s) * covariance)) * window_s


def model_sample_dispersion(
    model: Burstiness, rate_per_s: float, window_s: float, duration_s: float
) -> float:
    """Index of dispersion that a stretch of ``duration_s`` shows on average.

    It is lower than :func:`model_dispersion`, because variation slower than the stretch moves the mean
    of the stretch instead of spreading its windows.
    """
    of_mean = model_dispersion(model, rate_per_s, duration_s) * window_s / duration_s
    return model_dispersion(model, rate_per_s, window_s) - of_mean


def model_empty_share(model: Burstiness, rate_per_s: float, window_s: float) -> float:
    """Share of windows without an arrival, the rate taken as constant within a window."""
    nodes, node_weights = np.polynomial.hermite_e.hermegauss(31)
    drift = np.exp(model.drift_std * nodes - model.drift_std**2 / 2)
    share, ratio = model.busy_share, model.quiet_ratio
    busy_factor = 1 / (share + (1 - share) * ratio)
    expected = rate_per_s * window_s * busy_factor * drift
    empty = share * np.exp(-expected) + (1 - share) * np.exp(-ratio * expected)
    return float(np.average(empty, weights=node_weights))


def _from_unbounded(x: NDArray[np.float64]) -> Burstiness:
    share, ratio = 1 / (1 + np.exp(-x[:2]))
    memory_s, drift_std, drift_memory_s = np.exp(x[2:])
    return Burstiness(float(share), float(ratio), float(memory_s), float(drift_std), float(drift_memory_s))


def _check_size(trace: Trace) -> None:
    if len(trace) < MIN_REQUESTS or trace.duration_s < MIN_DURATION_S:
        msg = (
            f"trace {trace.name}: {len(trace)} requests over {trace.duration_s:g} s are too few to fit; "
            f"give at least {MIN_REQUESTS} requests over {MIN_DURATION_S:g} s"
        )
        raise TraceError(msg)


def _expectation_maximisation(
    x: NDArray[np.float64], components: int, rng: np.random.Generator
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """Weights, means and covariances of a Gaussian mixture, started by k-means++ seeding."""
    centres = [x[rng.integers(len(x))]]
    for _ in range(components - 1):
        distance = np.min([((x - centre) ** 2).sum(axis=1) for centre in centres], axis=0)
        centres.append(x[rng.choice(len(x), p=distance / distance.sum())])
    nearest = np.argmin(((x[:, None] - np.array(centres)) ** 2).sum(axis=2), axis=1)
    membership = np.eye(components)[nearest]
    previous = -math.inf
    for _ in range(_MAX_ROUNDS):
        totals = membership.sum(axis=0) + 1e-9
        means = (membership.T @ x) / totals[:, None]
        centred = x[None] - means[:, None]
        covariances = np.einsum("nk,kni,knj->kij", membership, centred, centred) / totals[:, None, None]
        covariances += np.eye(2) * _STD_FLOOR**2
        factors = np.linalg.cholesky(covariances)
        scaled = np.linalg.solve(factors, centred.transpose(0, 2, 1))
        log_density = (
            np.log(totals / len(x))[:, None]
            - 0.5 * (scaled**2).sum(axis=1)
            - np.log(np.diagonal(factors, axis1=1, axis2=2)).sum(axis=1)[:, None]
        )
        highest = log_density.max(axis=0)
        log_likelihood = highest + np.log(np.exp(log_density - highest).sum(axis=0))
        membership = np.exp(log_density - log_likelihood).T
        if log_likelihood.mean() - previous < _TOLERANCE:
            break
        previous = float(log_likelihood.mean())
    return totals / totals.sum(), means, covariances
