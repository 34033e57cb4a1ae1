"""The only seam between simulated, live and replayed serving."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from rlgov.records import Configuration, Limits, Window


class Deployment(Protocol):
    """One serving deployment under control.

    Order of use: ``start``, then ``advance`` once an interval, then ``close``. ``start`` may be called
    again for a new episode. A missing measurement is a DeploymentError or a window with ``blind`` set,
    never a made-up number.
    """

    @property
    def limits(self) -> Limits:
        """What may be asked for; valid after ``start`` (an episode may carry its own SLO)."""
        ...

    def start(self, seed: int) -> Window:
        """Begin at the fastest configuration and return the first window, of one interval."""
        ...

    def advance(self, configuration: Configuration) -> Window:
        """Hold ``configuration`` for one interval and report what happened."""
        ...

    @property
    def finished(self) -> bool:
        """Whether the workload has ended; a live deployment never does."""
        ...

    def close(self) -> None:
        """Release everything; safe to call twice."""
        ...
