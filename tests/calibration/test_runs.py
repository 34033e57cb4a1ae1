"""Run folders become mean iterations; what cannot be used is counted, what does not belong is refused."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from rlgov.calibration.predict import Work
from rlgov.calibration.runs import Observations, read_observations, same_card
from rlgov.calibration.table import (
    ITERATIONS,
    ITERATIONS_FILE,
    RunHeader,
    frame_of,
    read_header,
    read_points,
    write_header,
    write_iterations,
    write_points,
)
from rlgov.errors import CalibrationError, CharacterizationError
from rlgov.simulation.physics import build_tables
from rlgov.simulation.profile import Profile

Campaign = Callable[..., Path]
SMALL: dict[str, Any] = {
    "clocks": (1980, 1080), "caps": (32, 8), "tp": (4, 2), "classes": ("medium-in/medium-out",),
    "measure_s": 30,
}  # fmt: skip


@pytest.fixture(scope="module")
def run(dense: Profile, characterised: Campaign) -> Path:
    """Eight points of the dense profile itself."""
    return characterised(dense, **SMALL)


@pytest.fixture
def copy(run: Path, tmp_path: Path) -> Path:
    """The same, to be changed."""
    return shutil.copytree(run, tmp_path / "run")


def altered(folder: Path, **fields: Any) -> RunHeader:
    """The run's header with other fields."""
    return replace(read_header(folder), **fields)


def change(folder: Path, **columns: Any) -> None:
    """Give columns of all points (or a callable's choice) another value."""
    points = read_points(folder)
    write_points(folder, points.assign(**columns))


def test_means_are_what_the_simulator_did(dense: Profile, run: Path) -> None:
    observed = read_observations([run], dense)
    tables = build_tables(dense)
    assert len(observed.means) == 8
    assert len(observed.details) > 8
    assert not observed.left_out
    assert not observed.notes
    # A limit of power mixes two clocks in a point; its rows say that they are worth less.
    whole = np.flatnonzero(observed.means.error == 0.0)
    assert len(whole) >= 4
    for cells in (observed.means, observed.details):
        mine = cells.take(np.isin(cells.point, whole))
        assert np.max(np.abs(Work(mine).step_s(tables) / mine.step_s - 1.0)) < 0.01
    powered = Work(observed.means).power_w(tables, observed)
    assert np.max(np.abs(powered / observed.power_w - 1.0)) < 0.03
    assert set(observed.settings) == {"clock", "cap", "TP degree"}


def test_without_iterations_points_are_their_own_details(dense: Profile, copy: Path) -> None:
    (copy / ITERATIONS_FILE).unlink()
    observed = read_observations([copy], dense)
    assert observed.details is observed.means


def test_rows_without_a_number_are_left_out_and_counted(dense: Profile, copy: Path) -> None:
    points = read_points(copy)
    points.loc[0, "busy_s"] = np.nan
    points.loc[1, "iterations"] = np.nan
    points.loc[2, "steady"] = False
    points.loc[3, ["sm_clock_mhz", "measured_clock_mhz"]] = np.nan
    points.loc[4, "iterations"] = 3
    points.loc[5, "power_w_per_gpu"] = np.nan
    write_points(copy, points)
    observed = read_observations([copy], dense)
    assert len(observed.means) == 3
    assert sum(observed.left_out.values()) == 5
    assert len(observed.with_power) == 2
    told = " ".join(observed.left_out)
    for what in ("no busy_s", "no iterations", "not steady", "no sm_clock_mhz", "fewer than 20"):
        assert what in told


def test_nothing_usable_is_an_error_that_says_why(dense: Profile, copy: Path) -> None:
    change(copy, steady=False)
    with pytest.raises(CalibrationError, match="8 rows: not steady"):
        read_observations([copy], dense)


def test_degrees_that_the_profile_lacks_are_left_out(dense: Profile, copy: Path) -> None:
    points = read_points(copy)
    write_points(copy, points.assign(tp_degree=points["tp_degree"].where(points["tp_degree"] == 2, 8)))
    observed = read_observations([copy], dense)
    (why,) = observed.left_out
    assert "a TP degree that profile" in why
    assert observed.left_out[why] == 4


