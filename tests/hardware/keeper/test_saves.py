"""What survives a keeper."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rlgov.errors import HardwareError
from rlgov.hardware.keeper.saves import SaveFolder, boot_id
from rlgov.hardware.keeper.values import SavedLock

LOCK = SavedLock("GPU-1", 1600, (1200, 1400))


def make(path: Path, boot: str = "boot") -> tuple[SaveFolder, list[str]]:
    said: list[str] = []
    return SaveFolder(path, said.append, boot), said


@pytest.mark.parametrize(
    "lock",
    [
        LOCK,
        SavedLock("GPU-2", None, (1200,), confirmed=True),
        SavedLock("GPU-3", None, (), yielded="somebody else"),
    ],
)
def test_what_is_saved_is_loaded(tmp_path: Path, lock: SavedLock) -> None:
    folder, said = make(tmp_path)
    folder.save(LOCK)
    folder.save(lock)
    later, _ = make(tmp_path)
    assert lock in later.load(None)
    (path,) = tmp_path.glob(f"gpu-{lock.uuid}.json")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    later.forget(lock.uuid)
    later.forget(lock.uuid)
    assert lock not in folder.load(None)
    assert said == []


def test_the_same_thing_is_written_once(tmp_path: Path) -> None:
    folder, _ = make(tmp_path)
    folder.save(LOCK)
    before = (tmp_path / "gpu-GPU-1.json").stat().st_ino
    folder.save(LOCK)
    assert (tmp_path / "gpu-GPU-1.json").stat().st_ino == before
    folder.forget("GPU-1")
    folder.save(LOCK)
    assert folder.load(None) == (LOCK,)


def test_a_keeper_that_died_while_writing_is_no_hindrance(tmp_path: Path) -> None:
    folder, _ = make(tmp_path)
    folder.save(LOCK)
    (tmp_path / "gpu-GPU-1.new").write_text('{"half')
    assert folder.load(None) == (LOCK,)
    folder.save(SavedLock("GPU-1", 1600, (1000,)))
    assert folder.load(None)[0].clocks_mhz == (1000,)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(damage=st.one_of(st.binary(max_size=200), st.sampled_from([b"{}", b"[]", b"[" * 3000, b"1e999"])))
def test_a_damaged_file_restores_the_gpu(tmp_path: Path, damage: bytes) -> None:
    (tmp_path / "gpu-GPU-1.json").write_bytes(damage)
    folder, said = make(tmp_path)
    assert folder.load(1600) == (SavedLock("GPU-1", 1600, ()),)
    assert "damaged" in said[0]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("version", 2), ("uuid", "GPU-2"), ("restore_clock_mhz", "1600"), ("restore_clock_mhz", True),
        ("clocks_mhz", [1.5]), ("clocks_mhz", None), ("confirmed", 1), ("yielded", None), ("more", 1),
        ("boot_id", 3),
    ],
)  # fmt: skip
def test_a_wrong_field_restores_the_gpu(tmp_path: Path, field: str, value: object) -> None:
    folder, said = make(tmp_path)
    folder.save(LOCK)
    path = tmp_path / "gpu-GPU-1.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {field: value}))
    assert folder.load(None) == (SavedLock("GPU-1", None, ()),)
    assert "damaged" in said[0]


def test_a_link_is_not_followed(tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.write_text("precious")
    folder, _ = make(tmp_path)
    (tmp_path / "gpu-GPU-1.json").symlink_to(elsewhere)
    assert folder.load(None) == (SavedLock("GPU-1", None, ()),)
    (tmp_path / "gpu-GPU-1.new").symlink_to(elsewhere)
    folder.save(LOCK)
    assert elsewhere.read_text() == "precious"


def test_a_reboot_removed_the_lock(tmp_path: Path) -> None:
    make(tmp_path, "before")[0].save(LOCK)
    later, said = make(tmp_path, "after")
    assert later.load(None) == ()
    assert "reboot" in said[0]
    assert list(tmp_path.glob("*.json")) == []
    make(tmp_path, "")[0].save(LOCK)  # where it cannot be told, it is restored
    assert make(tmp_path, "after")[0].load(None) == (LOCK,)
    assert boot_id() == boot_id() != ""


def test_one_keeper_owns_the_folder(tmp_path: Path) -> None:
    first, second = make(tmp_path / "made")[0], make(tmp_path / "made")[0]
    first.own()
    with pytest.raises(HardwareError, match="another keeper"):
        second.own()
    first.close()
    first.close()
    second.own()
    second.close()


def test_a_folder_that_others_can_write_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o777)
    with pytest.raises(HardwareError, match="others than root"):
        make(tmp_path)[0].own()


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to give a folder away")
def test_a_folder_of_another_user_is_refused(tmp_path: Path) -> None:
    os.chown(tmp_path, 12345, -1)
    with pytest.raises(HardwareError, match="others than root"):
        make(tmp_path)[0].own()


def test_a_folder_that_cannot_be_used_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(HardwareError, match="--state-dir"):
        make(tmp_path / "file" / "folder")[0].own()
    folder, _ = make(tmp_path / "gone")
    with pytest.raises(FileNotFoundError):
        folder.save(LOCK)
    with pytest.raises(OSError, match="file's name"):
        folder.save(SavedLock("../x", None, ()))
