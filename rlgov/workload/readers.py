"""Read request traces from files: Azure, BurstGPT, Mooncake and the tidy CSV; write the tidy CSV.

A file is read whole or not at all. Every error names the file, the 1-based line, the field and what
to do about it. Files may be gzipped; that is found from their first bytes, not from their name.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import logging
import math
import os
import zlib
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NoReturn

import numpy as np

from rlgov.errors import TraceError
from rlgov.workload.trace import Trace

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from numpy.typing import NDArray

logger = logging.getLogger(__name__)

Kind = Literal["auto", "azure", "burstgpt", "mooncake", "tidy"]
Failed = Literal["drop", "error"]

MOONCAKE_BLOCK_TOKENS = 512
MAX_TOKENS = 100_000_000  # far above any context length: catches mixed-up columns before they overflow
MAX_LEAD_S = 366 * 86400.0  # a later first arrival is a wall-clock time, not a time from the start
GZIP_MAGIC = b"\x1f\x8b"
LINE_LIMIT = 1_000_000  # characters; a longer line is not a trace


@dataclass(frozen=True, slots=True)
class _CsvLayout:
    """Names of the columns of one kind of CSV, and how its arrivals are written."""

    arrival: str
    prompt: str
    output: str
    prefix: str | None
    parse_arrival_s: Callable[[str], float]

    @property
    def required(self) -> tuple[str, str, str]:
        return self.arrival, self.prompt, self.output


@dataclass(slots=True)
class _Rows:
    """What a parser collects, one entry a request; ``lines`` says where each was found."""

    path: Path
    layout: _CsvLayout
    failed: Failed
    lines: list[int] = field(default_factory=list)
    arrival_s: list[float] = field(default_factory=list)
    prompt_tokens: list[int] = field(default_factory=list)
    output_tokens: list[int] = field(default_factory=list)
    prefix_hit_tokens: list[int] = field(default_factory=list)
    left_out: int = 0

    def add(self, line: int, arrival_s: float, prompt: int, output: int, prefix_hit: int) -> None:
        """Take one request, or leave it out if it failed and failed ones are dropped."""
        if self.lines and arrival_s < self.arrival_s[-1]:
            problem = f"{self.layout.arrival} is earlier than on line {self.lines[-1]}"
            _fail(self.path, line, problem, f"sort the rows by {self.layout.arrival}")
        if prompt == 0 or output == 0:
            if self.failed == "error":
                name = self.layout.prompt if prompt == 0 else self.layout.output
                remedy = "delete the row, or read with failed='drop' to leave such requests out"
                _fail(self.path, line, f"{name} is 0", remedy)
            self.left_out += 1
            return
        self.lines.append(line)
        self.arrival_s.append(arrival_s)
        self.prompt_tokens.append(prompt)
        self.output_tokens.append(output)
        # One token is always computed; a fully cached prompt is published as a hit of its whole length.
        self.prefix_hit_tokens.append(min(prefix_hit, prompt - 1))


def _azure_seconds(text: str) -> float:
    """Seconds since the epoch; a timestamp without an offset is taken as UTC."""
    moment = datetime.fromisoformat(text)
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=UTC)
    return (moment - datetime(1970, 1, 1, tzinfo=UTC)).total_seconds()


_LAYOUTS: dict[str, _CsvLayout] = {
    "azure": _CsvLayout("TIMESTAMP", "ContextTokens", "GeneratedTokens", None, _azure_seconds),
    "burstgpt": _CsvLayout("Timestamp", "Request tokens", "Response tokens", None, float),
    "tidy": _CsvLayout("arrival_s", "prompt_tokens", "output_tokens", "prefix_hit_tokens", float),
}
_KNOWN = "; ".join(f"{kind}: {','.join(layout.required)}" for kind, layout in _LAYOUTS.items())


def read_trace(path: str | Path, *, kind: Kind = "auto", failed: Failed | None = None) -> Trace:
    """Read a trace file.

    Args:
        path: The file, plain or gzipped.
        kind: Its format; ``auto`` tells it from the header.
        failed: What to do with requests of zero prompt or output tokens. BurstGPT documents them as
            failed requests, so there the default is to drop them; elsewhere they are an error. The
            number dropped is logged and stands in ``Trace.notes``.

    Arrivals of public traces count from their first request; those of a tidy CSV are kept as they are.
    The span ends one mean gap after the last arrival, so that a cut into spans loses nobody.

    Raises:
        TraceError: The file cannot be read, or any row of it cannot be used.
    """
    path = Path(path)
    text = _read_text(path)
    if kind == "auto":
        kind = _detect(path, text)
    if kind == "mooncake":
        rows = _parse_mooncake(path, text, failed or "error")
    elif kind in _LAYOUTS:
        rows = _parse_csv(path, text, _LAYOUTS[kind], failed or ("drop" if kind == "burstgpt" else "error"))
    else:
        msg = f"{path}: unknown trace kind {kind!r}; use auto, mooncake, {', '.join(_LAYOUTS)}"
        raise TraceError(msg)
    return _to_trace(rows, from_first=kind != "tidy")


def detect_kind(path: str | Path) -> str:
    """The format of a trace file, told from its header. Raises TraceError when it is none known."""
    path = Path(path)
    return _detect(path, _read_text(path))


def write_trace(trace: Trace, path: str | Path) -> None:
    """Write the tidy CSV (gzipped when the name ends in ``.gz``), whole or not at all.

    Reading it back gives the same requests exactly. The column of prefix hits is left out when there
    are none; ``duration_s`` beyond the last arrival is not kept by the format.
    """
    path = Path(path)
    columns = {
        "arrival_s": trace.arrival_s,
        "prompt_tokens": trace.prompt_tokens,
        "output_tokens": trace.output_tokens,
    }
    if trace.prefix_hit_tokens.any():
        columns["prefix_hit_tokens"] = trace.prefix_hit_tokens
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows(zip(*(column.tolist() for column in columns.values()), strict=True))
    data = buffer.getvalue().encode("ascii")
    if path.suffix == ".gz":
        data = gzip.compress(data, mtime=0)  # no time stamp: equal traces give equal files
    partial = path.with_name(path.name + ".part")
    try:
        partial.write_bytes(data)
        os.replace(partial, path)  # noqa: PTH105  # atomic on one file system
    except OSError as error:
        partial.unlink(missing_ok=True)
        msg = f"{path}: cannot write the trace ({error}); choose a folder you may write to"
        raise TraceError(msg) from error


def _fail(path: Path, line: int, problem: str, remedy: str) -> NoReturn:
    msg = f"{path}, line {line}: {problem}; {remedy}"
    raise TraceError(msg)


def _read_text(path: Path) -> str:
    try:
        data = path.read_bytes()
    except OSError as error:
        msg = f"{path}: cannot read the trace ({error.strerror}); check the path and its permissions"
        raise TraceError(msg) from error
    if data.startswith(GZIP_MAGIC):
        try:
            data = gzip.decompress(data)
        except (OSError, EOFError, zlib.error) as error:
            msg = f"{path}: the gzip data is damaged or cut off ({error}); fetch the file again"
            raise TraceError(msg) from error
    if not data.strip():
        msg = f"{path}: the file is empty; give a trace with a header and at least one request"
        raise TraceError(msg)
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        _fail(path, 1, "the text is UTF-16", "save the file as UTF-8")
    junk_at = data.find(b"\x00")
    if junk_at >= 0:
        line = data.count(b"\n", 0, junk_at) + 1
        _fail(path, line, "binary data (a NUL byte)", "give a CSV or JSONL text file, or fetch it again")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        _fail(path, line, f"not UTF-8 text (byte 0x{data[error.start]:02x})", "save the file as UTF-8")


def _csv_rows(path: Path, text: str) -> Iterator[tuple[int, list[str]]]:
    """(line number, fields) of every row that is not blank."""
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    try:
        for row in reader:
            if row and not (len(row) == 1 and not row[0].strip()):
                yield reader.line_num, [field.strip() for field in row]
    except csv.Error as error:
        _fail(path, reader.line_num, f"malformed CSV ({error})", "repair or delete this row")


def _detect(path: Path, text: str) -> Kind:
    first = text.lstrip().split("\n", 1)[0]
    if first.startswith("{"):
        return "mooncake"
    if len(first) > LINE_LIMIT:
        _fail(path, 1, f"a first line of {len(first)} characters", "give a CSV with a header, or JSONL")
    _, header = next(_csv_rows(path, text))
    kinds: tuple[Kind, ...] = ("tidy", "azure", "burstgpt")
    found = {kind: sum(name in header for name in _LAYOUTS[kind].required) for kind in kinds}
    best = max(kinds, key=lambda kind: found[kind])
    if not found[best]:
        _fail(
            path,
            1,
            f"unknown header {','.join(header)[:120]!r}",
            f"expected one of: {_KNOWN}; or Mooncake JSONL",
        )
    return best


def _number(path: Path, line: int, name: str, text: str, parse: Callable[[str], float]) -> float:
    try:
        value = parse(text)
    except (ValueError, OverflowError):
        shown = text if len(text) <= 40 else text[:37] + "..."  # noqa: PLR2004  # keeps the message on one line
        remedy = "repair or delete this row (a last row may have been cut off)"
        _fail(path, line, f"{name} is {shown!r}, not a {_meaning(parse)}", remedy)
    if not math.isfinite(value):
        _fail(path, line, f"{name} is {text!r}, not finite", "repair or delete this row")
    return value


def _meaning(parse: Callable[[str], float]) -> str:
    return "number" if parse is float else "timestamp like 2023-11-16 18:15:46.6805900"


def _tokens(path: Path, line: int, name: str, value: float) -> int:
    if value < 0:
        _fail(path, line, f"{name} is {value:g}, negative", "token counts start at 1; repair this row")
    if value > MAX_TOKENS:
        _fail(path, line, f"{name} is {value:g}", "no request has so many tokens; check the columns")
    if value != int(value):
        _fail(path, line, f"{name} is {value:g}, not a whole number", "repair or delete this row")
    return int(value)


def _parse_csv(path: Path, text: str, layout: _CsvLayout, failed: Failed) -> _Rows:
    reader = _csv_rows(path, text)
    header_line, header = next(reader)
    missing = [name for name in layout.required if name not in header]
    if missing:
        _fail(
            path,
            header_line,
            f"missing column {', '.join(missing)} (found {','.join(header)[:120]})",
            f"the header must name {', '.join(layout.required)}",
        )
    if len(set(header)) != len(header):
        _fail(path, header_line, "a column name appears twice", "name each column once")
    arrival_at, prompt_at, output_at = (header.index(name) for name in layout.required)
    prefix_at = header.index(layout.prefix) if layout.prefix in header else None
    rows = _Rows(path, layout, failed)
    for line, row in reader:
        if len(row) != len(header):
            remedy = "repair or delete this row (a last row may have been cut off)"
            _fail(path, line, f"{len(row)} fields where the header has {len(header)}", remedy)
        arrival_s = _number(path, line, layout.arrival, row[arrival_at], layout.parse_arrival_s)
        counts = [
            _tokens(path, line, header[at], _number(path, line, header[at], row[at], float))
            for at in (prompt_at, output_at)
        ]
        prefix_hit = 0
        if prefix_at is not None:
            name = header[prefix_at]
            prefix_hit = _tokens(path, line, name, _number(path, line, name, row[prefix_at], float))
            if prefix_hit > counts[0]:
                problem = f"{name} is {prefix_hit}, above {layout.prompt} {counts[0]}"
                _fail(path, line, problem, "a prompt cannot hit more than its own length")
        rows.add(line, arrival_s, counts[0], counts[1], prefix_hit)
    return rows


_MOONCAKE = _CsvLayout("timestamp", "input_length", "output_length", None, float)


def _parse_mooncake(path: Path, text: str, failed: Failed) -> _Rows:
    """One JSON object a line; prefix hits come from a replay of the block hashes.

    The cache of the replay is infinite, so the hits are an upper bound of what a server would see.
    """
    rows = _Rows(path, _MOONCAKE, failed)
    seen: set[int] = set()
    for line, raw in enumerate(text.split("\n"), start=1):
        if not raw.strip():
            continue
        try:
            record = json.loads(raw)
        except (json.JSONDecodeError, RecursionError) as error:
            remedy = "repair or delete this row (a last row may have been cut off)"
            _fail(path, line, f"not JSON ({error})", remedy)
        if not isinstance(record, dict):
            _fail(path, line, "not a JSON object", "each line must be one request as {...}")
        arrival_ms = _json_number(path, line, record, "timestamp")
        prompt, output = (
            _tokens(path, line, name, _json_number(path, line, record, name))
            for name in ("input_length", "output_length")
        )
        hashes = _block_hashes(path, line, record, prompt)
        hit_blocks = next((i for i, block in enumerate(hashes) if block not in seen), len(hashes))
        seen.update(hashes)
        hit_tokens = min(hit_blocks * MOONCAKE_BLOCK_TOKENS, prompt)
        rows.add(line, arrival_ms / 1000, prompt, output, hit_tokens)
    return rows


def _json_number(path: Path, line: int, record: dict[str, object], name: str) -> float:
    if name not in record:
        _fail(path, line, f"missing field {name}", "each line needs timestamp, input_length, output_length")
    value = record[name]
    if isinstance(value, bool) or not isinstance(value, int | float):
        _fail(path, line, f"{name} is {str(value)[:40]!r}, not a number", "repair or delete this row")
    return _number(path, line, name, str(value), float)


def _block_hashes(path: Path, line: int, record: dict[str, object], prompt_tokens: int) -> list[int]:
    hashes = record.get("hash_ids", [])
    if not isinstance(hashes, list) or not all(type(block) is int for block in hashes):
        _fail(path, line, "hash_ids is not a list of integers", "repair or delete this row")
    blocks = -(-prompt_tokens // MOONCAKE_BLOCK_TOKENS)
    if len(hashes) > blocks:
        problem = f"{len(hashes)} hash_ids for {prompt_tokens} tokens, at most {blocks} fit"
        _fail(path, line, problem, f"hashes must stand for blocks of {MOONCAKE_BLOCK_TOKENS} tokens")
    return hashes


def _to_trace(rows: _Rows, *, from_first: bool) -> Trace:
    path = rows.path
    if not rows.lines:
        left_out = f" ({rows.left_out} of zero tokens left out)" if rows.left_out else ""
        msg = f"{path}: no requests after the header{left_out}; give a trace with at least one request"
        raise TraceError(msg)
    arrival_s: NDArray[np.float64] = np.array(rows.arrival_s, dtype=np.float64)
    if from_first:
        # Epoch seconds are exact to 0.24 us as floats, so finer digits of a difference are noise.
        arrival_s = np.round(arrival_s - arrival_s[0], 6)
    name = rows.layout.arrival
    if arrival_s[0] < 0:
        _fail(path, rows.lines[0], f"{name} is negative", "count times from the start of the trace")
    if arrival_s[0] > MAX_LEAD_S:
        problem = f"{name} starts at {arrival_s[0]:g} s"
        _fail(path, rows.lines[0], problem, "count times from the start of the trace, not from an epoch")
    notes: tuple[str, ...] = ()
    if rows.left_out:
        notes = (f"{rows.left_out} failed requests (zero tokens) of {path.name} left out",)
        logger.warning(notes[0])
    gap_s = float(arrival_s[-1] - arrival_s[0]) / (len(arrival_s) - 1) if len(arrival_s) > 1 else 1.0
    return Trace(
        _stem(path),
        arrival_s,
        np.array(rows.prompt_tokens, dtype=np.int64),
        np.array(rows.output_tokens, dtype=np.int64),
        np.array(rows.prefix_hit_tokens, dtype=np.int64),
        float(arrival_s[-1]) + (gap_s or 1.0),
        notes,
    )


def _stem(path: Path) -> str:
    return path.name.removesuffix(".gz").rsplit(".", 1)[0] or path.name
