"""A group of GPUs takes a clock as one unit, and gets back what it had."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from rlgov.clock import SystemClock, VirtualClock
from rlgov.errors import HardwareError
from rlgov.hardware.clocks import ClockState, GroupClocks, Verdict, judge_clock, snap_clock
from rlgov.hardware.hardware import open_hardware
from rlgov.hardware.throttle import (
    APPLICATION_CLOCKS,
    EXCUSING_REASONS,
    GPU_IDLE,
    SW_POWER_CAP,
    reason_names,
)
from tests.fakes.nvml import CODES, NvmlStub

SUPPORTED_MHZ = (1980, 1800, 1600, 1400, 1200, 1000)
SET = "nvmlDeviceSetGpuLockedClocks"
RESET = "nvmlDeviceResetGpuLockedClocks"
PASSING = ["TIMEOUT", "UNKNOWN", "IN_USE", "NOT_READY", "IRQ_ISSUE", "INSUFFICIENT_RESOURCES"]


class FakePort:
    """GPUs in memory. ``faults`` says, call by call, what goes wrong; when it is used up, all goes well."""

    def __init__(self, gpus: int, found_mhz: int | None = None) -> None:
        self.locks_mhz: dict[str, int | None] = {f"GPU-{number}": found_mhz for number in range(gpus)}
        self.faults: list[str] = []
        self.interrupt_at = -1  # number of the call that a signal interrupts
        self.calls = 0

    def probe(self, uuid: str) -> None:
        self._call(uuid, None)

    def set_lock(self, uuid: str, sm_clock_mhz: int) -> None:
        self._call(uuid, sm_clock_mhz)

    def reset_lock(self, uuid: str) -> None:
        self._call(uuid, None, writes=True)

    def clock_state(self, uuid: str) -> ClockState:
        self._call(uuid, None)
        return ClockState(self.locks_mhz[uuid] or SUPPORTED_MHZ[0], frozenset())

    def _call(self, uuid: str, mhz: int | None, *, writes: bool = False) -> None:
        interrupted = self.calls == self.interrupt_at
        self.calls += 1
        fault = self.faults.pop(0) if self.faults else "none"
        if (writes or mhz is not None) and fault != "refused":
            self.locks_mhz[uuid] = mhz
        if interrupted:
            raise KeyboardInterrupt
        if fault != "none":
            raise HardwareError(f"{uuid}: {fault}")


def _group(port: FakePort, restore_clock_mhz: int | None = None) -> GroupClocks:
    uuids = tuple(port.locks_mhz)
    return GroupClocks(port, uuids, SUPPORTED_MHZ, VirtualClock(), restore_clock_mhz=restore_clock_mhz)


class Group(RuleBasedStateMachine):
    """Any order of locks, faults and restores."""

    def __init__(self) -> None:
        super().__init__()
        self.said_split = False
        self.expected_mhz: int | None = None

    @initialize(gpus=st.integers(1, 4), operator_mhz=st.sampled_from((None, 1800)))
    def open(self, gpus: int, operator_mhz: int | None) -> None:
        self.port = FakePort(gpus, operator_mhz)
        self.found_mhz = self.expected_mhz = operator_mhz
        self.clocks = _group(self.port, operator_mhz)

    @rule(faults=st.lists(st.sampled_from(("none", "refused", "done, but failed")), max_size=20))
    def break_something(self, faults: list[str]) -> None:
        self.port.faults = faults

    @rule(mhz=st.integers(900, 2100))
    def lock(self, mhz: int) -> None:
        before_mhz = self.clocks.locked_mhz
        try:
            self.clocks.lock(mhz)
        except HardwareError as error:
            self.said_split = "could not be put back" in str(error) or (
                self.said_split and "back at" not in str(error)
            )
            if self.clocks.locked_mhz is None:
                self.expected_mhz = self.found_mhz
            else:
                assert self.clocks.locked_mhz == before_mhz
                self.expected_mhz = before_mhz
        else:
            self.expected_mhz = self.clocks.locked_mhz
            self.said_split = False
            assert self.expected_mhz == snap_clock(mhz, SUPPORTED_MHZ)

    @rule()
    def restore(self) -> None:
        try:
            self.clocks.restore()
        except HardwareError:
            self.said_split = True
        else:
            self.said_split = False
        self.expected_mhz = self.found_mhz

    @rule()
    def check(self) -> None:
        self.clocks.check()

    @invariant()
    def the_group_is_one_unless_it_was_said(self) -> None:
        if not self.said_split and hasattr(self, "port"):
            assert set(self.port.locks_mhz.values()) == {self.expected_mhz}

    def teardown(self) -> None:
        if hasattr(self, "port"):
            self.port.faults = []
            self.clocks.restore()
            assert set(self.port.locks_mhz.values()) == {self.found_mhz}
            writes = self.port.calls
            self.clocks.restore()
            assert self.port.calls == writes


TestGroup = Group.TestCase


@settings(deadline=None)
@given(interrupt_at=st.integers(0, 60), clocks_mhz=st.lists(st.sampled_from(SUPPORTED_MHZ), max_size=4))
def test_ctrl_c_at_any_moment_leaves_what_was_found(interrupt_at: int, clocks_mhz: list[int]) -> None:
    port = FakePort(3)
    port.interrupt_at = interrupt_at
    try:
        with _group(port) as clocks:
            for mhz in clocks_mhz:
                clocks.lock(mhz)
                clocks.check()
    except KeyboardInterrupt:
        clocks.restore()  # as the exit of the process does when the first restore was interrupted
    assert set(port.locks_mhz.values()) == {None}


@pytest.mark.parametrize("function", [SET, "nvmlDeviceGetClockInfo"])
@pytest.mark.parametrize("held_mhz", [None, 1800])
@pytest.mark.parametrize("broken", range(4))
def test_one_gpu_that_fails_takes_the_lock_from_all(
    stub: NvmlStub, clock: VirtualClock, broken: int, held_mhz: int | None, function: str
) -> None:
    with open_hardware(None, clock) as hardware:
        assert isinstance(hardware.clocks, GroupClocks)
        hardware.clocks.probe()
        if held_mhz is not None:
            hardware.clocks.lock(held_mhz)
        for code in sorted(CODES.keys() - {"FREQ_NOT_SUPPORTED"}):
            stub.heal()
            tries = 3 if code in PASSING else 1
            stub.fail(code, function, gpu=broken, times=tries)  # the way back is free
            with pytest.raises(HardwareError, match=code) as caught:
                hardware.clocks.lock(1200)
            assert stub.uuids[broken] in str(caught.value)
            assert stub.locks_mhz() == (held_mhz,) * 4, code
            assert hardware.clocks.locked_mhz == held_mhz
            lowered = [mhz for _, mhz in stub.writes[-4:]]
            assert lowered == [held_mhz] * 4
    assert stub.locks_mhz() == (None,) * 4


def test_a_group_that_cannot_be_put_back_is_unlocked_as_far_as_it_answers(
    stub: NvmlStub, clock: VirtualClock
) -> None:
    with open_hardware(None, clock) as hardware:
        hardware.clocks.lock(1800)
        stub.gpu(2).lost = 1
        with pytest.raises(HardwareError, match="could not be put back") as caught:
            hardware.clocks.lock(1200)
        assert stub.uuids[2] in str(caught.value)
        assert stub.locks_mhz() == (None, None, 1800, None)  # upwards, where the driver still answers
        with pytest.raises(HardwareError, match="--reset-gpu-clocks"):
            hardware.clocks.restore()
        stub.gpu(2).lost = 0
    assert stub.locks_mhz() == (None,) * 4


@pytest.mark.parametrize("code", PASSING)
def test_failures_that_pass_are_tried_again(stub: NvmlStub, clock: VirtualClock, code: str) -> None:
    with open_hardware(None, clock) as hardware:
        assert isinstance(hardware.clocks, GroupClocks)
        hardware.clocks.probe()
        stub.fail(code, SET, gpu=1, times=2)
        stub.fail(code, RESET, gpu=3, times=2)
        hardware.clocks.lock(1200)
        assert stub.locks_mhz() == (1200,) * 4
        hardware.clocks.restore()
        assert stub.locks_mhz() == (None,) * 4
        assert hardware.session is not None
        assert hardware.session.failures[code] == 4


@pytest.mark.parametrize("after", range(9))
def test_rights_that_are_missing_or_lost_are_told_with_the_remedy(
    stub: NvmlStub, clock: VirtualClock, after: int
) -> None:
    """At the probe (the first four calls) as well as in the middle of a lock."""
    with open_hardware(None, clock) as hardware:
        stub.fail("NO_PERMISSION", SET, after=after, times=1)
        if after == 8:  # probed and locked without a fault
            hardware.clocks.lock(1200)
        else:
            with pytest.raises(HardwareError, match="CAP_SYS_ADMIN"):
                hardware.clocks.lock(1200)
            assert stub.locks_mhz() == (None,) * 4
        assert any(mhz is not None for _, mhz in stub.writes) == (after > 4)


def test_without_rights_nothing_is_written(stub: NvmlStub, clock: VirtualClock) -> None:
    stub.state.unprivileged = 1
    with open_hardware(None, clock) as hardware:
        with pytest.raises(HardwareError, match="root or CAP_SYS_ADMIN"):
            hardware.clocks.lock(1200)
        assert hardware.meter.read().gpus[0].energy_j is not None
    assert stub.writes == ()


def test_an_operators_lock_is_put_back(stub: NvmlStub, clock: VirtualClock) -> None:
    for number in range(4):
        stub.gpu(number).locked_low_mhz = stub.gpu(number).locked_high_mhz = 1605
    with open_hardware(None, clock, restore_clock_mhz=1605) as hardware:
        hardware.clocks.lock(1200)
        assert stub.locks_mhz() == (1200,) * 4
    assert stub.locks_mhz() == (1605,) * 4
    with pytest.raises(HardwareError, match="1605"):  # names a clock that there is
        open_hardware(None, clock, restore_clock_mhz=1607)
    assert stub.state.sessions == 0


def test_what_was_never_locked_is_never_written(stub: NvmlStub, clock: VirtualClock) -> None:
    with open_hardware(None, clock) as hardware:
        with pytest.raises(HardwareError, match=r"1050, 1065, 1080 MHz"):
            hardware.clocks.lock(1000)
        hardware.clocks.restore()
        assert hardware.clocks.check().gpus == ()
    assert stub.writes == ()


def test_a_process_that_ends_without_closing_still_restores(nvml_stub: NvmlStub) -> None:
    code = """
