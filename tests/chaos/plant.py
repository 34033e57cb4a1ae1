"""A governed machine in virtual time: the toy world, its GPUs, and a keeper and a governor that can die.

Everything of rlgov in it is the real thing, but for sockets and threads: the governor's loop, core and
deployment, the keeper's client, protocol and lease machine. Only GPUs, files, stack and time are stand-ins.
"""

from __future__ import annotations

import atexit
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, cast
from unittest.mock import patch

import numpy as np

from rlgov.clock import VirtualClock
from rlgov.deployments.live_open import open_live
from rlgov.governor.core import Core
from rlgov.governor.gpus import LeasedClocks
from rlgov.governor.loop import Governor
from rlgov.governor.records import Mode
from rlgov.hardware.keeper import client as keeper_client
from rlgov.hardware.keeper.client import KeeperClocks, KeeperLink
from rlgov.hardware.keeper.errors import KeeperGone
from rlgov.hardware.keeper.options import LONGEST_PROMISED_S
from rlgov.hardware.keeper.values import Peer
from rlgov.simulation.profile import load_profile
from tests.fakes.keeper import SUPPORTED_MHZ, Bench, KilledError
from tests.fakes.world import FakeMeter, FakeStack, World

if TYPE_CHECKING:
    from collections.abc import Callable, Generator

    from rlgov.deployments.live import LiveDeployment
    from rlgov.engine.samples import Traffic
    from rlgov.governor.journal import Journal
    from rlgov.governor.records import Command, Tick
    from rlgov.hardware.clocks import ClockControl
    from rlgov.hardware.events import XidEvent
    from rlgov.hardware.meter import Meter
    from rlgov.records import Configuration, Limits

GPUS: Final = 4
LIMITS: Final = replace(load_profile("h100-qwen3-32b").limits(), sm_clocks_mhz=SUPPORTED_MHZ)
STEP_S: Final = 0.25
_SLICE_S: Final = 0.25
_CLOSED_KEPT: Final = 20_000


class GovernorKilledError(BaseException):
    """The governor died here. No error: nothing must catch it."""


class MovingClock(VirtualClock):
    """Virtual time in which somebody is told about every step."""

    def __init__(self) -> None:
        super().__init__(1000.0, 1.7e9)
        self.passed: Callable[[], None] = lambda: None

    def sleep_s(self, duration_s: float) -> None:
        left_s = duration_s
        while left_s > 0:
            step_s = min(left_s, STEP_S)
            super().sleep_s(step_s)
            left_s -= step_s
            self.passed()

    def suspend_s(self, duration_s: float) -> None:
        """Time passes, and nothing happens in it."""
        super().sleep_s(duration_s)
        self.passed()


class LongWorld(World):
    """The toy in coarser slices, at the clocks of other GPUs, and without a memory of what was told."""

    plant: Plant | None = None
    stalled = False

    @property
    def sm_clock_mhz(self) -> int:
        if self.plant is None:
            return SUPPORTED_MHZ[0]
        return min(gpu.state.sm_clock_mhz for gpu in self.plant.bench.machine.gpus.values())

    def catch_up(self) -> None:
        now_s = self.clock.monotonic_s()
        while self._now_s < now_s - 1e-9:
            self._slice(min(_SLICE_S, now_s - self._now_s))

    def _serve(self, span_s: float, end_s: float) -> None:
        if not self.stalled:
            super()._serve(span_s, end_s)

    def traffic(self, after: int) -> Traffic:
        told = super().traffic(max(after - self._forgotten, 0))
        keep = self._closed[max(after - self._forgotten, 0) :][-_CLOSED_KEPT:]
        self._forgotten += len(self._closed) - len(keep)
        self._closed[:] = keep
        return replace(told, cursor=self._forgotten + len(keep))

    _forgotten = 0


class DirectLink(KeeperLink):
    """A governor's connection to the keeper, without a socket."""

    def __init__(self, plant: Plant, timeout_s: float) -> None:
        super().__init__(Path("keeper.sock"), timeout_s)
        self._plant = plant
        self._client: int | None = None
        self._life = -1

    @property
    def connected(self) -> bool:
        return self._client is not None

    def close(self) -> None:
        client, self._client = self._client, None
        if client is not None and self._life == self._plant.life:
            self._plant.client_gone(client)

    def _exchange(self, line: bytes) -> bytes:
        plant = self._plant
        plant.may_die()
        if self._client is not None and self._life != plant.life:
            self.close()
            raise KeeperGone("it closed the connection") from ConnectionResetError()
        if plant.keeper_hangs and plant.keeper_lives:
            plant.clock.sleep_s(self._timeout_s)
            self.close()
            raise KeeperGone("no answer in time") from TimeoutError()
        if not plant.keeper_lives:
            raise KeeperGone("nobody listens") from ConnectionRefusedError()
        if self._client is None:
            self._client, self._life = plant.next_client(), plant.life
        try:
            answer, _ = plant.bench.keeper.answer(self._client, Peer(1000 + self._client, 0), line)
        except KilledError:
            plant.keeper_dies()
            self._client = None
            raise KeeperGone("it closed the connection") from ConnectionResetError()
        return answer


