"""Files that are whole or not there at all, and lines that are on disk once they are written.

Every change to a run folder goes through the few calls of :mod:`os` here, so that tests can end the program
before, within and after each of them.
"""

from __future__ import annotations

import os
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

from rlgov.errors import CharacterizationError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path


def replace_file(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file beside ``path``, bring it to disk, and put it in its place.

    Args:
        path: What is written; the folder is made if need be.
        write: Writes the file it is given.

    Raises:
        CharacterizationError: The disk is full, or the folder cannot be written; ``path`` is as it was.
    """
    part = path.with_name(f"{path.name}.part")
    with told_plainly(path):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write(part)
            handle = os.open(part, os.O_RDONLY | os.O_CLOEXEC)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)
            os.replace(part, path)  # noqa: PTH105  # atomic on one file system
            sync_folder(path.parent)
        finally:
            with suppress(OSError):
                part.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Bring to disk which files a folder holds."""
    handle = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def append_line(handle: int, line: bytes) -> None:
    """Append a line to an open file and bring it to disk; on an error the file is as long as before.

    Raises:
        OSError: It could not be written.
    """
    before = os.fstat(handle).st_size
    try:
        left = memoryview(line)
        while left:
            left = left[os.write(handle, left) :]
        os.fsync(handle)
    except OSError:
        with suppress(OSError):
            os.ftruncate(handle, before)
        raise


@contextmanager
def told_plainly(path: Path) -> Iterator[None]:
    """Turns what a file system says into what to do about it.

    Raises:
        CharacterizationError: For every OSError.
    """
    try:
        yield
    except OSError as error:
        msg = (
            f"{path}: cannot be written ({error.strerror or error}); finished points are kept: make room or "
            "correct the folder's permissions, and run the same command again, it goes on from here"
        )
        raise CharacterizationError(msg) from error
