"""What a training run shows in TensorBoard, through Stable-Baselines3's logger."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from stable_baselines3.common.logger import Figure, HParam

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import matplotlib.figure
    from numpy.typing import NDArray
    from stable_baselines3.common.logger import Logger

    from rlgov.agents.lagrangian import LagrangeMultipliers
    from rlgov.agents.train_config import TrainConfig
    from rlgov.records import Limits

PLAIN = ("stdout", "log", "json", "csv")  # outputs that cannot show a histogram or a figure
GUARD_PREFIX = "reason_"  # counters of decisions by the guard's reason
HPARAM_METRICS = ("eval/saving", "eval/worst_attainment", "constraint/miss_weight")


def record_rollout(
    logger: Logger, totals: Mapping[str, float], actions: NDArray[np.float32], limits: Limits
) -> None:
    """Energy, attainment and guard of one rollout, and the distribution of what was asked for.

    ``totals`` are sums over the rollout; ``actions`` are axis indices, shape (..., 3).
    """
    if totals["arrivals"] > 0:
        logger.record("serving/attainment", 1.0 - min(totals["misses"] / totals["arrivals"], 1.0))
    if totals.get("reference_energy_j", 0.0) > 0:
        logger.record("serving/energy_ratio", totals["energy_j"] / totals["reference_energy_j"])
    if totals.get("output_tokens", 0.0) > 0:
        logger.record("serving/energy_j_per_token", totals["energy_j"] / totals["output_tokens"])
    reasons = {name: value for name, value in totals.items() if name.startswith(GUARD_PREFIX)}
    decisions = sum(reasons.values())
    for name, value in reasons.items():
        if decisions > 0:
            logger.record(f"guard/{name.removeprefix(GUARD_PREFIX)}_share", value / decisions)
    index = actions.reshape(-1, 3).astype(np.int64)
    axes = {
        "asked/sm_clock_mhz": limits.sm_clocks_mhz,
        "asked/batch_cap": limits.batch_caps,
        "asked/tp_degree": limits.tp_degrees,
    }
    for axis, (name, values) in enumerate(axes.items()):
        chosen = np.asarray(values, dtype=np.float64)[index[:, axis]]
        logger.record(name, torch.from_numpy(chosen), exclude=PLAIN)
        logger.record(f"{name}_mean", float(chosen.mean()))


def record_constraint(logger: Logger, multipliers: LagrangeMultipliers) -> None:
    """Miss weight (lambda) and recent attainment of every constraint group, and over all."""
    weights = multipliers.miss_weights
    logger.record("constraint/miss_weight", float(weights.mean()))
    for group, weight in zip(multipliers.groups, weights, strict=True):
        logger.record(f"constraint_miss_weight/{group}", float(weight))
    attainments = multipliers.attainments
    if attainments:
        logger.record("constraint/worst_attainment", min(attainments.values()))
    for group, attainment in attainments.items():
        logger.record(f"constraint_attainment/{group}", attainment)


def record_episodes(logger: Logger, episodes: Sequence[Mapping[str, Any]]) -> None:
    """Means of every figure of the finished training episodes: return, attainment, energy, tails."""
    names = sorted({name for episode in episodes for name in episode} - {"r", "l", "t", "steps"})
    for name in names:
        values = [float(e[name]) for e in episodes if e.get(name) is not None]
        finite = [v for v in values if np.isfinite(v)]
        if finite:
            logger.record(f"episode/{name}", float(np.mean(finite)))


def record_evaluation(logger: Logger, figures: Mapping[str, float]) -> None:
    """The figures the best model is chosen by."""
    for name, value in figures.items():
        if name != "steps":
            logger.record(f"eval/{name}", value)


def record_hyperparameters(logger: Logger, config: TrainConfig) -> None:
    """The whole configuration, for TensorBoard's HPARAMS page."""
    flat = _flatten(config.model_dump(mode="json", exclude={"out", "resume"}))
    logger.record("hparams", HParam(flat, dict.fromkeys(HPARAM_METRICS, 0.0)), exclude=PLAIN)


def record_figures(logger: Logger, figures: Mapping[str, matplotlib.figure.Figure], steps: int) -> None:
    """Figures such as the energy-attainment front and one replayed hour."""
    for name, figure in figures.items():
        logger.record(f"figures/{name}", Figure(figure, close=True), exclude=PLAIN)
    logger.dump(steps)


def _flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, bool | str | float | None]:
    flat: dict[str, bool | str | float | None] = {}
    for name, value in values.items():
        if isinstance(value, dict):
            flat |= _flatten(value, f"{prefix}{name}.")
        elif isinstance(value, (bool, str, int, float)):
            flat[prefix + name] = value
        else:
            flat[prefix + name] = ", ".join(map(str, value)) if isinstance(value, list) else "none"
    return flat
