"""Any deployment, with everything it showed and was asked written to a journal."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from rlgov.errors import DeploymentError
from rlgov.journal import FileSink, Header, Interval, JournalWriter, Request
from rlgov.records import Decision

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path

    from rlgov.deployments.base import Deployment
    from rlgov.records import Configuration, Limits, Window
    from rlgov.workload.trace import Trace

UNEXPLAINED = "UNEXPLAINED"
"""Reason of a decision that nobody noted."""


class ArrivalSource(Protocol):
    """Tells which requests have arrived."""

    def take(self, until_s: float) -> Iterable[Request]:
        """Requests that arrived before ``until_s`` and were not taken yet."""
        ...

    def restart(self) -> None:
        """A new episode begins: time counts from its start again."""
        ...


class NoArrivals:
    """Nobody knows the requests."""

    def take(self, until_s: float) -> Iterable[Request]:  # noqa: ARG002  # the protocol's signature
        """Nothing."""
        return ()

    def restart(self) -> None:
        """Nothing to do."""


class TraceArrivals:
    """The requests of a trace that is being played from time 0."""

    def __init__(self, trace: Trace) -> None:
        self._trace = trace
        self._next = 0

    def take(self, until_s: float) -> Iterable[Request]:
        """Requests of the trace up to ``until_s``."""
        end = int(self._trace.arrival_s.searchsorted(until_s, side="left"))
        first, self._next = self._next, max(end, self._next)
        return [
            Request(
                float(self._trace.arrival_s[i]),
                int(self._trace.prompt_tokens[i]),
                int(self._trace.output_tokens[i]),
                int(self._trace.prefix_hit_tokens[i]),
            )
            for i in range(first, self._next)
        ]

    def restart(self) -> None:
        """Begin with the first request again."""
        self._next = 0


class RecordedDeployment:
    """Passes everything through to ``deployment`` and journals it.

    A window is written together with the decision taken on it, that is when the next interval begins;
    the last one is written by :meth:`close`. Every episode has its own file: ``run.jsonl``, then
    ``run-1.jsonl`` and so on.

    Args:
        deployment: What is recorded.
        path: The journal of the first episode; must not exist.
        arrivals: Where the requests come from; none are written by default.
        policy_digest: Goes into the header.
        versions: Software by name, for the header.
    """

    def __init__(
        self,
        deployment: Deployment,
        path: Path,
        *,
        arrivals: ArrivalSource | None = None,
        policy_digest: str = "",
        versions: Mapping[str, str] | None = None,
    ) -> None:
        self._deployment = deployment
        self._path = path
        self._arrivals: ArrivalSource = NoArrivals() if arrivals is None else arrivals
        self._policy_digest = policy_digest
        self._versions = dict(versions or {})
        self._episode = 0
        self._writer: JournalWriter | None = None
        self._window: Window | None = None
        self._noted: tuple[Decision, str] | None = None

    @property
    def inner(self) -> Deployment:
        """The recorded deployment."""
        return self._deployment

    @property
    def limits(self) -> Limits:
        """Limits of the recorded deployment."""
        return self._deployment.limits

    @property
    def finished(self) -> bool:
        """Whether the recorded deployment's workload has ended."""
        return self._deployment.finished

    def start(self, seed: int) -> Window:
        """Begin an episode and its journal."""
        self._finish()
        window = self._deployment.start(seed)
        path = self._path
        if self._episode:
            path = path.with_stem(f"{path.stem}-{self._episode}")
        self._episode += 1
        header = Header(self._deployment.limits, seed, self._policy_digest, self._versions)
        self._writer = JournalWriter(FileSink(path), header)
        self._arrivals.restart()
        self._window = window
        return window

    def note(self, decision: Decision, digest: str) -> None:
        """Explain the next :meth:`advance`: what was asked, why, and on which observation."""
        self._noted = (decision, digest)

    def advance(self, configuration: Configuration) -> Window:
        """Journal the decision with the window it was taken on, then carry it out."""
        if self._writer is None or self._window is None:
            msg = "advance() before start(): a recording begins with start()"
            raise DeploymentError(msg)
        at_s = self._window.start_s + self._window.duration_s
        decision, digest = self._noted or (Decision(at_s, configuration, configuration, UNEXPLAINED), "")
        self._noted = None
        if decision.applied != configuration:
            msg = f"the decision noted applies {decision.applied}, but {configuration} was carried out"
            raise DeploymentError(msg)
        self._write(self._writer, Interval(self._window, decision, digest))
        self._window = None  # an interval that fails must not be written twice
        self._window = self._deployment.advance(configuration)
        return self._window

    def close(self) -> None:
        """Write the last window and close journal and deployment; safe to call twice."""
        try:
            self._finish()
        finally:
            self._deployment.close()

    def _finish(self) -> None:
        writer, window = self._writer, self._window
        self._writer = self._window = self._noted = None
        if writer is None:
            return
        with writer:
            if window is not None:
                self._write(writer, Interval(window))

    def _write(self, writer: JournalWriter, interval: Interval) -> None:
        for request in self._arrivals.take(interval.window.start_s + interval.window.duration_s):
            writer.write(request)
        writer.write(interval)
