"""Days of governing in virtual time, with random faults: nothing stays locked, nothing grows."""

from __future__ import annotations

import errno
import gc
import os
from collections import Counter
from dataclasses import dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from rlgov.clock import SystemClock
from rlgov.errors import EngineError, RlgovError
from rlgov.governor.journal import RotatingFiles, RotationSettings, ThreadedJournal
from rlgov.governor.records import Command, CommandKind, Mode
from rlgov.hardware.events import XidEvent
from tests.chaos.plant import GPUS, GovernorKilledError, Plant
from tests.fakes.keeper import SUPPORTED_MHZ

if TYPE_CHECKING:
    from collections.abc import Callable

    from rlgov.clock import VirtualClock
    from rlgov.governor.journal import Journal

HOUR_S: Final = 3600.0
ROTATION: Final = RotationSettings(file_bytes=512 * 1024, files=4)
FAULT_EVERY_S: Final = 60.0  # on average
WATCHDOG_S: Final = 10.0
_QUEUED: Final = 1000
_SYSTEM = SystemClock()


class Disk:
    """Where the journal goes; full at times."""

    def __init__(self, folder: Path) -> None:
        self._files = RotatingFiles(folder, ROTATION)
        self.full = False

    def begin(self, header: str) -> None:
        self._check()
        self._files.begin(header)

    def write_line(self, text: str) -> None:
        self._check()
        self._files.write_line(text)

    def close(self) -> None:
        self._files.close()

    def _check(self) -> None:
        if self.full:
            raise OSError(errno.ENOSPC, "No space left on device")


@dataclass
class Tally:
    """What came of a soak."""

    hours: float
    ticks: int = 0
    acting: int = 0
    locks: int = 0
    governors: int = 0
    keepers: int = 0
    faults: Counter[str] = field(default_factory=Counter)
    conditions: Counter[str] = field(default_factory=Counter)
    reasons: Counter[str] = field(default_factory=Counter)
    broken: list[str] = field(default_factory=list)
    longest_s: float = 0.0  # that something was locked with nobody to hold it, and nothing to excuse it
    leaked: list[str] = field(default_factory=list)  # at the end
    objects: list[int] = field(default_factory=list)  # Python's, after each hour
    resident_bytes: list[int] = field(default_factory=list)  # of this process, after each hour
    handles: list[int] = field(default_factory=list)  # open files, after each hour
    journal_bytes: int = 0
    journal_files: int = 0
    journal_dropped: int = 0

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        counted = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: dict(kept) if isinstance(kept, Counter) else kept for name, kept in counted.items()}


