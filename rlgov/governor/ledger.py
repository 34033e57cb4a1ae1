"""What a governed run added up to so far: decisions by reason, energy, and what was or would be saved.

Saved energy is an estimate: the measured energy of a window, times the ratio that the profile's tables give
between two configurations under that load. It is told apart by whether the decision was carried out
(``active``: what the fastest configuration would have used is estimated) or not (``shadow``: the fastest
was in force and measured, and what the decision would have used is estimated). A window in which neither
holds, such as one during a TP switch or under clocks somebody else has locked, is left out.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from rlgov.governor.records import Tick
    from rlgov.records import Configuration, Limits, Window

ACTIVE: Final = "active"
SHADOW: Final = "shadow"
BASES: Final = (ACTIVE, SHADOW)


@dataclass(slots=True)
class Compared:
    """Energy of the windows for which there is a comparison, in joules."""

    chosen_j: float = 0.0  # at the decided configurations
    fastest_j: float = 0.0  # at the fastest one

    @property
    def saved_share(self) -> float | None:
        """1 - chosen / fastest; None while there is nothing to compare."""
        return 1.0 - self.chosen_j / self.fastest_j if self.fastest_j > 0 else None


@dataclass(slots=True)
class Totals:
    """Sums since the governor started."""

    ticks: int = 0
    blind: int = 0
    reasons: Counter[str] = field(default_factory=Counter)
    raised: Counter[str] = field(default_factory=Counter)  # how often each condition began
    arrivals: float = 0.0
    served: float = 0.0
    misses: float = 0.0
    preemptions: float = 0.0
    prompt_tokens: float = 0.0
    output_tokens: float = 0.0
    prefill_tokens: float = 0.0
    energy_j: float = 0.0
    metered_s: float = 0.0
    compared: dict[str, Compared] = field(default_factory=lambda: {basis: Compared() for basis in BASES})


@dataclass(frozen=True, slots=True)
class Residual:
    """Measured over predicted, of one window at the configuration that the prediction was for."""

    power: float | None
    itl: float | None


class Ledger:
    """Adds ticks up.

    Args:
        limits: Of the deployment.
    """

    def __init__(self, limits: Limits) -> None:
        self._fastest = limits.fastest
        self._previous: Tick | None = None
        self._held: frozenset[str] = frozenset()
        self.totals = Totals()
        self.residual = Residual(None, None)

    def add(self, tick: Tick) -> None:
        """Count one tick."""
        totals = self.totals
        totals.ticks += 1
        totals.reasons[tick.reason] += 1
        held = frozenset(condition.name for condition in tick.conditions)
        totals.raised.update(held - self._held)
        self._held = held
        if tick.window.blind:
            totals.blind += 1
        else:
            self._add_window(tick.window)
        self._previous = tick

    def _add_window(self, window: Window) -> None:
        totals = self.totals
        for name in ("arrivals", "served", "misses", "preemptions"):
            setattr(totals, name, getattr(totals, name) + _counted(getattr(window, name)))
        for name in ("prompt_tokens", "output_tokens", "prefill_tokens"):
            setattr(totals, name, getattr(totals, name) + _counted(getattr(window, name)))
        energy_j = window.energy_j
        self.residual = Residual(None, None)
        if energy_j is None or not (math.isfinite(energy_j) and energy_j >= 0):
            return
        totals.energy_j += energy_j
        totals.metered_s += _counted(window.duration_s)
        self._compare(window, energy_j)

    def _compare(self, window: Window, energy_j: float) -> None:
        before = self._previous
        if before is None or before.prediction is None or before.decision is None or window.switching:
            return
        predicted = before.prediction
        if not (predicted.energy_j > 0 and predicted.fastest_energy_j > 0):
            return
        in_force = _configuration(window)
        if before.acting and in_force == before.decision.applied:
            basis, expected_j = ACTIVE, predicted.energy_j
        elif not before.acting and in_force == self._fastest:
            basis, expected_j = SHADOW, predicted.fastest_energy_j
        else:
            return
        compared = self.totals.compared[basis]
        compared.chosen_j += energy_j * predicted.energy_j / expected_j
        compared.fastest_j += energy_j * predicted.fastest_energy_j / expected_j
        itl = None
        if basis == ACTIVE and window.itl_mean_s is not None and predicted.itl_s > 0:
            itl = window.itl_mean_s / predicted.itl_s
        self.residual = Residual(energy_j / expected_j, itl)


def _configuration(window: Window) -> Configuration | None:
    try:
        return window.configuration
    except (ValueError, OverflowError):  # NaN or infinity
        return None


def _counted(value: float) -> float:
    """What may be added to a total: nothing that is negative or not finite."""
    return value if math.isfinite(value) and value > 0 else 0.0
