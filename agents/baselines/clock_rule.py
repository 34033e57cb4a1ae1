"""What rules share that move only the clock and hold batch cap and TP degree for an episode."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

import numpy as np

from rlgov.errors import DeploymentError
from rlgov.records import Column, Configuration, Limits

if TYPE_CHECKING:
    from numpy.typing import NDArray


class ClockRule(ABC):
    """Base of the rules. A blind window always gets the fastest clock and leaves the state as it was."""

    def __init__(
        self,
        name: str,
        *,
        batch_cap: int | None,
        tp_degree: int | None,
        guarded: bool,
        idle_after_s: float | None = None,
    ) -> None:
        """``None`` for cap or TP degree takes the largest; ``idle_after_s`` of no traffic drops the clock."""
        self.name = name
        self.guarded = guarded
        self._batch_cap = batch_cap
        self._tp_degree = tp_degree
        self._idle_after_s = idle_after_s
        self._limits: Limits | None = None
        self._fixed = (0, 0)
        self._idle_s: NDArray[np.float64] = np.zeros(0)

    @property
    def limits(self) -> Limits:
        """The limits of the episode in progress."""
        if self._limits is None:
            msg = f"{self.name}: call start(limits, n) before decide()"
            raise DeploymentError(msg)
        return self._limits

    def start_configuration(self, limits: Limits) -> Configuration:
        """The highest clock with the rule's own cap and TP degree."""
        fastest = limits.fastest
        configuration = Configuration(
            fastest.sm_clock_mhz,
            fastest.batch_cap if self._batch_cap is None else self._batch_cap,
            fastest.tp_degree if self._tp_degree is None else self._tp_degree,
        )
        limits.index(configuration)  # refuses a cap or TP degree that is not offered
        return configuration

    def start(self, limits: Limits, n: int) -> None:
        """Forget the last episode."""
        _, cap, tp = limits.index(self.start_configuration(limits))
        self._limits = limits
        self._fixed = (cap, tp)
        self._idle_s = np.zeros(n)
        self._begin(limits, n)

    def decide(
        self,
        observation: NDArray[np.float32],  # noqa: ARG002 - the seam's; rules read the rows
        rows: NDArray[np.float64],
        mask: NDArray[np.bool_],  # noqa: ARG002 - the guard refuses what must not be
    ) -> NDArray[np.int64]:
        """The rule's clock with the fixed cap and TP degree, shape (n, 3)."""
        limits = self.limits
        blind = ~(rows[:, Column.BLIND] == 0)  # NaN counts as blind
        clock = self._clock(rows, blind)
        if self._idle_after_s is not None:
            busy = (
                (rows[:, Column.ARRIVALS] > 0)
                | (rows[:, Column.RUNNING] > 0)
                | (rows[:, Column.WAITING] > 0)
                | (rows[:, Column.OUTPUT_TOKENS] > 0)
            )
            self._idle_s = np.where(busy | blind, 0.0, self._idle_s + rows[:, Column.DURATION_S])
            # the tolerance keeps five windows of 1 s equal to 5 s whatever their sum rounds to
            clock = np.where(self._idle_s >= self._idle_after_s - 1e-9, len(limits.sm_clocks_mhz) - 1, clock)
        asked = np.empty((rows.shape[0], 3), dtype=np.int64)
        asked[:, 0] = np.where(blind, 0, clock)
        asked[:, 1:] = self._fixed
        return asked

    @abstractmethod
    def _begin(self, limits: Limits, n: int) -> None:
        """Look up the rule's settings in these limits and forget the last episode."""

    @abstractmethod
    def _clock(self, rows: NDArray[np.float64], blind: NDArray[np.bool_]) -> NDArray[np.int64]:
        """Clock index per row. For blind rows it is ignored, and they must leave the state as it was."""


def moving_average(
    old: NDArray[np.float64], new: NDArray[np.float64], weight: float, blind: NDArray[np.bool_]
) -> NDArray[np.float64]:
    """Exponential moving average that takes its first value (old = NaN) whole and skips blind rows."""
    mixed = np.where(np.isnan(old), new, old + weight * (new - old))
    return np.where(blind | np.isnan(new), old, mixed)
