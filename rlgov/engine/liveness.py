"""Whether an engine gets on with its work: judged by progress, never by its health check alone. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rlgov.engine.samples import EngineSample


@dataclass(frozen=True, slots=True)
class Progress:
    """What was last seen of an engine, and since when nothing moved."""

    moved_s: float
    probed_s: float
    work: float = 0.0  # everything the engine counts as done; it only grows
    busy: bool = False

    def seen(self, sample: EngineSample | None, dispatched: int, now_s: float) -> Progress:
        """After another look.

        Args:
            sample: Of the engine; None if it could not be read.
            dispatched: Requests the gateway has sent to it and not finished.
            now_s: Monotonic time.
        """
        if sample is None:
            # Unreadable and with nothing to do is no hang; the idle probe will tell.
            busy, work = dispatched > 0, self.work
        else:
            busy = bool(sample.running or sample.waiting or dispatched)
            work = sample.generated_tokens + sample.prefill_tokens + sample.finished
        moved = not busy or work != self.work
        return Progress(now_s if moved else self.moved_s, self.probed_s, work, busy)

    def probed(self, now_s: float, *, answered: bool) -> Progress:
        """After a probe; an answer is progress."""
        return Progress(now_s if answered else self.moved_s, now_s, self.work, self.busy)

    def needs_probe(self, now_s: float, hung_after_s: float, idle_probe_s: float, *, hung: bool) -> bool:
        """Whether to ask the engine for one token: its work stands still, or it has had none for long.

        An engine that gets on with its work is not asked: the probe would only join the queue.

        Args:
            now_s: Monotonic time.
            hung_after_s: Without progress for this time, work stands still.
            idle_probe_s: Between two probes of an engine without work.
            hung: It gave no answer the last time.
        """
        if self.busy:
            return now_s - max(self.moved_s, self.probed_s) >= hung_after_s
        return now_s - self.probed_s >= (hung_after_s if hung else idle_probe_s)
