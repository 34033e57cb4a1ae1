"""Opening the GPUs: the real binding, loading the stand-in as it would load the driver."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from rlgov.clock import VirtualClock
from rlgov.errors import HardwareError
from rlgov.hardware.clocks import Verdict
from rlgov.hardware.hardware import open_hardware
from tests.fakes.nvml import NvmlStub

WHOLE_WAY = """
import json
from rlgov.clock import SystemClock
from rlgov.hardware.hardware import open_hardware
from rlgov.hardware.meter import energy_between

with open_hardware(None, SystemClock()) as hardware:
    before = hardware.meter.read()
    hardware.clocks.lock(1499)
    check = hardware.clocks.check()
    after = hardware.meter.read()
    told = {
        "uuids": [gpu.uuid for gpu in hardware.gpus],
        "clocks": [hardware.clocks.supported_mhz[0], hardware.clocks.supported_mhz[-1]],
        "verified": check.verified,
        "asked_mhz": check.asked_mhz,
        "energy_j": energy_between(before, after),
        "power_w": [gpu.power_w for gpu in after.gpus],
        "clock_mhz": [gpu.sm_clock_mhz for gpu in after.gpus],
        "note": hardware.note,
    }
print(json.dumps(told))
"""


def _run(code: str, environment: dict[str, str]) -> Any:
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_a_process_finds_the_driver_reads_locks_and_restores(nvml_stub: NvmlStub) -> None:
    told = _run(WHOLE_WAY, nvml_stub.environment)
    assert told["uuids"] == list(nvml_stub.uuids)
    assert told["clocks"] == [1980, 1035 + 15]
    assert told["asked_mhz"] == 1485  # the highest supported one below
    assert told["verified"]
    assert told["clock_mhz"] == [1485] * 4
    assert told["energy_j"] >= 0
    assert all(100 < power < 700 for power in told["power_w"])
    assert told["note"] == ""
    assert nvml_stub.locks_mhz() == (None,) * 4
    assert nvml_stub.writes == tuple((gpu, mhz) for mhz in (1485, None) for gpu in range(4))
    assert nvml_stub.state.sessions == 0
    assert nvml_stub.state.open_event_sets == 0


def test_an_old_driver_without_some_functions_is_read_as_far_as_it_goes(
    make_nvml_stub: Callable[..., NvmlStub], nvml_fake: ModuleType, tmp_path: Path
) -> None:
    absent = (
        "nvmlDeviceGetTotalEnergyConsumption",
        "nvmlDeviceGetCurrentClocksEventReasons",
        "nvmlDeviceGetFieldValues",
        "nvmlDeviceGetMigMode",
        "nvmlEventSetCreate",
    )
    stub = make_nvml_stub(2, nvml_fake.build(tmp_path / "old", without=absent))
    told = _run(WHOLE_WAY, stub.environment)
    assert told["energy_j"] is None
    assert told["verified"]
    assert all(power > 100 for power in told["power_w"])  # from the averaged reading
    assert "nvmlEventSetCreate" in told["note"]
    assert stub.locks_mhz() == (None, None)


def test_without_a_driver_there_are_stand_ins_with_the_reason(tmp_path: Path) -> None:
    code = """
import json
from rlgov.clock import SystemClock
from rlgov.hardware.hardware import open_hardware
from rlgov.hardware.meter import energy_between
with open_hardware(None, SystemClock()) as hardware:
    hardware.clocks.lock(1000)
    reading = hardware.meter.read()
    print(json.dumps({
        "note": hardware.note, "present": [hardware.meter.present, hardware.clocks.present],
        "energy_j": energy_between(reading, hardware.meter.read()), "events": hardware.events.poll(),
    }))