class Soak:
    """A plant, and what happens to it.

    Args:
        folder: For the journal.
        seed: Of everything random.
    """

    def __init__(self, folder: Path, seed: int) -> None:
        self.disk = Disk(folder)
        self.folder = folder
        self.journals: list[ThreadedJournal] = []
        self.plant = Plant(seed, self._journal)
        self.rng = np.random.default_rng((seed, 1))
        self.governor_back_s = 0.0
        self.next_fault_s = self.now_s + FAULT_EVERY_S
        self.down = 0  # faults of the stack that last

    @property
    def now_s(self) -> float:
        return self.plant.clock.monotonic_s()

    def run(self, hours: float, told: Callable[[Tally], None] = lambda _: None) -> Tally:
        """So many hours.

        Args:
            hours: Of virtual time.
            told: Called after each of them.
        """
        tally = Tally(hours)
        began_s, next_hour_s = self.now_s, self.now_s + HOUR_S
        self._measure(tally)
        while self.now_s - began_s < hours * HOUR_S:
            self._governor(tally)
            if self.now_s >= self.next_fault_s:
                self.next_fault_s = self.now_s + float(self.rng.exponential(FAULT_EVERY_S))
                self._strike(tally)
            self._forget(tally)
            if self.now_s >= next_hour_s:
                next_hour_s += HOUR_S
                self._measure(tally)
                told(tally)
        self._end(tally)
        return tally

    # ------------------------------------------------------------------ one turn

    def _governor(self, tally: Tally) -> None:
        plant = self.plant
        if not plant.governor_lives:
            if self.now_s < self.governor_back_s:
                plant.clock.sleep_s(0.5)
                return
            try:
                plant.start_governor()
            except RlgovError:  # the stack does not answer: the service manager tries again
                plant.clock.sleep_s(1.0)
                return
            tally.governors += 1
        try:
            tick = plant.tick()
        except GovernorKilledError:
            plant.kill_governor()
            self.governor_back_s = self.now_s + self._back_after_s()
            return
        tally.ticks += 1
        tally.acting += tick.acting
        tally.reasons[tick.reason] += 1
        for condition in tick.conditions:
            tally.conditions[condition.name] += 1
        while self.journals[-1]._queue.qsize() > _QUEUED:  # no real governor is a thousand times as fast
            _SYSTEM.sleep_s(0.001)

    def _forget(self, tally: Tally) -> None:
        """What the stand-ins remember for other tests."""
        plant, machine = self.plant, self.plant.bench.machine
        tally.locks += sum(mhz is not None for _, mhz in machine.writes)
        tally.keepers = plant.life + 1
        for kept in (machine.writes, plant.bench.said, plant.world.calls, plant.world.leases_s):
            kept.clear()

    def _measure(self, tally: Tally) -> None:
        gc.collect()
        tally.objects.append(len(gc.get_objects()))
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
        tally.resident_bytes.append(pages * os.sysconf("SC_PAGE_SIZE"))
        tally.handles.append(len(os.listdir("/proc/self/fd")))  # noqa: PTH208  # of the kernel's, not a folder's

    def _end(self, tally: Tally) -> None:
        plant = self.plant
        plant.clock.sleep_s(600.0)  # whatever lasts, ends
        if plant.governor_lives:
            plant.end_governor()
        plant.clock.sleep_s(30.0)
        restored = plant.bench.keeper.stop(15.0)
        plant.watch.look()
        machine = plant.bench.machine
        if not restored:
            tally.leaked.append("the keeper still has something to restore")
        tally.leaked += [
            f"{uuid} at {gpu.lock_mhz} MHz"
            for uuid, gpu in machine.gpus.items()
            if not machine.as_found(uuid)
        ]
        tally.leaked += [f"saved: {lock}" for lock in machine.saved.values() if not lock.yielded]
        tally.leaked += [f"claimed: {uuid}" for uuid in machine.held]
        tally.broken, tally.longest_s = plant.watch.broken, plant.watch.longest_s
        sizes = [path.stat().st_size for path in self.folder.iterdir()]
        tally.journal_bytes, tally.journal_files = sum(sizes), len(sizes)
        tally.journal_dropped = sum(journal.dropped for journal in self.journals)

    # ------------------------------------------------------------------ what happens

    def _strike(self, tally: Tally) -> None:
        name = str(self.rng.choice(list(self.faults)))
        if name.startswith("governor") and not self.plant.governor_lives:
            return
        if name.startswith("keeper") and not (self.plant.keeper_lives and not self.plant.keeper_hangs):
            return
        tally.faults[name] += 1
        self.plant.watch.begin()
        self.faults[name](self)

    def _journal(self, clock: VirtualClock) -> Journal:
        journal = ThreadedJournal(self.disk, clock, ROTATION)
        self.journals = [*[old for old in self.journals if old.dropped][-8:], journal]
        return journal

    def _up_to(self, most_s: float) -> float:
        return float(self.rng.uniform(0.0, most_s))

    def _back_after_s(self) -> float:
        """Until a governor is started again: at times nobody does it for minutes."""
        return float(self.rng.exponential(20.0))

    def _later(self, after_s: float, what: Callable[[], None]) -> None:
        self.plant.due.append((self.now_s + after_s, what))

    def _gpu(self) -> tuple[str, Any]:
        uuid = f"GPU-{self.rng.integers(GPUS)}"
        return uuid, self.plant.bench.machine.gpus[uuid]

    def _set(self, thing: object, for_s: float, **changes: tuple[object, object]) -> None:
        """Fields are something else for a while: (then, afterwards)."""
        for name, (value, back) in changes.items():
            setattr(thing, name, value)
            self._later(for_s, partial(setattr, thing, name, back))

    def _governor_killed(self) -> None:
        self.plant.dies_after = int(self.rng.integers(1, 40))

    def _governor_ended(self) -> None:
        self.plant.end_governor()
        self.governor_back_s = self.now_s + self._back_after_s()

    def _governor_stopped(self) -> None:
        self.plant.stopped = True
        self.plant.clock.sleep_s(self._up_to(60.0))
        self.plant.stopped = False

    def _keeper_killed(self) -> None:
        self.plant.keeper_dies(0.5 + self._up_to(5.0))

    def _keeper_killed_midway(self) -> None:
        self.plant.bench.machine.dies_in = int(self.rng.integers(1, 30))

    def _keeper_hangs(self) -> None:
        plant = self.plant
        plant.keeper_hangs = True
        life = plant.life
        self._later(WATCHDOG_S, lambda: plant.keeper_dies(1.0) if plant.life == life else None)

    def _both_killed(self) -> None:
        self.plant.keeper_dies(0.5 + self._up_to(5.0))
        if self.plant.governor_lives:
            self.plant.kill_governor()
            self.governor_back_s = self.now_s + self._back_after_s()

    def _host_suspended(self) -> None:
        self.plant.clock.suspend_s(self._up_to(600.0))
        self.plant.watch.begin()

    def _driver_fails(self) -> None:
        code = str(self.rng.choice(["TIMEOUT", "UNKNOWN", "IN_USE", "NOT_SUPPORTED"]))
        where = str(self.rng.choice(["fault", "write_fault"]))
        self._set(self._gpu()[1], self._up_to(20.0), **{where: (code, "")})

    def _gpu_lost(self) -> None:
        uuid, gpu = self._gpu()

        def replaced() -> None:  # a driver that starts anew knows no locks
            gpu.fault = ""
            self.plant.bench.machine.foreign(uuid, None)
            self._order(CommandKind.REARM)

        gpu.fault = "GPU_IS_LOST"
        self._later(self._up_to(120.0), replaced)

    def _locks_ignored(self) -> None:
        uuid, gpu = self._gpu()
        self.plant.bench.machine.foreign(uuid, None)  # the driver drops its lock, and takes no other
        self._set(gpu, self._up_to(60.0), ignores=(True, False))

    def _power_capped(self) -> None:
        self._set(self._gpu()[1], self._up_to(120.0), cap_mhz=(1100, None))

    def _foreign_lock(self) -> None:
        uuid, _ = self._gpu()
        machine = self.plant.bench.machine

        def gone() -> None:
            if not machine.gpus[uuid].ours:
                machine.foreign(uuid, None)
            self._order(CommandKind.REARM)

        machine.foreign(uuid, int(self.rng.choice(SUPPORTED_MHZ)))
        self._later(self._up_to(120.0), gone)

    def _foreign_reset(self) -> None:
        for uuid in self.plant.bench.uuids:
            self.plant.bench.machine.foreign(uuid, None)

    def _claimed_elsewhere(self) -> None:
        held = self.plant.bench.machine.held_elsewhere
        uuid, _ = self._gpu()
        if uuid not in self.plant.bench.machine.held:  # an flock is not taken from whoever has it
            held.add(uuid)
            self._later(self._up_to(60.0), lambda: held.discard(uuid))

    def _state_folder_full(self) -> None:
        self._set(self.plant.bench.machine, self._up_to(60.0), full=(True, False))

    def _journal_full(self) -> None:
        self._set(self.disk, self._up_to(60.0), full=(True, False))

    def _stack_down(self) -> None:
        def refuse(name: str) -> None:
            if name in {"interval", "state", "configure", "limits"}:
                raise EngineError("the stack does not answer")

        self.plant.refuse = refuse
        self.down += 1

        def again() -> None:
            self.down -= 1
            if not self.down:
                self.plant.refuse = lambda _: None

        self._later(self._up_to(60.0), again)

    def _engine_stalls(self) -> None:
        self._set(self.plant.world, self._up_to(90.0), stalled=(True, False))

    def _engine_restarts(self) -> None:
        self.plant.world.engine_starts += 1

    def _switches_fail(self) -> None:
        self._set(self.plant.world, self._up_to(300.0), switch_fails=(True, False))
        self._later(400.0, self.plant.world.tp_refused.clear)

    def _calls_are_slow(self) -> None:
        self._set(self.plant.world, self._up_to(30.0), call_s=(0.3, 0.0))

    def _crowd(self) -> None:
        self._set(self.plant.world, self._up_to(60.0), rate_per_s=(30.0, 2.0))

    def _silence(self) -> None:
        self._set(self.plant.world, self._up_to(300.0), rate_per_s=(1e-4, 2.0))

    def _wall_clock_jumps(self) -> None:
        self.plant.clock.step_wall_s(float(self.rng.uniform(-3600.0, 3600.0)))

    def _policy_fails(self) -> None:
        self._set(self.plant.policy, self._up_to(60.0), garbage=(True, False))

    def _xid(self) -> None:
        xid = int(self.rng.choice([79, 48, 13, 31]))
        self.plant.xids.planned.append(XidEvent(self.now_s, self._gpu()[0], xid))
        self._later(60.0, lambda: self._order(CommandKind.REARM))

    def _operator_shadows(self) -> None:
        self._order(CommandKind.MODE, Mode.SHADOW)
        self._later(self._up_to(60.0), lambda: self._order(CommandKind.MODE, Mode.ACTIVE))

    def _operator_rearms(self) -> None:
        self._order(CommandKind.REARM)

    def _administrator_restores(self) -> None:
        plant = self.plant
        if plant.keeper_lives and not plant.keeper_hangs:
            plant._keeper_does(lambda: plant.bench.ask(0, "restore_all"))
            self._later(self._up_to(60.0), lambda: self._order(CommandKind.REARM))

    def _order(self, kind: CommandKind, mode: Mode | None = None) -> None:
        self.plant.orders.append(Command(kind, mode))

    faults: Final = {
        "governor killed": _governor_killed,
        "governor ended": _governor_ended,
        "governor stopped": _governor_stopped,
        "keeper killed": _keeper_killed,
        "keeper killed midway": _keeper_killed_midway,
        "keeper hangs": _keeper_hangs,
        "both killed": _both_killed,
        "host suspended": _host_suspended,
        "driver fails": _driver_fails,
        "GPU lost": _gpu_lost,
        "locks ignored": _locks_ignored,
        "power capped": _power_capped,
        "foreign lock": _foreign_lock,
        "foreign reset": _foreign_reset,
        "claimed elsewhere": _claimed_elsewhere,
        "state folder full": _state_folder_full,
        "journal full": _journal_full,
        "stack down": _stack_down,
        "engine stalls": _engine_stalls,
        "engine restarts": _engine_restarts,
        "switches fail": _switches_fail,
        "calls are slow": _calls_are_slow,
        "crowd": _crowd,
        "silence": _silence,
        "wall clock jumps": _wall_clock_jumps,
        "policy fails": _policy_fails,
        "Xid": _xid,
        "operator shadows": _operator_shadows,
        "operator re-arms": _operator_rearms,
        "administrator restores": _administrator_restores,
    }


def soak(hours: float, seed: int, folder: Path, told: Callable[[Tally], None] = lambda _: None) -> Tally:
    """Govern for so many hours of virtual time."""
    return Soak(folder, seed).run(hours, told)