@dataclass
class _Group:
    meter: Meter
    clocks: ClockControl

    def close(self) -> None:
        """The link ends with the clocks."""


class Xids:
    """Events that are planned."""

    def __init__(self) -> None:
        self.planned: list[XidEvent] = []

    def poll(self) -> tuple[XidEvent, ...]:
        told, self.planned = tuple(self.planned), []
        return told

    def close(self) -> None:
        """Nothing to close."""


class Whims:
    """A policy that wants something else all the time, and at times no setting at all."""

    name = "whims"
    guarded = True
    digest = "0123"

    def __init__(self, rng: np.random.Generator) -> None:
        self._rng = rng
        self.garbage = False

    def start_configuration(self, limits: Limits) -> Configuration:
        return limits.fastest

    def start(self, limits: Limits, n: int) -> None:
        """It forgets nothing."""

    def decide(self, observation: Any, rows: Any, mask: Any) -> Any:  # noqa: ARG002  # the seam's
        if self.garbage:
            if self._rng.random() < 0.5:
                raise RuntimeError("a policy that fails")
            return np.array([[np.nan, 1e9, -3.0]])
        slowest = (len(SUPPORTED_MHZ) - 1, 3, 0)
        anything = tuple(int(self._rng.integers(size)) for size in (len(SUPPORTED_MHZ), 4, 3))
        return np.array([slowest if self._rng.random() < 0.6 else anything], dtype=np.int64)


