"""The guard between a policy and the deployment: one object for training, replay and service.

Stages, in order: garbage indices become the fastest ones; a TP degree that cannot hold the load, or that
the deployment cannot give now, is refused; dwell times and rate limits slow every move towards slower
settings; a burning SLO overrides everything, and only upwards; a window that could not be observed means
fastest, with TP left alone. Moves towards faster settings are never delayed (TP excepted: a switch is
expensive either way). In service a :class:`~rlgov.envs.watch.Watch` adds two causes for the fastest setting:
serving that stands still, and a policy that did too much harm.

The action mask tells a policy beforehand what the guard would let through, so a masked policy is
rarely altered. Every decision leaves with a :class:`Reason`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from enum import IntEnum
from typing import TYPE_CHECKING, Protocol

import numpy as np

from rlgov.envs.action import CAP, CLOCK, TP, ActionTable
from rlgov.envs.watch import Watch, WatchSettings
from rlgov.errors import ConfigError
from rlgov.records import WINDOW_FIELDS, Column

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

    from rlgov.envs.watch import Watched
    from rlgov.records import Limits


class Reason(IntEnum):
    """What determined the applied configuration.

    BLIND, STALLED, TRIPPED and SLO_OVERRIDE are given whenever they are in force, the others only when they
    changed what was asked; IDLE and POLICY mean that the policy had its way. STALLED, TRIPPED and OOD are of
    service: training's guard has no watch, and nobody decides in the policy's place there.
    """

    POLICY = 0
    IDLE = 1  # as POLICY, in a window without any request
    MASKED = 2  # an index out of range, or a TP degree too small for the load or not to be had now
    RATE_LIMIT = 3  # the clock may fall only so fast
    DWELL = 4  # the batch cap or the TP degree moved too recently
    SWITCHING = 5  # a TP switch is in progress
    SLO_OVERRIDE = 6  # the SLO is burning: fastest clock, largest cap, no smaller TP degree
    BLIND = 7  # the deployment could not be observed: fastest clock, largest cap
    STALLED = 8  # there is work, and none of it moves: fastest clock, largest cap
    TRIPPED = 9  # the policy did too much harm and is out for a while: fastest clock, largest cap
    OOD = 10  # unlike anything the policy was trained on: the baseline decided, and had its way


@dataclass(frozen=True, slots=True)
class GuardSettings:
    """How tightly a policy is held. Dwell and hold times count control time, not wall time."""

    tp_dwell_s: float = 120.0
    """Least time from the end of one TP switch to the next one."""
    cap_dwell_s: float = 5.0
    """Least time from a change of the batch cap to a reduction; it may grow at once."""
    max_down_steps: int = 3
    """By how many settings the clock may fall in one interval; it may rise at once."""
    override_wait_fraction: float = 2.0
    """Override when the oldest request without a first token has waited this share of the TTFT limit."""
    override_overdue: float = 4.0
    """Override when at least so many requests are past their TTFT limit without a first token."""
    override_misses: float = 6.0
    """Override when at least so many requests missed the SLO in one window."""
    burn_window_s: float = 20.0
    """Time constant of the averages behind the burn rate."""
    burn_share: float = 0.15
    """Override when recent misses per recent arrival reach this share ..."""
    burn_misses: float = 3.0
    """... and at least about so many requests missed within the burn window."""
    hold_s: float = 3.0
    """How long an override lasts after its cause is gone."""
    kv_headroom: float = 1.0
    """A TP degree is refused when its KV capacity is below this many times the tokens in use."""

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if math.isnan(value) or value < 0:
                msg = f"GuardSettings.{field.name} must not be negative or NaN, got {value}"
                raise ConfigError(msg)
        if self.max_down_steps < 1 or self.burn_window_s <= 0:
            msg = "GuardSettings.max_down_steps must be at least 1 and burn_window_s above 0"
            raise ConfigError(msg)


class GuardLike(Protocol):
    """What an environment or a governor needs of a guard."""

    table: ActionTable

    def reset(self, which: NDArray[np.bool_], service_levels: NDArray[np.float64] | None = None) -> None:
        """Forget the past of the rows in ``which``; optionally set every row's SLO, shape (n, 2)."""
        ...

    def mask(self, rows: NDArray[np.float64]) -> NDArray[np.bool_]:
        """Which settings the guard would let through, flat over the axes, shape (n, table.size)."""
        ...

    def apply(
        self, asked: ArrayLike, rows: NDArray[np.float64]
    ) -> tuple[NDArray[np.int64], NDArray[np.int8]]:
        """The configuration to apply and the reason, for each row; advances the guard's state."""
        ...


