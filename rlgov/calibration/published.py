"""Read the published measurements, and refuse what they lack instead of guessing.

Files, columns and units: ``PROVENANCE.md`` beside the data. Each reader names the file, the column and the
rows of what is missing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import numpy as np
import pandas as pd

from rlgov.errors import CalibrationError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

ML_ENERGY_FILE: Final = "ml_energy_llm.csv"
PREFILL_FILE: Final = "prefill_power_h100.csv"
DESKTOP_FILE: Final = "freq_sweep_desktop.csv"
JETSON_FILE: Final = "freq_sweep_jetson.csv"
MUXSERVE_FILE: Final = "muxserve_perf.csv"
SPLITWISE_FILE: Final = "splitwise_perf.csv"
ALL_REDUCE_FILE: Final = "vidur_allreduce.csv"
LINEAR_FILE: Final = "vidur_linear.csv"

_NAMED_ROWS = 5


def read_table(folder: Path, file: str, numbers: Sequence[str], texts: Sequence[str] = ()) -> pd.DataFrame:
    """A published table, with at least one row and without holes in the columns asked for.

    Args:
        folder: where the published tables lie; or the table itself.
        file: its name.
        numbers: columns that must hold a finite number in each row.
        texts: columns that must be there.

    Returns:
        The whole table.

    Raises:
        CalibrationError: It is not there, no table, empty, lacks a column, or has rows without a number.
    """
    path = folder if folder.is_file() else folder / file
    try:
        frame = pd.read_csv(path)
    except FileNotFoundError as error:
        msg = f"there is no {path}; give the folder that holds {file}, or that file"
        raise CalibrationError(msg) from error
    except (OSError, ValueError) as error:
        msg = f"{path} cannot be read as a table: {error}; give a CSV file with a line of column names"
        raise CalibrationError(msg) from error
    check_columns(frame, numbers, texts, str(path))
    return frame


def check_columns(frame: pd.DataFrame, numbers: Sequence[str], texts: Sequence[str], where: str) -> None:
    """Refuse a table that is empty, lacks a column, or has rows without a number where one is needed.

    Raises:
        CalibrationError: with the columns, or the first rows (1 is the first after the header).
    """
    missing = [name for name in (*numbers, *texts) if name not in frame.columns]
    if missing:
        msg = f"{where} lacks the columns {', '.join(missing)}; it has {', '.join(map(str, frame.columns))}"
        raise CalibrationError(msg)
    if frame.empty:
        msg = f"{where} has no rows; give a table with measurements"
        raise CalibrationError(msg)
    for name in numbers:
        values = pd.to_numeric(frame[name], errors="coerce").to_numpy(np.float64)
        bad = np.flatnonzero(~np.isfinite(values))
        if bad.size:
            rows = ", ".join(str(int(i) + 1) for i in bad[:_NAMED_ROWS])
            more = f" and {bad.size - _NAMED_ROWS} more" if bad.size > _NAMED_ROWS else ""
            msg = f"{where}: no number in column {name} of rows {rows}{more}; fill them in or leave them out"
            raise CalibrationError(msg)


def read_ml_energy(folder: Path) -> pd.DataFrame:
    """Decode at saturation and default clocks: one row a (model, GPU, GPUs, task, batch cap)."""
    numbers = (
        "num_gpus", "tp", "ep", "dp", "max_num_seqs", "avg_batch_size", "median_itl_ms", "output_tok_s",
        "avg_power_w_per_gpu", "avg_output_len", "mean_ctx_from_output",
    )  # fmt: skip
    return read_table(folder, ML_ENERGY_FILE, numbers, ("task", "model", "architecture", "precision", "gpu"))


def read_desktop(folder: Path) -> pd.DataFrame:
    """Clock sweeps of desktop cards; the SM clock of some power-cap sweeps is not published."""
    return read_table(folder, DESKTOP_FILE, ("mem_mhz", "tok_s", "power_w"), ("gpu", "phase", "control"))


def read_jetson(folder: Path) -> pd.DataFrame:
    """Locked clocks of a Jetson AGX Orin, decode rows only."""
    frame = read_table(folder, JETSON_FILE, ("sm_mhz", "batch", "power_w"), ("phase",))
    decode = frame[frame["phase"] == "decode"].reset_index(drop=True)
    check_columns(decode, ("decode_iter_ms",), (), f"{JETSON_FILE}, decode rows")
    return decode
