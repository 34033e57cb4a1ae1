"""The GPU checks over the stand-in driver, each in a process of its own as on a real machine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from rlgov.doctor.finding import Level
from tests.fakes.nvml import NvmlStub

CHECK = """
import dataclasses, json
from rlgov.clock import SystemClock
from rlgov.doctor.gpus import check_gpus
print(json.dumps([dataclasses.asdict(finding) for finding in check_gpus(SystemClock())]))
"""


def _check(environment: dict[str, str]) -> dict[str, dict[str, str]]:
    done = subprocess.run(
        [sys.executable, "-c", CHECK],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return {finding["check"]: finding for finding in json.loads(done.stdout)}


def test_whole_gpus_with_rights_are_fine_and_left_as_they_are(nvml_stub: NvmlStub) -> None:
    nvml_stub.gpu(0).locked_low_mhz = nvml_stub.gpu(0).locked_high_mhz = 1605
    found = _check(nvml_stub.environment)
    assert {finding["level"] for finding in found.values()} == {Level.OK}
    assert "4 x NVIDIA Stub 80GB (Hopper, 80 GiB, 700 W)" in found["gpus"]["said"]
    assert "1050 to 1980 MHz" in found["clocks"]["said"]
    assert nvml_stub.writes == ()
    assert nvml_stub.locks_mhz() == (1605, None, None, None)
    assert nvml_stub.state.sessions == 0


def test_what_is_wrong_is_said_with_its_remedy(nvml_stub: NvmlStub) -> None:
    nvml_stub.state.unprivileged = 1
    nvml_stub.gpu(1).persistence = 0
    nvml_stub.gpu(2).compute_mode = 3
    nvml_stub.fail("NOT_SUPPORTED", "nvmlDeviceGetTotalEnergyConsumption", gpu=3)
    found = _check(nvml_stub.environment)
    for check, said, remedy in (
        ("clocks", "NO_PERMISSION", "CAP_SYS_ADMIN"),
        ("persistence mode", nvml_stub.uuids[1], "nvidia-smi -pm 1"),
        ("compute mode", nvml_stub.uuids[2], "nvidia-smi -c DEFAULT"),
        ("energy counter", nvml_stub.uuids[3], "Volta"),
    ):
        assert found[check]["level"] == Level.WARN
        assert said in found[check]["said"]
        assert remedy in found[check]["remedy"]


def test_partitioned_and_closed_gpus(nvml_stub: NvmlStub) -> None:
    nvml_stub.gpu(1).mig = 1
    nvml_stub.gpu(2).compute_mode = 2
    found = _check(nvml_stub.environment)
    assert found["mig"]["level"] == found["clocks"]["level"] == Level.WARN
    assert "MIG" in found["clocks"]["said"]
    assert found["compute mode"]["level"] == Level.FAIL


def test_a_gpu_that_is_lost_has_to_be_seen_to(nvml_stub: NvmlStub) -> None:
    nvml_stub.gpu(1).lost = 1
    found = _check(nvml_stub.environment)
    assert found["nvml"]["level"] == Level.FAIL
    assert "GPU_IS_LOST" in found["nvml"]["said"]


@pytest.mark.parametrize("gpus", [None, 0])
def test_a_machine_without_gpus_can_serve(nvml_stub: NvmlStub, tmp_path: Path, gpus: int | None) -> None:
    environment = nvml_stub.environment
    if gpus is None:
        (tmp_path / "libnvidia-ml.so.1").write_text("no library", encoding="utf-8")
        environment["LD_LIBRARY_PATH"] = str(tmp_path)
    else:
        nvml_stub.state.gpu_count = gpus
    found = _check(environment)
    assert list(found) == ["nvml"]
    assert found["nvml"]["level"] == Level.WARN
    assert "CPUs" in found["nvml"]["remedy"]
