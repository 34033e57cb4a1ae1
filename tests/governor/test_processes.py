"""A real governor and a real keeper that get killed, hang and come back; see tests/chaos for random ones."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from rlgov.journal import read_journal
from tests.chaos.runs import FAULTS, many_runs
from tests.chaos.scene import GPUS, PATIENCE_S, PROMISED_S, Scene, Started

pytestmark = pytest.mark.slow

ENDS = (signal.SIGTERM, signal.SIGINT, signal.SIGKILL, signal.SIGSEGV)
CODES = {signal.SIGTERM: 0, signal.SIGINT: 130}
FOREIGN_MHZ = 1200


@pytest.fixture
def scene(nvml_library: Path) -> Iterator[Scene]:
    with Scene(nvml_library) as made:
        yield made


def _kill_keeper(scene: Scene) -> None:
    assert scene.keeper is not None
    scene.signal(scene.keeper, signal.SIGKILL)
    scene.keeper.wait(PATIENCE_S)


def _kill_both(scene: Scene) -> None:
    scene.signal(scene.keeper, signal.SIGKILL)  # first, or it might see the other one go
    scene.signal(scene.governor, signal.SIGKILL)
    assert scene.keeper is not None
    assert scene.governor is not None
    scene.keeper.wait(PATIENCE_S)
    scene.governor.wait(PATIENCE_S)
    assert not scene.restored()  # nobody is left to do it


@pytest.mark.parametrize("number", ENDS, ids=[number.name for number in ENDS])
def test_whatever_ends_the_governor_the_clocks_are_restored(scene: Scene, number: signal.Signals) -> None:
    scene.start()
    governor = scene.governor
    assert isinstance(governor, Started)
    scene.signal(governor, number)
    scene.until("all clocks are as they were found", scene.restored, PROMISED_S)
    governor.wait(PATIENCE_S)
    assert governor.code == CODES.get(number, -number)
    if number is signal.SIGKILL:
        scene.start_governor()  # the next one takes over
        scene.until_governed()


def test_a_governor_that_hangs_loses_its_lease_and_writes_nothing_on_it(scene: Scene) -> None:
    scene.start()
    scene.signal(scene.governor, signal.SIGSTOP)
    scene.until("all clocks are as they were found", scene.restored, PROMISED_S)
    scene.clock.sleep_s(3 * scene.interval_s)
    assert scene.restored()
    written = scene.stub.state.write_count
    scene.signal(scene.governor, signal.SIGCONT)
    scene.until("it says that its lease was lost", lambda: "LeaseLost" in scene.conditions())
    assert scene.status()["tick"]["actuation"]["failures"]["clock/LeaseLost"] >= 1
    scene.until_governed()  # under a lease of its own, asked for anew
    locks = [mhz for _, mhz in scene.stub.writes[written:]]
    assert None not in locks


def test_a_keeper_that_is_killed_restores_when_it_starts_and_the_governor_goes_on(scene: Scene) -> None:
    scene.start()
    _kill_keeper(scene)
    scene.until("the governor misses it", lambda: "KeeperGone" in scene.conditions())
    written = scene.stub.state.write_count
    scene.start_keeper()
    restored = {gpu for gpu, mhz in scene.stub.writes[written : written + GPUS] if mhz is None}
    assert restored == set(range(GPUS))
    scene.until_governed()
    scene.until("all is well again", lambda: "KeeperGone" not in scene.conditions())
    assert scene.governor is not None
    assert scene.governor.running()


def test_both_killed_at_once_and_only_the_keeper_comes_back(scene: Scene) -> None:
    scene.start()
    _kill_both(scene)
    scene.start_keeper()
    assert scene.restored()  # before it serves anybody
    assert scene.saved() == set()


def test_both_killed_at_once_and_nothing_comes_back_but_the_service_manager(scene: Scene) -> None:
    scene.start()
    _kill_both(scene)
    scene.stop_post()
    assert scene.restored()
    assert scene.saved() == set()


def test_what_an_administrator_locked_is_restored_and_never_less(nvml_library: Path) -> None:
    with Scene(nvml_library, restore_mhz=1620) as scene:
        scene.start()
        assert max(mhz or 9999 for mhz in scene.stub.locks_mhz()) < 1620
        scene.signal(scene.governor, signal.SIGKILL)
        scene.until("the administrator's clock is back", scene.restored, PROMISED_S)
        assert scene.stub.locks_mhz() == (1620,) * GPUS


def test_a_foreign_writer_keeps_its_clock_and_the_governor_says_so(scene: Scene) -> None:
    scene.start()
    scene.until(
        "the clock has settled",
        lambda: (
            scene.status()["tick"]["actuation"]["verdict"] == "held"
            and scene.stub.locks_mhz() == (600,) * GPUS
        ),
    )
    scene.clock.sleep_s(2.0)  # the keeper has measured it, too
    scene.foreign_lock(1, FOREIGN_MHZ)
    scene.until("the governor yields", lambda: "ForeignWriter" in scene.conditions(), PROMISED_S)
    scene.until(
        "the others are restored",
        lambda: scene.stub.locks_mhz() == (None, FOREIGN_MHZ, None, None),
        PROMISED_S,
    )
    scene.clock.sleep_s(4 * scene.interval_s)
    scene.signal(scene.governor, signal.SIGTERM)
    assert scene.governor is not None
    scene.governor.wait(PATIENCE_S)
    assert scene.stub.locks_mhz() == (None, FOREIGN_MHZ, None, None)
    assert not scene.status()


def test_a_killed_governor_leaves_a_journal_that_can_be_read(scene: Scene) -> None:
    scene.start()
    scene.until("a few decisions were taken", lambda: scene.status()["tick"]["number"] >= 8)
    scene.signal(scene.governor, signal.SIGKILL)
    scene.until("all clocks are as they were found", scene.restored, PROMISED_S)
    journal = read_journal(scene.folder / "journal")
    assert len(journal.intervals) >= 6
    decisions = [interval.decision for interval in journal.intervals if interval.decision is not None]
    assert {decision.asked.sm_clock_mhz for decision in decisions} == {600}


def _cpu_s(pid: int) -> float:
    figures = Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()
    return (int(figures[11]) + int(figures[12])) / os.sysconf("SC_CLK_TCK")


def _resident_bytes(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text(encoding="ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_a_governor_is_small(scene: Scene) -> None:
    scene.start()
    assert scene.governor is not None
    pid, before, began_s = scene.governor.pid, scene.status()["tick"]["number"], _cpu_s(scene.governor.pid)
    while scene.status()["tick"]["number"] < before + 15:
        scene.clock.sleep_s(scene.interval_s)
    # A hundredth of a core is 10 ms a tick of a second; here the machine is busy, and status is asked for.
    assert (_cpu_s(pid) - began_s) / (scene.status()["tick"]["number"] - before) < 0.1
    assert _resident_bytes(pid) < 100e6


def test_random_faults_leave_nothing_locked() -> None:
    """`python -m tests.chaos --runs 200` does hundreds of them."""
    outcomes = many_runs(runs=len(FAULTS), seed=7, workers=4, told=lambda _: None)
    assert [outcome for outcome in outcomes if outcome.violation] == []
    assert sum(outcome.locked > 0 for outcome in outcomes) > len(FAULTS) // 2
