"""The journal of a run: JSON lines, written as it happens and read back by replay.

The first line is the header. Then, in any order of kinds but in order of time, come

* ``interval``: a window, the decision taken on it, and a digest of the observation it gave;
* ``request``: one arrival, so that a recording can feed the simulator.

Floats are written with ``repr`` precision and survive the round trip exactly. Encoding and decoding are
pure; :class:`FileSink` and :func:`read_journal` are the only parts that touch a file, and a sink that
rotates by size can take the place of the first.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field, fields
from typing import TYPE_CHECKING, Any, Final, Literal, Protocol, Self

import numpy as np
from pydantic import BaseModel, ConfigDict, ValidationError

from rlgov.errors import JournalError
from rlgov.records import Configuration, Decision, Limits, ServiceLevel, Window

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path
    from types import TracebackType

    from numpy.typing import NDArray

JOURNAL_SCHEMA: Final = 2
"""Version of the journal's format; a reader refuses any other.

2: windows carry ``tp_refused``, and their energy may be missing. 1: the first.
"""

JOURNAL_SUFFIX: Final = ".jsonl"
GOVERNOR_MODE: Final = "governor.mode"
"""Among a header's versions where a governor wrote the journal: what it did with its decisions."""


@dataclass(frozen=True, slots=True)
class Request:
    """One arrival. ``arrival_s`` is on the time axis of the windows."""

    arrival_s: float
    prompt_tokens: int
    output_tokens: int
    prefix_hit_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Header:
    """What a run was: limits (with its SLO), seed, policy and software."""

    limits: Limits
    seed: int = 0
    policy_digest: str = ""
    versions: dict[str, str] = field(default_factory=dict)
    """Software by name; leaves no trace in what replay compares."""


@dataclass(frozen=True, slots=True)
class Interval:
    """A window and the decision taken on it; the last window of a run has none."""

    window: Window
    decision: Decision | None = None
    observation_digest: str = ""


@dataclass(frozen=True, slots=True)
class Journal:
    """A whole run in memory."""

    header: Header
    intervals: tuple[Interval, ...]
    requests: tuple[Request, ...] = ()


