"""Whether an engine that has work gets on with it: health pages say nothing about that."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rlgov.errors import ConfigError

if TYPE_CHECKING:
    from rlgov.engine.samples import EngineSample

STALLED_AFTER_SAMPLES = 3


class Progress:
    """Says that an engine stalls: requests wait or run, and for some samples in a row no counter moved.

    A page that some cache serves unchanged looks the same, and calls for the same: trust nothing of it.

    Args:
        after_samples: How many samples without progress make a stall.
    """

    def __init__(self, after_samples: int = STALLED_AFTER_SAMPLES) -> None:
        if after_samples < 1:
            raise ConfigError(f"after_samples must be at least 1, got {after_samples}")
        self._after_samples = after_samples
        self._last: tuple[str | float | None, ...] | None = None
        self._still = 0

    @property
    def stalled(self) -> bool:
        """Whether the last samples showed work and no progress."""
        return self._still >= self._after_samples

    def observe(self, sample: EngineSample) -> bool:
        """Take in the next sample; returns :attr:`stalled`."""
        seen = (
            sample.engine_id,
            sample.generated_tokens,
            sample.prefill_tokens,
            sample.finished,
            sample.iterations,
        )
        working = sample.running > 0 or sample.waiting > 0
        self._still = self._still + 1 if working and seen == self._last else 0
        self._last = seen
        return self.stalled
