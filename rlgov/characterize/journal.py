"""The journal of a campaign: one line a finished repetition, on disk before the next one begins.

A campaign can be killed at any moment. What was being measured then is measured again; a line that was being
written then is cut off. The folder belongs to one campaign at a time, by a lock on the journal.
"""

from __future__ import annotations

import fcntl
import json
import os
from typing import TYPE_CHECKING, Any

from rlgov.calibration.table import JOURNAL_FILE
from rlgov.errors import CharacterizationError

if TYPE_CHECKING:
    from pathlib import Path
    from types import TracebackType
    from typing import Self


class PointJournal:
    """Rows of finished repetitions, by point and repeat. Use it in a ``with``.

    Args:
        folder: The run folder.

    Raises:
        CharacterizationError: Another campaign works in the folder, or a line in the middle is damaged.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / JOURNAL_FILE
        self._file = self._path.open("a+b")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._file.close()
            msg = f"{folder}: another `rlgov characterize` works in this folder; wait for it, or name another"
            raise CharacterizationError(msg) from error
        try:
            self.rows = self._read()
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._file.close()

    def add(self, row: dict[str, Any]) -> None:
        """Note a finished repetition; it is on disk when this returns."""
        line = json.dumps(row, allow_nan=False).encode() + b"\n"
        self._file.write(line)
        self._file.flush()
        os.fsync(self._file.fileno())
        self.rows[row["point_id"], row["repeat"]] = row

    def _read(self) -> dict[tuple[str, int], dict[str, Any]]:
        self._file.seek(0)
        content = self._file.read()
        whole = content.rfind(b"\n") + 1
        if whole < len(content):  # killed while this line was written
            self._file.truncate(whole)
        rows = {}
        for number, line in enumerate(content[:whole].splitlines(), 1):
            try:
                row = json.loads(line)
                rows[str(row["point_id"]), int(row["repeat"])] = row
            except (ValueError, KeyError, TypeError) as error:
                msg = (
                    f"{self._path}:{number}: not a finished point ({error}); "
                    "remove that line to measure it again"
                )
                raise CharacterizationError(msg) from error
        return rows
