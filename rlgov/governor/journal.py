"""The journal of a governor: written by its own thread, rotated by size, and never waited for.

The loop puts entries into a bounded queue. Where the disk is slow, full or read-only, entries are dropped and
counted, and governing goes on; writing begins again, in a new file, as soon as the disk takes it. Every file
begins with the header, so each can be read by itself, and the folder as a whole by
:func:`rlgov.journal.read_journal`.
"""

from __future__ import annotations

import contextlib
import os
import queue
import re
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Protocol

from rlgov.errors import ConfigError, JournalError
from rlgov.journal import JOURNAL_SUFFIX, Header, Interval, Request, encode

if TYPE_CHECKING:
    from pathlib import Path

    from rlgov.clock import Clock

_NAME: Final = re.compile(rf"govern-(\d{{8}}){re.escape(JOURNAL_SUFFIX)}")
_CLOSE_S: Final = 5.0
_WAIT_S: Final = 0.5


@dataclass(frozen=True, slots=True)
class RotationSettings:
    """How much of the journal is kept."""

    file_bytes: int = 32 * 1024 * 1024
    """A file is followed by the next one when it has grown to this."""
    files: int = 16
    """The oldest files beyond so many are deleted."""
    queued: int = 4096
    """Entries that may wait for the disk."""
    retry_s: float = 5.0
    """After a failure the disk is left alone for so long."""

    def __post_init__(self) -> None:
        if self.file_bytes < 1 or self.files < 1 or self.queued < 1 or self.retry_s <= 0:
            msg = f"rotation settings must be above 0, got {self}"
            raise ConfigError(msg)


class RotatingFiles:
    """Lines in numbered files of a folder, the oldest deleted. Not safe to share between threads.

    Args:
        folder: Made if it is not there.
        settings: How much is kept.
    """

    def __init__(self, folder: Path, settings: RotationSettings) -> None:
        self._folder = folder
        self._settings = settings
        self._header = ""
        self._handle: int | None = None
        self._written = 0  # bytes of the file that are whole lines

    def begin(self, header: str) -> None:
        """Another header holds from here on: go on in a new file. Raises OSError."""
        self.close()
        self._header = header

    def write_line(self, text: str) -> None:
        """Append a line to the newest file; raises OSError, and then nothing of it is in the file."""
        data = text.encode() + b"\n"
        if self._handle is not None and self._written + len(data) > self._settings.file_bytes:
            self.close()
        if self._handle is None:
            self._open()
        self._append(data)

    def close(self) -> None:
        """End the file; safe to call twice."""
        if self._handle is not None:
            handle, self._handle = self._handle, None
            os.close(handle)

    def _append(self, data: bytes) -> None:
        assert self._handle is not None  # noqa: S101  # opened above
        try:
            left = memoryview(data)
            while left:
                left = left[os.write(self._handle, left) :]
        except OSError:
            with contextlib.suppress(OSError):  # half a line must not stand in the way of the next one
                os.ftruncate(self._handle, self._written)
            raise
        self._written += len(data)

    def _open(self) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        numbers = self._numbers()
        path = self._path(max(numbers, default=0) + 1)
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_CLOEXEC, 0o644)
        self._handle, self._written = handle, 0
        try:
            self._append(self._header.encode() + b"\n")
        except OSError:
            self.close()
            with contextlib.suppress(OSError):
                path.unlink()
            raise
        for number in sorted(numbers)[: max(len(numbers) + 1 - self._settings.files, 0)]:
            with contextlib.suppress(OSError):  # it is tried again with the next file
                self._path(number).unlink()

    def _numbers(self) -> list[int]:
        names = (_NAME.fullmatch(path.name) for path in self._folder.iterdir())
        return [int(name[1]) for name in names if name is not None]

    def _path(self, number: int) -> Path:
        return self._folder / f"govern-{number:08d}{JOURNAL_SUFFIX}"