class _Line(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class _HeaderLine(_Line):
    kind: Literal["header"]
    schema_version: int
    header: Header


class _IntervalLine(_Line):
    kind: Literal["interval"]
    interval: Interval


class _RequestLine(_Line):
    kind: Literal["request"]
    request: Request


_LINES: Final[dict[str, type[_Line]]] = {
    "header": _HeaderLine,
    "interval": _IntervalLine,
    "request": _RequestLine,
}
_NESTED: Final[dict[str, type]] = {
    "header": Header,
    "limits": Limits,
    "service_level": ServiceLevel,
    "interval": Interval,
    "window": Window,
    "decision": Decision,
    "asked": Configuration,
    "applied": Configuration,
    "request": Request,
}


def observation_digest(observation: NDArray[np.float32]) -> str:
    """First 16 hexadecimal digits of the sha256 of an observation's little-endian float32 bytes."""
    data = np.ascontiguousarray(observation, dtype="<f4").tobytes()
    return hashlib.sha256(data).hexdigest()[:16]


def encode(entry: Header | Interval | Request) -> str:
    """One journal line, without its newline. Raises JournalError for NaN or infinity."""
    body = asdict(entry)
    line: dict[str, Any]
    if isinstance(entry, Header):
        line = {"kind": "header", "schema_version": JOURNAL_SCHEMA, "header": body}
    elif isinstance(entry, Interval):
        line = {"kind": "interval", "interval": body}
    else:
        line = {"kind": "request", "request": body}
    try:
        return json.dumps(line, allow_nan=False, separators=(",", ":"))
    except ValueError as error:
        kind = type(entry).__name__
        msg = f"{kind} holds NaN or infinity; use None for a missing value or set blind: {entry}"
        raise JournalError(msg) from error


def decode(text: str, *, where: str) -> Header | Interval | Request:
    """Inverse of :func:`encode`.

    Args:
        text: One line.
        where: File and line for the message of a JournalError.
    """
    try:
        raw = json.loads(text)
    except json.JSONDecodeError as error:
        msg = f"{where}: not JSON ({error.msg} at column {error.colno}); the journal is damaged or cut off"
        raise JournalError(msg) from error
    kind = raw.get("kind") if isinstance(raw, dict) else None
    if kind not in _LINES:
        msg = f"{where}: kind must be one of {', '.join(_LINES)}, got {kind!r}"
        raise JournalError(msg)
    if kind == "header" and raw.get("schema_version") != JOURNAL_SCHEMA:
        msg = (
            f"{where}: schema_version {raw.get('schema_version')!r} cannot be read, only {JOURNAL_SCHEMA}; "
            "record the run again, or read it with the rlgov version that wrote it"
        )
        raise JournalError(msg)
    _check_names(raw, where)
    try:
        line = _LINES[kind].model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        msg = f"{where}: field {'.'.join(map(str, first['loc']))}: {first['msg']}"
        raise JournalError(msg) from error
    entry: Header | Interval | Request = getattr(line, kind)
    return entry


def decode_journal(lines: Iterable[str], *, name: str) -> Journal:
    """A journal from its lines; ``name`` stands in messages."""
    header: Header | None = None
    intervals: list[Interval] = []
    requests: list[Request] = []
    for number, text in enumerate(lines, start=1):
        where = f"{name}:{number}"
        entry = decode(text, where=where)
        if isinstance(entry, Header) != (header is None):
            msg = f"{where}: the header must be the first line and the only one of its kind"
            raise JournalError(msg)
        if isinstance(entry, Header):
            header = entry
        elif isinstance(entry, Interval):
            if intervals and entry.window.start_s < intervals[-1].window.start_s:
                msg = f"{where}: field window.start_s: {entry.window.start_s} lies before the window above it"
                raise JournalError(msg)
            intervals.append(entry)
        else:
            requests.append(entry)
    if header is None or not intervals:
        msg = f"{name}: a journal needs a header and at least one interval; this one is empty"
        raise JournalError(msg)
    return Journal(header, tuple(intervals), tuple(requests))


def read_journal(path: Path, *, allow_cut: bool = False) -> Journal:
    """Read a journal from a file, or the last run of a folder that a rotating writer filled.

    Args:
        path: The file, or the folder.
        allow_cut: Leave out a last line without a newline: what a writer that was killed leaves behind.

    Raises:
        JournalError: Names file and line.
    """
    if path.is_dir():
        return _read_folder(path)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        msg = f"{path}: cannot be read: {error}"
        raise JournalError(msg) from error
    lines = text.split("\n")
    tail = lines.pop()
    if tail and not allow_cut:
        msg = f"{path}:{len(lines) + 1}: the last line is cut off; read it with allow_cut to go without it"
        raise JournalError(msg)
    return decode_journal(lines, name=str(path))


def _read_folder(folder: Path) -> Journal:
    """The last run in a folder: the newest file and those before it that have the same header.

    Each begins with the header; one may be cut off where its writer was killed or its disk was full.
    """
    parts: list[Journal] = []
    for path in sorted(folder.glob(f"*{JOURNAL_SUFFIX}"), reverse=True):
        try:
            part = read_journal(path, allow_cut=True)
        except JournalError:
            if _holds_nothing(path):
                continue  # begun, and ended before the first interval
            raise
        if parts and part.header != parts[-1].header:
            break
        parts.append(part)
    if not parts:
        msg = f"{folder}: no journal in this folder; name a file, or the folder of `rlgov govern --journal`"
        raise JournalError(msg)
    parts.reverse()
    return Journal(
        parts[0].header,
        tuple(interval for part in parts for interval in part.intervals),
        tuple(request for part in parts for request in part.requests),
    )


def _holds_nothing(path: Path) -> bool:
    """Whether a file holds no more than a header, or a part of one."""
    with path.open(encoding="utf-8") as file:
        lines = [line for line in file if line.endswith("\n")]
    return all(decode(line, where=f"{path}:1") is not None and '"kind":"header"' in line for line in lines)


class LineSink(Protocol):
    """Where journal lines go."""

    def write_line(self, text: str) -> None:
        """Append one line; when it returns, the line is out of this process."""
        ...

    def close(self) -> None:
        """No more lines; safe to call twice."""
        ...


class FileSink:
    """A new file, flushed line by line so that a killed run keeps all but its last line.

    Args:
        path: Must not exist: a journal is never overwritten.
    """

    def __init__(self, path: Path) -> None:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("x", encoding="utf-8", newline="\n")
        except OSError as error:
            msg = f"{path}: cannot be created ({error}); name a journal that does not exist yet"
            raise JournalError(msg) from error
        self._path = path

    def write_line(self, text: str) -> None:
        """Append one line and flush it. Raises JournalError when the disk does not take it."""
        try:
            self._file.write(text + "\n")
            self._file.flush()
        except (OSError, ValueError) as error:
            msg = f"{self._path}: cannot be written ({error}); free some space or journal elsewhere"
            raise JournalError(msg) from error

    def close(self) -> None:
        """Close the file; safe to call twice. Raises JournalError when lines could not be written out."""
        try:
            self._file.close()
        except OSError as error:
            msg = f"{self._path}: cannot be written ({error}); free some space or journal elsewhere"
            raise JournalError(msg) from error


class JournalWriter:
    """Writes a journal, header first; a context manager that closes its sink."""

    def __init__(self, sink: LineSink, header: Header) -> None:
        self._sink = sink
        sink.write_line(encode(header))

    def write(self, entry: Interval | Request) -> None:
        """Append one entry."""
        self._sink.write_line(encode(entry))

    def close(self) -> None:
        """Close the sink; safe to call twice."""
        self._sink.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def _check_names(raw: dict[str, Any], where: str, path: str = "") -> None:
    # pydantic would fill in defaults and drop unknown names of plain dataclasses: neither may happen.
    for name, value in raw.items():
        if name not in _NESTED or not isinstance(value, dict):
            continue
        known = {f.name for f in fields(_NESTED[name])}
        here = f"{path}{name}"
        if missing := known - value.keys():
            msg = f"{where}: field {here}: missing {', '.join(sorted(missing))}"
            raise JournalError(msg)
        if unknown := value.keys() - known:
            msg = f"{where}: field {here}: unknown {', '.join(sorted(unknown))}"
            raise JournalError(msg)
        _check_names(value, where, f"{here}.")
