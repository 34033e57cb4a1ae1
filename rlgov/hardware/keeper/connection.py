"""One client's connection: bytes in, lines out, bounded on both sides; never waits."""

from __future__ import annotations

import socket
import struct
from typing import Final

from rlgov.hardware.keeper.protocol import LONGEST_LINE_BYTES
from rlgov.hardware.keeper.values import Peer

_RECEIVE_BYTES: Final = 4096
_LONGEST_BACKLOG_BYTES: Final = 65_536
_PATIENCE_S: Final = 5.0
"""A line that was begun must be finished within this time."""


class Connection:
    """A client.

    Args:
        accepted: Its socket.
        number: Names it to the keeper; never used twice.
        now_s: Now.
    """

    def __init__(self, accepted: socket.socket, number: int, now_s: float) -> None:
        accepted.settimeout(0)
        pid, uid, _ = struct.unpack(
            "3i", accepted.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
        )
        self.socket = accepted
        self.number = number
        self.peer = Peer(pid, uid)
        self.active_s = now_s
        """When it last said something."""
        self.ended: bool = False
        """Nothing more comes from it, or it must be told nothing more."""
        self._received = bytearray()
        self._begun_s: float | None = None
        self._to_send = bytearray()

    @property
    def wants_to_send(self) -> bool:
        """Whether something waits to be sent."""
        return bool(self._to_send)

    @property
    def has_line(self) -> bool:
        """Whether a whole line waits to be read."""
        return b"\n" in self._received

    @property
    def overlong(self) -> bool:
        """Whether it sends a line longer than any request."""
        return not self.has_line and len(self._received) > LONGEST_LINE_BYTES

    def stalled(self, now_s: float) -> bool:
        """Whether it began a line long ago and does not finish it."""
        return self._begun_s is not None and now_s - self._begun_s > _PATIENCE_S

    def receive(self, now_s: float) -> None:
        """Take in what has arrived, as far as there is room."""
        if len(self._received) > LONGEST_LINE_BYTES:
            return
        try:
            data = self.socket.recv(_RECEIVE_BYTES)
        except (BlockingIOError, InterruptedError):
            return
        except OSError:
            data = b""
        if not data:
            self.ended = True
            return
        self.active_s = now_s
        self._received += data
        if self._begun_s is None:
            self._begun_s = now_s

    def take_line(self, now_s: float) -> bytes:
        """The next line; ``has_line`` must hold."""
        line, _, rest = bytes(self._received).partition(b"\n")
        self._received = bytearray(rest)
        self._begun_s = now_s if rest else None
        return line

    def send(self, data: bytes = b"") -> None:
        """Send as much as goes at once, keep the rest; a client that does not read its answers ends."""
        self._to_send += data
        while self._to_send:
            try:
                sent = self.socket.send(self._to_send)
            except (BlockingIOError, InterruptedError):
                break
            except OSError:
                self.ended = True
                break
            del self._to_send[:sent]
        if len(self._to_send) > _LONGEST_BACKLOG_BYTES:
            self.ended = True