def test_an_unfinished_run_is_refused(dense: Profile, copy: Path) -> None:
    write_points(copy, read_points(copy).iloc[:5])
    with pytest.raises(CalibrationError, match=r"5 of the 8 rows.*resume"):
        read_observations([copy], dense)


def test_a_run_that_never_wrote_a_table_is_refused(dense: Profile, copy: Path) -> None:
    for name in ("points.parquet", "points.csv"):
        (copy / name).unlink()
    with pytest.raises(CharacterizationError, match="resume"):
        read_observations([copy], dense)


def test_a_missing_column_is_named(dense: Profile, copy: Path) -> None:
    (copy / "points.parquet").unlink()
    table = pd.read_csv(copy / "points.csv").drop(columns="busy_s")
    table.to_csv(copy / "points.csv", index=False)
    with pytest.raises(CharacterizationError, match="lacks busy_s"):
        read_observations([copy], dense)


def test_no_run_is_an_error(dense: Profile) -> None:
    with pytest.raises(CalibrationError, match="no run"):
        read_observations([], dense)


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        ("model", "other/Model", "of the model 'other/Model'"),
        ("gpu", "NVIDIA A100-SXM4-80GB", "of the GPU 'NVIDIA A100-SXM4-80GB'"),
    ],
)
def test_a_run_of_something_else_is_refused(
    dense: Profile, copy: Path, field: str, value: str, says: str
) -> None:
    write_header(copy, altered(copy, **{field: value}))
    with pytest.raises(CalibrationError, match=says):
        read_observations([copy], dense)


@pytest.mark.parametrize(
    ("field", "value"), [("model", "other"), ("gpu", "NVIDIA B200"), ("deployment", "live")]
)
def test_runs_of_different_deployments_are_refused(
    dense: Profile, run: Path, copy: Path, field: str, value: str
) -> None:
    write_header(copy, altered(copy, digest="0" * 12, **{field: value}))
    with pytest.raises(CalibrationError, match="one deployment"):
        read_observations([run, copy], dense)


def test_the_same_run_twice_is_refused(dense: Profile, run: Path, copy: Path) -> None:
    with pytest.raises(CalibrationError, match="same campaign"):
        read_observations([run, copy], dense)


def test_runs_of_one_deployment_are_taken_together(
    dense: Profile, run: Path, characterised: Campaign
) -> None:
    more = characterised(dense, **(SMALL | {"clocks": (1530,)}))
    both = read_observations([run, more], dense)
    assert len(both.means) == 12
    assert set(both.settings["clock"].tolist()) == {1980, 1530, 1080}


def test_the_drivers_name_of_a_card_is_recognised(dense: Profile, copy: Path) -> None:
    write_header(copy, replace(read_header(copy), gpu="NVIDIA H100 80GB HBM3"))
    assert len(read_observations([copy], dense).means) == 8


def test_what_is_assumed_is_noted(dense: Profile, copy: Path) -> None:
    write_header(copy, replace(read_header(copy), gpu=None))
    change(copy, sm_clock_mhz=np.nan, measured_clock_mhz=np.nan)
    observed = read_observations([copy], dense)
    assert np.all(observed.means.clock_mhz == dense.gpu.sm_clock_max_mhz)
    assert "clock" not in observed.settings
    assert any("does not say which GPU" in note for note in observed.notes)
    assert any("no clock was locked or measured" in note for note in observed.notes)


@pytest.mark.parametrize(
    ("driver", "sheet", "same"),
    [
        ("NVIDIA H100 80GB HBM3", "H100 SXM 80GB", True),
        ("NVIDIA H200", "H100 SXM 80GB", False),
        ("NVIDIA A100-SXM4-80GB", "A100 SXM 80GB", True),
        ("NVIDIA GeForce RTX 4090", "GeForce RTX 4090 24GB", True),
        ("NVIDIA GeForce RTX 5090", "GeForce RTX 4090 24GB", False),
        ("NVIDIA L40S", "L40S 48GB", True),
        ("NVIDIA L40", "L40S 48GB", False),
        ("", "H100 SXM 80GB", False),
        ("CPU", "CPU", True),
    ],
)
def test_names_of_cards(driver: str, sheet: str, same: bool) -> None:  # noqa: FBT001  # of a table
    assert same_card(driver, sheet) is same


