"""An hour of governing in virtual time, with a fault a minute; `python -m tests.chaos --soak` does a day."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from rlgov.governor.records import CONDITIONS
from rlgov.hardware.keeper.machine import LeaseMachine
from rlgov.hardware.keeper.values import Effect
from tests.chaos.soak import ROTATION, soak


@pytest.mark.slow
def test_an_hour_of_random_faults_leaks_nothing(tmp_path: Path) -> None:
    tally = soak(1.5, 1, tmp_path)
    assert tally.broken == []
    assert tally.leaked == []
    assert tally.locks > 500
    assert tally.governors > 2
    assert tally.keepers > 2
    assert sum(tally.faults.values()) > 40
    assert len(tally.conditions) > len(CONDITIONS) // 3
    assert tally.objects[-1] - tally.objects[1] < 5_000
    assert max(tally.handles) - min(tally.handles) < 10
    assert 1 <= tally.journal_files <= ROTATION.files
    assert tally.journal_bytes <= ROTATION.files * ROTATION.file_bytes


@pytest.mark.slow
def test_it_would_be_noticed_if_a_keeper_restored_nothing_when_it_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forget(*_: object) -> Iterator[Effect]:
        yield from ()

    monkeypatch.setattr(LeaseMachine, "recover", forget)
    assert soak(3.0, 1, tmp_path).broken
