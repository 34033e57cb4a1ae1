from __future__ import annotations

import errno
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rlgov.governor.points import PointMaker
from rlgov.governor.records import Condition, Mode, Tick
from rlgov.governor.tensorboard import MOST_WAITING, EventFiles, TensorBoardEvents
from rlgov.records import Limits

MakeTick = Callable[..., Tick]


def read(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Every scalar in the folder, by TensorBoard's own reader."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    found = accumulator.EventAccumulator(str(folder))
    found.Reload()
    tags: list[str] = found.Tags()["scalars"]
    return {tag: [(event.step, event.value) for event in found.Scalars(tag)] for tag in tags}


class Broken:
    """Fails as told, and keeps the rest."""

    def __init__(self, failures: int) -> None:
        self.failures = failures
        self.points: list[tuple[dict[str, float], int]] = []

    def add(self, scalars: dict[str, float], step: int, wall_s: float) -> None:
        assert wall_s > 0
        if self.failures:
            self.failures -= 1
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self.points.append((scalars, step))

    def close(self) -> None:
        pass


def test_tensorboard_reads_the_points(tmp_path: Path, limits: Limits, make_tick: MakeTick) -> None:
    events = TensorBoardEvents(EventFiles(tmp_path / "tb"), limits, ticks_a_point=3)
    for number in range(7):
        events.write(make_tick(reason="SLO_OVERRIDE" if number == 1 else "POLICY"))
    events.close()
    events.close()
    scalars = read(tmp_path / "tb")
    steps = [step for step, _ in scalars["power/measured_w"]]
    assert steps == [3, 6, 7]
    assert [value for _, value in scalars["power/measured_w"]] == [2000.0] * 3
    assert [step for step, _ in scalars["guard/slo_override_share"]] == [3]
    assert scalars["guard/slo_override_share"][0][1] == pytest.approx(1 / 3)
    assert scalars["reward/energy"][0] == (3, -0.5)
    assert events.dropped == 0


def test_tags_that_training_has_too_mean_the_same(limits: Limits, make_tick: MakeTick) -> None:
    ticks = [make_tick(seen={"misses": float(number == 0), "energy_j": 1000.0}) for number in range(4)]
    point = PointMaker(limits).make(ticks)
    assert point["serving/attainment"] == 1.0 - 1.0 / 16.0
    assert point["serving/energy_j_per_token"] == 4000.0 / 3200.0
    assert point["serving/energy_ratio"] == pytest.approx(0.75)  # the decisions' 1500 of 2000 J
    assert point["asked/sm_clock_mhz_mean"] == 1500.0
    assert point["guard/policy_share"] == 1.0
    names = {tag.split("/")[0] for tag in point}
    assert {"serving", "asked", "guard", "applied", "in_force", "tails", "reward"} <= names


def test_a_point_holds_only_what_was_measured(limits: Limits, make_tick: MakeTick) -> None:
    blind: dict[str, Any] = {"blind": 1.0, "energy_j": None}
    point = PointMaker(limits).make([make_tick(seen=blind, ood_score=None, prediction=None, decision=None)])
    assert point["governor/blind_share"] == 1.0
    assert not {"power/measured_w", "serving/attainment", "asked/sm_clock_mhz_mean"} & set(point)
    part = PointMaker(limits).make([make_tick(), make_tick(seen={"energy_j": None, "kv_usage": math.nan})])
    assert "serving/energy_j_per_token" not in part  # tokens of a window without energy
    assert part["power/measured_w"] == 2000.0
    assert part["tails/kv_usage_worst"] == 0.2
    assert all(math.isfinite(value) for value in part.values())


def test_conditions_and_acting_are_shares(
    limits: Limits, make_tick: MakeTick, make_condition: Callable[..., Condition]
) -> None:
    ticks = [make_tick(acting=True, mode=Mode.ACTIVE, conditions=(make_condition("Throttled"),)), make_tick()]
    point = PointMaker(limits).make(ticks)
    assert point["condition/Throttled_share"] == 0.5
    assert point["governor/acting_share"] == 0.5


def test_a_full_disk_drops_points_and_recovers(limits: Limits, make_tick: MakeTick) -> None:
    broken = Broken(failures=2)
    events = TensorBoardEvents(broken, limits, ticks_a_point=1)
    for _ in range(3):
        events.write(make_tick())
    events.close()
    assert events.dropped == 2
    assert [step for _, step in broken.points] == [3]


def test_a_disk_that_hangs_does_not_stop_the_loop(limits: Limits, make_tick: MakeTick) -> None:
    import threading

    released = threading.Event()

    class Hanging(Broken):
        def add(self, scalars: dict[str, float], step: int, wall_s: float) -> None:
            released.wait()
            super().add(scalars, step, wall_s)

    writer = Hanging(failures=0)
    events = TensorBoardEvents(writer, limits, ticks_a_point=1)
    extra = 10
    for _ in range(MOST_WAITING + extra):
        events.write(make_tick())  # returns at once, every time
    assert events.dropped >= extra - 1  # one is being written
    released.set()
    events.close()
    assert len(writer.points) + events.dropped == MOST_WAITING + extra


def test_a_real_full_disk_is_survived(tmp_path: Path) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("needs /dev/full")
    files = EventFiles(tmp_path)
    files.add({"a": 1.0}, 1, 1000.0)
    files.close()
    (path,) = tmp_path.iterdir()
    second = tmp_path / (path.name.removesuffix("0") + "1")
    second.symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left"):
        files.add({"a": 2.0}, 2, 1000.0)
    second.unlink()
    files.add({"a": 3.0}, 3, 1000.0)
    files.close()
    assert read(tmp_path)["a"] == [(1, 1.0), (3, 3.0)]


def test_files_are_bounded_in_size_and_number(tmp_path: Path, limits: Limits, make_tick: MakeTick) -> None:
    events = TensorBoardEvents(
        EventFiles(tmp_path, largest_bytes=4000, most_files=3), limits, ticks_a_point=1
    )
    for _ in range(60):
        events.write(make_tick())
    events.close()
    assert events.dropped == 0
    files = list(tmp_path.iterdir())
    assert len(files) <= 3
    assert all(path.stat().st_size < 8000 for path in files)
    assert read(tmp_path)["power/measured_w"][-1] == (60, 2000.0)


def test_without_tensorboard_the_message_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import sys

    from rlgov.errors import ConfigError

    monkeypatch.setitem(sys.modules, "tensorboard.compat.proto", None)
    with pytest.raises(ConfigError, match="pip install tensorboard"):
        EventFiles(tmp_path)
