"""The run folder of a characterisation: which files it holds, and what their columns mean.

``characterization.yml``
    What was run: deployment, profile, settings, limits, versions, seed. :class:`RunHeader`.
``points.parquet``, ``points.csv``
    One row a point and repeat: the same table twice, once for programs and once for people. :data:`POINTS`.
``iterations.parquet``
    One row an iteration of the engine, where the deployment could tell. :data:`ITERATIONS`.
``points.jsonl``
    The journal of finished points that a resumed campaign reads. Internal to the campaign; a reader takes
    ``points.parquet``.

**Missing is NaN (numbers, flags) or NA (text), never 0.** A meter that is not there gives no energy; a
configuration whose clock cannot be set has no ``sm_clock_mhz``.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, Literal

import numpy as np
import pandas as pd
import yaml
from pydantic import ConfigDict, TypeAdapter, ValidationError, with_config

from rlgov.calibration.durable import replace_file
from rlgov.errors import CharacterizationError

if TYPE_CHECKING:
    from pathlib import Path

SCHEMA: Final = 1
"""Version of the run folder's format; a reader refuses any other."""

HEADER_FILE: Final = "characterization.yml"
POINTS_FILE: Final = "points.parquet"
POINTS_CSV: Final = "points.csv"
ITERATIONS_FILE: Final = "iterations.parquet"
JOURNAL_FILE: Final = "points.jsonl"

Kind = Literal["text", "count", "number", "flag"]


@dataclass(frozen=True, slots=True)
class ColumnSpec:
    """One column of a table.

    ``kind``: ``text`` (pandas ``string``), ``count`` (``Int64``), ``flag`` (``boolean``) or ``number``
    (``float64``). A ``required`` column holds a value in every row.
    """

    name: str
    kind: Kind
    about: str
    required: bool = False

    @property
    def dtype(self) -> str:
        """Of pandas; every one of them can hold a missing value."""
        return {"text": "string", "count": "Int64", "flag": "boolean", "number": "float64"}[self.kind]


def _latencies(name: str, about: str) -> tuple[ColumnSpec, ...]:
    return tuple(ColumnSpec(f"{name}_p{q}_s", "number", f"{about}, {q}th percentile") for q in (50, 90, 99))


POINTS: Final[tuple[ColumnSpec, ...]] = (
    ColumnSpec(
        "point_id", "text", "what was held and offered; equal in every run of the same point", required=True
    ),
    ColumnSpec("repeat", "count", "number of the repetition, from 0", required=True),
    ColumnSpec(
        "workload", "text", "class of lengths such as short-in/long-out, or trace:NAME", required=True
    ),
    ColumnSpec(
        "mode", "text", "closed: so many requests under way at all times; open: at a rate", required=True
    ),
    ColumnSpec("concurrency", "count", "requests kept under way (closed)"),
    ColumnSpec("rate_per_s", "number", "requests asked for a second (open)"),
    ColumnSpec("sm_clock_mhz", "number", "locked; missing where the clock cannot be set"),
    ColumnSpec("batch_cap", "count", "requests that may run at once", required=True),
    ColumnSpec("tp_degree", "count", "GPUs of the engine", required=True),
    ColumnSpec(
        "allotted_gpus",
        "count",
        "GPUs that the energy is of: those of the engine, as far as it tells them",
        required=True,
    ),
    ColumnSpec("duration_s", "number", "measured, warm-up left out", required=True),
    ColumnSpec("steady", "flag", "whether the measured span passed the steadiness rule", required=True),
    ColumnSpec("requests", "count", "sent in the measured span"),
    ColumnSpec(
        "served", "count", "whose last token came in the span, with every token; TPOT and e2e are of them"
    ),
    ColumnSpec("failed", "count", "that ended in the span in any other way"),
    ColumnSpec("prompt_tokens_mean", "number", "a served request"),
    ColumnSpec("prompt_pairs_mean", "number", "(query, key) pairs in the prompt of a served request"),
    ColumnSpec("output_tokens_mean", "number", "a served request"),
    ColumnSpec("context_tokens_mean", "number", "of a decoding sequence, over iterations without prompts"),
    *_latencies("ttft", "seconds from the request to its first token, which came in the span"),
    *_latencies("tpot", "mean seconds a further token of a request"),
    *_latencies("itl", "seconds between two tokens, over all gaps; needs iterations"),
    *_latencies("e2e", "seconds from the request to its last token"),
    ColumnSpec("output_tokens_per_s", "number", "generated in the measured span"),
    ColumnSpec("power_w_per_gpu", "number", "mean; energy over time and allotted GPUs"),
    ColumnSpec("energy_j", "number", "in the span, of the engine's GPUs"),
    ColumnSpec(
        "energy_error", "number", "relative; what the meter's resolution leaves open, 0 in simulation"
    ),
    ColumnSpec("j_per_output_token", "number", "energy over tokens generated, prefill included"),
    ColumnSpec("j_per_request", "number", "energy over requests that finished"),
    ColumnSpec("running_mean", "number", "requests running, over time"),
    ColumnSpec("kv_usage_mean", "number", "share of KV blocks in use, 0..1"),
    ColumnSpec("measured_clock_mhz", "number", "SM clock after throttling, over time"),
    ColumnSpec("throttled_fraction", "number", "share of the time below the asked clock"),
    ColumnSpec("throttle_reasons", "text", 'names seen, joined with +; "none" where none was seen'),
    ColumnSpec("iterations", "number", "of the engine in the measured span"),
    ColumnSpec("busy_s", "number", "spent iterating"),
    ColumnSpec("prefill_tokens", "number", "prompt tokens computed"),
    ColumnSpec("generated_tokens", "number", "tokens generated"),
    ColumnSpec("gpu", "text", "name of the GPU"),
    ColumnSpec("model", "text", "name of the model", required=True),
    ColumnSpec("source", "text", "simulated, live or attach", required=True),
)
"""Columns of the points."""