"""
    (tmp_path / "libnvidia-ml.so.1").write_text("no library", encoding="utf-8")
    told = _run(code, {"LD_LIBRARY_PATH": str(tmp_path)})
    assert "LIBRARY_NOT_FOUND" in told["note"]
    assert "install the NVIDIA driver" in told["note"]
    assert told["present"] == [False, False]
    assert told["energy_j"] is None
    assert told["events"] == []


def test_gpus_that_were_named_must_be_there(stub: NvmlStub, clock: VirtualClock) -> None:
    with pytest.raises(HardwareError, match=stub.uuids[0]):  # lists those that are
        open_hardware(["GPU-nowhere"], clock)
    with pytest.raises(HardwareError, match="twice"):
        open_hardware([stub.uuids[1], stub.uuids[1]], clock)
    assert stub.state.sessions == 0
    stub.fail("DRIVER_NOT_LOADED", "nvmlInitWithFlags")
    with pytest.raises(HardwareError, match="load the NVIDIA driver"):
        open_hardware([stub.uuids[0]], clock)
    assert not open_hardware([], clock).meter.present


def test_only_the_named_gpus_are_touched_whatever_their_index(stub: NvmlStub, clock: VirtualClock) -> None:
    wanted = (stub.uuids[2], stub.uuids[1])
    stub.shuffle([3, 1, 0, 2])
    with open_hardware(wanted, clock) as hardware:
        stub.shuffle([1, 2, 3, 0])
        hardware.clocks.lock(1200)
        assert stub.locks_mhz() == (None, 1200, 1200, None)
        assert [gpu.uuid for gpu in hardware.meter.read().gpus] == list(wanted)


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [("mig", 1, "MIG"), ("virtualization", 2, "shared (vGPU)"), ("virtualization", 3, "vGPU host")],
)
def test_clocks_of_shared_gpus_are_left_alone(
    stub: NvmlStub, clock: VirtualClock, field: str, value: int, said: str
) -> None:
    setattr(stub.gpu(1), field, value)
    with open_hardware(None, clock) as hardware:
        assert not hardware.clocks.present
        assert said in hardware.note
        hardware.clocks.lock(1200)
        assert hardware.meter.present
        assert hardware.meter.read().gpus[1].energy_j is not None
    with pytest.raises(HardwareError, match="only observe"):
        open_hardware(None, clock, require_clocks=True)
    assert stub.writes == ()
    assert stub.state.sessions == 0


def test_gpus_of_two_kinds_share_the_clocks_both_have(stub: NvmlStub, clock: VirtualClock) -> None:
    other = stub.gpu(3)
    other.clock_count = 3
    other.clocks_mhz[:3] = [1800, 1500, 1111]
    with open_hardware(None, clock) as hardware:
        assert hardware.clocks.supported_mhz == (1800, 1500)
    other.clock_count = 1
    other.clocks_mhz[:1] = [1111]
    with open_hardware(None, clock) as hardware:
        assert not hardware.clocks.present
        assert "in common" in hardware.note


def test_an_ignored_lock_is_noticed_and_a_power_cap_excused(stub: NvmlStub, clock: VirtualClock) -> None:
    with open_hardware(None, clock) as hardware:
        stub.gpu(1).ignores_locks = 1
        stub.gpu(2).capped_mhz = 1110
        hardware.clocks.lock(1200)
        check = hardware.clocks.check()
        assert [gpu.verdict for gpu in check.gpus] == [
            Verdict.HELD,
            Verdict.UNVERIFIED,
            Verdict.EXCUSED,
            Verdict.HELD,
        ]
        assert not check.verified
        stub.gpu(1).ignores_locks = 0
        assert hardware.clocks.check().verified


def test_gpus_tell_what_a_governor_needs(stub: NvmlStub, clock: VirtualClock) -> None:
    stub.gpu(1).persistence = 0
    stub.gpu(2).compute_mode = 3
    with open_hardware(None, clock) as hardware:
        first, second, third, _ = hardware.gpus
    assert (first.name, first.architecture, first.driver_version) == (
        "NVIDIA Stub 80GB",
        "Hopper",
        "580.0.stub",
    )
    assert first.memory_bytes == 80 * 2**30
    assert first.tdp_w == first.power_limit_w == 700.0
    assert first.memory_clock_mhz == 2619
    assert first.energy_counter
    assert (first.persistence, second.persistence) == (True, False)
    assert (first.compute_mode, third.compute_mode) == ("default", "exclusive process")
