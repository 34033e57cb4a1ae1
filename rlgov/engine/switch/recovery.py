"""After a crash of rlgov: which engines of the earlier run may serve on, and which must go. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Set as AbstractSet

    from rlgov.engine.switch.journal import EngineRecord, StackRecord

# An engine that was being stopped is not taken back: its shutdown may have begun.
_FIT = ("active", "draining", "warming", "starting", "asleep")


@dataclass(frozen=True, slots=True)
class Recovery:
    """Engine ids: try ``candidates`` in this order, keep the first that serves; ``stop`` at any rate."""

    candidates: tuple[str, ...]
    stop: tuple[str, ...]


def recover(record: StackRecord, alive: AbstractSet[str], usable: AbstractSet[str]) -> Recovery:
    """What becomes of an earlier run's engines.

    The routed engine serves on: before the move that is the old one, and the switch is taken back; after
    it the new one, and the switch is completed. Where requests were held and none was routed, the old
    engine comes first as long as its stop had not begun, then the new one.

    Args:
        record: What the earlier run wrote last.
        alive: Engines whose process is still the same one.
        usable: Those that were started as this run would start them.
    """
    living = [engine for engine in record.engines if engine.spec.engine_id in alive]
    fit = [engine for engine in living if engine.phase in _FIT and engine.spec.engine_id in usable]
    old_id = record.switch.old_id if record.switch is not None else None

    def rank(engine: EngineRecord) -> tuple[bool, bool, int]:
        identifier = engine.spec.engine_id
        awake_old = identifier == old_id and engine.phase != "asleep"
        return identifier != record.routed, not awake_old, _FIT.index(engine.phase)

    candidates = tuple(engine.spec.engine_id for engine in sorted(fit, key=rank))
    stop = tuple(e.spec.engine_id for e in living if e.spec.engine_id not in candidates)
    return Recovery(candidates, stop)
