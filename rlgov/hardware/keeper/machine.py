"""Who may set which GPU's clock, for how long, and what happens when they are gone. Pure: no I/O, no clock.

Every method that changes the world is a generator: it names one effect after the other, is told what came of
each, and returns its answer, or raises :class:`~rlgov.hardware.keeper.values.Refused`. Whatever happens to a
lease, its GPUs go by way of RESTORING back to FREE: restoring is tried until it succeeds. The one exception
is a GPU whose clock somebody else changed: it is left as it is, YIELDED, until it is re-armed.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from rlgov.hardware.keeper.accounts import GpuBook, LeaseBook, choose_clock, offered_mhz
from rlgov.hardware.keeper.restoring import REARM, Restoration
from rlgov.hardware.keeper.values import (
    Checked,
    Claim,
    Code,
    Failure,
    Forget,
    Inspect,
    KeeperState,
    Lease,
    Measure,
    Note,
    Phase,
    Refused,
    Save,
    SavedLock,
    SetLock,
    Unclaim,
)
from rlgov.hardware.keeper.verifying import Verification, seen

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from rlgov.hardware.keeper.values import KeeperSettings, Offer, Peer, Steps


class LeaseMachine:
    """The leases of one machine's GPUs.

    Args:
        offers: The GPUs.
        settings: The administrator's bounds, and how patient to be.
    """

    def __init__(self, offers: Iterable[Offer], settings: KeeperSettings) -> None:
        self._settings = settings
        self._gpus = {offer.uuid: GpuBook.of(offer, settings) for offer in offers}
        self._leases: dict[int, LeaseBook] = {}
        self._ended: dict[int, Refused] = {}  # what to tell clients whose lease we ended
        self._stopping = False
        self.counts: Counter[str] = Counter()
        self._restoration = Restoration(settings, self.counts)
        self._verification = Verification(settings, self._restoration)

    # ------------------------------------------------------------------ what clients ask

    def lock(
        self, client: int, peer: Peer, uuids: tuple[str, ...], asked_mhz: int, ttl_s: float, now_s: float
    ) -> Steps[Lease]:
        """Lease a group if it is not leased yet, renew the lease, and hold all its GPUs at a clock, or none.

        Args:
            client: The connection it comes from.
            peer: The process at the other end.
            uuids: The group.
            asked_mhz: The clock wished for.
            ttl_s: How long the lease shall live without renewal.
            now_s: Now.

        Raises:
            Refused: With the reason. All GPUs are then as before, or restored.
        """
        gpus = self._group(uuids)
        lease = self._leases.get(client)
        if lease is None:
            if (ended := self._ended.pop(client, None)) is not None:
                raise ended
            self._admit(gpus, now_s)
        elif lease.uuids != uuids:
            raise Refused(
                Code.WRONG_GROUP,
                f"this connection leases {', '.join(lease.uuids)}; release that first, or use a connection "
                "for each group",
                lease.uuids,
            )
        settings = self._settings
        ttl_s = min(max(ttl_s, settings.shortest_lease_s), settings.longest_lease_s)
        if lease is not None:
            lease.renew(now_s, ttl_s)  # whatever becomes of the wish: its holder is alive
        wanted_mhz = choose_clock(gpus, asked_mhz)
        if lease is None or lease.asked_mhz != wanted_mhz:
            self._not_too_soon(gpus, now_s)
        if lease is None:
            yield from self._examine(gpus)
            lease = LeaseBook(client, peer, gpus, ttl_s, now_s + ttl_s)
            self._leases[client] = lease
            for gpu in gpus:
                gpu.phase, gpu.owner, gpu.why = Phase.LEASED, lease, ""
            self.counts["leases"] += 1
        if lease.asked_mhz != wanted_mhz:
            yield from self._change(lease, wanted_mhz, now_s)
        return Lease(lease.uuids, wanted_mhz, lease.ttl_s, lease.expires_s - now_s)

    def renew(self, client: int, now_s: float) -> Lease:
        """Start the lease's time to live anew. Raises Refused where there is none, with what became of it."""
        try:
            lease = self._lease(client)
        except Refused:
            self._ended.pop(client, None)  # told; a new lock begins a new lease
            raise
        lease.renew(now_s)
        return Lease(lease.uuids, lease.asked_mhz or 0, lease.ttl_s, lease.ttl_s)

    def release(self, client: int, now_s: float) -> Steps[tuple[str, ...]]:
        """End the lease and restore; without a lease, nothing. The GPUs that could not be restored yet."""
        lease = self._leases.get(client)
        if lease is None:
            return ()
        yield from self._end(lease, None, now_s)
        return tuple(gpu.uuid for gpu in lease.gpus if gpu.phase is Phase.RESTORING and gpu.attempts)

    def check(self, client: int, now_s: float) -> Steps[Checked]:
        """Measure the leased GPUs now. Raises Refused where there is no lease."""
        lease = self._lease(client)
        checks = []
        for gpu in lease.gpus:
            outcome = yield Measure(gpu.uuid)
            checks.append(seen(gpu, outcome))
        return Checked(
            lease.asked_mhz or 0, now_s - lease.locked_at_s, lease.expires_s - now_s, tuple(checks)
        )

    def disconnect(self, client: int, now_s: float) -> Steps[None]:
        """The client is gone: restore at once."""
        self._ended.pop(client, None)
        lease = self._leases.get(client)
        if lease is not None:
            self.counts["clients_gone"] += 1
            yield Note(f"process {lease.peer.pid} went away with a lease; restoring {', '.join(lease.uuids)}")
            yield from self._end(lease, None, now_s)

    def rearm(self, uuids: tuple[str, ...]) -> Steps[tuple[str, ...]]:
        """Lease GPUs again that were left to somebody else, or whose driver ignored locks.

        Args:
            uuids: Which; all of them if empty.

        Returns:
            Those that had not been leased out before this.

        Raises:
            Refused: A GPU is not there.
        """
        rearmed = []
        for gpu in self._known(uuids) if uuids else tuple(self._gpus.values()):
            if gpu.strikes:
                gpu.strikes, gpu.suspended_until_s = 0, float("-inf")
                rearmed.append(gpu.uuid)
            gpu.yield_after = ""
            if gpu.phase is Phase.YIELDED:
                gpu.freed()
                yield Forget(gpu.uuid)
                rearmed.append(gpu.uuid)
        return tuple(dict.fromkeys(rearmed))

    # ------------------------------------------------------------------ what happens by itself

    def recover(self, saved: Sequence[SavedLock], now_s: float) -> Steps[None]:
        """Take up what an earlier keeper left: restore its locks, leave what it left to others."""
        for lock in saved:
            gpu = self._gpus.get(lock.uuid)
            if gpu is None:
                yield Note(f"{lock.uuid} was left locked, but there is no such GPU any more", grave=True)
            elif lock.yielded:
                gpu.phase, gpu.why = Phase.YIELDED, lock.yielded
            else:
                gpu.phase, gpu.touched, gpu.why = Phase.RESTORING, True, "left locked by an earlier keeper"
                gpu.restore_mhz = lock.restore_clock_mhz
                gpu.locked_mhz = max(lock.clocks_mhz, default=None)
                gpu.confirmed = lock.confirmed and len(lock.clocks_mhz) == 1
                self.counts["recovered"] += 1
        for gpu in self._gpus.values():
            if gpu.phase is Phase.RESTORING:
                yield from self._restoration.attempt(gpu, now_s)

    def tick(self, now_s: float) -> Steps[None]:
        """End what has expired, try again to restore what could not be, measure what is locked."""
        for lease in tuple(self._leases.values()):
            if now_s >= lease.expires_s:
                self.counts["expired"] += 1
                told = f"the lease was not renewed for {lease.ttl_s:g} s; the clocks were restored"
                yield Note(f"process {lease.peer.pid}: {told}")
                yield from self._end(lease, Refused(Code.LEASE_LOST, told, lease.uuids), now_s)
        for gpu in self._gpus.values():
            if gpu.phase is Phase.RESTORING and now_s >= gpu.retry_at_s:
                yield from self._restoration.attempt(gpu, now_s)
        for lease in tuple(self._leases.values()):
            if lease.asked_mhz is not None and now_s >= lease.next_check_s:
                lease.next_check_s = now_s + self._settings.check_interval_s
                yield from self._verify(lease, now_s)

    def restore_all(self, why: str, now_s: float) -> Steps[None]:
        """Take every clock back for the administrator, and lease none of them until re-armed."""
        for gpu in self._gpus.values():
            if gpu.phase is not Phase.YIELDED:
                gpu.yield_after = why
        for lease in tuple(self._leases.values()):
            yield from self._end(lease, Refused(Code.LEASE_LOST, why, lease.uuids), now_s)
        for gpu in self._gpus.values():
            if gpu.phase is Phase.FREE:
                yield from self._restoration.leave(gpu, why)

    def stop(self, now_s: float) -> Steps[None]:
        """Lease nothing any more, and restore everything."""
        self._stopping = True
        for lease in tuple(self._leases.values()):
            end = Refused(Code.LEASE_LOST, "the keeper is stopping; the clocks were restored", lease.uuids)
            yield from self._end(lease, end, now_s)

    def deadline_s(self) -> float:
        """When :meth:`tick` has something to do next; infinite if nothing is out."""
        times_s = [gpu.retry_at_s for gpu in self._gpus.values() if gpu.phase is Phase.RESTORING]
        for lease in self._leases.values():
            times_s += [lease.expires_s, lease.next_check_s if lease.asked_mhz is not None else float("inf")]
        return min(times_s, default=float("inf"))

    @property
    def restoring(self) -> tuple[str, ...]:
        """GPUs that are not yet as they were found."""
        return tuple(gpu.uuid for gpu in self._gpus.values() if gpu.phase is Phase.RESTORING)

    def holds(self, client: int) -> bool:
        """Whether a client has a lease."""
        return client in self._leases

    def offered_mhz(self, uuids: tuple[str, ...]) -> tuple[int, ...]:
        """Clocks that a group may be locked at, descending. Raises Refused where there is none."""
        gpus = self._group(uuids)
        _allowed(gpus)
        return offered_mhz(gpus)

    def state(self, now_s: float) -> KeeperState:
        """An account of everything."""
        return KeeperState(tuple(gpu.told(now_s) for gpu in self._gpus.values()), dict(self.counts))

    # ------------------------------------------------------------------ taking on

    def _known(self, uuids: tuple[str, ...]) -> tuple[GpuBook, ...]:
        if missing := tuple(uuid for uuid in uuids if uuid not in self._gpus):
            raise Refused(
                Code.UNKNOWN_GPU,
                f"no GPU has the UUID {', '.join(missing)}; there are: {', '.join(self._gpus) or 'none'}",
                missing,
            )
        return tuple(self._gpus[uuid] for uuid in uuids)

    def _group(self, uuids: tuple[str, ...]) -> tuple[GpuBook, ...]:
        if not uuids or len(set(uuids)) != len(uuids):
            raise Refused(Code.UNKNOWN_GPU, "name the GPUs of the group, each of them once", uuids)
        return self._known(uuids)

    def _admit(self, gpus: Sequence[GpuBook], now_s: float) -> None:
        """Raise unless these GPUs may be leased now."""
        if self._stopping:
            raise Refused(Code.STOPPING, "the keeper is stopping; try again when it runs")
        if yielded := tuple(gpu for gpu in gpus if gpu.phase is Phase.YIELDED):
            told = "; ".join(f"{gpu.uuid}: {gpu.why}" for gpu in yielded)
            raise Refused(
                Code.FOREIGN_WRITER,
                f"{told}. Find out who, then: {REARM}",
                tuple(gpu.uuid for gpu in yielded),
            )
        _allowed(gpus)
        for gpu in gpus:
            if gpu.owner is not None:
                raise Refused(
                    Code.TAKEN,
                    f"{gpu.uuid} is leased to process {gpu.owner.peer.pid}; one at a time: end that one",
                    (gpu.uuid,),
                )
            if gpu.phase is Phase.RESTORING:
                raise Refused(
                    Code.RESTORING, f"{gpu.uuid} is still being restored: {gpu.why}; try again", (gpu.uuid,)
                )
            if now_s < gpu.suspended_until_s:
                raise Refused(
                    Code.SUSPENDED,
                    f"{gpu.uuid}: its driver accepts locks and does not carry them out; look for a power "
                    f"limit, MIG or another tool, then: {REARM}; else wait "
                    f"{gpu.suspended_until_s - now_s:.0f} s",
                    (gpu.uuid,),
                )

    def _examine(self, gpus: Sequence[GpuBook]) -> Steps[None]:
        """Claim a group, all of it or none."""
        for number, gpu in enumerate(gpus):
            code, outcome = Code.NOT_ALLOWED, (yield Inspect(gpu.uuid))
            if not isinstance(outcome, Failure):
                code, outcome = Code.TAKEN, (yield Claim(gpu.uuid))
            if isinstance(outcome, Failure):
                for claimed in gpus[:number]:
                    yield Unclaim(claimed.uuid)
                raise Refused(code, outcome.message, (gpu.uuid,))

    def _not_too_soon(self, gpus: Sequence[GpuBook], now_s: float) -> None:
        since_s = now_s - max(gpu.written_at_s for gpu in gpus)
        if since_s < self._settings.write_interval_s:
            raise Refused(
                Code.TOO_SOON,
                f"the clock was set {since_s:.2f} s ago; wait {self._settings.write_interval_s} s",
            )
        if suspect := tuple(gpu.uuid for gpu in gpus if gpu.suspicions):
            told = ", ".join(suspect)
            raise Refused(Code.TOO_SOON, f"{told} does not run at its lock; looking into it", suspect)

    def _lease(self, client: int) -> LeaseBook:
        lease = self._leases.get(client)
        if lease is not None:
            return lease
        ended = self._ended.get(client)
        raise ended or Refused(Code.NO_LEASE, "nothing is leased on this connection; lock a clock first")

    # ------------------------------------------------------------------ locking

    def _change(self, lease: LeaseBook, wanted_mhz: int, now_s: float) -> Steps[None]:
        """Set all and have all answer, or put all back. What may be in force is saved before it may be."""
        before_mhz = lease.asked_mhz
        for gpu in lease.gpus:
            kept = SavedLock(gpu.uuid, gpu.restore_mhz, gpu.saved(before_mhz, wanted_mhz).clocks_mhz)
            outcome = yield Save(kept)
            if isinstance(outcome, Failure):
                if before_mhz is None:
                    yield from self._end(lease, None, now_s)
                raise Refused(Code.CANNOT_SAVE, f"{outcome.message}; without that no clock is set")
        failure: Failure | None = None
        tried: list[GpuBook] = []
        for gpu in lease.gpus:
            gpu.touched, gpu.confirmed, gpu.suspicions, gpu.written_at_s = True, False, 0, now_s
            tried.append(gpu)
            outcome = yield SetLock(gpu.uuid, wanted_mhz)
            if isinstance(outcome, Failure):
                failure = outcome
                self._restoration.failed(gpu, failure)
                break
        for gpu in lease.gpus if failure is None else ():
            outcome = yield Measure(gpu.uuid)
            if isinstance(outcome, Failure):
                failure = outcome
                self._restoration.failed(gpu, failure)
                break
        if failure is not None:
            restored = yield from self._roll_back(lease, tried, before_mhz, failure, now_s)
            raise Refused(Code.DRIVER, f"{failure.message} [{restored}]", lease.uuids)
        lease.asked_mhz, lease.locked_at_s = wanted_mhz, now_s
        lease.next_check_s = now_s + self._settings.settle_s
        for gpu in lease.gpus:
            gpu.locked_mhz = wanted_mhz
        self.counts["locks"] += 1

    def _roll_back(
        self,
        lease: LeaseBook,
        tried: Sequence[GpuBook],
        before_mhz: int | None,
        failure: Failure,
        now_s: float,
    ) -> Steps[str]:
        self.counts["rolled_back"] += 1
        lost = any(gpu.lost for gpu in lease.gpus)
        if before_mhz is not None and not lost:
            for gpu in tried:
                outcome = yield SetLock(gpu.uuid, before_mhz)
                if isinstance(outcome, Failure):
                    break
            else:
                lease.locked_at_s, lease.next_check_s = now_s, now_s + self._settings.settle_s
                return f"all GPUs are back at {before_mhz} MHz"
        end = None
        if before_mhz is not None:
            end = Refused(Code.LEASE_LOST, f"{failure.message}; the clocks were restored", lease.uuids)
        yield from self._end(lease, end, now_s)
        if open_ones := [gpu.uuid for gpu in lease.gpus if gpu.phase is Phase.RESTORING]:
            return f"restored, but for {', '.join(open_ones)}, which is tried again until it is"
        return "all GPUs are restored"

    # ------------------------------------------------------------------ giving back

    def _verify(self, lease: LeaseBook, now_s: float) -> Steps[None]:
        """Measure the group; give it up where it is lost, ignored, or somebody else's."""
        finding = yield from self._verification.verify(lease, now_s)
        if finding.foreign:
            self.counts["foreign"] += 1
            uuids = tuple(gpu.uuid for gpu in finding.foreign)
            why = f"somebody else changed its clock from our {lease.asked_mhz} MHz"
            for gpu in lease.gpus:
                gpu.contested = True
            told = Refused(
                Code.FOREIGN_WRITER, f"{', '.join(uuids)}: {why}. Find out who, then: {REARM}", uuids
            )
            yield from self._end(lease, told, now_s, finding.foreign, why)
        elif finding.why:
            self.counts["unverified"] += 1
            yield Note(f"{finding.why}; restoring {', '.join(lease.uuids)}", grave=True)
            told = Refused(Code.LEASE_LOST, f"{finding.why}; the clocks were restored", lease.uuids)
            yield from self._end(lease, told, now_s)

    def _end(
        self,
        lease: LeaseBook,
        told: Refused | None,
        now_s: float,
        foreign: Sequence[GpuBook] = (),
        why: str = "",
    ) -> Steps[None]:
        """End a lease: every GPU is to be restored, but for those that are somebody else's now."""
        del self._leases[lease.client]
        if told is not None:
            self._ended[lease.client] = told
        for gpu in lease.gpus:  # all of them first: whatever happens in between, none is forgotten
            gpu.phase, gpu.owner, gpu.attempts, gpu.retry_at_s = Phase.RESTORING, None, 0, now_s
            gpu.suspicions = gpu.suspicions if gpu.contested else 0
        for gpu in lease.gpus:
            if gpu in foreign:
                yield from self._restoration.leave(gpu, why)
            else:
                yield from self._restoration.attempt(gpu, now_s)


def _allowed(gpus: Sequence[GpuBook]) -> None:
    for gpu in gpus:
        if gpu.refusal:
            raise Refused(Code.NOT_ALLOWED, gpu.refusal, (gpu.uuid,))
