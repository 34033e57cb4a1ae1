"""The table of errors: everything asked is in it, and a miss is called one."""

from __future__ import annotations

from pathlib import Path

import pytest

from rlgov.calibration.report import Line, published_report


@pytest.fixture(scope="module")
def lines(shared_dir: Path) -> list[Line]:
    return published_report(shared_dir / "data")


def test_a_miss_is_called_one() -> None:
    def met(asked: float | None, measured: float) -> bool | None:
        return Line("x", "y", asked, measured, 1).met

    assert (met(5.0, 4.9), met(5.0, 5.04), met(5.0, 5.06), met(None, 99.0)) == (True, True, False, None)


def test_every_asked_error_is_reported(lines: list[Line]) -> None:
    def asked(*words: str) -> list[float | None]:
        return [line.asked for line in lines if all(w in f"{line.what}, {line.how}" for w in words)]

    assert asked("H100 dense", "time", "one-model-out") == [9.0]
    assert asked("B200 dense", "time", "one-model-out") == [13.0]
    assert asked("H100 mixture", "time", "one-model-out") == [20.0]
    assert set(asked("H100", "power", "one-model-out")) == {10.0}
    assert 14.0 in asked("B200 all", "power", "one-model-out")
    assert asked("time", "one-batch-out") == [5.0] * 4
    assert asked("power", "one-batch-out") == [2.5] * 2
    assert asked("prefill power over clock") == [8.0]
    assert len(asked("RTX")) + len(asked("Jetson")) == 9


def test_what_was_asked_of_h100_is_kept(lines: list[Line]) -> None:
    missed = {f"{line.what}, {line.how}" for line in lines if line.met is False}
    assert not [name for name in missed if name.startswith("H100")]


def test_every_line_says_how_and_on_what(lines: list[Line]) -> None:
    assert all(line.how and line.rows > 0 and line.measured >= 0 for line in lines)
