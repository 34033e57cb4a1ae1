"""A campaign that is killed, or whose disk fails, at any step of what it writes."""

from __future__ import annotations

import errno
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rlgov.calibration.table import JOURNAL_FILE, read_header, read_iterations, read_points
from rlgov.characterize.campaign import Outcome, gather
from rlgov.errors import CharacterizationError, EngineError

if TYPE_CHECKING:
    from tests.characterize.conftest import Disk, InstantBench

Run = Callable[..., Outcome]
POINTS = 4
FULL = OSError(errno.ENOSPC, "No space left on device")


def _lines(out: Path) -> int:
    journal = out / JOURNAL_FILE
    return journal.read_bytes().count(b"\n") if journal.is_file() else 0


@pytest.fixture
def undisturbed(run_instant: Run, make_bench: type[InstantBench], disk: Disk, tmp_path: Path) -> Path:
    """The run folder of a campaign that nothing happened to; ``disk.steps`` is how many steps it took."""
    out = tmp_path / "undisturbed"
    with disk.watched():
        run_instant(out, make_bench())
    return out


def _assert_same(out: Path, wanted: Path) -> None:
    pd.testing.assert_frame_equal(read_points(out), read_points(wanted))
    iterations, expected = read_iterations(out), read_iterations(wanted)
    assert iterations is not None
    assert expected is not None
    pd.testing.assert_frame_equal(iterations, expected)
    assert read_header(out).digest == read_header(wanted).digest
    assert _lines(out) == POINTS
    assert not list(out.rglob("*.part"))


def test_killed_at_every_step_it_goes_on_without_repeating_a_finished_point(
    undisturbed: Path,
    run_instant: Run,
    make_bench: type[InstantBench],
    disk: Disk,
    killed: type[BaseException],
) -> None:
    steps = disk.steps
    assert steps > 8 * POINTS  # each point writes its iterations, then its line
    for step in range(steps):
        out = undisturbed.with_name(f"killed-{step}")
        with disk.watched(kill_at=step), pytest.raises(killed):
            run_instant(out, make_bench())
        finished = _lines(out)
        again = make_bench()
        assert run_instant(out, again).measured == POINTS - finished
        assert len(set(again.measured)) == len(again.measured) == POINTS - finished
        _assert_same(out, undisturbed)


@given(data=st.data())
@settings(
    max_examples=25,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
def test_killed_again_and_again_it_ends_with_the_same_points(
    data: st.DataObject,
    undisturbed: Path,
    run_instant: Run,
    make_bench: type[InstantBench],
    disk: Disk,
    killed: type[BaseException],
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    out = tmp_path_factory.mktemp("again") / "run"
    kills = data.draw(st.lists(st.integers(0, 45), max_size=8))
    tried = finished = 0
    for step in kills:
        bench = make_bench()
        with disk.watched(kill_at=step):
            with suppress(killed):
                run_instant(out, bench)
            tried += len(bench.measured)
        assert _lines(out) >= finished  # nothing that was finished is lost
        finished = _lines(out)
    last = make_bench()
    run_instant(out, last)
    assert tried + len(last.measured) <= POINTS + len(kills)  # a kill costs at most the point under way
    _assert_same(out, undisturbed)


def test_a_disk_that_is_full_at_any_step_is_told_and_costs_no_finished_point(
    undisturbed: Path, run_instant: Run, make_bench: type[InstantBench], disk: Disk
) -> None:
    told = []
    for step in range(disk.steps):
        out = undisturbed.with_name(f"full-{step}")
        with disk.watched(kill_at=step, error=FULL):
            try:
                run_instant(out, make_bench())
            except CharacterizationError as error:
                told.append(str(error))
        journal = out / JOURNAL_FILE
        if journal.is_file():
            content = journal.read_bytes()
            assert content in {b"", content.rstrip(b"\n") + b"\n"}  # no line is torn
        finished = _lines(out)
        assert run_instant(out, make_bench()).measured == POINTS - finished
        _assert_same(out, undisturbed)
    assert len(told) > 6 * POINTS  # all but the removal of what is gone already
    assert all("No space left on device" in text and "goes on from here" in text for text in told)


def test_the_tables_of_an_unfinished_campaign_can_be_had(
    run_instant: Run, make_bench: type[InstantBench], disk: Disk, killed: type[BaseException], tmp_path: Path
) -> None:
    out = tmp_path / "run"
    with pytest.raises(CharacterizationError, match=r"holds no characterization\.yml"):
        gather(out)
    with disk.watched(kill_at=20), pytest.raises(killed):
        run_instant(out, make_bench())
    finished = _lines(out)
    assert 0 < finished < POINTS
    outcome = gather(out)
    assert (len(outcome.points), outcome.header.points) == (finished, POINTS)
    assert len(read_points(out)) == finished
    run_instant(out, make_bench())
    assert len(read_points(out)) == POINTS
    (out / JOURNAL_FILE).unlink()  # a folder that was copied without it
    assert len(gather(out).points) == POINTS


@pytest.mark.parametrize(
    ("changes", "deployment", "says"),
    [
        ({"caps": (8,)}, {}, r"caps \[\] there, \[8\] here"),
        ({"measure_s": 5.0}, {}, "measure_s 4.0 there, 5.0 here"),
        ({}, {"identity": {"limits": {"tdp_w": 650.0}, "physics": "a"}}, "tdp_w 700.0 there, 650.0 here"),
        ({}, {"identity": {"limits": {"tdp_w": 700.0}, "physics": "b"}}, "physics a there, b here"),
    ],
)
def test_another_plan_is_refused_by_the_field_that_differs(
    changes: dict[str, Any],
    deployment: dict[str, Any],
    says: str,
    undisturbed: Path,
    run_instant: Run,
    make_bench: type[InstantBench],
) -> None:
    before = {path: path.read_bytes() for path in undisturbed.rglob("*") if path.is_file()}
    with pytest.raises(CharacterizationError, match=says):
        run_instant(undisturbed, make_bench(**deployment), **changes)
    assert {path: path.read_bytes() for path in undisturbed.rglob("*") if path.is_file()} == before


def test_other_versions_are_noted_when_a_campaign_goes_on(
    run_instant: Run, make_bench: type[InstantBench], disk: Disk, killed: type[BaseException], tmp_path: Path
) -> None:
    out = tmp_path / "run"
    with disk.watched(kill_at=20), pytest.raises(killed):
        run_instant(out, make_bench(versions={"driver": "580"}))
    header = run_instant(out, make_bench(versions={"driver": "590"})).header
    assert header.versions["driver"] == "580"
    assert any("driver 580, then 590" in note for note in header.notes)
    assert read_header(out) == header


def test_what_cannot_be_served_is_refused_before_the_first_point(
    run_instant: Run, make_bench: type[InstantBench], tmp_path: Path
) -> None:
    with pytest.raises(CharacterizationError, match="takes 288 tokens, at TP 1 one may take 200"):
        run_instant(tmp_path / "run", make_bench(room_tokens=200))
    assert not (tmp_path / "run").exists()


def test_a_point_that_fails_is_tried_once_more(
    run_instant: Run, make_bench: type[InstantBench], tmp_path: Path
) -> None:
    once = make_bench(failures=1)
    assert run_instant(tmp_path / "once", once).measured == POINTS
    assert once.measured[0] == once.measured[1]
    with pytest.raises(EngineError, match="just restarted"):
        run_instant(tmp_path / "twice", make_bench(failures=2))
    assert run_instant(tmp_path / "twice", make_bench()).measured == POINTS
