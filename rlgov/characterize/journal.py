"""The journal of a campaign: one line a finished repetition, on disk before the next one begins.

A campaign can be killed at any moment. What was being measured then is measured again; a line that was being
written then is cut off. The folder belongs to one campaign at a time, by a lock on the journal.
"""

from __future__ import annotations

import fcntl
import json
import os
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from rlgov.calibration.durable import append_line, sync_folder, told_plainly
from rlgov.calibration.table import JOURNAL_FILE, POINTS, frame_of
from rlgov.errors import CharacterizationError

if TYPE_CHECKING:
    from pathlib import Path
    from types import TracebackType
    from typing import Self

_MODE = 0o644


class PointJournal:
    """Rows of finished repetitions, by point and repeat. Use it in a ``with``.

    Args:
        folder: The run folder.

    Raises:
        CharacterizationError: Another campaign works in the folder, a line is damaged, or the folder cannot
            be written.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / JOURNAL_FILE
        with told_plainly(self._path):
            # Unbuffered: what could not be written must not be tried again when the file is closed.
            flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
            self._handle = os.open(self._path, flags, _MODE)
        try:
            self._lock(folder)
            with told_plainly(self._path):
                sync_folder(folder)
                self.rows = self._read()
        except BaseException:
            os.close(self._handle)
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        with suppress(OSError):  # every line is on disk already
            os.close(self._handle)

    def add(self, row: dict[str, Any]) -> None:
        """Note a finished repetition; it is on disk when this returns.

        Raises:
            CharacterizationError: It could not be written, such as on a full disk; the journal is as before.
        """
        line = json.dumps(row, allow_nan=False).encode() + b"\n"
        with told_plainly(self._path):
            append_line(self._handle, line)
        self.rows[row["point_id"], row["repeat"]] = row

    def _lock(self, folder: Path) -> None:
        try:
            fcntl.flock(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            msg = f"{folder}: another `rlgov characterize` works in this folder; wait for it, or name another"
            raise CharacterizationError(msg) from error
        except OSError as error:
            msg = f"{self._path}: cannot be locked ({error.strerror}); use a folder on a local disk"
            raise CharacterizationError(msg) from error

    def _read(self) -> dict[tuple[str, int], dict[str, Any]]:
        content = self._path.read_bytes()
        whole = content.rfind(b"\n") + 1
        if whole < len(content):  # killed while this line was written
            os.ftruncate(self._handle, whole)
        rows: dict[tuple[str, int], dict[str, Any]] = {}
        for number, line in enumerate(content[:whole].splitlines(), 1):
            try:
                row = json.loads(line)
                key = str(row["point_id"]), int(row["repeat"])
            except (ValueError, KeyError, TypeError) as error:
                raise self._damaged(number, str(error)) from error
            if key in rows:
                raise self._damaged(number, f"point {key[0]} has repeat {key[1]} twice")
            rows[key] = row
        self._check(list(rows.values()))
        return rows

    def _check(self, rows: list[dict[str, Any]]) -> None:
        """See that every row fits the table, now rather than when the last point is measured."""
        try:
            frame_of(rows, POINTS, str(self._path))
        except CharacterizationError:
            for number, row in enumerate(rows, 1):  # which one it is
                try:
                    frame_of([row], POINTS, "a row")
                except CharacterizationError as error:
                    raise self._damaged(number, str(error)) from error
            raise

    def _damaged(self, number: int, why: str) -> CharacterizationError:
        return CharacterizationError(
            f"{self._path}:{number}: not a finished point ({why}); remove that line to measure it again"
        )
