"""One holder a GPU among processes."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from rlgov.clock import VirtualClock
from rlgov.errors import HardwareError
from rlgov.hardware.claims import DEFAULT_FOLDER, GpuClaims, claims_folder, is_file_safe
from rlgov.hardware.hardware import open_hardware
from tests.fakes.nvml import NvmlStub


def test_one_holder_at_a_time(tmp_path: Path) -> None:
    ours, theirs = GpuClaims(tmp_path / "made", "ours"), GpuClaims(tmp_path / "made", "theirs")
    ours.take("GPU-1")
    ours.take("GPU-1")
    theirs.take("GPU-2")
    with pytest.raises(HardwareError, match=f"ours, process {os.getpid()}"):
        theirs.take("GPU-1")
    ours.give_up("GPU-1")
    ours.give_up("GPU-1")
    theirs.take("GPU-1")
    with pytest.raises(HardwareError, match="theirs"):
        ours.take("GPU-1")
    for uuid in ("GPU-1", "GPU-2"):
        theirs.give_up(uuid)


def test_a_claim_whose_file_was_removed_holds_against_nobody_but_a_new_one_does(tmp_path: Path) -> None:
    ours, theirs = GpuClaims(tmp_path, "ours"), GpuClaims(tmp_path, "theirs")
    ours.take("GPU-1")
    (tmp_path / "gpu-GPU-1.claim").unlink()
    theirs.take("GPU-1")
    third = GpuClaims(tmp_path, "third")
    with pytest.raises(HardwareError, match="theirs"):
        third.take("GPU-1")
    ours.give_up("GPU-1")
    theirs.give_up("GPU-1")


@pytest.mark.parametrize("uuid", ["", "../x", "a/b", "-x", "x" * 81, "GPU 1", "GPU-1\n"])
def test_a_name_never_leaves_the_folder(tmp_path: Path, uuid: str) -> None:
    assert not is_file_safe(uuid)
    with pytest.raises(HardwareError, match="no UUID"):
        GpuClaims(tmp_path, "ours").take(uuid)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_used_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(HardwareError, match="RLGOV_CLAIMS_DIR"):
        GpuClaims(tmp_path / "file" / "folder", "ours").take("GPU-1")
    (tmp_path / "gpu-GPU-1.claim").symlink_to(tmp_path / "file")
    with pytest.raises(HardwareError, match="cannot claim"):
        GpuClaims(tmp_path, "ours").take("GPU-1")
    assert (tmp_path / "file").read_text() == ""


def test_where_claims_lie(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("RLGOV_CLAIMS_DIR", str(tmp_path))
    assert claims_folder() == tmp_path
    monkeypatch.delenv("RLGOV_CLAIMS_DIR")
    assert claims_folder() == DEFAULT_FOLDER


def test_a_direct_lock_claims_its_gpus_until_it_restores(stub: NvmlStub, clock: VirtualClock) -> None:
    other = GpuClaims(claims_folder(), "another")
    other.take(stub.uuids[1])
    with open_hardware(None, clock) as hardware:
        with pytest.raises(HardwareError, match="another, process"):
            hardware.clocks.lock(1200)
        assert stub.writes == ()
        other.take(stub.uuids[0])  # what it had claimed of the group it gave up again
        for uuid in stub.uuids[:2]:
            other.give_up(uuid)
        hardware.clocks.lock(1200)
        with pytest.raises(HardwareError, match="rlgov, process"):
            other.take(stub.uuids[3])
        hardware.clocks.restore()
        other.take(stub.uuids[3])
        other.give_up(stub.uuids[3])
