"""What a live deployment is made of: the parts it drives, how it is held, and what it tells of itself."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Iterable

    from rlgov.engine.samples import StackInterval, StackState
    from rlgov.errors import RlgovError
    from rlgov.hardware.meter import MeterReading
    from rlgov.journal import Request
    from rlgov.records import Configuration, Limits, Window


class Stack(Protocol):
    """A serving stack under control; :class:`rlgov.engine.control.client.StackClient` is one.

    Every call raises an RlgovError when the stack does not answer.
    """

    def state(self) -> StackState:
        """The stack now."""
        ...

    def interval(self, after: int) -> StackInterval:
        """Everything there is to read; requests closed after the cursor ``after``."""
        ...

    def configure(
        self, *, batch_cap: int | None = None, tp_degree: int | None = None, lease_s: float | None = None
    ) -> StackState:
        """Move it; what is None stays. A cap with a lease falls open when it is not renewed in time."""
        ...

    def close(self) -> None:
        """Let go of the connection; the stack goes on."""
        ...


class WindowSource(Protocol):
    """Composes windows from what was read; :class:`rlgov.deployments.measured.MeasuredWindows` is one."""

    @property
    def open_requests(self) -> int:
        """Requests that had not finished when the stack was last read."""
        ...

    @property
    def unrecorded(self) -> int:
        """Requests of the episode that ended and that a recording cannot hold."""
        ...

    @property
    def blind_because(self) -> str:
        """Why the last window was blind; empty when it was not."""
        ...

    def start(self, interval: StackInterval, reading: MeterReading, limits: Limits) -> None:
        """Time 0 of an episode is when the stack was read."""
        ...

    def next(
        self,
        interval: StackInterval,
        reading: MeterReading,
        configuration: Configuration,
        *,
        handed_s: float | None = None,
    ) -> Window:
        """The window from the last readings to these, in which ``configuration`` was in force."""
        ...

    def unread(
        self, at_s: float, reading: MeterReading, configuration: Configuration, *, why: str = ""
    ) -> Window:
        """The blind window up to ``at_s``, when the stack could not be read."""
        ...

    def take(self, until_s: float) -> Iterable[Request]:
        """Requests that were served, arrived before ``until_s`` and were not taken yet."""
        ...


class Workload(Protocol):
    """Traffic that is played against the stack while an episode lasts."""

    def start(self, seed: int) -> None:
        """Begin, at once; what an earlier episode left running has been stopped."""
        ...

    @property
    def finished(self) -> bool:
        """Whether everything was sent and answered."""
        ...

    def stop(self) -> None:
        """End it now; safe at any time."""
        ...


class OwnTraffic:
    """The stack's own clients bring the traffic; it never ends."""

    def start(self, seed: int) -> None:
        """Nothing to start."""

    @property
    def finished(self) -> bool:
        """Serving does not end by itself."""
        return False

    def stop(self) -> None:
        """Nothing to stop."""


@dataclass(frozen=True, slots=True)
class LiveSettings:
    """How a live deployment is held."""

    lease_intervals: float = 3.0
    """A batch cap falls open when it was not renewed for so many intervals."""
    ready_timeout_s: float = 900.0
    """How long an episode's start waits until the stack serves, at the TP degree it shall begin with."""
    poll_s: float = 0.5
    """How often it looks meanwhile."""


@dataclass(slots=True)
class LiveStatus:
    """What a person or a metrics page should know of a live deployment; counts since its first start."""

    windows: int = 0
    blind_windows: int = 0
    blind_in_a_row: int = 0
    overruns: int = 0
    """Intervals that took longer than they should."""
    failed_actions: int = 0
    """Settings that could not be carried out ..."""
    failures: dict[str, int] = field(default_factory=dict)
    """... by what failed (clock or stack) and how: ``clock/NO_PERMISSION``."""
    clock_error: RlgovError | None = None
    """Why the clock could not be set, renewed, checked or restored the last time; None when it could ..."""
    clock_failures_in_a_row: int = 0
    """... and how often that happened without a success."""
    unread_because: str = ""
    """Why the stack could not be read for the last window; empty when it could."""
    unverified_clocks: int = 0
    """Windows at whose end a measured clock contradicted the lock, with nothing to excuse it."""
    unfinished_requests: int = 0
    """Requests open now; a recording that ends now leaves them out ..."""
    unrecorded_requests: int = 0
    """... and those of the episode that ended without being served, or arrived before it."""
    tp_refused: dict[int, str] = field(default_factory=dict)
    """TP degrees that cannot be had now, with the reason."""
    last_problem: str = ""

    def failed(self, what: str, error: RlgovError) -> None:
        """Count an action that failed."""
        # NVML's answers carry a code; for all others the name of the error says what kind it is.
        kind = f"{what}/{getattr(error, 'code', '') or type(error).__name__}"
        self.failed_actions += 1
        self.failures[kind] = self.failures.get(kind, 0) + 1
        self.last_problem = str(error)

    def clock_failed(self, error: RlgovError) -> None:
        """Count a failure of setting, renewing, checking or restoring the clock."""
        self.failed("clock", error)
        self.clock_error = error
        self.clock_failures_in_a_row += 1
