"""A request trace in memory: aligned, read-only arrays, sorted by arrival."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from rlgov.errors import TraceError

if TYPE_CHECKING:
    from numpy.typing import NDArray


@dataclass(frozen=True, slots=True, eq=False)
class Trace:
    """Requests sorted by arrival, each array of shape (n,).

    ``arrival_s`` counts from the start of the trace; ``duration_s`` is the observed span, at least
    the last arrival. ``prefix_hit_tokens`` are prompt tokens found in the prefix cache. ``notes``
    say what a reader left out or changed, for people to see.
    """

    name: str
    arrival_s: NDArray[np.float64]
    prompt_tokens: NDArray[np.int64]
    output_tokens: NDArray[np.int64]
    prefix_hit_tokens: NDArray[np.int64]
    duration_s: float
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        n = self.arrival_s.shape[0]
        if any(a.shape != (n,) for a in (self.prompt_tokens, self.output_tokens, self.prefix_hit_tokens)):
            msg = f"trace {self.name}: the arrays differ in length; give one value a request in each"
            raise TraceError(msg)
        if not (np.isfinite(self.duration_s) and self.duration_s >= 0):
            msg = f"trace {self.name}: duration_s must be finite and not negative, got {self.duration_s}"
            raise TraceError(msg)
        if n:
            self._check_values()
        for array in (self.arrival_s, self.prompt_tokens, self.output_tokens, self.prefix_hit_tokens):
            array.setflags(write=False)

    def _check_values(self) -> None:
        checks = (
            (bool(np.all(np.isfinite(self.arrival_s))), "arrival_s must be finite"),
            (bool(np.all(np.diff(self.arrival_s) >= 0)), "arrivals must be sorted"),
            (
                bool(self.arrival_s[0] >= 0 and self.arrival_s[-1] <= self.duration_s),
                "arrivals must lie in 0..duration_s",
            ),
            (bool(self.prompt_tokens.min() >= 1), "prompt_tokens must be at least 1"),
            (bool(self.output_tokens.min() >= 1), "output_tokens must be at least 1"),
            (bool(self.prefix_hit_tokens.min() >= 0), "prefix_hit_tokens must not be negative"),
            (
                bool(np.all(self.prefix_hit_tokens < self.prompt_tokens)),
                "prefix_hit_tokens must be below prompt_tokens (the last token is always computed)",
            ),
        )
        for passed, remedy in checks:
            if not passed:
                msg = f"trace {self.name}: {remedy}"
                raise TraceError(msg)

    def __len__(self) -> int:
        return int(self.arrival_s.shape[0])

    @property
    def mean_rate_per_s(self) -> float:
        """Requests per second over the whole span; 0 for an empty span."""
        return len(self) / self.duration_s if self.duration_s > 0 else 0.0

    def slice(self, from_s: float, to_s: float) -> Trace:
        """Requests that arrive in [from_s, to_s), with arrivals counted from ``from_s``."""
        if not 0 <= from_s < to_s:
            msg = f"trace {self.name}: cannot cut [{from_s}, {to_s}); give 0 <= from_s < to_s"
            raise TraceError(msg)
        if from_s >= self.duration_s:
            msg = (
                f"trace {self.name}: cannot cut from {from_s:g} s, the trace ends at {self.duration_s:g} s; "
                "give an earlier from_s"
            )
            raise TraceError(msg)
        to_s = min(to_s, self.duration_s)
        lo, hi = np.searchsorted(self.arrival_s, [from_s, to_s], side="left")
        return Trace(
            f"{self.name}[{from_s:g}s-{to_s:g}s]",
            self.arrival_s[lo:hi] - from_s,
            self.prompt_tokens[lo:hi].copy(),
            self.output_tokens[lo:hi].copy(),
            self.prefix_hit_tokens[lo:hi].copy(),
            to_s - from_s,
            self.notes,
        )

    def scaled(self, rate_scale: float) -> Trace:
        """The same requests arriving ``rate_scale`` times as fast (time is compressed)."""
        if not (rate_scale > 0 and np.isfinite(rate_scale)):
            msg = f"trace {self.name}: rate scale must be finite and above 0, got {rate_scale}"
            raise TraceError(msg)
        return Trace(
            f"{self.name}x{rate_scale:g}",
            self.arrival_s / rate_scale,
            self.prompt_tokens.copy(),
            self.output_tokens.copy(),
            self.prefix_hit_tokens.copy(),
            self.duration_s / rate_scale,
            self.notes,
        )

    def split(self, train_fraction: float) -> tuple[Trace, Trace]:
        """Train span first, test span after it: the two never mix."""
        if not 0 < train_fraction < 1:
            msg = f"trace {self.name}: train_fraction must lie between 0 and 1, got {train_fraction}"
            raise TraceError(msg)
        cut_s = self.duration_s * train_fraction
        return self.slice(0.0, cut_s), self.slice(cut_s, self.duration_s)
