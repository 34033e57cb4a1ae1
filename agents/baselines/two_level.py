"""Two clocks with hysteresis: low while there is slack, high under pressure."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

import numpy as np

from rlgov.agents.baselines.clock_rule import ClockRule, moving_average
from rlgov.agents.baselines.space import (
    Choice,
    Family,
    Real,
    clock_index,
    clocks_dimension,
    fixed_dimensions,
    offered_clock,
)
from rlgov.records import Column

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from rlgov.agents.baselines.space import Dimension, Parameters, PolicyContext, Value
    from rlgov.records import Configuration, Limits


@dataclass(frozen=True, slots=True)
class TwoLevelSettings:
    """A signal at its threshold raises the clock; all below ``release`` of theirs for ``hold_s`` lower it."""

    low_clock_mhz: int
    high_clock_mhz: int
    batch_cap: int | None = None
    tp_degree: int | None = None
    guarded: bool = False
    wait_fraction: float = 0.3  # age of the oldest request without a first token, over the TTFT limit
    backlog_tokens: float = 8192.0  # prompt tokens still to be computed
    itl_fraction: float = 0.9  # mean gap between tokens over the TPOT limit
    load_tokens_per_s: float = 20000.0  # moving average of arriving prompt tokens
    load_weight: float = 0.2  # of the newest window in that average
    release: float = 0.7
    hold_s: float = 3.0
    idle_after_s: float | None = None


class TwoLevelPolicy(ClockRule):
    """A strong simple rule: no model, four signals, one bit of state a deployment."""

    def __init__(self, settings: TwoLevelSettings) -> None:
        super().__init__(
            "two-level",
            batch_cap=settings.batch_cap,
            tp_degree=settings.tp_degree,
            guarded=settings.guarded,
            idle_after_s=settings.idle_after_s,
        )
        self.settings = settings
        self._low = 0
        self._high = 0
        self._is_high: NDArray[np.bool_] = np.zeros(0, dtype=np.bool_)
        self._calm_s: NDArray[np.float64] = np.zeros(0)
        self._load: NDArray[np.float64] = np.zeros(0)

    def _begin(self, limits: Limits, n: int) -> None:
        low_mhz, high_mhz = sorted((self.settings.low_clock_mhz, self.settings.high_clock_mhz))
        self._low, self._high = clock_index(limits, low_mhz), clock_index(limits, high_mhz)
        self._is_high = np.ones(n, dtype=np.bool_)
        self._calm_s = np.zeros(n)
        self._load = np.full(n, np.nan)

    def _clock(self, rows: NDArray[np.float64], blind: NDArray[np.bool_]) -> NDArray[np.int64]:
        settings, level = self.settings, self.limits.service_level
        duration_s = rows[:, Column.DURATION_S]
        tokens_per_s = rows[:, Column.PROMPT_TOKENS] / duration_s
        self._load = moving_average(self._load, tokens_per_s, settings.load_weight, blind)
        signals = np.stack(
            (
                rows[:, Column.OLDEST_WAIT_S] / (settings.wait_fraction * level.ttft_s),
                rows[:, Column.WAITING_TOKENS] / settings.backlog_tokens,
                rows[:, Column.ITL_MEAN_S] / (settings.itl_fraction * level.tpot_s),
                self._load / settings.load_tokens_per_s,
            )
        )
        pressure = np.nan_to_num(signals, nan=0.0).max(axis=0)  # a tail nobody measured presses nobody
        calm_s = np.where(pressure < settings.release, self._calm_s + duration_s, 0.0)
        is_high = (pressure >= 1.0) | (self._is_high & (calm_s < settings.hold_s - 1e-9))
        self._calm_s = np.where(blind, self._calm_s, calm_s)
        self._is_high = np.where(blind, self._is_high, is_high)
        return np.where(self._is_high, self._high, self._low).astype(np.int64)


def _space(limits: Limits) -> tuple[Dimension, ...]:
    return (
        clocks_dimension("low_clock_mhz", limits),
        clocks_dimension("high_clock_mhz", limits),
        *fixed_dimensions(limits),
        Real("wait_fraction", 0.05, 1.0),
        Real("backlog_tokens", 500.0, 50000.0, log_scale=True),
        Real("itl_fraction", 0.4, 1.2),
        Real("load_tokens_per_s", 500.0, 100000.0, log_scale=True),
        Real("load_weight", 0.02, 1.0, log_scale=True),
        Real("release", 0.3, 1.0),
        Real("hold_s", 0.5, 30.0, log_scale=True),
        Choice("idle_after_s", (None, 15.0, 5.0)),
    )


def _defaults(limits: Limits) -> dict[str, Value]:
    chosen = TwoLevelSettings(
        low_clock_mhz=offered_clock(limits, 0.6),
        high_clock_mhz=limits.sm_clocks_mhz[0],
        batch_cap=limits.batch_caps[0],
        tp_degree=limits.tp_degrees[0],
    )
    return {field.name: getattr(chosen, field.name) for field in fields(TwoLevelSettings)}


def _build(parameters: Parameters, context: PolicyContext) -> TwoLevelPolicy:
    chosen = FAMILY.complete(parameters, context.limits)
    return TwoLevelPolicy(TwoLevelSettings(**chosen))  # type: ignore[arg-type]  # values come from the fields' own space


def _near_static(limits: Limits, configuration: Configuration) -> dict[str, Value]:
    return {
        **_defaults(limits),
        "low_clock_mhz": configuration.sm_clock_mhz,
        "batch_cap": configuration.batch_cap,
        "tp_degree": configuration.tp_degree,
    }


FAMILY = Family(
    "two-level", _space, _defaults, _build, _near_static, rising=(("low_clock_mhz", "high_clock_mhz"),)
)
