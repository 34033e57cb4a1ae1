"""The promise, over any order of clients, faults, foreign writes, suspensions, and deaths of the keeper.

*Whatever happens to who holds a lease, within T every GPU is at the saved state or higher.* T counts from the
last word of the client, or from when the driver works again or a keeper runs again, whichever is latest.
"""

from __future__ import annotations

from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from rlgov.hardware.keeper.options import LONGEST_PROMISED_S
from rlgov.hardware.keeper.values import Code, KeeperSettings, Refused
from tests.fakes.keeper import SUPPORTED_MHZ, Bench, KilledError

GPUS = 3
GROUPS = st.sampled_from(
    [("GPU-0",), ("GPU-1",), ("GPU-0", "GPU-1"), ("GPU-1", "GPU-2"), ("GPU-0", "GPU-1", "GPU-2")]
)
CLIENTS = st.integers(1, 3)
UUIDS = st.sampled_from([f"GPU-{number}" for number in range(GPUS)])
CLOCKS_MHZ = st.integers(900, 2100)
FAULTS = st.sampled_from(["TIMEOUT", "UNKNOWN", "NO_PERMISSION", "GPU_IS_LOST", "RESET_REQUIRED"])


class Promise(RuleBasedStateMachine):
    """One keeper after the other over the same GPUs and files."""

    @initialize(
        restore_mhz=st.sampled_from([None, 1600]),
        bounds_mhz=st.sampled_from([(0, 100_000), (1100, 1900), (1400, 1400)]),
    )
    def begin(self, restore_mhz: int | None, bounds_mhz: tuple[int, int]) -> None:
        self.bench = Bench(
            GPUS,
            KeeperSettings(restore_clock_mhz=restore_mhz, floor_mhz=bounds_mhz[0], ceiling_mhz=bounds_mhz[1]),
        )
        self.machine = self.bench.machine
        self.excused_until_s = dict.fromkeys(self.bench.uuids, self.now_s)  # T counts from here
        self.owner: dict[str, int | None] = dict.fromkeys(self.bench.uuids)
        self.locked_at_s = dict.fromkeys(self.bench.uuids, float("-inf"))
        self.seen_writes = 0

    @property
    def now_s(self) -> float:
        return self.bench.clock.monotonic_s()

    # ------------------------------------------------------------------ clients

    @rule(client=CLIENTS, gpus=GROUPS, mhz=CLOCKS_MHZ, ttl_s=st.sampled_from([0.5, 3.0, 9.0, 60.0]))
    def lock(self, client: int, gpus: tuple[str, ...], mhz: int, ttl_s: float) -> None:
        before, keeper = len(self.machine.writes), self.bench.keeper
        self.ask(client, "lock", gpus=gpus, sm_clock_mhz=mhz, ttl_s=ttl_s)
        settings_ = self.bench.settings
        first: dict[str, int | None] = {}
        for uuid, written_mhz in self.machine.writes[before:]:
            first.setdefault(uuid, written_mhz)  # what comes after is rolling back, or a next keeper's work
        for uuid, written_mhz in first.items():
            if written_mhz is None or written_mhz == settings_.restore_clock_mhz:
                continue
            assert uuid in gpus
            assert settings_.floor_mhz <= written_mhz <= settings_.ceiling_mhz
            assert written_mhz in SUPPORTED_MHZ
            if keeper is self.bench.keeper:  # a keeper that died of it is asked nothing more
                assert self.now_s - self.locked_at_s[uuid] >= settings_.write_interval_s - 1e-9
                self.locked_at_s[uuid] = self.now_s

    @rule(client=CLIENTS)
    def renew(self, client: int) -> None:
        self.ask(client, "renew")

    @rule(client=CLIENTS)
    def release(self, client: int) -> None:
        self.ask(client, "release")

    @rule(client=CLIENTS)
    def check(self, client: int) -> None:
        self.ask(client, "check")

    @rule(client=CLIENTS)
    def disconnect(self, client: int) -> None:
        self.guarded(lambda: self.bench.keeper.gone(client))

    @rule(client=CLIENTS, gpus=st.one_of(st.just(()), GROUPS))
    def rearm(self, client: int, gpus: tuple[str, ...]) -> None:
        self.ask(client, "rearm", gpus=gpus)

    @rule(client=CLIENTS)
    def restore_all(self, client: int) -> None:
        self.ask(client, "restore_all")

    # ------------------------------------------------------------------ the world

    @rule(uuid=UUIDS, mhz=st.sampled_from([None, *SUPPORTED_MHZ]))
    def foreign_write(self, uuid: str, mhz: int | None) -> None:
        self.machine.foreign(uuid, mhz)

    @rule(uuid=UUIDS, fault=FAULTS, writes_only=st.booleans())
    def break_driver(self, uuid: str, fault: str, *, writes_only: bool) -> None:
        if writes_only:
            self.machine.gpus[uuid].write_fault = fault
        else:
            self.machine.gpus[uuid].fault = fault

    @rule(uuid=UUIDS)
    def heal_driver(self, uuid: str) -> None:
        gpu = self.machine.gpus[uuid]
        if gpu.fault or gpu.write_fault:
            self.excuse(uuid)
        gpu.fault = gpu.write_fault = ""

    @rule(uuid=UUIDS, ignores=st.booleans(), busy=st.booleans(), capped=st.booleans())
    def behave(self, uuid: str, *, ignores: bool, busy: bool, capped: bool) -> None:
        gpu = self.machine.gpus[uuid]
        gpu.ignores = ignores and not (gpu.ours and gpu.lock_mhz is not None)
        gpu.busy, gpu.cap_mhz = busy, 1100 if capped else None

    @rule(full=st.booleans())
    def fill_disk(self, *, full: bool) -> None:
        self.machine.full = full

    @rule(uuid=UUIDS, taken=st.booleans())
    def claim_elsewhere(self, uuid: str, *, taken: bool) -> None:
        if taken and uuid not in self.machine.held:
            self.machine.held_elsewhere.add(uuid)
        elif uuid in self.machine.held_elsewhere:
            self.machine.held_elsewhere.discard(uuid)
            self.excuse(uuid)

    # ------------------------------------------------------------------ time and death

    @rule(duration_s=st.sampled_from([0.05, 0.2, 0.5, 1.0, 3.0, 20.0]))
    def time_passes(self, duration_s: float) -> None:
        self.guarded(lambda: self.bench.run(duration_s))

    @rule(duration_s=st.sampled_from([5.0, 3600.0]))
    def host_sleeps(self, duration_s: float) -> None:
        self.bench.clock.advance_s(duration_s)
        self.guarded(self.bench.keeper.tick)

    @rule(calls=st.integers(1, 30))
    def doom_keeper(self, calls: int) -> None:
        self.machine.dies_in = calls

    @rule(down_s=st.sampled_from([0.0, 0.5, 60.0]))
    def kill_keeper(self, down_s: float) -> None:
        self.restart(down_s)

    @rule()
    @precondition(lambda self: self.machine.dies_in < 0)
    def stop_keeper(self) -> None:
        self.bench.keeper.stop(10.0)
        for uuid, gpu in self.machine.gpus.items():
            if not (gpu.fault or gpu.write_fault or uuid in self.machine.held_elsewhere):
                assert self.machine.as_found(uuid), "a keeper that stopped left a lock"
        self.restart(0.0)

    # ------------------------------------------------------------------ what must hold

    @invariant()
    def promise(self) -> None:
        if not hasattr(self, "bench"):
            return
        for uuid, gpu in self.machine.gpus.items():
            if gpu.fault or gpu.write_fault or uuid in self.machine.held_elsewhere:
                self.excuse(uuid)
            if not self.machine.as_found(uuid):
                assert self.now_s - self.excused_until_s[uuid] <= LONGEST_PROMISED_S

    @invariant()
    def one_owner(self) -> None:
        if not hasattr(self, "bench"):
            return
        for gpu in self.bench.state().gpus:
            leased = gpu.phase == "leased"
            assert leased == (gpu.owner is not None)
            assert not (leased and gpu.uuid in self.machine.held_elsewhere)
            if leased:
                assert gpu.uuid in self.machine.held
                assert gpu.uuid in self.machine.saved
        assert not self.machine.held & self.machine.held_elsewhere

    @invariant()
    def nothing_is_forgotten(self) -> None:
        """Every lock of ours that is in force can be found in a file: the next keeper would restore it."""
        if not hasattr(self, "bench"):
            return
        for uuid in self.bench.uuids:
            if not self.machine.as_found(uuid):
                assert uuid in self.machine.saved
                assert not self.machine.saved[uuid].yielded

    def teardown(self) -> None:
        if not hasattr(self, "bench"):
            return
        for uuid in self.bench.uuids:
            self.heal_driver(uuid)
        self.machine.full = False
        self.machine.held_elsewhere.clear()
        self.machine.dies_in = -1
        self.bench.run(LONGEST_PROMISED_S)
        for uuid in self.bench.uuids:
            assert self.machine.as_found(uuid)
        assert not self.bench.keeper.restoring

    # ------------------------------------------------------------------ helpers

    def excuse(self, uuid: str) -> None:
        self.excused_until_s[uuid] = self.now_s

    def ask(self, client: int, do: str, **fields: Any) -> None:
        def act() -> None:
            refusal = None
            try:
                self.bench.ask(client, do, **fields)
            except Refused as no:
                refusal = no
            if refusal is None or refusal.code is Code.TOO_SOON:
                if do in {"lock", "renew"}:
                    self.heard_from(client)
            else:
                assert refusal.message

        self.guarded(act)

    def heard_from(self, client: int) -> None:
        for gpu in self.bench.state().gpus:
            if gpu.owner is not None and gpu.owner.pid == 1000 + client:
                self.excuse(gpu.uuid)

    def guarded(self, act: Any) -> None:
        """Do something that the keeper may die of; then the next one starts."""
        try:
            act()
        except KilledError:
            self.restart(0.5)

    def restart(self, down_s: float) -> None:
        self.bench.clock.advance_s(down_s)
        for uuid in self.bench.uuids:
            self.excuse(uuid)
            self.locked_at_s[uuid] = float("-inf")  # the next keeper does not know of it
        self.bench.start()
        self.bench.keeper.recover(10.0)


TestPromise = Promise.TestCase
TestPromise.settings = settings(max_examples=200, stateful_step_count=50, deadline=None)