class Plant:
    """The machine. Time passes by its clock; the keeper does what is due, and restarts, by itself.

    Args:
        seed: Of traffic and whims.
        journal: Makes the journal of a governor that starts.
    """

    def __init__(self, seed: int, journal: Callable[[VirtualClock], Journal]) -> None:
        self.clock = MovingClock()
        self.rng = np.random.default_rng(seed)
        self.bench = Bench(GPUS)
        self.bench.clock = self.clock
        self.bench.start()
        self.world = LongWorld(rate_per_s=2.0, seed=seed, clock=self.clock)
        self.world.plant = self
        self.policy = Whims(self.rng)
        self.xids = Xids()
        self.orders: list[Command] = []
        self.life = 0  # of the keeper
        self.keeper_lives, self.keeper_hangs = True, False
        self.keeper_back_s = 0.0
        self.dies_after: int | None = None  # calls of the governor until it is killed
        self.stopped = False
        self.watch = Watch(self)
        self.due: list[tuple[float, Callable[[], None]]] = []
        self._journal_of = journal
        self._clients = 0
        self._governor: _Running | None = None
        self._recovering = False
        self.clock.passed = self._passed

    # ------------------------------------------------------------------ the governor

    @property
    def governor_lives(self) -> bool:
        """Whether one runs, stopped or not."""
        return self._governor is not None

    def start_governor(self) -> None:
        """A new process, as it were."""
        clocks = LeasedClocks(self._connect, SUPPORTED_MHZ)
        group = _Group(FakeMeter(self.world), clocks)
        deployment = open_live(FakeStack(self.world), LIMITS, self.clock, hardware=group, acting=False)
        core = Core(deployment.limits, self.policy, mode=Mode.ACTIVE, clocks="keeper")
        journal = self._journal_of(self.clock)
        loop = Governor(
            deployment, core, self.clock, clocks=clocks, events=self.xids, journal=journal, orders=self._take
        )
        self._governor = _Running(
            deployment, clocks, journal, cast("Generator[Tick, None, None]", loop.run())
        )

    def tick(self) -> Tick:
        """One interval. Raises GovernorKilledError where it is killed in it."""
        assert self._governor is not None
        self.world.before_call = self._before
        return next(self._governor.ticks)

    def kill_governor(self) -> None:
        """SIGKILL: nothing of it runs any more, and the kernel closes its socket."""
        running, self._governor, self.dies_after = self._governor, None, None
        assert running is not None
        self.world.before_call = _nothing
        atexit.unregister(running.deployment.close)
        running.journal.close()
        running.ticks.close()
        self.watch.begin()
        running.clocks.close()

    def end_governor(self) -> None:
        """SIGTERM."""
        running, self._governor, self.dies_after = self._governor, None, None
        assert running is not None
        self.world.before_call = self._before
        running.ticks.close()
        try:
            running.deployment.close()
        finally:
            running.journal.close()
            running.clocks.close()
            atexit.unregister(running.deployment.close)

    def may_die(self) -> None:
        """One of the governor's calls."""
        if self.dies_after is not None:
            self.dies_after -= 1
            if self.dies_after <= 0:
                raise GovernorKilledError

    def _before(self, name: str) -> None:
        self.may_die()
        self.refuse(name)

    refuse: Callable[[str], None] = staticmethod(lambda _: None)
    """Raises for calls of the stack that shall fail."""

    def _take(self) -> tuple[Command, ...]:
        told = tuple(self.orders)
        self.orders.clear()
        return told

    def _connect(self) -> KeeperClocks:
        def link(_: Path, timeout_s: float) -> DirectLink:
            return DirectLink(self, timeout_s)

        with patch.object(keeper_client, "KeeperLink", link):
            return KeeperClocks(Path("keeper.sock"), self.bench.uuids, self.clock, ttl_s=3.0)

    # ------------------------------------------------------------------ the keeper

    def next_client(self) -> int:
        """A number for a connection."""
        self._clients += 1
        return self._clients

    def client_gone(self, client: int) -> None:
        """A connection ended."""
        if self.keeper_hangs:
            life = self.life
            self.due.append((0.0, lambda: self.client_gone(client) if life == self.life else None))
        elif self.keeper_lives:
            self._keeper_does(lambda: self.bench.keeper.gone(client))

    def keeper_dies(self, back_after_s: float = 1.0) -> None:
        """SIGKILL; the service manager starts it again."""
        self.keeper_lives = self.keeper_hangs = False
        self.life += 1
        self.keeper_back_s = self.clock.monotonic_s() + back_after_s
        self.watch.begin()

    def _keeper_does(self, what: Callable[[], object]) -> None:
        try:
            what()
        except KilledError:
            self.keeper_dies()

    def _passed(self) -> None:
        now_s = self.clock.monotonic_s()
        for act in [act for act in self.due if act[0] <= now_s]:
            self.due.remove(act)
            act[1]()
        if not self._recovering:
            if not self.keeper_lives and now_s >= self.keeper_back_s:
                self._recovering = self.keeper_lives = True
                self.bench.start()
                self._keeper_does(lambda: self.bench.keeper.recover(0.0))
                self._recovering = False
            if self.keeper_lives and not self.keeper_hangs:
                self._keeper_does(self.bench.keeper.tick)
        self.watch.look()


@dataclass
class _Running:
    deployment: LiveDeployment
    clocks: LeasedClocks
    journal: Journal
    ticks: Generator[Tick, None, None]


@dataclass
class Watch:
    """Holds what is locked to the promise.

    T counts from the moment when nobody was left to hold a lock, or when the last of what excuses it ended: a
    keeper that is dead, a driver that refuses, another fault.
    """

    plant: Plant
    since_s: dict[str, float] = field(default_factory=dict)
    longest_s: float = 0.0
    broken: list[str] = field(default_factory=list)

    def begin(self) -> None:
        """A fault: count anew."""
        self.since_s.clear()

    def look(self) -> None:
        """Now."""
        plant = self.plant
        now_s = plant.clock.monotonic_s()
        machine, books = plant.bench.machine, plant.bench.keeper._machine._gpus
        acting = plant.governor_lives and not plant.stopped and plant.keeper_lives and not plant.keeper_hangs
        for uuid, gpu in machine.gpus.items():
            excused = bool(gpu.fault or gpu.write_fault or uuid in machine.held_elsewhere)
            held = acting and books[uuid].owner is not None
            if machine.as_found(uuid) or held or excused:
                self.since_s.pop(uuid, None)
                continue
            open_s = now_s - self.since_s.setdefault(uuid, now_s)
            self.longest_s = max(self.longest_s, open_s)
            if open_s > LONGEST_PROMISED_S:
                self.broken.append(
                    f"at {now_s:.1f} s: {uuid} locked at {gpu.lock_mhz} MHz for {open_s:.1f} s"
                )
                self.since_s[uuid] = now_s


def _nothing(_: str) -> None:
    """A hook that does nothing."""
