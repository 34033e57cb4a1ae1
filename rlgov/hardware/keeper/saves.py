"""What a later keeper must know, one small file a GPU. A crash leaves the old or the new one."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Final

from rlgov.errors import HardwareError
from rlgov.hardware.claims import is_file_safe
from rlgov.hardware.keeper.values import SavedLock

if TYPE_CHECKING:
    from collections.abc import Callable

_VERSION: Final = 1
_LARGEST_BYTES: Final = 4096
_FIELDS: Final = {"version", "boot_id", "uuid", "restore_clock_mhz", "clocks_mhz", "confirmed", "yielded"}
_WRITABLE_BY_OTHERS: Final = 0o022
_BOOT_ID: Final = Path("/proc/sys/kernel/random/boot_id")


def boot_id() -> str:
    """Names this run of the kernel; empty where it cannot be read."""
    try:
        return _BOOT_ID.read_text(encoding="ascii").strip()
    except OSError:
        return ""


class SaveFolder:
    """The saved locks of one machine; one keeper at a time owns it.

    Locks do not survive a reboot, so what was saved before the last one is dropped.

    Args:
        path: Made if it is not there.
        say: Told about files that cannot be understood.
        boot: This run of the kernel.
    """

    def __init__(self, path: Path, say: Callable[[str], None], boot: str | None = None) -> None:
        self.path = path
        self._say = say
        self._boot = boot_id() if boot is None else boot
        self._lock: int | None = None
        self._written: dict[str, bytes] = {}

    def own(self) -> None:
        """Keep other keepers out until :meth:`close` or the end of this process.

        Raises:
            HardwareError: Another keeper owns it, others may write in it, or it cannot be used.
        """
        try:
            self.path.mkdir(mode=0o755, parents=True, exist_ok=True)
            status = self.path.stat()
            flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
            handle = os.open(self.path / "keeper.lock", flags, 0o600)
        except OSError as error:
            raise HardwareError(
                f"{self.path}: cannot be used ({error.strerror}); run as root, or give --state-dir"
            ) from error
        if status.st_mode & _WRITABLE_BY_OTHERS or status.st_uid not in {0, os.geteuid()}:
            os.close(handle)
            raise HardwareError(
                f"{self.path}: others than root and this user may write in it; chmod go-w, or chown it"
            )
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(handle)
            raise HardwareError(
                f"{self.path}: another keeper runs here; stop it, or name another folder with --state-dir"
            ) from error
        self._lock = handle
        for half in self.path.glob("gpu-*.new"):  # of a keeper that was killed while it wrote
            with contextlib.suppress(OSError):
                half.unlink()

    def close(self) -> None:
        """Let others own it; safe to call twice."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def save(self, lock: SavedLock) -> None:
        """Keep this in place of what was kept of that GPU. Raises OSError; then the old one is there."""
        path = self._path(lock.uuid)
        text = json.dumps(
            {
                "version": _VERSION,
                "boot_id": self._boot,
                "uuid": lock.uuid,
                "restore_clock_mhz": lock.restore_clock_mhz,
                "clocks_mhz": list(lock.clocks_mhz),
                "confirmed": lock.confirmed,
                "yielded": lock.yielded[:1000],
            }
        ).encode()
        if self._written.get(lock.uuid) == text:
            return
        self._written.pop(lock.uuid, None)
        beside = path.with_suffix(".new")
        with contextlib.suppress(FileNotFoundError):
            beside.unlink()  # of a write that failed
        handle = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            _write_all(handle, text)
            os.fsync(handle)
        finally:
            os.close(handle)
        beside.rename(path)
        self._settle()
        self._written[lock.uuid] = text

    def forget(self, uuid: str) -> None:
        """Nothing is to be restored on this GPU. Raises OSError."""
        self._written.pop(uuid, None)
        path = self._path(uuid)
        if path.exists():
            path.unlink()
            self._settle()

    def load(self, otherwise_mhz: int | None) -> tuple[SavedLock, ...]:
        """Everything that is kept, in the order of the files' names.

        Args:
            otherwise_mhz: What to restore where a file is damaged; None: no lock.
        """
        locks = []
        for path in sorted(self.path.glob("gpu-*.json")):
            uuid = path.stem.removeprefix("gpu-")
            if not is_file_safe(uuid):
                self._say(f"{path}: not one of ours; left alone")
                continue
            try:
                lock, boot = _parse(path, uuid)
            except (OSError, ValueError) as error:
                self._say(f"{path}: damaged ({error}); restoring this GPU")
                lock, boot = SavedLock(uuid, otherwise_mhz, ()), ""
            if boot and self._boot and boot != self._boot:
                self._say(f"{path}: from before a reboot, which removed the lock; dropped")
                with contextlib.suppress(OSError):
                    path.unlink()
                continue
            locks.append(lock)
        return tuple(locks)

    def _path(self, uuid: str) -> Path:
        if not is_file_safe(uuid):
            raise OSError(f"{uuid!r} cannot be part of a file's name")
        return self.path / f"gpu-{uuid}.json"

    def _settle(self) -> None:
        """Have the folder's own change written."""
        handle = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _write_all(handle: int, text: bytes) -> None:
    while text:
        text = text[os.write(handle, text) :]


def _parse(path: Path, uuid: str) -> tuple[SavedLock, str]:
    """The saved lock and its boot. Raises ValueError with what is wrong, OSError."""
    handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        text = os.read(handle, _LARGEST_BYTES)
    finally:
        os.close(handle)
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"no JSON: {error}") from error
    if not isinstance(content, dict) or set(content) != _FIELDS:
        raise ValueError("not the fields of a saved lock")
    restore_mhz, clocks_mhz = content["restore_clock_mhz"], content["clocks_mhz"]
    right = (
        content["version"] == _VERSION
        and content["uuid"] == uuid
        and isinstance(content["boot_id"], str)
        and (restore_mhz is None or type(restore_mhz) is int)
        and isinstance(clocks_mhz, list)
        and all(type(clock) is int for clock in clocks_mhz)
        and isinstance(content["confirmed"], bool)
        and isinstance(content["yielded"], str)
    )
    if not right:
        raise ValueError("not the values of a saved lock")
    lock = SavedLock(uuid, restore_mhz, tuple(clocks_mhz), content["confirmed"], content["yielded"])
    return lock, content["boot_id"]