from rlgov.clock import SystemClock
from rlgov.hardware.hardware import open_hardware
hardware = open_hardware(None, SystemClock())
hardware.clocks.lock(1200)
{end}
"""
    for end, returns in (("", 0), ("raise RuntimeError", 1), ("import sys; sys.exit(3)", 3)):
        done = subprocess.run(
            [sys.executable, "-c", code.format(end=end)],
            env=nvml_stub.environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == returns, done.stderr
        assert nvml_stub.locks_mhz() == (None,) * 4
    assert nvml_stub.state.write_count == 24


def test_what_could_not_be_restored_is_tried_again_at_exit(nvml_stub: NvmlStub, repository: Path) -> None:
    code = f"""
import sys
sys.path.insert(0, {str(repository)!r})
from rlgov.clock import SystemClock
from rlgov.errors import HardwareError
from rlgov.hardware.hardware import open_hardware
hardware = open_hardware(None, SystemClock())
hardware.clocks.lock(1200)
print("locked", flush=True)
sys.stdin.readline()
try:
    hardware.close()
except HardwareError as error:
    print(error, flush=True)
sys.stdin.readline()
"""
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        env={**os.environ, **nvml_stub.environment},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stdout.readline() == "locked\n"
        nvml_stub.gpu(2).lost = 1
        process.stdin.write("\n")
        process.stdin.flush()
        assert nvml_stub.uuids[2] in process.stdout.readline()
        assert nvml_stub.locks_mhz() == (None, None, 1200, None)
        nvml_stub.gpu(2).lost = 0
    assert process.returncode == 0
    assert nvml_stub.locks_mhz() == (None,) * 4


def test_settling_is_measured_and_bounded(clock: VirtualClock) -> None:
    class SlowPort(FakePort):
        """Takes the lock over 30 ms after it was set."""

        def clock_state(self, uuid: str) -> ClockState:
            super().clock_state(uuid)
            settled = clock.monotonic_s() > 100.03
            return ClockState(1200 if settled else 1980, frozenset())

    port = SlowPort(2)
    with GroupClocks(port, tuple(port.locks_mhz), SUPPORTED_MHZ, clock) as clocks:
        clocks.lock(1200)
        assert not clocks.check().verified
        slow = clocks.settle(timeout_s=0.02)
        assert not slow.verified
        assert slow.since_lock_s == pytest.approx(0.02, abs=0.006)
        settled = clocks.settle(timeout_s=1.0)
        assert settled.verified
        assert settled.since_lock_s == pytest.approx(0.03, abs=0.006)


def test_a_gpu_that_cannot_be_read_is_not_verified() -> None:
    port = FakePort(2)
    with _group(port) as clocks:
        clocks.lock(1200)
        port.faults = ["none", "refused"]
        assert [gpu.verdict for gpu in clocks.check().gpus] == [Verdict.HELD, Verdict.UNVERIFIED]


@given(asked=st.integers(1, 3000), supported=st.sets(st.integers(1, 3000), min_size=1))
def test_snapping_takes_the_highest_at_or_below(asked: int, supported: set[int]) -> None:
    fitting = [clock for clock in supported if clock <= asked]
    if fitting:
        assert snap_clock(asked, tuple(supported)) == max(fitting)
    else:
        with pytest.raises(HardwareError, match=str(min(supported))):
            snap_clock(asked, tuple(supported))


@pytest.mark.parametrize(
    ("measured_mhz", "reasons", "verdict"),
    [
        (1200, set(), Verdict.HELD),
        (1215, set(), Verdict.HELD),
        (1185, {SW_POWER_CAP}, Verdict.HELD),
        (1000, set(), Verdict.UNVERIFIED),
        (1000, {SW_POWER_CAP}, Verdict.EXCUSED),
        (345, {GPU_IDLE}, Verdict.IDLE),
        (1000, {APPLICATION_CLOCKS}, Verdict.UNVERIFIED),
        (1980, set(EXCUSING_REASONS), Verdict.UNVERIFIED),
        (1980, {GPU_IDLE}, Verdict.UNVERIFIED),
    ],
)
def test_what_a_measured_clock_says(measured_mhz: int, reasons: set[str], verdict: Verdict) -> None:
    assert judge_clock(1200, measured_mhz, frozenset(reasons)) is verdict


@given(st.integers(0, 2**20 - 1))
def test_every_reason_bit_gets_a_name_of_its_own(bits: int) -> None:
    assert len(reason_names(bits)) == bits.bit_count()
    assert (SW_POWER_CAP in reason_names(bits)) == bool(bits & 4)


def test_groups_need_gpus_and_clocks() -> None:
    for uuids, clocks in (((), SUPPORTED_MHZ), (("GPU-0",), ())):
        with pytest.raises(HardwareError, match="one kind"):
            GroupClocks(FakePort(1), uuids, clocks, SystemClock())
