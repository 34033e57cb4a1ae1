"""GPUs, files and claims in memory, for a keeper on a virtual clock. All of them can fail, and the keeper can
die at any call of theirs.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from rlgov.clock import VirtualClock
from rlgov.errors import HardwareError
from rlgov.hardware.clocks import ClockState
from rlgov.hardware.keeper.keeper import Keeper
from rlgov.hardware.keeper.protocol import (
    Request,
    get_checked,
    get_lease,
    parse_answer,
    request_line,
)
from rlgov.hardware.keeper.values import (
    Checked,
    KeeperSettings,
    KeeperState,
    Lease,
    Note,
    Offer,
    Peer,
    SavedLock,
)
from rlgov.hardware.nvml import NvmlError
from rlgov.hardware.throttle import GPU_IDLE, SW_POWER_CAP

SUPPORTED_MHZ = (1980, 1800, 1600, 1400, 1200, 1000)
TOP_MHZ = SUPPORTED_MHZ[0]
IDLE_MHZ = 345


class KilledError(BaseException):
    """The keeper died here. No error: nothing must catch it."""


@dataclass
class FakeGpu:
    """One GPU as the driver has it."""

    lock_mhz: int | None = None
    ours: bool = False  # who set that: a keeper, or somebody else
    busy: bool = True
    ignores: bool = False  # accepts a lock and does nothing
    cap_mhz: int | None = None
    reasons: frozenset[str] = frozenset()
    fault: str = ""  # what NVML answers to everything
    write_fault: str = ""  # what it answers to locks and resets
    refusal: str = ""  # MIG and the like, since the start or later

    @property
    def state(self) -> ClockState:
        free_mhz = TOP_MHZ if self.busy else IDLE_MHZ
        wanted_mhz = free_mhz if self.lock_mhz is None else self.lock_mhz
        reasons = self.reasons | (frozenset() if self.busy else {GPU_IDLE})
        if self.cap_mhz is not None and self.cap_mhz < wanted_mhz:
            return ClockState(self.cap_mhz, reasons | {SW_POWER_CAP})
        return ClockState(wanted_mhz, reasons)


@dataclass
class Machine:
    """What outlives a keeper: GPUs, saved locks, who claims what. A :class:`KeeperDriver`, too."""

    gpus: dict[str, FakeGpu]
    restore_mhz: int | None = None
    saved: dict[str, SavedLock] = field(default_factory=dict)
    held: set[str] = field(default_factory=set)  # claimed by the keeper
    held_elsewhere: set[str] = field(default_factory=set)
    full: bool = False  # of the disk
    dies_in: int = -1  # calls until the keeper dies, half of the time after the call took effect
    writes: list[tuple[str, int | None]] = field(default_factory=list)

    def step(self) -> bool:
        """Count a call; whether the keeper dies after it. Raises KilledError where it dies before it."""
        if self.dies_in < 0:
            return False
        self.dies_in -= 1
        if self.dies_in == 0:
            self.dies_in = -1
            raise KilledError
        return self.dies_in == 1

    # driver

    def offers(self) -> tuple[Offer, ...]:
        return tuple(Offer(uuid, SUPPORTED_MHZ, gpu.refusal) for uuid, gpu in self.gpus.items())

    def inspect(self, uuid: str) -> None:
        self._enter(uuid)
        if refusal := self.gpus[uuid].refusal:
            raise HardwareError(refusal)

    def set_lock(self, uuid: str, sm_clock_mhz: int) -> None:
        self._write(uuid, sm_clock_mhz)

    def reset_lock(self, uuid: str) -> None:
        self._write(uuid, None)

    def clock_state(self, uuid: str) -> ClockState:
        return self._enter(uuid).state

    def _enter(self, uuid: str) -> FakeGpu:
        self.step()
        gpu = self.gpus[uuid]
        if gpu.fault:
            raise NvmlError("nvmlDevice", gpu.fault, uuid)
        return gpu

    def _write(self, uuid: str, mhz: int | None) -> None:
        assert uuid in self.held, "a keeper wrote without the claim"
        saved = self.saved.get(uuid)
        assert saved is not None, "a keeper wrote before it saved"
        assert not saved.yielded, "a keeper wrote on a GPU that it had left to another"
        if mhz != self.restore_mhz:
            assert mhz in saved.clocks_mhz, "a keeper wrote something else than it saved"
        after = self.step()
        gpu = self.gpus[uuid]
        for fault in (gpu.fault, gpu.write_fault):
            if fault:
                raise NvmlError("nvmlDeviceSetGpuLockedClocks", fault, uuid)
        self.writes.append((uuid, mhz))
        if not gpu.ignores:
            gpu.lock_mhz, gpu.ours = mhz, True
        if after:
            raise KilledError

    # saves

    def save(self, lock: SavedLock) -> None:
        after = self.step()
        if self.full:
            raise OSError(28, "No space left on device")
        self.saved[lock.uuid] = lock
        if after:
            raise KilledError

    def forget(self, uuid: str) -> None:
        after = self.step()
        self.saved.pop(uuid, None)
        if after:
            raise KilledError

    def load(self, otherwise_mhz: int | None) -> tuple[SavedLock, ...]:
        del otherwise_mhz
        return tuple(self.saved.values())

    # claims

    def take(self, uuid: str) -> None:
        self.step()
        if uuid in self.held_elsewhere:
            raise HardwareError(f"{uuid} is set by another: rlgov, process 1")
        self.held.add(uuid)

    def give_up(self, uuid: str) -> None:
        self.step()
        self.held.discard(uuid)

    # what others do

    def foreign(self, uuid: str, mhz: int | None) -> None:
        """Somebody else locks a GPU, or removes a lock."""
        self.gpus[uuid].lock_mhz, self.gpus[uuid].ours = mhz, False

    def as_found(self, uuid: str) -> bool:
        """Whether a GPU is at the saved state, or higher, or as somebody else set it."""
        gpu = self.gpus[uuid]
        if gpu.lock_mhz is None or not gpu.ours:
            return True
        return self.restore_mhz is not None and gpu.lock_mhz >= self.restore_mhz


class Bench:
    """A keeper over a :class:`Machine`, on a virtual clock, asked through its protocol.

    Args:
        gpus: How many.
        settings: The administrator's.
    """

    def __init__(self, gpus: int = 4, settings: KeeperSettings | None = None) -> None:
        self.settings = KeeperSettings() if settings is None else settings
        self.clock = VirtualClock(1000.0)
        restore_mhz = self.settings.restore_clock_mhz
        self.machine = Machine(
            {f"GPU-{number}": FakeGpu(lock_mhz=restore_mhz) for number in range(gpus)}, restore_mhz
        )
        self.said: list[Note] = []
        self.number = 0
        self.start()

    @property
    def uuids(self) -> tuple[str, ...]:
        return tuple(self.machine.gpus)

    def start(self) -> None:
        """A keeper, before it recovers."""
        machine = self.machine
        machine.held.clear()  # flocks end with their process
        machine.dies_in = -1
        self.keeper = Keeper(machine, machine, machine, self.settings, self.clock, say=self.said.append)

    def ask(self, client: int, do: str, **fields: object) -> dict[str, object]:
        """Raises Refused."""
        self.number += 1
        line = request_line(Request(self.number, do, **fields))  # type: ignore[arg-type]  # as the kind wants
        answer, sensible = self.keeper.answer(client, Peer(1000 + client, 0), line)
        assert sensible
        return parse_answer(answer, self.number)

    def lock(self, client: int, gpus: tuple[str, ...], mhz: int, ttl_s: float = 3.0) -> Lease:
        return get_lease(self.ask(client, "lock", gpus=gpus, sm_clock_mhz=mhz, ttl_s=ttl_s))

    def check(self, client: int) -> Checked:
        return get_checked(self.ask(client, "check"))

    def state(self) -> KeeperState:
        return self.keeper.state()

    def phase(self, uuid: str) -> str:
        return next(gpu.phase for gpu in self.state().gpus if gpu.uuid == uuid)

    def why(self, uuid: str) -> str:
        return next(gpu.why for gpu in self.state().gpus if gpu.uuid == uuid)

    def locks_mhz(self) -> tuple[int | None, ...]:
        return tuple(gpu.lock_mhz for gpu in self.machine.gpus.values())

    def run(self, duration_s: float) -> None:
        """Let time pass as the server's loop does: it wakes when something is due, and every second."""
        until_s = self.clock.monotonic_s() + duration_s
        while (left_s := until_s - self.clock.monotonic_s()) > 0:
            self.clock.advance_s(min(max(self.keeper.due_in_s(), 0.001), 1.0, left_s))
            self.keeper.tick()

    def run_renewing(self, duration_s: float, *clients: int) -> None:
        """As :meth:`run`, with clients that are alive."""
        until_s = self.clock.monotonic_s() + duration_s
        while self.clock.monotonic_s() < until_s:
            self.run(min(1.0, until_s - self.clock.monotonic_s()))
            for client in clients:
                self.ask(client, "renew")
