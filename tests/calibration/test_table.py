from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from rlgov.calibration import table
from rlgov.errors import CharacterizationError

ROW: dict[str, Any] = {
    "point_id": "0123456789ab",
    "repeat": 0,
    "workload": "short-in/long-out",
    "mode": "closed",
    "concurrency": 8,
    "sm_clock_mhz": 1980.0,
    "batch_cap": 8,
    "tp_degree": 1,
    "allotted_gpus": 1,
    "duration_s": 30.0,
    "steady": True,
    "served": 12,
    "throttle_reasons": "none",
    "model": "m",
    "source": "simulated",
}
HEADER = table.RunHeader(
    schema=table.SCHEMA,
    rlgov_version="0",
    deployment="simulated",
    profile="p",
    model="m",
    gpu=None,
    seed=3,
    points=2,
    digest="a" * 12,
    settings={"classes": ["short-in/short-out"]},
    notes=("a note",),
)


def points(*rows: dict[str, Any]) -> pd.DataFrame:
    return table.frame_of(list(rows), table.POINTS, "points")


@pytest.mark.parametrize("keep", ["parquet", "csv"])
def test_points_survive_the_round_trip_with_what_is_missing(tmp_path: Path, keep: str) -> None:
    written = points(ROW, ROW | {"point_id": "000000000001", "repeat": 1, "energy_j": 3.25})
    parquet, csv = table.write_points(tmp_path, written)
    (csv if keep == "parquet" else parquet).unlink()
    back = table.read_points(tmp_path)
    pd.testing.assert_frame_equal(back, written)
    assert np.isnan(back["energy_j"].iloc[0])
    assert back["requests"].isna().all()
    assert not list(tmp_path.glob("*.part"))


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda frame: frame.drop(columns=["energy_j"]), "lacks energy_j"),
        (lambda frame: frame.assign(clock=1), "unknown column clock"),
        (lambda frame: frame.assign(batch_cap=pd.NA), "row 1 has no batch_cap"),
        (lambda frame: frame.assign(duration_s=np.nan), "row 1 has no duration_s"),
        (lambda frame: frame.assign(ttft_p50_s="soon"), "column ttft_p50_s"),
        (lambda frame: frame.assign(energy_j=np.inf), "infinite energy_j"),
        (lambda frame: pd.concat([frame, frame]), "repeat 0 twice"),
        (lambda frame: frame.iloc[:0], "no point in it"),
    ],
)
def test_a_damaged_table_is_refused_with_its_reason(tmp_path: Path, damage: Any, says: str) -> None:
    damage(points(ROW)).to_parquet(tmp_path / table.POINTS_FILE, index=False)
    with pytest.raises(CharacterizationError, match=says):
        table.read_points(tmp_path)


def test_other_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CharacterizationError, match="holds no points"):
        table.read_points(tmp_path)
    (tmp_path / table.POINTS_FILE).write_bytes(b"nothing of the kind")
    with pytest.raises(CharacterizationError, match="cannot be read as a table"):
        table.read_points(tmp_path)


def test_a_row_of_unknown_names_is_refused() -> None:
    with pytest.raises(CharacterizationError, match="enrgy_j is no column"):
        points(ROW | {"enrgy_j": 1.0})


def test_iterations_survive_and_may_be_absent(tmp_path: Path) -> None:
    assert table.read_iterations(tmp_path) is None
    rows = [{"point_id": "x", "repeat": 0, "t_s": 1.0, "step_s": 0.02, "running": 4.0}]
    written = table.frame_of(rows, table.ITERATIONS, "iterations")
    table.write_iterations(tmp_path, written)
    back = table.read_iterations(tmp_path)
    assert back is not None
    pd.testing.assert_frame_equal(back, written)


def test_the_header_survives_and_its_format_is_checked(tmp_path: Path) -> None:
    with pytest.raises(CharacterizationError, match="holds no characterization"):
        table.read_header(tmp_path)
    table.write_header(tmp_path, HEADER)
    assert table.read_header(tmp_path) == HEADER
    table.write_header(tmp_path, replace(HEADER, schema=99))
    with pytest.raises(CharacterizationError, match="of format 99"):
        table.read_header(tmp_path)
    (tmp_path / table.HEADER_FILE).write_text("schema: 1\npoints: many\n", encoding="utf-8")
    with pytest.raises(CharacterizationError, match="restore it"):
        table.read_header(tmp_path)