def with_iterations(folder: Path, dense: Profile, rows: list[dict[str, Any]]) -> Observations:
    """The run, its first point with these iterations and no other with any."""
    first = read_points(folder).iloc[0]
    known = {"point_id": first["point_id"], "repeat": 0, "running": 8, "waiting": 0, "kv_usage": 0.1}
    table = [known | {"t_s": float(i)} | row for i, row in enumerate(rows)]
    write_iterations(folder, frame_of(table, ITERATIONS, "test"))
    return read_observations([folder], dense)


def decode(step_s: float, sequences: float = 8, context: float = 4000) -> dict[str, float]:
    return {"step_s": step_s, "decode_tokens": sequences, "context_tokens": context, "prefill_tokens": 0}


def prompt(step_s: float, tokens: float) -> dict[str, float]:
    return {"step_s": step_s, "decode_tokens": 7, "context_tokens": 3500 + tokens, "prefill_tokens": tokens}


def test_iterations_with_and_without_prompts_are_told_apart(dense: Profile, copy: Path) -> None:
    rows = [decode(0.02)] * 50 + [prompt(0.05, 500)] * 30
    observed = with_iterations(copy, dense, rows)
    mine = observed.details.take(observed.details.point == 0)
    assert mine.prefill_tokens.tolist() == [0, 500]
    assert mine.decodes.tolist() == [8, 7]
    # The prompt is not context that decoding sequences attend to.
    assert mine.context_tokens.tolist() == [4000, pytest.approx(3500)]
    assert mine.step_s.tolist() == [pytest.approx(0.02), pytest.approx(0.05)]
    pairs = observed.means.pairs[0] / observed.means.prefill_tokens[0]
    assert mine.pairs[1] == pytest.approx(500 * pairs)
    assert len(observed.details) == 2 + 7  # the other points tell nothing single


def test_batches_of_different_sizes_are_told_apart(dense: Profile, copy: Path) -> None:
    rows = [decode(0.01 + 0.001 * size, size, 500 * size) for size in (2, 8, 32, 64) for _ in range(60)]
    observed = with_iterations(copy, dense, rows)
    mine = observed.details.take(observed.details.point == 0)
    assert len(mine) >= 3
    assert np.allclose(mine.step_s, 0.01 + 0.001 * mine.decodes)


def test_a_zero_step_is_paid_for_by_the_one_before(dense: Profile, copy: Path) -> None:
    """Asynchronous scheduling: two results at once, the second took no time of its own."""
    rows = [decode(0.04), decode(0.0)] * 40
    observed = with_iterations(copy, dense, rows)
    mine = observed.details.take(observed.details.point == 0)
    assert mine.step_s.tolist() == [pytest.approx(0.02)]


def test_pauses_and_missing_values_are_left_out_and_counted(dense: Profile, copy: Path) -> None:
    rng = np.random.default_rng(0)
    rows = [decode(step) for step in rng.normal(0.02, 0.0005, 200).tolist()]
    rows[50] = decode(1.5)
    rows[60] = decode(0.02) | {"context_tokens": float("nan")}
    observed = with_iterations(copy, dense, rows)
    mine = observed.details.take(observed.details.point == 0)
    assert mine.step_s[0] == pytest.approx(0.02, rel=0.01)
    assert observed.left_out == {"iterations with a missing value": 1, "iterations that held a pause": 1}


def test_too_few_iterations_leave_the_points_mean(dense: Profile, copy: Path) -> None:
    observed = with_iterations(copy, dense, [decode(9.0)] * 5)
    mine = observed.details.take(observed.details.point == 0)
    assert mine.step_s.tolist() == [observed.means.step_s[0]]


def test_a_mean_clock_below_the_asked_one_counts_less(dense: Profile, copy: Path) -> None:
    points = read_points(copy)
    change(copy, measured_clock_mhz=points["sm_clock_mhz"] * 0.9)
    observed = read_observations([copy], dense)
    assert np.all(observed.means.error > 0.05)