# Any of these missing, negative or absurd makes a window unusable, that is blind.
_REQUIRED = np.array(
    [Column[name.upper()] for name in WINDOW_FIELDS if not name.startswith(("ttft_", "tpot_", "itl_"))],
    dtype=np.intp,
)
_BURN = np.array([Column.ARRIVALS, Column.MISSES], dtype=np.intp)
_TRAFFIC = np.array([Column.ARRIVALS, Column.RUNNING, Column.WAITING], dtype=np.intp)
_TROUBLE = np.array([Column.OLDEST_WAIT_S, Column.OVERDUE, Column.MISSES], dtype=np.intp)
_SWITCH, _CAP_MOVE = 0, 1
_TOLERANCE = 1e-6
_TOO_MUCH = np.where(_REQUIRED == Column.BLIND, _TOLERANCE, 1e15)  # so any blind flag but 0 is caught, too
_SLACK_S = 1e-9  # dwell times are sums of interval lengths: absorbs their rounding


@dataclass(slots=True)
class _Assessment:
    """What a row means for the guard; depends on the state and the row, and changes neither."""

    key: bytes
    blind: NDArray[np.bool_]
    idle: NDArray[np.bool_]
    override: NDArray[np.bool_]
    triggered: NDArray[np.bool_]
    switching: NDArray[np.bool_]
    tp_frozen: NDArray[np.bool_]
    cap_frozen: NDArray[np.bool_]
    current: NDArray[np.int64]
    tp_feasible: NDArray[np.bool_]
    duration_s: NDArray[np.float64]
    since_s: NDArray[np.float64]
    average: NDArray[np.float64]
    forced: NDArray[np.bool_]  # override, or what the watch adds: fastest clock, largest cap
    watched: Watched | None


