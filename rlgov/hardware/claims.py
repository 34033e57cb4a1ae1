"""One holder a GPU: an advisory lock on a file each, of whoever sets that GPU's clock.

The keeper takes it while a lease is out, :class:`rlgov.hardware.clocks.GroupClocks` from its first lock to
its restore. It ends with the process that holds it, however that ends. Processes see each other only where
they share the folder: mount it into every container that sets clocks.
"""

from __future__ import annotations

import fcntl
import os
import re
from pathlib import Path
from typing import Final, Protocol

from rlgov.errors import HardwareError

FOLDER_VARIABLE: Final = "RLGOV_CLAIMS_DIR"
DEFAULT_FOLDER: Final = Path("/run/rlgov")

_UUID = re.compile(r"[A-Za-z0-9][A-Za-z0-9-]{0,79}")


class Claims(Protocol):
    """Who sets a GPU's clock."""

    def take(self, uuid: str) -> None:
        """Become the one; once is enough. Raises HardwareError, with the holder, if another process is."""
        ...

    def give_up(self, uuid: str) -> None:
        """No longer be the one; safe to call at any time."""
        ...


class NoClaims:
    """Claims nothing, hinders nobody."""

    def take(self, uuid: str) -> None:
        """Does nothing."""

    def give_up(self, uuid: str) -> None:
        """Does nothing."""


def claims_folder() -> Path:
    """Where this machine's claims lie: ``RLGOV_CLAIMS_DIR``, else ``/run/rlgov``."""
    return Path(os.environ.get(FOLDER_VARIABLE) or DEFAULT_FOLDER)


def is_file_safe(uuid: str) -> bool:
    """Whether a GPU's name can be part of a file's name."""
    return _UUID.fullmatch(uuid) is not None


class GpuClaims:
    """Claims by flock.

    Args:
        folder: Common to all processes that set clocks.
        holder: What others are told who holds a GPU, beside the process number.
    """

    def __init__(self, folder: Path, holder: str) -> None:
        self._folder = folder
        self._holder = holder
        self._held: dict[str, int] = {}

    def take(self, uuid: str) -> None:
        """Become the one who sets this GPU's clock.

        Raises:
            HardwareError: Another process is, or the folder cannot be used.
        """
        if uuid in self._held:
            return
        if not is_file_safe(uuid):
            raise HardwareError(f"{uuid!r} is no UUID of a GPU; `nvidia-smi -L` lists them")
        path = self._folder / f"gpu-{uuid}.claim"
        try:
            self._folder.mkdir(mode=0o755, parents=True, exist_ok=True)
            handle = self._open(path, uuid)
        except OSError as error:
            raise HardwareError(
                f"{path}: cannot claim the GPU ({error.strerror}); run as root, or name a folder that all "
                f"who set clocks can write in {FOLDER_VARIABLE}"
            ) from error
        self._held[uuid] = handle

    def give_up(self, uuid: str) -> None:
        """Let others set this GPU's clock; safe to call at any time."""
        handle = self._held.pop(uuid, None)
        if handle is not None:
            os.close(handle)  # the file stays: to remove it would let two processes lock two files

    def _open(self, path: Path, uuid: str) -> int:
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        while True:
            handle = os.open(path, flags, 0o600)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if _is_at(handle, path):  # somebody may have removed it between open and lock
                    os.truncate(handle, 0)
                    os.pwrite(handle, f"{self._holder}, process {os.getpid()}\n".encode(), 0)
                    return handle
            except BlockingIOError:
                holder = os.pread(handle, 200, 0).decode(errors="replace").strip() or "another process"
                os.close(handle)
                raise HardwareError(
                    f"the clock of {uuid} is set by another: {holder}; stop that one first"
                ) from None
            except BaseException:
                os.close(handle)
                raise
            os.close(handle)


def _is_at(handle: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), path.stat(follow_symlinks=False))
    except FileNotFoundError:
        return False
