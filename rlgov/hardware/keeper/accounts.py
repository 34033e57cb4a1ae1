"""The lease machine's own books: one record a GPU, one a lease, and what follows from them alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from rlgov.errors import HardwareError
from rlgov.hardware.clocks import TOLERANCE_MHZ, ClockState, Verdict, judge_clock, snap_clock
from rlgov.hardware.keeper.values import Code, Kept, Phase, Refused, SavedLock

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rlgov.hardware.keeper.values import KeeperSettings, Offer, Outcome, Peer

NEVER_S = float("-inf")


@dataclass(slots=True)
class LeaseBook:
    """One lease. The group's GPUs are one unit."""

    client: int
    peer: Peer
    gpus: tuple[GpuBook, ...]
    ttl_s: float
    expires_s: float
    asked_mhz: int | None = None  # in force on all GPUs; None: nothing was locked yet
    locked_at_s: float = 0.0
    next_check_s: float = 0.0

    @property
    def uuids(self) -> tuple[str, ...]:
        """The group, in the client's order."""
        return tuple(gpu.uuid for gpu in self.gpus)

    def renew(self, now_s: float, ttl_s: float | None = None) -> None:
        """Start the time to live anew."""
        self.ttl_s = self.ttl_s if ttl_s is None else ttl_s
        self.expires_s = now_s + self.ttl_s


@dataclass(slots=True)
class GpuBook:
    """One GPU."""

    uuid: str
    every_mhz: tuple[int, ...]  # supported, descending
    offered_mhz: tuple[int, ...]  # of these, within the administrator's bounds
    refusal: str
    restore_mhz: int | None
    phase: Phase = Phase.FREE
    owner: LeaseBook | None = None
    touched: bool = False  # something may differ from what was found
    locked_mhz: int | None = None  # what we last set, if nothing else came between
    confirmed: bool = False  # measured at exactly that clock since it was set
    obedient: bool = False  # has been measured at a lock that an unlocked GPU would exceed
    written_at_s: float = NEVER_S
    suspicions: int = 0  # measurements in a row that contradict the lock
    contested: bool = False  # another GPU of the group was taken over; a clock below ours is suspicious, too
    unreadable: int = 0  # in a row
    strikes: int = 0
    suspended_until_s: float = NEVER_S
    attempts: int = 0
    retry_at_s: float = NEVER_S
    lost: bool = False
    yield_after: str = ""  # once restored, leave it to the administrator, for this reason
    verdict: str = ""
    why: str = ""

    @classmethod
    def of(cls, offer: Offer, settings: KeeperSettings) -> GpuBook:
        """The record of a GPU that nothing was done to yet."""
        every = tuple(sorted(offer.supported_mhz, reverse=True))
        bounded = tuple(clock for clock in every if settings.floor_mhz <= clock <= settings.ceiling_mhz)
        refusal = offer.refusal
        if not refusal and not bounded:
            refusal = (
                f"{offer.uuid} has no SM clock between the administrator's {settings.floor_mhz} and "
                f"{settings.ceiling_mhz} MHz"
            )
        return cls(offer.uuid, every, bounded, refusal, settings.restore_clock_mhz)

    def judge(self, state: ClockState) -> Verdict:
        """What a measurement says about our lock."""
        if self.locked_mhz is None:
            return Verdict.HELD
        return judge_clock(self.locked_mhz, state.sm_clock_mhz, state.throttle_reasons)

    def overridden(self, state: ClockState) -> bool:
        """Whether a measurement, at the time of restoring, speaks for somebody else's change.

        Only a lock that was measured in force can have been changed. A clock below ours is taken for a
        change only where one was seen on the group: in doubt the lock is removed, which makes the GPU faster.
        """
        if not self.confirmed or self.locked_mhz is None:
            return False
        if state.sm_clock_mhz > self.locked_mhz + TOLERANCE_MHZ:
            return True
        return self.contested and self.judge(state) is Verdict.UNVERIFIED

    def held(self) -> bool:
        """Note a measurement at the lock; whether that is news."""
        news = not self.confirmed
        self.confirmed, self.suspicions = True, 0
        if self.locked_mhz is not None and self.locked_mhz + TOLERANCE_MHZ < self.every_mhz[0]:
            self.obedient, self.strikes = True, 0
        return news

    def changed_by_another(self, state: Outcome) -> bool:
        """Whether a contradiction is somebody else's doing rather than a driver that ignores locks."""
        above = (
            isinstance(state, ClockState)
            and self.locked_mhz is not None
            and state.sm_clock_mhz > self.locked_mhz
        )
        return self.confirmed or (above and self.obedient)

    def saved(self, *clocks_mhz: int | None) -> SavedLock:
        """What to keep, with the clocks that may be in force."""
        clocks = tuple(dict.fromkeys(clock for clock in clocks_mhz if clock is not None))
        return SavedLock(self.uuid, self.restore_mhz, clocks, self.confirmed)

    def freed(self) -> None:
        """It is as it was found."""
        self.phase, self.owner, self.touched, self.lost = Phase.FREE, None, False, False
        self.locked_mhz, self.confirmed, self.contested = None, False, False
        self.suspicions, self.unreadable, self.attempts = 0, 0, 0
        self.verdict = self.why = self.yield_after = ""

    def told(self, now_s: float) -> Kept:
        """For the keeper's account of itself."""
        lease = self.owner
        why = self.why or self.refusal
        if self.phase is Phase.FREE and now_s < self.suspended_until_s:
            why = (
                f"its driver ignored our locks; not leased for another {self.suspended_until_s - now_s:.0f} s"
            )
        return Kept(
            self.uuid,
            self.phase,
            self.offered_mhz,
            self.locked_mhz if lease is None else lease.asked_mhz,
            None if lease is None else lease.peer,
            None if lease is None else lease.expires_s - now_s,
            self.verdict,
            self.attempts,
            self.lost,
            why,
        )


def offered_mhz(gpus: Sequence[GpuBook]) -> tuple[int, ...]:
    """Clocks that all of these GPUs have within the bounds, descending. Raises Refused if there is none."""
    common = set.intersection(*(set(gpu.offered_mhz) for gpu in gpus))
    if not common:
        raise Refused(
            Code.NO_CLOCK, "these GPUs have no SM clock in common within the bounds; lease GPUs of one kind"
        )
    return tuple(sorted(common, reverse=True))


def choose_clock(gpus: Sequence[GpuBook], asked_mhz: int) -> int:
    """The clock that a wish becomes: supported by all, within bounds, at or below the wish where possible.

    Raises:
        Refused: These GPUs have no clock in common, or none at or below the wish.
    """
    offered = offered_mhz(gpus)
    try:
        snap_clock(asked_mhz, tuple(set.intersection(*(set(gpu.every_mhz) for gpu in gpus))))
    except HardwareError as error:
        raise Refused(Code.NO_CLOCK, str(error)) from error
    # Below the floor, the wish is raised to the lowest clock that is offered.
    return max((clock for clock in offered if clock <= asked_mhz), default=offered[-1])
