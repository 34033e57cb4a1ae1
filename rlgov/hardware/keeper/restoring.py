"""How one GPU gets back to what was found: tried until it is so, or left to whoever changed it. Pure."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rlgov.hardware.keeper.values import (
    Claim,
    Failure,
    Forget,
    Measure,
    Note,
    Phase,
    ResetLock,
    Save,
    SavedLock,
    SetLock,
    Unclaim,
)

if TYPE_CHECKING:
    from collections import Counter

    from rlgov.hardware.keeper.accounts import GpuBook
    from rlgov.hardware.keeper.values import KeeperSettings, Steps

LOST = frozenset({"GPU_IS_LOST", "RESET_REQUIRED"})
REARM = "rlgov-keeper --rearm"


class Restoration:
    """The way from RESTORING to FREE, or to YIELDED.

    Args:
        settings: How patient to be.
        counts: What happened, by kind.
    """

    def __init__(self, settings: KeeperSettings, counts: Counter[str]) -> None:
        self._settings = settings
        self._counts = counts

    def attempt(self, gpu: GpuBook, now_s: float) -> Steps[None]:
        """Try once. What fails is tried again later; what differs from our lock is looked into first."""
        if gpu.touched:
            if gpu.confirmed and (yield from self._overridden(gpu, now_s)):
                return
            failure = yield from self._put_back(gpu)
            if failure is not None:
                self._retry_later(gpu, failure, now_s)
                if gpu.attempts == 1:
                    yield Note(f"{gpu.uuid} could not be restored: {failure.message}", grave=True)
                return
            self._counts["restored"] += 1
        why = gpu.yield_after
        gpu.freed()
        outcome = yield Forget(gpu.uuid)
        if isinstance(outcome, Failure):
            yield Note(outcome.message, grave=True)
        if why:
            yield from self.leave(gpu, why)
        else:
            yield Unclaim(gpu.uuid)

    def leave(self, gpu: GpuBook, why: str) -> Steps[None]:
        """Leave a GPU as it is, to whoever set it so, until it is re-armed."""
        gpu.freed()
        gpu.phase, gpu.why = Phase.YIELDED, why
        yield Note(f"{gpu.uuid} is left as it is: {why}. It is leased again after: {REARM}", grave=True)
        outcome = yield Save(SavedLock(gpu.uuid, gpu.restore_mhz, (), yielded=why))
        if isinstance(outcome, Failure):
            yield Note(outcome.message, grave=True)
        yield Unclaim(gpu.uuid)

    def failed(self, gpu: GpuBook, failure: Failure) -> None:
        """Note that a driver did not do as it was told."""
        gpu.lost = gpu.lost or failure.code in LOST
        self._counts["driver_failures"] += 1

    def _overridden(self, gpu: GpuBook, now_s: float) -> Steps[bool]:
        """Whether another's lock is, or may be, in place of ours; one measurement does not decide it."""
        seen = yield Measure(gpu.uuid)
        if seen is None or isinstance(seen, Failure) or not gpu.overridden(seen):
            return False
        gpu.suspicions += 1
        gpu.retry_at_s = now_s + self._settings.check_interval_s
        gpu.why = "its clock is not the one that was set; looking into it"
        if gpu.suspicions >= self._settings.checks:
            self._counts["foreign"] += 1
            yield from self.leave(gpu, f"somebody else changed its clock from {gpu.locked_mhz} MHz")
        return True

    def _put_back(self, gpu: GpuBook) -> Steps[Failure | None]:
        outcome = yield Claim(gpu.uuid)
        if not isinstance(outcome, Failure):
            if gpu.confirmed:
                # A keeper that dies after the next effect must not take it for somebody else's change.
                gpu.confirmed = False
                yield Save(gpu.saved(gpu.locked_mhz))
            if gpu.restore_mhz is None:
                outcome = yield ResetLock(gpu.uuid)
            else:
                outcome = yield SetLock(gpu.uuid, gpu.restore_mhz)
        return outcome if isinstance(outcome, Failure) else None

    def _retry_later(self, gpu: GpuBook, failure: Failure, now_s: float) -> None:
        self.failed(gpu, failure)
        settings = self._settings
        pause_s = settings.first_retry_s * 2.0 ** min(gpu.attempts, 30)
        gpu.attempts += 1
        gpu.why = failure.message
        gpu.retry_at_s = now_s + (
            settings.longest_retry_s if gpu.lost else min(pause_s, settings.longest_retry_s)
        )
