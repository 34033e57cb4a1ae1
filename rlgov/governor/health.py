"""Whether the governor lives and whether it may be relied on: two questions, judged from its ticks. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from rlgov.governor.records import Tick

START_GRACE_S: Final = 120.0
"""How long the first tick may take: a deployment opens its engine and meters before it."""
MISSED_INTERVALS: Final = 5
LEAST_PATIENCE_S: Final = 10.0
NOT_READY: Final = frozenset({"Tripped", "EngineStalled", "StackUnreachable", "GpuLost", "ForeignWriter"})
"""Conditions under which the governor is alive, and does not govern."""


@dataclass(frozen=True, slots=True)
class Health:
    """Alive: the loop makes progress. Ready: it sees the deployment and nothing keeps it from governing."""

    alive: bool
    ready: bool
    why: tuple[str, ...]  # what is missing; empty when both hold
    tick_age_s: float | None  # since the last tick was handed over; None before the first


def patience_s(interval_s: float) -> float:
    """How long the loop may be silent."""
    return max(MISSED_INTERVALS * interval_s, LEAST_PATIENCE_S)


def judge(
    tick: Tick | None, *, started_s: float, published_s: float | None, now_s: float, interval_s: float
) -> Health:
    """Judge the loop by its last tick.

    Args:
        tick: The last one, None before the first.
        started_s: When the surface began.
        published_s: When the last tick was handed over.
        now_s: Now. All three are monotonic.
        interval_s: Of the control loop.
    """
    if tick is None or published_s is None:
        waited_s = now_s - started_s
        alive = waited_s <= START_GRACE_S
        why = (f"no window was seen yet, {waited_s:.0f} s after the start",)
        return Health(alive, ready=False, why=why, tick_age_s=None)
    age_s = now_s - published_s
    missing: list[str] = []
    alive = age_s <= patience_s(interval_s)
    if not alive:
        missing.append(f"the loop has been silent for {age_s:.0f} s, with intervals of {interval_s:g} s")
    if tick.window.blind:
        missing.append("the last window is blind: the deployment could not be observed")
    missing += [f"{held.name}: {held.message}" for held in tick.conditions if held.name in NOT_READY]
    return Health(alive, ready=not missing, why=tuple(missing), tick_age_s=age_s)