ITERATIONS: Final[tuple[ColumnSpec, ...]] = (
    ColumnSpec("point_id", "text", "of the point", required=True),
    ColumnSpec("repeat", "count", "of the point", required=True),
    ColumnSpec("t_s", "number", "end of the iteration, after the start of the measured span", required=True),
    ColumnSpec(
        "step_s", "number", "its own time; what overlaps with the one before is left out", required=True
    ),
    ColumnSpec("running", "number", "requests in it"),
    ColumnSpec("waiting", "number", "requests behind it"),
    ColumnSpec("prefill_tokens", "number", "prompt tokens computed"),
    ColumnSpec("decode_tokens", "number", "tokens decoded, one a decoding sequence"),
    ColumnSpec("context_tokens", "number", "tokens attended to, over all sequences"),
    ColumnSpec("kv_usage", "number", "share of KV blocks in use at its end"),
)
"""Columns of the iterations."""


@dataclass(frozen=True, slots=True)
class RunHeader:
    """What was run. Settings, limits and physics are those of the moment the campaign began."""

    schema: int
    rlgov_version: str
    deployment: Literal["simulated", "live", "attach"]
    profile: str
    model: str
    gpu: str | None
    seed: int
    points: int
    """Rows that the finished campaign has: points times repeats."""
    digest: str
    """Twelve hexadecimal digits of everything that decides which points there are and how they are
    measured: a campaign with another digest is another campaign."""
    settings: dict[str, Any] = field(default_factory=dict)
    limits: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    """Programs at the beginning."""
    identity: dict[str, Any] = field(default_factory=dict)
    """What else makes it this campaign and no other: digests of profile and lengths, the engine's version."""
    notes: tuple[str, ...] = ()


with_config(ConfigDict(extra="forbid"))(RunHeader)
_HEADER = TypeAdapter(RunHeader)


def write_header(folder: Path, header: RunHeader) -> None:
    """Write ``characterization.yml``, whole or not at all."""
    content = _HEADER.dump_python(header, mode="json")
    text = yaml.safe_dump(content, sort_keys=False, allow_unicode=True)
    replace_file(folder / HEADER_FILE, lambda part: part.write_text(text, encoding="utf-8"))


def read_header(folder: Path) -> RunHeader:
    """What was run.

    Raises:
        CharacterizationError: The folder holds no characterisation, a damaged one, or one of another format.
    """
    path = folder / HEADER_FILE
    if not path.is_file():
        msg = f"{folder} holds no {HEADER_FILE}; name the folder that `rlgov characterize --out` wrote"
        raise CharacterizationError(msg)
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
        if isinstance(content, dict) and content.get("schema") not in {None, SCHEMA}:
            msg = (
                f"{path}: of format {content['schema']}, this rlgov reads format {SCHEMA}; "
                "characterise again, or use the rlgov that wrote it"
            )
            raise CharacterizationError(msg)
        return _HEADER.validate_python(content)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        msg = f"{path}: not a YAML file ({error}); restore it, or characterise again"
        raise CharacterizationError(msg) from error
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        msg = f"{path}: {where or 'content'}: {first['msg']}; restore it, or characterise again"
        raise CharacterizationError(msg) from error


def empty_points() -> pd.DataFrame:
    """A table of points without rows, every column of its type."""
    return frame_of((), POINTS, "points")


def frame_of(
    rows: tuple[dict[str, Any], ...] | list[dict[str, Any]], columns: tuple[ColumnSpec, ...], where: str
) -> pd.DataFrame:
    """Rows as a table, columns in order, each of its type; a name that a row lacks is missing there.

    Raises:
        CharacterizationError: A row holds a name that is no column, or lacks a required one.
    """
    names = [column.name for column in columns]
    for row in rows:
        unknown = sorted(set(row) - set(names))
        if unknown:
            msg = f"{where}: {', '.join(unknown)} is no column; columns are {', '.join(names)}"
            raise CharacterizationError(msg)
    frame = pd.DataFrame(list(rows), columns=names)
    return _typed(frame, columns, where)


