"""Tells systemd how a service is: its notification protocol over ``NOTIFY_SOCKET``, nothing else."""

from __future__ import annotations

import os
import socket
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import MutableMapping


class Notifier:
    """Does nothing where no service manager listens. Never blocks and never fails.

    Args:
        environment: Where the service manager says how it listens; its variables are taken out, so that
            child processes do not answer in our place.
    """

    def __init__(self, environment: MutableMapping[str, str] = os.environ) -> None:
        address = environment.pop("NOTIFY_SOCKET", "")
        watchdog_us = environment.pop("WATCHDOG_USEC", "")
        watched_pid = environment.pop("WATCHDOG_PID", "")
        self._socket: socket.socket | None = None
        self.watchdog_s: float | None = None
        """The service is killed when it says nothing for so long; None: nobody watches."""
        if not address.startswith(("/", "@")):
            return
        self._address = "\0" + address[1:] if address.startswith("@") else address
        self._socket = socket.socket(
            socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK
        )
        if watchdog_us.isdecimal() and int(watchdog_us) and watched_pid in {"", str(os.getpid())}:
            self.watchdog_s = int(watchdog_us) / 1e6

    def ready(self, status: str) -> None:
        """The service is up."""
        self._send(f"READY=1\nSTATUS={status}")

    def alive(self) -> None:
        """The service does its work; say so at least twice per ``watchdog_s``."""
        if self.watchdog_s is not None:
            self._send("WATCHDOG=1")

    def stopping(self) -> None:
        """The service is going down."""
        self._send("STOPPING=1")

    def close(self) -> None:
        """Say nothing any more; safe to call twice."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    def _send(self, text: str) -> None:
        if self._socket is None:
            return
        try:
            self._socket.sendto(text.encode(), self._address)
        except OSError:
            return  # whoever watches will notice the silence
