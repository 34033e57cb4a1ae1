"""One governor acts on a stack: an advisory lock on a file beside its control socket.

Clocks have the keeper's leases. Batch cap and TP degree have no owner in the stack, and two governors would
undo each other's settings there. The lock ends with the process that holds it, however that ends.
"""

from __future__ import annotations

import fcntl
import os
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from pathlib import Path

_SHOWN_BYTES = 200


class StackClaim(Protocol):
    """Who may act on a stack."""

    def take(self) -> str:
        """Become the one; once is enough. Who the other one is, or nothing when it worked."""
        ...

    def give_up(self) -> None:
        """No longer be the one; safe to call at any time."""
        ...


class NoStackClaim:
    """Nothing to claim: an attached vLLM, and tests."""

    def take(self) -> str:
        """Always works."""
        return ""

    def give_up(self) -> None:
        """Does nothing."""


class FileClaim:
    """A claim by flock.

    Args:
        path: The file; it stays, empty of meaning, when nobody holds it. Where it cannot be opened nothing is
            claimed and nobody is kept out.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._handle: int | None = None

    def take(self) -> str:
        """Become the one; once is enough. Who the other one is, or nothing when it worked."""
        if self._handle is not None:
            return ""
        try:
            handle = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o660)
        except OSError:
            return ""
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(handle, _SHOWN_BYTES, 0).decode(errors="replace").strip()
            os.close(handle)
            return holder or "another process"
        except OSError:  # a file system without locks
            os.close(handle)
            return ""
        os.truncate(handle, 0)
        os.pwrite(handle, f"process {os.getpid()}\n".encode(), 0)
        self._handle = handle
        return ""

    def give_up(self) -> None:
        """No longer be the one; safe to call at any time."""
        if self._handle is not None:
            handle, self._handle = self._handle, None
            os.close(handle)
