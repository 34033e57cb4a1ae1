"""The governor's journal: rotated, read back as one, and never in the way."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from rlgov.agents.audit import audit_journal
from rlgov.clock import SystemClock, VirtualClock
from rlgov.errors import ConfigError, JournalError
from rlgov.governor.journal import RotatingFiles, RotationSettings, ThreadedJournal
from rlgov.governor.records import Command, CommandKind, Mode
from rlgov.journal import Header, Interval, encode, read_journal
from rlgov.records import Window
from rlgov.simulation.profile import load_profile

LIMITS = load_profile("h100-qwen3-32b").limits()
WINDOW = Window(
    start_s=0.0, duration_s=1.0, arrivals=4.0, prompt_tokens=4000.0, output_tokens=800.0,
    prefill_tokens=4000.0, served=4.0, misses=0.0, overdue=0.0, preemptions=0.0, running=20.0,
    waiting=0.0, waiting_tokens=0.0, oldest_wait_s=0.0, running_mean=19.5, busy_fraction=0.9,
    kv_usage=0.1, ttft_p50_s=0.2, ttft_p99_s=0.3, tpot_p50_s=0.02, tpot_p99_s=0.03, itl_mean_s=0.02,
    energy_j=1200.0, measured_clock_mhz=1980.0, throttled_fraction=0.0, sm_clock_mhz=1980.0,
    batch_cap=256.0, tp_degree=4.0, switching=0.0, age_s=0.0,
)  # fmt: skip
SMALL = RotationSettings(file_bytes=20_000, files=4, retry_s=5.0)
PATIENCE_S = 30.0


def interval(number: int) -> Interval:
    return Interval(replace(WINDOW, start_s=float(number)))


def wait_for(what: Callable[[], bool]) -> None:
    clock = SystemClock()
    until_s = clock.monotonic_s() + PATIENCE_S
    while not what():
        assert clock.monotonic_s() < until_s
        clock.sleep_s(0.01)


def test_files_are_rotated_counted_and_read_back_as_one(tmp_path: Path) -> None:
    files = RotatingFiles(tmp_path / "journal", replace(SMALL, files=1000))
    files.begin(encode(Header(LIMITS)))
    for number in range(100):
        files.write_line(encode(interval(number)))
    files.close()
    paths = sorted((tmp_path / "journal").iterdir())
    assert len(paths) > 3
    assert all(path.stat().st_size <= SMALL.file_bytes for path in paths)
    assert all(read_journal(path).header == Header(LIMITS) for path in paths)
    journal = read_journal(tmp_path / "journal")
    assert [each.window.start_s for each in journal.intervals] == [float(n) for n in range(100)]


def test_only_so_many_files_are_kept_and_others_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "other.jsonl").write_text(encode(Header(LIMITS)) + "\n")
    files = RotatingFiles(tmp_path, SMALL)
    files.begin(encode(Header(LIMITS)))
    for number in range(400):
        files.write_line(encode(interval(number)))
    files.close()
    assert len(list(tmp_path.glob("govern-*.jsonl"))) == SMALL.files
    assert (tmp_path / "notes.txt").exists()
    assert (tmp_path / "other.jsonl").exists()


def test_the_last_run_of_a_folder_is_read_and_what_a_kill_cut_off_is_left_out(tmp_path: Path) -> None:
    for run in ("first", "second"):
        files = RotatingFiles(tmp_path, SMALL)
        files.begin(encode(Header(LIMITS, versions={"governor.run": run})))
        for number in range(20):
            files.write_line(encode(interval(number)))
        files.close()
    newest = max(tmp_path.iterdir())
    with newest.open("a") as file:
        file.write(encode(interval(20))[:50])
    (tmp_path / "govern-00009999.jsonl").write_text(encode(Header(LIMITS)) + "\n")  # begun, and killed
    journal = read_journal(tmp_path)
    assert journal.header.versions == {"governor.run": "second"}
    assert len(journal.intervals) == 20


def test_a_folder_without_a_journal_is_refused(tmp_path: Path) -> None:
    with pytest.raises(JournalError, match="no journal"):
        read_journal(tmp_path)


def test_settings_that_keep_nothing_are_refused() -> None:
    with pytest.raises(ConfigError):
        RotationSettings(files=0)


# --------------------------------------------------------------------------- a disk that does not take it


class Disk:
    """Lines in memory; fails or hangs when told to."""

    def __init__(self) -> None:
        self.error: OSError | None = None
        self.hanging = threading.Event()
        self.hanging.set()
        self.files: list[list[str]] = []
        self._open = False
        self._header = ""

    def begin(self, header: str) -> None:
        self.close()
        self._header = header

    def write_line(self, text: str) -> None:
        self.hanging.wait(PATIENCE_S)
        if self.error is not None:
            raise self.error
        if not self._open:
            self._open = True
            self.files.append([self._header])
        self.files[-1].append(text)

    def close(self) -> None:
        self._open = False


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EIO])
def test_a_full_or_readonly_disk_drops_lines_and_recovers_in_a_new_file(code: int) -> None:
    disk, clock = Disk(), VirtualClock()
    journal = ThreadedJournal(disk, clock, SMALL)
    journal.begin(Header(LIMITS))
    journal.write(interval(0))
    wait_for(lambda: bool(disk.files))
    disk.error = OSError(code, os.strerror(code))
    journal.write(interval(1))
    wait_for(lambda: journal.dropped == 1)
    assert os.strerror(code) in journal.problem
    disk.error = None
    journal.write(interval(2))  # too soon: the disk is left alone
    wait_for(lambda: journal.dropped == 2)
    clock.advance_s(SMALL.retry_s)
    journal.write(interval(3))
    wait_for(lambda: len(disk.files) == 2)
    wait_for(lambda: journal.problem == "")
    journal.close()
    assert [len(lines) for lines in disk.files] == [2, 2]
    assert disk.files[1][0] == encode(Header(LIMITS))


def test_a_disk_that_hangs_never_holds_up_the_loop() -> None:
    disk = Disk()
    disk.hanging.clear()
    journal = ThreadedJournal(disk, VirtualClock(), RotationSettings(queued=8))
    journal.begin(Header(LIMITS))
    for number in range(50):
        journal.write(interval(number))
    assert journal.dropped >= 50 - 8 - 1
    disk.hanging.set()
    journal.close()
    assert len(disk.files) == 1


def test_an_entry_that_no_journal_can_hold_is_dropped_alone() -> None:
    disk = Disk()
    journal = ThreadedJournal(disk, VirtualClock(), SMALL)
    journal.begin(Header(LIMITS))
    journal.write(Interval(replace(WINDOW, running=float("nan"))))
    journal.write(interval(1))
    journal.close()
    assert journal.dropped == 1
    assert len(disk.files[0]) == 2


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_write_that_fails_half_way_leaves_whole_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = RotatingFiles(tmp_path, replace(SMALL, file_bytes=10**9))
    files.begin(encode(Header(LIMITS)))
    files.write_line(encode(interval(0)))
    write, full = os.write, os.open("/dev/full", os.O_WRONLY)

    def half(handle: int, data: Any) -> int:
        if len(data) > 100:
            return write(handle, data[:100])
        return write(full, data)  # "No space left on device"

    monkeypatch.setattr("rlgov.governor.journal.os.write", half)
    with pytest.raises(OSError, match="No space left"):
        files.write_line(encode(interval(1)))
    monkeypatch.undo()
    os.close(full)
    files.write_line(encode(interval(2)))
    files.close()
    assert [each.window.start_s for each in read_journal(tmp_path).intervals] == [0.0, 2.0]


# --------------------------------------------------------------------------- what a governor writes


@pytest.mark.parametrize("mode", [Mode.SHADOW, Mode.ACTIVE])
def test_a_governed_run_audits_equal(govern: Callable[..., Any], tmp_path: Path, mode: Mode) -> None:
    def wish(number: int) -> tuple[int, int, int]:
        return (3 * number) % 12, number % 6, 0

    journal = ThreadedJournal(RotatingFiles(tmp_path, replace(SMALL, files=1000)), SystemClock(), SMALL)
    governed = govern(wish, mode=mode, journal=journal)
    governed.tick(150)
    journal.close()
    assert len(list(tmp_path.iterdir())) > 3
    recorded = read_journal(tmp_path)
    assert len(recorded.intervals) == 150
    assert recorded.requests
    audit = audit_journal(recorded, type(governed.core._policy)(wish))
    assert audit.equal, audit.audit.summary()
    assert audit.observations_compared == 149
    assert audit.reasons_changed() == 0


def test_a_change_of_mode_begins_a_new_episode_in_a_new_file(
    govern: Callable[..., Any], tmp_path: Path
) -> None:
    journal = ThreadedJournal(RotatingFiles(tmp_path, RotationSettings()), SystemClock(), RotationSettings())
    governed = govern((5, 1, 0), mode=Mode.SHADOW, journal=journal)
    governed.tick(10)
    governed.orders.append(Command(CommandKind.MODE, Mode.ACTIVE))
    governed.tick(10)
    journal.close()
    modes = [read_journal(path).header.versions["governor.mode"] for path in sorted(tmp_path.iterdir())]
    assert modes == ["shadow", "active"]
    audit = audit_journal(read_journal(tmp_path), type(governed.core._policy)(lambda _: (5, 1, 0)))
    assert audit.equal
