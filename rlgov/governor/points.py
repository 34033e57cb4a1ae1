"""Ticks put together into one point of TensorBoard, under the tags of a training run. Pure.

Where a tag stands in a training run, too (``serving/``, ``guard/``, ``asked/``), it means the same here:
sums, shares and means over the ticks of a point, as there over those of a rollout.
"""

from __future__ import annotations

import math
from collections import Counter
from typing import TYPE_CHECKING

from rlgov.governor.ledger import Ledger

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from rlgov.governor.records import Tick
    from rlgov.records import Configuration, Limits, Window

_AXES = ("sm_clock_mhz", "batch_cap", "tp_degree")
_WORST = ("ttft_p99_s", "tpot_p99_s", "oldest_wait_s", "kv_usage", "waiting")
_MEDIAN = ("ttft_p50_s", "tpot_p50_s", "itl_mean_s", "running_mean", "measured_clock_mhz")


class PointMaker:
    """Keeps what one point needs of the ticks before it.

    Args:
        limits: Of the deployment.
    """

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._ledger = Ledger(limits)
        self._energy_j = (0.0, 0.0)  # chosen and fastest, at the last point

    def make(self, ticks: Sequence[Tick]) -> dict[str, float]:
        """The scalars of a point by tag; only finite ones, and none for what was not measured."""
        power_residuals: list[float] = []
        for tick in ticks:
            self._ledger.add(tick)
            if self._ledger.residual.power is not None:
                power_residuals.append(self._ledger.residual.power)
        seen = [tick.window for tick in ticks if not tick.window.blind]
        point = _shares(ticks) | _configurations(ticks) | _serving(seen) | self._saving()
        for name in _WORST:
            point[f"tails/{name}_worst"] = max(_values(seen, name), default=math.nan)
        for name in _MEDIAN:
            point[f"window/{name}"] = _mean(_values(seen, name))
        terms = sorted({term for tick in ticks for term in tick.reward_terms})
        for term in terms:
            point[f"reward/{term}"] = _mean(tick.reward_terms.get(term, math.nan) for tick in ticks)
        scores = [tick.ood_score for tick in ticks if tick.ood_score is not None]
        point["governor/ood_score"] = max(scores, default=math.nan)
        point["governor/decision_ms"] = 1e3 * max(tick.decision_duration_s for tick in ticks)
        predictions = [tick.prediction for tick in ticks if tick.prediction is not None]
        point["power/predicted_w"] = _mean(prediction.power_w for prediction in predictions)
        point["power/measured_over_predicted"] = _mean(power_residuals)
        if ticks[-1].adapted is not None:
            point["profile/time_scale"] = ticks[-1].adapted.time_scale
            point["profile/power_scale"] = ticks[-1].adapted.power_scale
        return {tag: value for tag, value in point.items() if math.isfinite(value)}

    def _saving(self) -> dict[str, float]:
        compared = self._ledger.totals.compared.values()
        total = (sum(c.chosen_j for c in compared), sum(c.fastest_j for c in compared))
        chosen_j, fastest_j = (now - before for now, before in zip(total, self._energy_j, strict=True))
        self._energy_j = total
        return {"serving/energy_ratio": chosen_j / fastest_j} if fastest_j > 0 else {}


def _serving(seen: Sequence[Window]) -> dict[str, float]:
    arrivals, misses, tokens = (_sum(seen, name) for name in ("arrivals", "misses", "output_tokens"))
    metered = [window for window in seen if window.energy_j is not None]
    energy_j, metered_s = _sum(metered, "energy_j"), _sum(metered, "duration_s")
    point = {}
    if arrivals > 0:
        point["serving/attainment"] = 1.0 - min(misses / arrivals, 1.0)
    if tokens > 0 and metered and len(metered) == len(seen):
        point["serving/energy_j_per_token"] = energy_j / tokens
    if metered_s > 0:
        point["power/measured_w"] = energy_j / metered_s
    return point


def _shares(ticks: Sequence[Tick]) -> dict[str, float]:
    count = len(ticks)
    reasons = Counter(tick.reason.lower() for tick in ticks)
    conditions = Counter(condition.name for tick in ticks for condition in tick.conditions)
    point = {f"guard/{reason}_share": times / count for reason, times in reasons.items()}
    point |= {f"condition/{name}_share": times / count for name, times in conditions.items()}
    point["governor/acting_share"] = sum(tick.acting for tick in ticks) / count
    point["governor/baseline_share"] = sum(tick.baseline for tick in ticks) / count
    point["governor/blind_share"] = sum(bool(tick.window.blind) for tick in ticks) / count
    return point


def _configurations(ticks: Sequence[Tick]) -> dict[str, float]:
    decisions = [tick.decision for tick in ticks if tick.decision is not None]
    stages: tuple[tuple[str, list[Configuration]], ...] = (
        ("asked", [decision.asked for decision in decisions]),
        ("applied", [decision.applied for decision in decisions]),
    )
    point = {
        f"{stage}/{axis}_mean": _mean(float(getattr(c, axis)) for c in configurations)
        for stage, configurations in stages
        for axis in _AXES
    }
    seen = [tick.window for tick in ticks if not tick.window.blind]
    return point | {f"in_force/{axis}_mean": _mean(_values(seen, axis)) for axis in _AXES}


def _values(windows: Iterable[Window], name: str) -> list[float]:
    values = (getattr(window, name) for window in windows)
    return [float(value) for value in values if value is not None and math.isfinite(value)]


def _sum(windows: Iterable[Window], name: str) -> float:
    return math.fsum(_values(windows, name))


def _mean(values: Iterable[float]) -> float:
    finite = [value for value in values if math.isfinite(value)]
    return math.fsum(finite) / len(finite) if finite else math.nan
