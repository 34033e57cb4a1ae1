"""The status page: everything an operator may want to know of a governor, as one JSON object. Pure."""

from __future__ import annotations

import math
from dataclasses import asdict, fields
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from rlgov.governor.health import Health
    from rlgov.governor.ledger import Totals
    from rlgov.governor.records import Governed, Tick

STATUS_SCHEMA: Final = 1


def status_document(
    governed: Governed, tick: Tick | None, totals: Totals, health: Health, now_wall_s: float
) -> dict[str, Any]:
    """What /status answers; what is not known, or no finite number, is null.

    Args:
        governed: What does not change.
        tick: The last one, None before the first.
        totals: Sums so far.
        health: Of the loop.
        now_wall_s: For the uptime.
    """
    document: dict[str, Any] = {
        "schema": STATUS_SCHEMA,
        "uptime_s": max(now_wall_s - governed.started_wall_s, 0.0),
        "health": asdict(health),
        "governed": asdict(governed),
        "conditions": _conditions(tick),
        "totals": _totals(totals),
        "tick": None,
    }
    if tick is not None:
        shown = asdict(tick)
        del shown["conditions"]
        document["tick"] = shown
    cleaned: dict[str, Any] = _finite(document)
    return cleaned


def _conditions(tick: Tick | None) -> list[dict[str, Any]]:
    if tick is None:
        return []
    return [
        {
            "name": condition.name,
            "severity": condition.severity.value,
            "for_s": max(tick.at_s - condition.since_s, 0.0),
            "message": condition.message,
            "remedy": condition.remedy,
        }
        for condition in tick.conditions
    ]


def _totals(totals: Totals) -> dict[str, Any]:
    shown = {field.name: getattr(totals, field.name) for field in fields(totals)}
    shown |= {"reasons": dict(totals.reasons), "raised": dict(totals.raised)}
    shown["compared"] = {basis: asdict(compared) for basis, compared in totals.compared.items()}
    for basis, compared in totals.compared.items():
        shown["compared"][basis]["saved_share"] = compared.saved_share
    return shown


def _finite(value: Any) -> Any:  # noqa: ANN401  # whatever JSON can hold
    """The same value with null for every number that JSON lacks."""
    if isinstance(value, dict):
        return {str(name): _finite(below) for name, below in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(below) for below in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
