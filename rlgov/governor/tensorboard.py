"""TensorBoard's events of a governed run, beside those of training.

A governor runs for months, so ticks are put together: one point a minute (see
:mod:`rlgov.governor.points`). A thread of its own writes them from a bounded queue; when the disk is full
or slow, points are dropped and counted, and the loop does not notice. A file ends at a size, and the oldest
ones are removed.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import queue
import socket
import threading
from typing import TYPE_CHECKING, Any, Final, Protocol

from rlgov.errors import ConfigError
from rlgov.governor.points import PointMaker

if TYPE_CHECKING:
    from pathlib import Path

    from rlgov.governor.records import Tick
    from rlgov.records import Limits

LOG: Final = logging.getLogger(__name__)
TICKS_A_POINT: Final = 60
MOST_WAITING: Final = 64
LARGEST_FILE_BYTES: Final = 16 * 1024 * 1024
MOST_FILES: Final = 8
_CLOSE_TIMEOUT_S: Final = 5.0


class EventSink(Protocol):
    """Where ticks go to be written."""

    @property
    def dropped(self) -> int:
        """Points that were not written."""
        ...

    def write(self, tick: Tick) -> None:
        """Take a tick; never blocks."""
        ...

    def close(self) -> None:
        """Write out what waits; safe to call twice."""
        ...


class NullEvents:
    """Writes nothing."""

    dropped = 0

    def write(self, tick: Tick) -> None:
        """Nothing to do."""

    def close(self) -> None:
        """Nothing to do."""


class PointWriter(Protocol):
    """Writes points to a place; every call may raise OSError."""

    def add(self, scalars: dict[str, float], step: int, wall_s: float) -> None:
        """One point."""
        ...

    def close(self) -> None:
        """No more points; safe to call twice."""
        ...


class TensorBoardEvents:
    """Puts ticks together and writes them from a thread of its own.

    Args:
        writer: Where points go.
        limits: Of the deployment.
        ticks_a_point: How many ticks make a point.
    """

    def __init__(self, writer: PointWriter, limits: Limits, *, ticks_a_point: int = TICKS_A_POINT) -> None:
        self._writer = writer
        self._points = PointMaker(limits)
        self._ticks_a_point = ticks_a_point
        self._ticks: list[Tick] = []
        self._queue: queue.Queue[tuple[Tick, ...] | None] = queue.Queue(MOST_WAITING)
        self._dropped_full = 0  # each of the two is written by one thread alone
        self._dropped_failed = 0
        self._told = False
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="rlgov-tensorboard", daemon=True)
        self._thread.start()

    @property
    def dropped(self) -> int:
        """Points that were not written."""
        return self._dropped_full + self._dropped_failed

    def write(self, tick: Tick) -> None:
        """Take a tick; never blocks."""
        self._ticks.append(tick)
        if len(self._ticks) >= self._ticks_a_point:
            self._hand_over()

    def close(self) -> None:
        """Write out what waits, for a few seconds at most; safe to call twice."""
        if self._closed:
            return
        self._closed = True
        if self._ticks:
            self._hand_over()
        with contextlib.suppress(queue.Full):
            self._queue.put(None, timeout=_CLOSE_TIMEOUT_S)
        self._thread.join(_CLOSE_TIMEOUT_S)

    def _hand_over(self) -> None:
        ticks, self._ticks = tuple(self._ticks), []
        try:
            self._queue.put_nowait(ticks)
        except queue.Full:
            self._dropped_full += 1

    def _run(self) -> None:
        while (ticks := self._queue.get()) is not None:
            try:
                self._writer.add(self._points.make(ticks), ticks[-1].number, ticks[-1].wall_s)
                self._told = False
            except OSError as error:
                self._dropped_failed += 1
                if not self._told:
                    self._told = True
                    LOG.warning("TensorBoard's events cannot be written (%s); points are dropped", error)
            except Exception:  # whatever a tick holds, the next one is written again
                self._dropped_failed += 1
                LOG.exception("a point for TensorBoard could not be made")
        with contextlib.suppress(OSError):
            self._writer.close()


class EventFiles:
    """Event files in a folder, as TensorBoard reads them; each ends at a size, and few are kept.

    Args:
        folder: Made where it does not exist.
        largest_bytes: A file that has grown beyond this is the last but one.
        most_files: Older ones **of this process** are removed.

    Raises:
        ConfigError: TensorBoard is not installed.
    """

    def __init__(
        self, folder: Path, *, largest_bytes: int = LARGEST_FILE_BYTES, most_files: int = MOST_FILES
    ) -> None:
        try:
            from tensorboard.compat.proto import event_pb2, summary_pb2  # noqa: PLC0415  # not in `live`
            from tensorboard.summary.writer.record_writer import RecordWriter  # noqa: PLC0415  # as above
        except ModuleNotFoundError as error:
            raise ConfigError(
                "--tensorboard needs the package tensorboard; pip install tensorboard, or leave the flag out"
            ) from error
        self._event: Any = event_pb2.Event
        self._summary: Any = summary_pb2.Summary
        self._record_writer: Any = RecordWriter
        self._folder = folder
        self._largest_bytes = largest_bytes
        self._most_files = most_files
        self._numbers = itertools.count()
        self._written: list[Path] = []
        self._file: Any = None

    def add(self, scalars: dict[str, float], step: int, wall_s: float) -> None:
        """Write one point. Raises OSError; the next point then begins a new file."""
        values = [self._summary.Value(tag=tag, simple_value=value) for tag, value in scalars.items()]
        event = self._event(wall_time=wall_s, step=step, summary=self._summary(value=values))
        try:
            if self._file is None:
                self._open(wall_s)
            self._record_writer(self._file).write(event.SerializeToString())
            self._file.flush()
            if self._file.tell() > self._largest_bytes:
                self.close()
        except OSError:
            # A record that was cut off would hide everything after it in the same file.
            with contextlib.suppress(OSError):
                self.close()
            raise

    def close(self) -> None:
        """Close the file."""
        file, self._file = self._file, None
        if file is not None:
            file.close()

    def _open(self, wall_s: float) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        name = f"events.out.tfevents.{int(wall_s):010d}.{socket.gethostname()}.{os.getpid()}"
        path = self._folder / f"{name}.{next(self._numbers)}"
        while len(self._written) >= self._most_files:
            self._written.pop(0).unlink(missing_ok=True)
        self._file = path.open("wb")
        self._written.append(path)
        first = self._event(wall_time=wall_s, file_version="brain.Event:2")
        self._record_writer(self._file).write(first.SerializeToString())
