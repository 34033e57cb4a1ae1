"""Conditions: what an operator should know now, kept from tick to tick, each with what to check next."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from rlgov.governor.records import CONDITIONS, Condition, Severity

if TYPE_CHECKING:
    from rlgov.governor.facts import Facts
    from rlgov.records import Window

LINGER_S: Final = 60.0
"""How long what happened in a moment is shown."""
WALL_JUMP_S: Final = 5.0
THROTTLED_SHARE: Final = 0.05
_MOST_OVERRUNS: Final = 3  # within the time a moment is shown


class Conditions:
    """The conditions in force: told anew every tick, or gone at its end."""

    def __init__(self) -> None:
        self._since_s: dict[str, float] = {}
        self._told: dict[str, Condition] = {}
        self._lingering: dict[str, tuple[Condition, float]] = {}  # with when it is gone

    def tell(self, name: str, severity: Severity, now_s: float, message: str, remedy: str) -> None:
        """It holds in this tick."""
        if name not in CONDITIONS:
            msg = f"{name} is not among the governor's CONDITIONS; add it there"
            raise ValueError(msg)
        since_s = self._since_s.setdefault(name, now_s)
        self._told[name] = Condition(name, severity, since_s, message, remedy)

    def happened(self, name: str, severity: Severity, now_s: float, message: str, remedy: str) -> None:
        """It happened in this tick, and is shown for a while."""
        self.tell(name, severity, now_s, message, remedy)
        self._lingering[name] = (self._told[name], now_s + LINGER_S)

    def close(self, now_s: float) -> tuple[Condition, ...]:
        """The tick is over: everything in force, by name. What was not told again is forgotten."""
        for name, (condition, until_s) in tuple(self._lingering.items()):
            if now_s >= until_s:
                del self._lingering[name]
            else:
                self._told.setdefault(name, condition)
        told, self._told = self._told, {}
        self._since_s = {name: condition.since_s for name, condition in told.items()}
        return tuple(told[name] for name in sorted(told))


class Watcher:
    """Finds the conditions that say something about the world and change nothing about acting."""

    def __init__(self) -> None:
        self._last: Facts | None = None
        self._engine: tuple[int, str] | None = None  # the last one that was seen
        self._overruns: list[tuple[float, int]] = []  # when, and how many there were by then

    def look(self, facts: Facts, window: Window, conditions: Conditions) -> None:
        """Tell what this tick shows."""
        now_s = facts.now_s
        if facts.unread_because:
            conditions.tell(
                "StackUnreachable", Severity.WARNING, now_s, facts.unread_because,
                "see whether `rlgov serve` (or the attached vLLM) runs and is not overloaded; the governor "
                "connects again by itself",
            )  # fmt: skip
        if facts.stack_conditions:
            told = "; ".join(f"{name}: {text}" for name, text in sorted(facts.stack_conditions.items()))
            conditions.tell(
                "StackCondition", Severity.WARNING, now_s, f"the serving stack reports {told}",
                "look at the log of the serving stack and of its engine",
            )  # fmt: skip
        if facts.tp_refused:
            told = "; ".join(f"TP {tp}: {why}" for tp, why in sorted(facts.tp_refused.items()))
            conditions.tell(
                "TpRefused", Severity.INFO, now_s, f"TP degrees that cannot be had now: {told}",
                "nothing, if that is meant; a start that failed is tried again after a while",
            )  # fmt: skip
        throttled = window.throttled_fraction > THROTTLED_SHARE
        if throttled and not window.blind:
            conditions.tell(
                "Throttled", Severity.INFO, now_s,
                f"the GPUs ran below the asked clock for {window.throttled_fraction:.0%} of the window",
                "power limit or heat: `nvidia-smi -q -d PERFORMANCE` names the reason",
            )  # fmt: skip
        if window.energy_j is None and not window.blind:
            conditions.tell(
                "NotMetered", Severity.WARNING, now_s,
                "nothing meters the GPUs' energy, so there is nothing to decide on",
                "run the governor where NVML shows the GPUs; `rlgov doctor` says what is missing",
            )  # fmt: skip
        self._moments(facts, conditions)
        self._last = facts

    def _has_restarted(self, facts: Facts) -> bool:
        if "restart" in facts.blind_because:
            return True
        if facts.engine is None:
            return False
        before, self._engine = self._engine, facts.engine
        return before is not None and before != facts.engine and before[0] == facts.engine[0]

    def _moments(self, facts: Facts, conditions: Conditions) -> None:
        last, now_s = self._last or facts, facts.now_s
        if self._has_restarted(facts):
            conditions.happened(
                "EngineRestarted", Severity.INFO, now_s,
                "the engine restarted: its counters began anew, and that window was not used",
                "see the engine's log for why it ended, if that was not you",
            )  # fmt: skip
        drift_s = (facts.wall_s - last.wall_s) - (now_s - last.now_s)
        if abs(drift_s) > WALL_JUMP_S:
            conditions.happened(
                "WallClockJump", Severity.INFO, now_s,
                f"the wall clock jumped by {drift_s:+.0f} s; control goes by the monotonic clock and is not "
                "touched",
                "see whether NTP runs; times in logs around now do not line up",
            )  # fmt: skip
        if facts.journal_dropped > last.journal_dropped or facts.journal_problem:
            conditions.happened(
                "JournalDropping", Severity.WARNING, now_s,
                f"{facts.journal_dropped} lines of the journal were dropped so far: "
                f"{facts.journal_problem or 'the disk is too slow'}",
                "free space, or name another folder with --journal; governing goes on without it",
            )  # fmt: skip
        self._overruns = [(at_s, count) for at_s, count in self._overruns if now_s - at_s < LINGER_S]
        self._overruns.append((now_s, facts.overruns))
        recent = facts.overruns - self._overruns[0][1]
        if recent >= _MOST_OVERRUNS:
            conditions.tell(
                "Overrun", Severity.WARNING, now_s,
                f"{recent} control intervals of the last minute took longer than they should",
                "the machine, the stack or the driver answers slowly: look at CPU load and at dmesg",
            )  # fmt: skip
