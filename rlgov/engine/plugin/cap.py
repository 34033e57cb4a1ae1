"""The batch cap as a value: who asked for what, and until when. Pure; the scheduler carries it out."""

from __future__ import annotations

import math


class Cap:
    """An admission cap that falls back open, to the maximum, when its lease is not renewed.

    A governor that dies must not leave an engine throttled, so the way back needs nobody's help.

    Args:
        maximum: What the engine was started with; never exceeded.
    """

    __slots__ = ("expires_s", "maximum", "value")

    def __init__(self, maximum: int) -> None:
        if maximum < 1:
            msg = f"an engine that admits at most {maximum} requests serves none"
            raise ValueError(msg)
        self.maximum = maximum
        self.value = maximum
        self.expires_s = math.inf
        """Monotonic time from which on the maximum holds again; infinite without a lease."""

    def ask(self, batch_cap: int | None, lease_s: float | None, now_s: float) -> int:
        """Set the cap, replacing the last one and its lease.

        Args:
            batch_cap: Requests that may run at once; more than the maximum means the maximum.
                None restores it.
            lease_s: Seconds for which it holds; None: until the next call.
            now_s: Monotonic time.

        Returns:
            The cap in force.

        Raises:
            ValueError: A cap below 1, or a lease that is not a positive number of seconds.
        """
        if batch_cap is not None and batch_cap < 1:
            msg = f"batch_cap is {batch_cap}, but an engine must admit at least 1 request"
            raise ValueError(msg)
        if lease_s is not None and not (0 < lease_s < math.inf):
            msg = (
                f"lease_s is {lease_s}, but a lease lasts a positive number of seconds; null is for no lease"
            )
            raise ValueError(msg)
        self.value = self.maximum if batch_cap is None else min(batch_cap, self.maximum)
        leased = lease_s is not None and batch_cap is not None
        self.expires_s = now_s + lease_s if leased and lease_s is not None else math.inf
        return self.value

    def in_force(self, now_s: float) -> int:
        """The cap at ``now_s``; opens it when the lease is over."""
        if now_s >= self.expires_s:
            self.value = self.maximum
            self.expires_s = math.inf
        return self.value