class Lines(Protocol):
    """Where lines go; every call may raise OSError."""

    def begin(self, header: str) -> None:
        """Another header holds from here on."""
        ...

    def write_line(self, text: str) -> None:
        """Append a line."""
        ...

    def close(self) -> None:
        """No more lines; safe to call twice."""
        ...


class Journal(Protocol):
    """What the loop knows of a journal; nothing of it waits or raises."""

    @property
    def dropped(self) -> int:
        """Entries that could not be written so far."""
        ...

    @property
    def problem(self) -> str:
        """Why nothing can be written now; empty when it can."""
        ...

    def begin(self, header: Header) -> None:
        """A new episode."""
        ...

    def write(self, entry: Interval | Request) -> None:
        """Keep an entry."""
        ...

    def close(self) -> None:
        """Write out what waits, for some seconds at most; safe to call twice."""
        ...


class NoJournal:
    """Keeps nothing, and drops nothing."""

    dropped = 0
    problem = ""

    def begin(self, header: Header) -> None:
        """Nothing to begin."""

    def write(self, entry: Interval | Request) -> None:
        """Forget it."""

    def close(self) -> None:
        """Nothing to close."""


class ThreadedJournal:
    """Writes in a thread of its own.

    Args:
        lines: Where to.
        clock: Paces attempts after a failure.
        settings: How many entries may wait, and for how long a disk that failed is left alone.
    """

    def __init__(self, lines: Lines, clock: Clock, settings: RotationSettings) -> None:
        self._lines = lines
        self._clock = clock
        self._retry_s = settings.retry_s
        self._queue: queue.Queue[Header | Interval | Request | None] = queue.Queue(settings.queued)
        self._refused = 0  # by the loop: the queue was full
        self._lost = 0  # by the thread
        self._problem = ""
        self._header: Header | None = None  # that could not be begun yet
        self._quiet_until_s = float("-inf")
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="journal", daemon=True)
        self._thread.start()

    @property
    def dropped(self) -> int:
        """Entries that could not be written so far."""
        return self._refused + self._lost

    @property
    def problem(self) -> str:
        """Why nothing can be written now; empty when it can."""
        return self._problem

    def begin(self, header: Header) -> None:
        """A new episode, in a new file."""
        self._put(header)

    def write(self, entry: Interval | Request) -> None:
        """Hand an entry over; dropped and counted where too many wait."""
        self._put(entry)

    def close(self) -> None:
        """Write out what waits, for some seconds at most; safe to call twice."""
        self._closing.set()
        with contextlib.suppress(queue.Full):
            self._queue.put_nowait(None)
        self._thread.join(_CLOSE_S)

    def _put(self, entry: Header | Interval | Request) -> None:
        try:
            self._queue.put_nowait(entry)
        except queue.Full:
            self._refused += 1
            if isinstance(entry, Header):
                self._header = entry  # an episode must not go on under the header of the one before

    def _run(self) -> None:
        while True:
            try:
                entry = self._queue.get(timeout=_WAIT_S)
            except queue.Empty:
                entry = None
            if entry is not None:
                self._write(entry)
            elif self._closing.is_set() and self._queue.empty():
                break
        with contextlib.suppress(OSError):
            self._lines.close()

    def _write(self, entry: Header | Interval | Request) -> None:
        if isinstance(entry, Header):
            self._header = entry
            return
        if self._clock.monotonic_s() < self._quiet_until_s:
            self._lost += 1
            return
        try:
            header, self._header = self._header, None
            if header is not None:
                self._lines.begin(encode(header))
            self._lines.write_line(encode(entry))
        except JournalError as error:  # an entry that no journal can hold
            self._lost += 1
            self._problem = str(error)
        except OSError as error:
            self._lost += 1
            self._problem = f"{error.strerror or error} ({error.filename or 'journal'})"
            self._quiet_until_s = self._clock.monotonic_s() + self._retry_s
            with contextlib.suppress(OSError):
                self._lines.close()  # what comes next goes into a new file
            if self._header is None:
                self._header = header
        else:
            self._problem = ""