class Guard:
    """The guard of ``n`` deployments side by side; row i never depends on another row.

    Args:
        settings: How tightly to hold.
        limits: What the deployment allows. Its SLO holds until :meth:`reset` sets others.
        n: Number of deployments; a service uses 1.
        watch: What service adds; None, as in training, for nothing.
        follow: The settings decided last count as those in force, whatever the rows say. For decisions that
            nobody carries out: otherwise every one of them would be held as the first step from where the
            deployment stands.
    """

    def __init__(
        self,
        settings: GuardSettings,
        limits: Limits,
        n: int,
        *,
        watch: WatchSettings | None = None,
        follow: bool = False,
    ) -> None:
        if n < 1:
            msg = f"a guard serves at least one deployment, got n={n}"
            raise ConfigError(msg)
        self.settings = settings
        self.table = ActionTable(limits)
        self.n = n
        self.watch = None if watch is None else Watch(watch, n)
        self.follow = follow
        self._own = np.full((n, 3), -1, dtype=np.int64)  # decided last; -1: nothing yet
        self._kv_capacity_tokens = np.array(limits.kv_capacity_tokens, dtype=np.float64)
        self._trouble = np.empty((n, len(_TROUBLE)))
        self._trouble[:, 0] = settings.override_wait_fraction * limits.service_level.ttft_s
        self._trouble[:, 1:] = settings.override_overdue, settings.override_misses
        self._since_s = np.full((n, 2), np.inf)  # since the last TP switch, since the cap moved
        self._dwell_s = np.array([settings.tp_dwell_s, settings.cap_dwell_s]) - _SLACK_S
        self._hold_left_s = np.zeros(n)
        self._average = np.zeros((n, 2))  # arrivals and misses per second
        self._tp_index = np.full(n, -1, dtype=np.int64)  # of the TP degree last applied; -1: none yet
        self._assessed: _Assessment | None = None
        self._rows_index = np.arange(n)
        self._cap_rank = np.arange(self.table.nvec[CAP])
        self._tp_rank = np.arange(self.table.nvec[TP])
        self._clock_rank = np.arange(self.table.nvec[CLOCK])

    def reset(self, which: NDArray[np.bool_], service_levels: NDArray[np.float64] | None = None) -> None:
        """Forget the past of the rows in ``which``; optionally set every row's SLO.

        Args:
            which: Rows whose episode begins anew, bool of shape (n,).
            service_levels: ``[ttft_s, tpot_s]`` of every row, shape (n, 2).
        """
        self._since_s[which] = np.inf
        self._hold_left_s[which] = 0.0
        self._average[which] = 0.0
        self._tp_index[which] = -1
        self._own[which] = -1
        self._assessed = None
        if self.watch is not None:
            self.watch.reset(which)
        if service_levels is not None:
            self._trouble[:, 0] = self.settings.override_wait_fraction * service_levels[:, 0]

    def mask(self, rows: NDArray[np.float64]) -> NDArray[np.bool_]:
        """What would be let through, flat (clock, cap, TP), shape (n, table.size).

        At least one setting per axis is always allowed: the fastest clock, the largest cap and, on the
        TP axis, the degree in force.
        """
        state = self._assess(rows)
        offsets = self.table.offsets
        mask = np.empty((self.n, self.table.size), dtype=np.bool_)
        forced = state.forced
        slowest = state.current[:, CLOCK] + self.settings.max_down_steps
        slowest[forced] = 0
        np.less_equal(self._clock_rank, slowest[:, None], out=mask[:, : offsets[CAP]])
        smallest = np.where(state.cap_frozen, state.current[:, CAP], self.table.size)
        smallest[forced] = 0
        np.less_equal(self._cap_rank, smallest[:, None], out=mask[:, offsets[CAP] : offsets[TP]])
        tp_mask = mask[:, offsets[TP] :]
        tp_mask[:] = state.tp_feasible & ~state.tp_frozen[:, None]
        tp_mask[self._rows_index, state.current[:, TP]] = True
        return mask

    def apply(
        self, asked: ArrayLike, rows: NDArray[np.float64]
    ) -> tuple[NDArray[np.int64], NDArray[np.int8]]:
        """The configuration to apply for each row, with its reason; advances the guard's state.

        Args:
            asked: Indices (clock, cap, TP) of shape (n, 3); anything that is no index means fastest.
            rows: The window rows the decision was taken on.

        Returns:
            Applied indices, int64 of shape (n, 3), and reasons, int8 of shape (n,).
        """
        state = self._assess(rows)
        self._assessed = None
        wanted, outside = self.table.sanitised(asked)
        applied = wanted.copy()
        reasons = state.idle.astype(np.int8)  # Reason.IDLE or Reason.POLICY
        current = state.current
        current_tp = current[:, TP]

        # A TP index out of range means "leave it", not "the largest": a switch is never the safe move.
        refused = outside[:, TP] | ~state.tp_feasible[self._rows_index, wanted[:, TP]]
        refused &= (wanted[:, TP] != current_tp) | outside[:, TP]
        frozen = state.tp_frozen & (wanted[:, TP] != current_tp)
        np.copyto(applied[:, TP], current_tp, where=refused | frozen)
        lowest = current[:, CLOCK] + self.settings.max_down_steps
        limited = applied[:, CLOCK] > lowest
        np.copyto(applied[:, CLOCK], lowest, where=limited)
        held = state.cap_frozen & (applied[:, CAP] > current[:, CAP])
        np.copyto(applied[:, CAP], current[:, CAP], where=held)
        applied[state.forced, :TP] = 0

        reasons[refused | outside.any(axis=1)] = Reason.MASKED
        reasons[limited] = Reason.RATE_LIMIT
        reasons[held | frozen] = Reason.DWELL
        reasons[frozen & state.switching] = Reason.SWITCHING
        reasons[state.override] = Reason.SLO_OVERRIDE
        if state.watched is not None:
            reasons[state.watched.tripped] = Reason.TRIPPED
            reasons[state.watched.stalled] = Reason.STALLED
        reasons[state.blind] = Reason.BLIND
        self._commit(state, applied)
        return applied, reasons

    def _commit(self, state: _Assessment, applied: NDArray[np.int64]) -> None:
        # A decision takes effect now and holds for one interval, which is why times since a change
        # start at 0 and grow by the length of the *next* window when that is assessed.
        switched = (applied[:, TP] != state.current[:, TP]) | state.switching
        self._since_s = state.since_s
        self._since_s[switched, _SWITCH] = 0.0
        self._since_s[applied[:, CAP] != state.current[:, CAP], _CAP_MOVE] = 0.0
        hold_left_s = np.maximum(self._hold_left_s - state.duration_s, 0.0)
        self._hold_left_s = np.where(state.triggered, self.settings.hold_s, hold_left_s)
        self._average = state.average
        self._tp_index = applied[:, TP].copy()
        self._own = applied.copy()
        if self.watch is not None and state.watched is not None:
            self.watch.commit(state.watched, applied[:, TP] != state.current[:, TP])

    def _assess(self, rows: NDArray[np.float64]) -> _Assessment:
        # mask() and apply() see the same rows; the second call reuses the first one's work.
        key = rows.tobytes()
        if self._assessed is not None and self._assessed.key == key:
            return self._assessed
        if rows.shape != (self.n, len(WINDOW_FIELDS)):
            msg = f"expected rows of shape {(self.n, len(WINDOW_FIELDS))}, got {rows.shape}"
            raise ConfigError(msg)
        required = rows.take(_REQUIRED, axis=1)
        usable = (required > -_TOLERANCE) & (required < _TOO_MUCH)
        blind: NDArray[np.bool_] = ~np.logical_and.reduce(usable, axis=1)
        duration_s = rows[:, Column.DURATION_S].copy()
        some_blind = bool(blind.any())
        told = rows
        if some_blind:
            duration_s[blind] = self.table.limits.interval_s
            rows = np.where(blind[:, None], 0.0, rows)
        current = self.table.in_force(rows)
        switching = rows[:, Column.SWITCHING] > 0.0
        # While a switch is in progress the row shows the old engine's degree, and a blind row shows
        # nothing: what was applied last stands in both cases.
        hidden = switching | blind
        if hidden.any():
            np.copyto(current[:, TP], self._stands(told), where=hidden)
        held_tokens = self._kv_capacity_tokens[current[:, TP]]
        slowed = np.logical_or.reduce(current[:, :TP] > 0, axis=1)
        if self.follow:
            np.copyto(current, self._own, where=self._own >= 0)
        idle: NDArray[np.bool_] = ~np.logical_or.reduce(rows.take(_TRAFFIC, axis=1) != 0.0, axis=1)

        average = self._averaged(rows, duration_s)
        if some_blind:
            average[blind] = self._average[blind]
            idle &= ~blind
        burning = self._burning(rows, average)
        triggered: NDArray[np.bool_] = burning | blind
        override = triggered | (self._hold_left_s > _SLACK_S)
        forced = override
        watched = None
        if self.watch is not None:
            watched = self.watch.assess(rows, duration_s, blind, burning & ~blind, override, slowed)
            forced = override | watched.stalled | watched.tripped

        since_s = self._since_s + duration_s[:, None]
        frozen = since_s < self._dwell_s
        tp_frozen, cap_frozen = frozen[:, _SWITCH] | switching | blind, frozen[:, _CAP_MOVE]
        if watched is not None:
            tp_frozen |= watched.stalled | watched.tripped | watched.spent
        tp_feasible = self._feasible(rows, held_tokens, current[:, TP], override)
        self._assessed = _Assessment(
            key, blind, idle, override, triggered, switching, tp_frozen, cap_frozen, current,
            tp_feasible, duration_s, since_s, average, forced, watched,
        )  # fmt: skip
        return self._assessed

    def _feasible(
        self,
        rows: NDArray[np.float64],
        held_tokens: NDArray[np.float64],
        current_tp: NDArray[np.int64],
        override: NDArray[np.bool_],
    ) -> NDArray[np.bool_]:
        """TP degrees that hold the load and can be had, shape (n, degrees)."""
        in_use_tokens = rows[:, Column.KV_USAGE] * held_tokens
        in_use_tokens = (in_use_tokens + rows[:, Column.WAITING_TOKENS]) * self.settings.kv_headroom
        feasible: NDArray[np.bool_] = self._kv_capacity_tokens >= in_use_tokens[:, None]
        if rows[:, Column.TP_REFUSED].any():
            refused = rows[:, Column.TP_REFUSED].astype(np.int64)  # bits; a usable row holds no NaN
            feasible &= (refused[:, None] >> self._tp_rank) & 1 == 0
        if override.any():  # an override goes upwards only: no move to a smaller TP degree either
            feasible &= ~override[:, None] | (self._tp_rank <= current_tp[:, None])
        return feasible

    def _stands(self, rows: NDArray[np.float64]) -> NDArray[np.int64]:
        """Index of the TP degree that stands: applied last, else told by the row, else the largest."""
        degrees = rows[:, Column.TP_DEGREE]
        told = np.where(degrees > 0, self.table.in_force(rows)[:, TP], 0)
        return np.where(self._tp_index >= 0, self._tp_index, told).astype(np.int64)

    def _averaged(self, rows: NDArray[np.float64], duration_s: NDArray[np.float64]) -> NDArray[np.float64]:
        """Arrivals and misses per second, averaged."""
        alpha = np.minimum(duration_s / self.settings.burn_window_s, 1.0)
        rates = rows.take(_BURN, axis=1) / np.maximum(duration_s, _SLACK_S)[:, None]
        average: NDArray[np.float64] = self._average + alpha[:, None] * (rates - self._average)
        return average

    def _burning(self, rows: NDArray[np.float64], average: NDArray[np.float64]) -> NDArray[np.bool_]:
        """Whether the SLO burns, by what the window shows or by the averages."""
        settings = self.settings
        burning = average[:, 1] >= settings.burn_share * average[:, 0]
        burning &= average[:, 1] * settings.burn_window_s >= max(settings.burn_misses, _SLACK_S)
        trouble = rows.take(_TROUBLE, axis=1) >= self._trouble
        burning |= np.logical_or.reduce(trouble, axis=1)
        return np.asarray(burning, dtype=np.bool_)


class NullGuard:
    """Lets everything through; indices that are none still become the fastest ones."""

    def __init__(self, limits: Limits, n: int) -> None:
        self.table = ActionTable(limits)
        self.n = n

    def reset(self, which: NDArray[np.bool_], service_levels: NDArray[np.float64] | None = None) -> None:
        """Nothing to forget."""

    def mask(self, rows: NDArray[np.float64]) -> NDArray[np.bool_]:
        """Everything is allowed."""
        return np.ones((len(rows), self.table.size), dtype=np.bool_)

    def apply(
        self,
        asked: ArrayLike,
        rows: NDArray[np.float64],  # noqa: ARG002  # the guard's signature
    ) -> tuple[NDArray[np.int64], NDArray[np.int8]]:
        """What was asked, with Reason.POLICY, or Reason.MASKED where it was out of range."""
        wanted, outside = self.table.sanitised(asked)
        reasons = np.where(outside.any(axis=1), Reason.MASKED, Reason.POLICY).astype(np.int8)
        return wanted.copy(), reasons
