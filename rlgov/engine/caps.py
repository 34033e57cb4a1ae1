"""The batch cap in force: a lease that falls back open, whoever holds it. The lease is pure."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class CapLease:
    """A cap, and until when.

    ``until_s`` is monotonic time; None keeps the cap until it is changed.
    """

    maximum: int
    cap: int
    until_s: float | None = None

    @classmethod
    def open(cls, maximum: int) -> CapLease:
        """No cap but the engine's own maximum."""
        return cls(maximum, maximum)

    def asked(self, cap: int, lease_s: float | None, now_s: float) -> CapLease:
        """The lease after somebody asked for a cap; above the maximum it is the maximum."""
        return CapLease(self.maximum, min(cap, self.maximum), None if lease_s is None else now_s + lease_s)

    def in_force(self, now_s: float) -> int:
        """The cap now."""
        return self.maximum if self.expired(now_s) else self.cap

    def expired(self, now_s: float) -> bool:
        """Whether the lease has run out."""
        return self.until_s is not None and now_s >= self.until_s

    def wanted(self, now_s: float) -> int | None:
        """What to ask an engine for: the cap, or None for its maximum."""
        cap = self.in_force(now_s)
        return None if cap >= self.maximum else cap

    def remaining_s(self, now_s: float) -> float | None:
        """What is left of the lease; None without one."""
        return None if self.until_s is None or self.expired(now_s) else self.until_s - now_s
