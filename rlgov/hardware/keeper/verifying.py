"""Whether a leased group runs at its lock, and if it does not, whose doing that is. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from rlgov.hardware.clocks import GpuCheck, Verdict
from rlgov.hardware.keeper.values import FIRST_SUSPENSION_S, Failure, Measure, Save

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rlgov.hardware.keeper.accounts import GpuBook, LeaseBook
    from rlgov.hardware.keeper.restoring import Restoration
    from rlgov.hardware.keeper.values import KeeperSettings, Outcome, Steps


@dataclass(frozen=True, slots=True)
class Finding:
    """Why a lease cannot go on. All empty: it can."""

    foreign: tuple[GpuBook, ...] = ()  # somebody else changed these
    why: str = ""  # lost, silent or ignoring GPUs


def seen(gpu: GpuBook, outcome: Outcome) -> GpuCheck:
    """One measurement, judged."""
    if outcome is None or isinstance(outcome, Failure):
        return GpuCheck(gpu.uuid, None, frozenset(), Verdict.UNVERIFIED)
    return GpuCheck(gpu.uuid, outcome.sm_clock_mhz, outcome.throttle_reasons, gpu.judge(outcome))


class Verification:
    """Measures groups.

    Args:
        settings: How patient to be.
        restoration: Where failures of the driver are noted.
    """

    def __init__(self, settings: KeeperSettings, restoration: Restoration) -> None:
        self._settings = settings
        self._restoration = restoration

    def verify(self, lease: LeaseBook, now_s: float) -> Steps[Finding]:
        """Measure a group once."""
        foreign: list[GpuBook] = []
        ignored: list[GpuBook] = []
        for gpu in lease.gpus:
            outcome = yield Measure(gpu.uuid)
            gpu.verdict = seen(gpu, outcome).verdict
            if self._unreadable(gpu, outcome):
                continue
            if gpu.verdict == Verdict.HELD:
                if gpu.held():
                    yield Save(gpu.saved(gpu.locked_mhz))  # where it fails, a later keeper just restores
            elif gpu.verdict != Verdict.UNVERIFIED:
                gpu.suspicions = 0
            else:
                gpu.suspicions += 1
                if gpu.suspicions >= self._settings.checks:
                    (foreign if gpu.changed_by_another(outcome) else ignored).append(gpu)
        if foreign:
            return Finding(tuple(foreign))
        return Finding(why=self._why(lease.gpus, ignored, now_s))

    def _unreadable(self, gpu: GpuBook, outcome: Outcome) -> bool:
        unreadable = outcome is None or isinstance(outcome, Failure)
        gpu.unreadable = gpu.unreadable + 1 if unreadable else 0
        if isinstance(outcome, Failure):
            self._restoration.failed(gpu, outcome)
        return unreadable

    def _why(self, gpus: Sequence[GpuBook], ignored: Sequence[GpuBook], now_s: float) -> str:
        if lost := [gpu.uuid for gpu in gpus if gpu.lost]:
            return f"{', '.join(lost)} is lost; take its work away and see dmesg"
        if silent := [gpu.uuid for gpu in gpus if gpu.unreadable >= self._settings.checks]:
            return f"{', '.join(silent)} cannot be measured"
        for gpu in ignored:
            gpu.strikes += 1
            pause_s = FIRST_SUSPENSION_S * 2.0 ** min(gpu.strikes - 1, 30)
            gpu.suspended_until_s = now_s + min(pause_s, self._settings.longest_suspension_s)
        named = ", ".join(gpu.uuid for gpu in ignored)
        return f"{named}: the driver accepted a lock and does not hold it" if ignored else ""
