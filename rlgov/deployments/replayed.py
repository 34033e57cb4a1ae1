"""A recorded run as a deployment: shows what was recorded and audits what is asked."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING

import numpy as np

from rlgov.errors import DeploymentError, JournalError
from rlgov.workload.trace import Trace

if TYPE_CHECKING:
    from rlgov.journal import Journal
    from rlgov.records import Configuration, Limits, Window


class Outcome(Enum):
    """How a decision compares with the recorded one."""

    EQUAL = "equal"
    DIVERGED = "diverged"
    UNRECORDED = "unrecorded"  # the recording holds no decision for this window


@dataclass(frozen=True, slots=True)
class Verdict:
    """The audit of one decision. ``at_s`` is the end of the window it was taken on."""

    interval: int
    at_s: float
    outcome: Outcome
    asked: Configuration
    recorded: Configuration | None


@dataclass(frozen=True, slots=True)
class Audit:
    """The audit of a run."""

    verdicts: tuple[Verdict, ...]

    def count(self, outcome: Outcome) -> int:
        """How many decisions had this outcome."""
        return sum(v.outcome is outcome for v in self.verdicts)

    @property
    def divergences(self) -> tuple[Verdict, ...]:
        """The decisions that differ from the recorded ones, in order."""
        return tuple(v for v in self.verdicts if v.outcome is Outcome.DIVERGED)

    @property
    def equal(self) -> bool:
        """Whether every decision was recorded and is the same again; False when nothing was audited."""
        return bool(self.verdicts) and all(v.outcome is Outcome.EQUAL for v in self.verdicts)

    def summary(self) -> str:
        """One line for people."""
        line = (
            f"{len(self.verdicts)} decisions: {self.count(Outcome.EQUAL)} equal, "
            f"{self.count(Outcome.DIVERGED)} diverged, {self.count(Outcome.UNRECORDED)} unrecorded"
        )
        if self.divergences:
            first = self.divergences[0]
            line += f"; first divergence at {first.at_s:g} s: asked {first.asked}, recorded {first.recorded}"
        return line


class ReplayedDeployment:
    """Plays a journal back. What is asked is compared with what was applied then, and never acted on.

    A verdict compares **applied** configurations, that is after the guard: what reached the deployment.

    Args:
        journal: The recording.
    """

    def __init__(self, journal: Journal) -> None:
        if not journal.intervals:
            msg = "the journal holds no interval; there is nothing to replay"
            raise JournalError(msg)
        self._journal = journal
        self._next = 0
        self._verdicts: list[Verdict] = []

    @property
    def limits(self) -> Limits:
        """Limits of the recorded run."""
        return self._journal.header.limits

    @property
    def finished(self) -> bool:
        """Whether the last recorded window has been shown."""
        return self._next >= len(self._journal.intervals)

    def start(self, seed: int) -> Window:  # noqa: ARG002  # a recording has no randomness
        """Show the first recorded window; the audit begins anew."""
        self._next = 1
        self._verdicts = []
        return self._journal.intervals[0].window

    def advance(self, configuration: Configuration) -> Window:
        """Audit ``configuration`` against the recorded decision and show the next window."""
        if self._next == 0:
            msg = "advance() before start(): a replay begins with start()"
            raise DeploymentError(msg)
        if self.finished:
            windows = len(self._journal.intervals)
            msg = f"the recording ends after {windows} windows; call start() to replay again"
            raise DeploymentError(msg)
        self._verdicts.append(self._judge(self._next - 1, configuration))
        window = self._journal.intervals[self._next].window
        self._next += 1
        return window

    def close(self) -> None:
        """Nothing to release."""

    def audit(self) -> Audit:
        """Every verdict since :meth:`start`."""
        return Audit(tuple(self._verdicts))

    def _judge(self, interval: int, asked: Configuration) -> Verdict:
        entry = self._journal.intervals[interval]
        at_s = entry.window.start_s + entry.window.duration_s
        if entry.decision is None:
            return Verdict(interval, at_s, Outcome.UNRECORDED, asked, None)
        recorded = entry.decision.applied
        outcome = Outcome.EQUAL if asked == recorded else Outcome.DIVERGED
        return Verdict(interval, at_s, outcome, asked, recorded)


def recorded_trace(journal: Journal, name: str) -> Trace:
    """The requests of a recording as a trace, from its first window on, to feed the simulator.

    Raises:
        JournalError: The recording holds no requests.
    """
    start_s = journal.intervals[0].window.start_s
    last = journal.intervals[-1].window
    requests = sorted((r for r in journal.requests if r.arrival_s >= start_s), key=lambda r: r.arrival_s)
    if not requests:
        msg = f"{name}: the journal holds no requests; record with an arrival source to feed a simulator"
        raise JournalError(msg)
    arrival_s = np.array([r.arrival_s for r in requests]) - start_s
    return Trace(
        name,
        arrival_s,
        np.array([r.prompt_tokens for r in requests], dtype=np.int64),
        np.array([r.output_tokens for r in requests], dtype=np.int64),
        np.array([r.prefix_hit_tokens for r in requests], dtype=np.int64),
        max(last.start_s + last.duration_s - start_s, float(arrival_s[-1])),
    )
