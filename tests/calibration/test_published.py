"""Published tables are read whole or refused with the place of what they lack."""

from __future__ import annotations

from pathlib import Path

import pytest

from rlgov.calibration.published import read_jetson, read_ml_energy, read_table
from rlgov.errors import CalibrationError


def _write(folder: Path, text: str, name: str = "t.csv") -> Path:
    (folder / name).write_text(text, encoding="utf-8")
    return folder


def test_a_table_is_found_in_a_folder_or_by_its_path(tmp_path: Path) -> None:
    folder = _write(tmp_path, "a,b\n1,x\n2,y\n")
    for place in (folder, folder / "t.csv"):
        assert read_table(place, "t.csv", ("a",), ("b",))["a"].tolist() == [1, 2]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a,b\n", "has no rows"),
        ("b\nx\n", "lacks the columns a; it has b"),
        ("a,b\n1,x\n,y\nnan,z\n2,w\n", r"no number in column a of rows 2, 3; fill them in or leave them out"),
        ("a,b\n1,x\ninf,y\n", "no number in column a of rows 2"),
        ("a,b\nmany,x\n", "no number in column a of rows 1"),
        ("", "cannot be read as a table"),
    ],
    ids=["empty", "column", "holes", "infinite", "text", "nothing"],
)
def test_what_a_table_lacks_is_named(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(CalibrationError, match=said):
        read_table(_write(tmp_path, text), "t.csv", ("a",), ("b",))


def test_many_bad_rows_are_counted(tmp_path: Path) -> None:
    folder = _write(tmp_path, "a,b\n" + ",x\n" * 9)
    with pytest.raises(CalibrationError, match="rows 1, 2, 3, 4, 5 and 4 more"):
        read_table(folder, "t.csv", ("a",), ("b",))


def test_a_missing_table_is_named(tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match=r"there is no .*ml_energy_llm\.csv; give the folder"):
        read_ml_energy(tmp_path)


def test_prefill_rows_of_the_jetson_need_no_decode_time(tmp_path: Path) -> None:
    header, name = "phase,sm_mhz,batch,power_w,decode_iter_ms\n", "freq_sweep_jetson.csv"
    rows = "prefill,306,1,20,\ndecode,306,1,20,56\n"
    assert len(read_jetson(_write(tmp_path, header + rows, name))) == 1
    with pytest.raises(CalibrationError, match="decode rows: no number in column decode_iter_ms of rows 2"):
        read_jetson(_write(tmp_path, header + rows + "decode,306,2,20,\n", name))
