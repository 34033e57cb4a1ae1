"""What every decision maker offers, learned or not, for n deployments at once."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from rlgov.records import Configuration, Limits


class Policy(Protocol):
    """Chooses a configuration for each of n deployments from what their last window showed.

    Order of use: ``start`` once an episode (it forgets everything of the one before), then ``decide``
    once an interval. A policy does no I/O and reads no clock.
    """

    @property
    def name(self) -> str:
        """How reports call it."""
        ...

    @property
    def guarded(self) -> bool:
        """Whether it is meant to run under the guard; published rules run as published, without it."""
        ...

    def start_configuration(self, limits: Limits) -> Configuration:
        """Where an episode begins: the fastest setting, or the rule's own fixed cap and TP degree."""
        ...

    def start(self, limits: Limits, n: int) -> None:
        """Forget the last episode and get ready for ``n`` deployments with these limits."""
        ...

    def decide(
        self, observation: NDArray[np.float32], rows: NDArray[np.float64], mask: NDArray[np.bool_]
    ) -> NDArray[np.int64]:
        """Index per axis (clock, cap, TP), shape (n, 3), 0 = fastest.

        Args:
            observation: (n, features) as encoded by ``rlgov.envs.observation``; what learned policies read.
            rows: (n, window fields), see ``rlgov.records.Column``; what rules read. NaN = not measured.
            mask: (n, clocks + caps + TP degrees), False where the guard would refuse the choice.
        """
        ...
