"""What the guard adds in service: it notices that serving stands still, and that its overrides do not help.

Training goes without: nothing stalls in simulation, and a policy that still explores would trip all the time.
The guard itself is the same object; it is given a watch, or none.

* **Stall.** There is work, and neither a token nor a prompt token was computed for a while: the engine hangs
  although it may call itself healthy. Nothing that a governor decides then is based on anything.
* **Trip.** A burning SLO that began below the fastest settings is charged to the policy. Several of them
  within a time, or one that lasts, and the policy is taken out for a back-off, which doubles from trip to
  trip; after some trips for good, until somebody arms it again.
* **Switch budget.** So many TP switches an hour, whatever the dwell time allows.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

import numpy as np

from rlgov.errors import ConfigError
from rlgov.records import Column

if TYPE_CHECKING:
    from numpy.typing import NDArray

_HOUR_S = 3600.0
_SLACK_S = 1e-9
_WORK = np.array([Column.RUNNING, Column.WAITING], dtype=np.intp)
_PROGRESS = np.array([Column.OUTPUT_TOKENS, Column.PREFILL_TOKENS, Column.SERVED], dtype=np.intp)


@dataclass(frozen=True, slots=True)
class WatchSettings:
    """When serving counts as stalled, and how much harm a policy may do. Times are control time."""

    stall_s: float = 8.0
    """Work without progress for so long is a stall. No iteration takes that long."""
    trip_overrides: int = 4
    """Trip at so many SLO overrides charged to the policy ..."""
    trip_within_s: float = 300.0
    """... within this time."""
    trip_override_s: float = 60.0
    """Trip, too, at one that lasts this long."""
    backoff_s: float = 120.0
    """How long the first trip takes the policy out; every further one twice as long as the one before ..."""
    backoff_limit_s: float = 3600.0
    """... but no longer than this."""
    latch_after: int = 5
    """After so many trips the policy stays out until it is armed again."""
    forgive_s: float = 7200.0
    """After so long without a trip the earlier ones are forgotten."""
    tp_switches_per_hour: int = 12
    """TP switches in any hour."""

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if not (value > 0 and math.isfinite(value)):
                msg = f"WatchSettings.{field.name} must be a number above 0, got {value}"
                raise ConfigError(msg)


@dataclass(slots=True)
class Watched:
    """What a row means for the watch; depends on its state and the row, and changes neither."""

    stalled: NDArray[np.bool_]
    tripped: NDArray[np.bool_]
    spent: NDArray[np.bool_]  # no TP switch is left in this hour
    now_s: NDArray[np.float64]
    still_s: NDArray[np.float64]
    over: NDArray[np.bool_]
    over_s: NDArray[np.float64]
    charged: NDArray[np.bool_]
    newly: NDArray[np.bool_]
    backoff_left_s: NDArray[np.float64]


class Watch:
    """The watch of ``n`` deployments side by side; row i never depends on another row.

    Args:
        settings: When to step in.
        n: Number of deployments.
    """

    def __init__(self, settings: WatchSettings, n: int) -> None:
        self.settings = settings
        self._now_s = np.zeros(n)
        self._still_s = np.zeros(n)  # time without progress
        self._over = np.zeros(n, dtype=np.bool_)  # an override of the SLO is in force
        self._over_s = np.zeros(n)  # how long one that is charged to the policy has lasted
        self._charges_s = np.full((n, settings.trip_overrides), -np.inf)  # oldest first
        self._switches_s = np.full((n, settings.tp_switches_per_hour), -np.inf)
        self._backoff_left_s = np.zeros(n)
        self._next_backoff_s = np.full(n, settings.backoff_s)
        self._tripped_at_s = np.full(n, -np.inf)
        self.trips = np.zeros(n, dtype=np.int64)
        """Trips that are not forgotten yet."""
        self.latched = np.zeros(n, dtype=np.bool_)
        """Rows whose policy stays out until :meth:`rearm`."""

    @property
    def backoff_left_s(self) -> NDArray[np.float64]:
        """How long each row's policy stays out; infinite where it is latched."""
        return np.where(self.latched, np.inf, self._backoff_left_s)

    def reset(self, which: NDArray[np.bool_]) -> None:
        """A new episode. It does not forgive: trips stay, and so does the switch budget."""
        self._still_s[which] = 0.0
        self._over[which] = False
        self._over_s[which] = 0.0

    def rearm(self) -> None:
        """Forgive everything, in every row."""
        self._charges_s[:] = -np.inf
        self._backoff_left_s[:] = 0.0
        self._next_backoff_s[:] = self.settings.backoff_s
        self._tripped_at_s[:] = -np.inf
        self._over_s[:] = 0.0
        self.trips[:] = 0
        self.latched[:] = False

    def assess(
        self,
        rows: NDArray[np.float64],
        duration_s: NDArray[np.float64],
        blind: NDArray[np.bool_],
        burning: NDArray[np.bool_],
        override: NDArray[np.bool_],
        slowed: NDArray[np.bool_],
    ) -> Watched:
        """What the rows mean.

        Args:
            rows: Window rows, zeros where blind.
            duration_s: Length of each window.
            blind: Rows that show nothing.
            burning: Rows whose own window gives cause for an override.
            override: Rows in which one is in force.
            slowed: Rows below the fastest clock or the largest cap: there the policy is to blame.
        """
        settings = self.settings
        now_s = self._now_s + duration_s
        idle = ~np.logical_or.reduce(rows.take(_WORK, axis=1) > 0.0, axis=1)
        moving = np.logical_or.reduce(rows.take(_PROGRESS, axis=1) > 0.0, axis=1)
        going = idle | moving | (rows[:, Column.SWITCHING] > 0.0)
        still_s = np.where(going, 0.0, self._still_s + duration_s)
        still_s = np.where(blind, self._still_s, still_s)

        over = burning | (self._over & override)
        over = np.where(blind, self._over, over)
        charged = burning & ~self._over & slowed
        lasting = over & ~blind & (self._over_s > 0.0)
        over_s = np.where(lasting, self._over_s + duration_s, 0.0)
        over_s = np.where(charged, duration_s, np.where(blind, self._over_s, over_s))
        # With this charge the ring would be full of charges no older than the time allowed.
        oldest_s = self._charges_s[:, 1] if settings.trip_overrides > 1 else now_s
        often = charged & (now_s - oldest_s <= settings.trip_within_s)
        left_s = np.maximum(self._backoff_left_s - duration_s, 0.0)
        out = self.latched | (left_s > _SLACK_S)
        newly = (often | (over_s >= settings.trip_override_s)) & ~out
        spent = now_s - self._switches_s[:, 0] < _HOUR_S
        return Watched(
            still_s >= settings.stall_s - _SLACK_S, out | newly, spent,
            now_s, still_s, over, over_s, charged, newly, left_s,
        )  # fmt: skip

    def commit(self, watched: Watched, switched: NDArray[np.bool_]) -> None:
        """Take the assessment over; ``switched``: rows in which a TP switch begins now."""
        settings = self.settings
        self._now_s, self._still_s = watched.now_s, watched.still_s
        self._over, self._over_s = watched.over, watched.over_s
        _remember(self._charges_s, watched.charged, watched.now_s)
        _remember(self._switches_s, switched, watched.now_s)
        self._backoff_left_s = watched.backoff_left_s
        quiet = watched.now_s - self._tripped_at_s - self._next_backoff_s > settings.forgive_s
        self.trips[quiet & ~self.latched] = 0
        self._next_backoff_s[quiet] = settings.backoff_s
        newly = watched.newly
        if newly.any():
            self.trips[newly] += 1
            self._tripped_at_s[newly] = watched.now_s[newly]
            self._backoff_left_s[newly] = self._next_backoff_s[newly]
            doubled_s = np.minimum(2.0 * self._next_backoff_s, settings.backoff_limit_s)
            self._next_backoff_s[newly] = doubled_s[newly]
            self._charges_s[newly] = -np.inf
            self._over_s[newly] = 0.0
            self.latched |= self.trips >= settings.latch_after


def _remember(times_s: NDArray[np.float64], which: NDArray[np.bool_], now_s: NDArray[np.float64]) -> None:
    """Append a time to the rows in ``which``; the oldest falls out."""
    if which.any():
        times_s[which, :-1] = times_s[which, 1:]
        times_s[which, -1] = now_s[which]
