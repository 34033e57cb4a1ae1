"""Whether the governor may act: what takes its hands off the deployment, for how long, and until when. Pure.

Four kinds. *Latched* until an operator arms it again: a foreign writer, no permission, a lost GPU, a policy
that tripped too often. *While it lasts*: a stalled engine, a blind deployment. *For a while, longer each
time*: clocks that fail or do not show. And what was wrong *from the start*: a bundle for something else.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from rlgov.envs.guard import Reason
from rlgov.errors import ConfigError
from rlgov.governor.records import Severity
from rlgov.hardware.clocks import Verdict

if TYPE_CHECKING:
    from rlgov.governor.conditions import Conditions
    from rlgov.governor.facts import Facts
    from rlgov.records import Window

_LOST_CODES: Final = frozenset({"GPU_IS_LOST", "RESET_REQUIRED"})
_DENIED_CODES: Final = frozenset({"NO_PERMISSION", "not_allowed"})


@dataclass(frozen=True, slots=True)
class SafetySettings:
    """When the governor takes its hands off."""

    blind_s: float = 5.0
    """Blind for so long: everything is given back until the deployment is seen again."""
    unverified_s: float = 5.0
    """The measured clock contradicts the lock for so long, with nothing to excuse it: given back ..."""
    clock_failures: int = 5
    """... and so after this many failures to set the clock in a row."""
    pause_s: float = 30.0
    """How long the clocks are then left alone; every further time twice as long ..."""
    pause_limit_s: float = 900.0
    """... but no longer than this."""
    forgive_s: float = 600.0
    """After so long without such trouble the next pause is a short one again."""

    def __post_init__(self) -> None:
        for name in self.__dataclass_fields__:
            if not getattr(self, name) > 0:
                msg = f"SafetySettings.{name} must be above 0, got {getattr(self, name)}"
                raise ConfigError(msg)


class Safety:
    """Keeps what speaks against acting.

    Args:
        settings: When to let go.
        mismatches: Why policy and deployment do not fit; nothing is ever acted on then.
    """

    def __init__(self, settings: SafetySettings, mismatches: tuple[str, ...] = ()) -> None:
        self._settings = settings
        self._mismatches = mismatches
        self._foreign = ""
        self._denied = ""
        self._lost = ""
        self._blind_s = 0.0
        self._unverified_s = 0.0
        self._pause_until_s = float("-inf")
        self._next_pause_s = settings.pause_s
        self._paused_because = ""

    def rearm(self) -> None:
        """An operator has looked at it: forget what is latched, and any pause."""
        self._foreign = self._denied = self._lost = self._paused_because = ""
        self._pause_until_s = float("-inf")
        self._next_pause_s = self._settings.pause_s
        self._unverified_s = 0.0

    def allows(
        self,
        facts: Facts,
        window: Window,
        reason: Reason,
        backoff_left_s: float,
        conditions: Conditions,
        *,
        active: bool,
    ) -> bool:
        """Whether the decision of this tick may be carried out; tells the conditions that say why not.

        Args:
            facts: The world beside the window.
            window: What was seen.
            reason: The guard's.
            backoff_left_s: How long the guard keeps the policy out; infinite when latched.
            conditions: Where to tell.
            active: Whether the operator wants it to act.
        """
        clear = [
            not self._unfit(facts, conditions),
            not self._is_lost(facts, conditions),
            not self._has_rival(facts, conditions),
            not self._is_foreign(facts, conditions),
            not self._is_denied(facts, conditions),
            not self._is_blind(facts, window, reason, conditions),
            not self._is_stalled(facts, reason, conditions),
            not self._is_tripped(facts, reason, backoff_left_s, conditions),
            not self._is_paused(facts, window, conditions),
        ]
        self._keeper(facts, conditions)
        return active and all(clear)

    # ------------------------------------------------------------------ until somebody looks at it

    def _unfit(self, facts: Facts, conditions: Conditions) -> bool:
        if self._mismatches:
            conditions.tell(
                "BundleMismatch", Severity.CRITICAL, facts.now_s, "; ".join(self._mismatches),
                "train or choose a policy for this deployment, or name the right --profile; nothing is acted "
                "on meanwhile",
            )  # fmt: skip
        return bool(self._mismatches)

    def _is_lost(self, facts: Facts, conditions: Conditions) -> bool:
        fatal = [event for event in facts.faults if event.fatal]
        if fatal:
            first = fatal[0]
            self._lost = f"Xid {first.xid} on {first.uuid or 'a GPU of the group'}: {first.advice}"
        elif getattr(facts.clock_error, "code", "") in _LOST_CODES:
            self._lost = str(facts.clock_error)
        elif facts.lost_gpus:
            self._lost = f"{', '.join(facts.lost_gpus)} fell off the bus"
        if self._lost:
            conditions.tell(
                "GpuLost", Severity.CRITICAL, facts.now_s, f"the whole group is left alone: {self._lost}",
                "drain the node and have the GPU reset or serviced (see dmesg), then arm the governor again",
            )  # fmt: skip
        return bool(self._lost)

    def _is_foreign(self, facts: Facts, conditions: Conditions) -> bool:
        if type(facts.clock_error).__name__ == "ForeignWriter":
            self._foreign = str(facts.clock_error)
        if self._foreign:
            conditions.tell(
                "ForeignWriter", Severity.CRITICAL, facts.now_s,
                f"somebody else sets these clocks, and keeps them: {self._foreign}",
                "find out who (nvidia-smi -lgc, DCGM, another governor); then arm the governor again: "
                "POST /v1/rearm, or `rlgov tell rearm`",
            )  # fmt: skip
        return bool(self._foreign)

    def _is_denied(self, facts: Facts, conditions: Conditions) -> bool:
        if str(getattr(facts.clock_error, "code", "")) in _DENIED_CODES:
            self._denied = str(facts.clock_error)
        if self._denied:
            conditions.tell(
                "PermissionDenied", Severity.CRITICAL, facts.now_s, self._denied,
                "let `rlgov keeper` run as root and this user into its group, or run the governor with "
                "CAP_SYS_ADMIN; then arm it again. Shadow mode needs no rights",
            )  # fmt: skip
        return bool(self._denied)

    # ------------------------------------------------------------------ while it lasts

    @staticmethod
    def _has_rival(facts: Facts, conditions: Conditions) -> bool:
        if facts.rival:
            conditions.tell(
                "AnotherGovernor", Severity.CRITICAL, facts.now_s,
                f"another governor acts on this stack ({facts.rival}), so this one does not",
                "end one of the two, or order one into shadow mode; once the other is gone, this one acts",
            )  # fmt: skip
        return bool(facts.rival)

    def _is_blind(self, facts: Facts, window: Window, reason: Reason, conditions: Conditions) -> bool:
        if reason is not Reason.BLIND:
            self._blind_s = 0.0
            return False
        self._blind_s += window.duration_s
        gone = self._blind_s >= self._settings.blind_s
        done = "everything was given back" if gone else "the fastest setting is held"
        conditions.tell(
            "Blind", Severity.CRITICAL if gone else Severity.WARNING, facts.now_s,
            f"the deployment could not be observed for {self._blind_s:.0f} s: {done}",
            "see StackUnreachable, and whether the engine answers on its own metrics page",
        )  # fmt: skip
        return gone

    @staticmethod
    def _is_stalled(facts: Facts, reason: Reason, conditions: Conditions) -> bool:
        if reason is not Reason.STALLED:
            return False
        conditions.tell(
            "EngineStalled", Severity.CRITICAL, facts.now_s,
            "requests are there, and no token moves: everything was given back until one does",
            "the engine hangs though it may call itself healthy: see its log and nvidia-smi, and restart it; "
            "the governor never does",
        )  # fmt: skip
        return True

    @staticmethod
    def _is_tripped(facts: Facts, reason: Reason, backoff_left_s: float, conditions: Conditions) -> bool:
        if reason is not Reason.TRIPPED and backoff_left_s <= 0:
            return False
        latched = backoff_left_s == float("inf")
        conditions.tell(
            "Tripped", Severity.CRITICAL if latched else Severity.WARNING, facts.now_s,
            "the SLO burned too often under this policy, so it is out "
            + ("until somebody arms it again" if latched else f"for another {backoff_left_s:.0f} s"),
            "compare load and latencies with training; train for this load, or arm it again if it was not "
            "the policy",
        )  # fmt: skip
        return latched

    # ------------------------------------------------------------------ for a while

    def _is_paused(self, facts: Facts, window: Window, conditions: Conditions) -> bool:
        settings, now_s = self._settings, facts.now_s
        if now_s < self._pause_until_s:
            self._tell_pause(now_s, conditions)
            return True
        held = facts.acting and facts.check.asked_mhz is not None
        if held and not facts.check.verified:
            self._unverified_s += window.duration_s
        else:
            self._unverified_s = 0.0
        because = ""
        if self._unverified_s >= settings.unverified_s:
            seen = sorted({gpu.measured_mhz for gpu in facts.check.gpus if gpu.measured_mhz is not None})
            because = (
                f"{facts.check.asked_mhz} MHz were asked for, {seen} MHz measured, and nothing explains it"
            )
        elif self._keeps_failing(facts):
            because = f"the clock could not be set {facts.clock_failures_in_a_row} times: {facts.clock_error}"
        if not because:
            if now_s - self._pause_until_s > settings.forgive_s:
                self._next_pause_s = settings.pause_s
            return False
        self._paused_because = because
        self._pause_until_s = now_s + self._next_pause_s
        self._next_pause_s = min(2.0 * self._next_pause_s, settings.pause_limit_s)
        self._unverified_s = 0.0
        self._tell_pause(now_s, conditions)
        return True

    def _keeps_failing(self, facts: Facts) -> bool:
        # A keeper that is gone is looked for in every interval: asking is cheap, and nothing is locked.
        failing = facts.clock_failures_in_a_row >= self._settings.clock_failures
        return facts.acting and failing and type(facts.clock_error).__name__ != "KeeperGone"

    def _tell_pause(self, now_s: float, conditions: Conditions) -> None:
        conditions.tell(
            "ActuationUnverified", Severity.WARNING, now_s,
            f"{self._paused_because}; the clocks are left alone for {self._pause_until_s - now_s:.0f} s",
            "see whether another program sets clocks, and `nvidia-smi -q -d PERFORMANCE,CLOCK`",
        )  # fmt: skip

    # ------------------------------------------------------------------ said, without consequences here

    @staticmethod
    def _keeper(facts: Facts, conditions: Conditions) -> None:
        name = type(facts.clock_error).__name__
        if name == "KeeperGone":
            conditions.tell(
                "KeeperGone", Severity.CRITICAL, facts.now_s, str(facts.clock_error),
                "start the keeper (`systemctl status rlgov-keeper`); it restores the clocks when it starts, "
                "and the governor connects again by itself",
            )  # fmt: skip
        elif name == "LeaseLost":
            conditions.happened(
                "LeaseLost", Severity.WARNING, facts.now_s, str(facts.clock_error),
                "the governor was too slow to renew it: see Overrun and the machine's load",
            )  # fmt: skip


def worst(facts: Facts) -> str:
    """The worst verdict of a lock's GPUs, or none."""
    if facts.check.asked_mhz is None:
        return "none"
    order = (Verdict.UNVERIFIED, Verdict.EXCUSED, Verdict.IDLE, Verdict.HELD)
    found = {gpu.verdict for gpu in facts.check.gpus}
    return next((str(verdict) for verdict in order if verdict in found), str(Verdict.UNVERIFIED))
