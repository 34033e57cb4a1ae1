"""Unix sockets: making one to listen at, and HTTP over one."""

from __future__ import annotations

import http.client
import os
import socket
from typing import TYPE_CHECKING

from rlgov.errors import ConfigError

if TYPE_CHECKING:
    from pathlib import Path

SOCKET_UMASK = 0o117  # leaves read and write for owner and group
LONGEST_SOCKET_PATH_BYTES = 107  # the kernel's sun_path, less its terminating zero


def bind_unix(path: Path, *, flag: str, who: str) -> socket.socket:
    """A socket of mode 0660 at ``path``; a leftover that nobody listens on is replaced.

    Args:
        path: Where; its folder must exist.
        flag: The flag a person would give another path with, for messages.
        who: What would be listening at that path already, for messages.

    Raises:
        ConfigError: The path is too long, is taken, or cannot be made.
    """
    if len(os.fsencode(path)) > LONGEST_SOCKET_PATH_BYTES:
        raise ConfigError(
            f"{path}: too long for a Unix socket ({LONGEST_SOCKET_PATH_BYTES} bytes at most); "
            f"give a shorter path with {flag}"
        )
    _remove_leftover(path, flag, who)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    before = os.umask(SOCKET_UMASK)
    try:
        listener.bind(os.fspath(path))
    except OSError as error:
        listener.close()
        raise ConfigError(
            f"{path}: cannot be made ({error.strerror}); give a writable place with {flag}"
        ) from error
    finally:
        os.umask(before)
    return listener


def _remove_leftover(path: Path, flag: str, who: str) -> None:
    """Remove a socket that nobody listens on; anything else at that path is somebody's and stays."""
    if not path.is_socket():
        if path.exists():
            raise ConfigError(f"{path}: is there and is no socket; give another path with {flag}")
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(1.0)
        try:
            probe.connect(os.fspath(path))
        except ConnectionRefusedError:
            path.unlink(missing_ok=True)
        except OSError as error:
            raise ConfigError(
                f"{path}: cannot be used ({error.strerror or error}); give another path"
            ) from error
        else:
            raise ConfigError(
                f"{path}: another {who} listens there; stop it, or give another path with {flag}"
            )


class UnixConnection(http.client.HTTPConnection):
    """HTTP over a Unix socket.

    Args:
        path: Of the socket.
        timeout_s: Longest wait for a connection, and for each piece of an answer.
    """

    timeout: float

    def __init__(self, path: Path, timeout_s: float) -> None:
        super().__init__("localhost", timeout=timeout_s)
        self._path = path

    def connect(self) -> None:
        """Connect to the socket."""
        link = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            link.settimeout(self.timeout)
            link.connect(os.fspath(self._path))
        except OSError:
            link.close()
            raise
        self.sock = link