def write_points(folder: Path, points: pd.DataFrame) -> tuple[Path, Path]:
    """Write ``points.parquet`` and ``points.csv``, each whole or not at all.

    Raises:
        CharacterizationError: A column is missing, unknown, of another type, or lacks a required value.
    """
    typed = _typed(points, POINTS, "points")
    parquet, csv = folder / POINTS_FILE, folder / POINTS_CSV
    replace_file(parquet, lambda part: typed.to_parquet(part, index=False))
    replace_file(csv, lambda part: typed.to_csv(part, index=False, lineterminator="\n"))
    return parquet, csv


def read_points(folder: Path) -> pd.DataFrame:
    """The points of a run folder, checked: columns, types, required values, no point twice.

    Falls back on ``points.csv`` where there is no ``points.parquet``.

    Raises:
        CharacterizationError: There is no table, it has no rows, or it breaks the rules above; the message
            names file, column and row.
    """
    path = folder / POINTS_FILE if (folder / POINTS_FILE).is_file() else folder / POINTS_CSV
    if not path.is_file():
        msg = (
            f"{folder} holds no {POINTS_FILE} and no {POINTS_CSV}; name the folder of a finished "
            "characterisation, or resume the one that did not finish"
        )
        raise CharacterizationError(msg)
    points = _typed(_read(path), POINTS, str(path))
    if points.empty:
        msg = f"{path}: there is no point in it; run `rlgov characterize` to the end first"
        raise CharacterizationError(msg)
    twice = points[points.duplicated(["point_id", "repeat"])]
    if not twice.empty:
        first = twice.iloc[0]
        msg = f"{path}: point {first['point_id']} has repeat {first['repeat']} twice; keep one of them"
        raise CharacterizationError(msg)
    return points


def write_iterations(folder: Path, iterations: pd.DataFrame) -> Path:
    """Write ``iterations.parquet``, whole or not at all."""
    typed = _typed(iterations, ITERATIONS, "iterations")
    path = folder / ITERATIONS_FILE
    replace_file(path, lambda part: typed.to_parquet(part, index=False))
    return path


def read_iterations(folder: Path) -> pd.DataFrame | None:
    """The iterations of a run folder; None where the deployment could not tell.

    Raises:
        CharacterizationError: The table breaks the rules of :data:`ITERATIONS`.
    """
    path = folder / ITERATIONS_FILE
    return _typed(_read(path), ITERATIONS, str(path)) if path.is_file() else None


def _read(path: Path) -> pd.DataFrame:
    try:
        if path.suffix == ".csv":
            # Text stays text: an id of digits only must not become a number.
            text = {column.name: "string" for column in POINTS if column.kind == "text"}
            return pd.read_csv(path, dtype=text, keep_default_na=False, na_values=[""])
        return pd.read_parquet(path)
    except (OSError, ValueError) as error:
        msg = f"{path}: cannot be read as a table ({error}); restore it, or characterise again"
        raise CharacterizationError(msg) from error


def _typed(frame: pd.DataFrame, columns: tuple[ColumnSpec, ...], where: str) -> pd.DataFrame:
    names = [column.name for column in columns]
    missing = [name for name in names if name not in frame.columns]
    unknown = [str(name) for name in frame.columns if name not in names]
    if missing or unknown:
        parts = [f"lacks {', '.join(missing)}"] if missing else []
        parts += [f"has the unknown column {', '.join(unknown)}"] if unknown else []
        msg = f"{where}: {' and '.join(parts)}; a table of `rlgov characterize` has {', '.join(names)}"
        raise CharacterizationError(msg)
    frame = frame[names].reset_index(drop=True)
    typed = {column.name: _column(frame[column.name], column, where) for column in columns}
    return pd.DataFrame(typed, columns=names)


def _column(values: pd.Series[Any], column: ColumnSpec, where: str) -> pd.Series[Any]:
    try:
        typed: pd.Series[Any] = values.astype(column.dtype)  # type: ignore[call-overload]  # a dtype by name
    except (TypeError, ValueError) as error:
        msg = f"{where}: column {column.name} ({column.about}) must hold {column.kind}s: {error}"
        raise CharacterizationError(msg) from error
    if column.required and bool(typed.isna().any()):
        row = int(np.flatnonzero(typed.isna())[0])
        msg = f"{where}: row {row + 1} has no {column.name} ({column.about}); every row needs one"
        raise CharacterizationError(msg)
    if column.kind == "number" and bool(np.isinf(typed.to_numpy(dtype=np.float64)).any()):
        row = int(np.flatnonzero(np.isinf(typed.to_numpy(dtype=np.float64)))[0])
        msg = f"{where}: row {row + 1} has an infinite {column.name}; leave out what is not known"
        raise CharacterizationError(msg)
    return typed
