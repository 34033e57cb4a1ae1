"""The keeper's loop: one thread over all connections and the clock. No client can hold up another."""

from __future__ import annotations

import contextlib
import grp
import os
import selectors
import signal
import socket
import stat
from typing import TYPE_CHECKING, Final

from rlgov.errors import HardwareError
from rlgov.hardware.keeper.connection import Connection
from rlgov.hardware.keeper.protocol import refusal_line
from rlgov.hardware.keeper.values import Code

if TYPE_CHECKING:
    from pathlib import Path
    from types import FrameType, TracebackType
    from typing import Self

    from rlgov.clock import Clock
    from rlgov.hardware.keeper.keeper import Keeper
    from rlgov.hardware.keeper.notify import Notifier

MOST_CONNECTIONS: Final = 64
_LINES_A_TURN: Final = 4
_LONGEST_PAUSE_S: Final = 1.0  # after a suspension of the host, leases are looked at this soon
_BACKLOG: Final = 128
_SOCKET_MODE: Final = 0o660
_UMASK: Final = 0o117
_STOPPING: Final = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


def listen(path: Path, group: str) -> socket.socket:
    """A listening socket for root, its user and its group.

    Args:
        path: Where; an old socket there is replaced, so make sure first that no other keeper runs.
        group: Who may connect beside root; empty: the keeper's own group.

    Raises:
        HardwareError: There is no such group, or the path cannot be used.
    """
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        if path.exists() and stat.S_ISSOCK(path.stat(follow_symlinks=False).st_mode):
            path.unlink()
        before = os.umask(_UMASK)  # the socket must never be open to all, not even for a moment
        try:
            listener.bind(str(path))
        finally:
            os.umask(before)
        if group:
            os.chown(path, -1, grp.getgrnam(group).gr_gid)
        path.chmod(_SOCKET_MODE)
        listener.listen(_BACKLOG)
        listener.settimeout(0)
    except KeyError as error:
        listener.close()
        raise HardwareError(f"there is no group {group!r}; make it, or name another with --group") from error
    except OSError as error:
        listener.close()
        raise HardwareError(f"{path}: cannot listen there ({error}); name another with --socket") from error
    return listener


class Signals:
    """Turns SIGTERM, SIGINT and SIGHUP into a readable socket, so that they interrupt nothing halfway."""

    def __init__(self) -> None:
        self.received = 0

    def __enter__(self) -> Self:
        self.reader, self._writer = socket.socketpair()
        self.reader.settimeout(0)
        self._writer.settimeout(0)
        self._wakeup = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        self._before = {number: signal.signal(number, self._note) for number in _STOPPING}
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._wakeup)
        self.reader.close()
        self._writer.close()

    def _note(self, number: int, _: FrameType | None) -> None:
        self.received = number


class Server:
    """Serves one keeper until a signal.

    Args:
        keeper: Answers.
        listener: A listening socket, not blocking.
        signals: Say when to stop.
        clock: Paces everything.
        notifier: Hears that the loop turns.
    """

    def __init__(
        self, keeper: Keeper, listener: socket.socket, signals: Signals, clock: Clock, notifier: Notifier
    ) -> None:
        self._keeper = keeper
        self._listener = listener
        self._signals = signals
        self._clock = clock
        self._notifier = notifier
        self._selector = selectors.DefaultSelector()
        self._connections: dict[int, Connection] = {}
        self._numbers = 0

    def run(self) -> None:
        """Serve until a signal says to stop; the clocks are still as they are then."""
        self.open()
        try:
            while not self._signals.received:
                self.turn(self._pause_s())
        finally:
            self.close()

    def open(self) -> None:
        """Take up the work; then :meth:`turn` may be called."""
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._selector.register(self._signals.reader, selectors.EVENT_READ)

    def close(self) -> None:
        """End every connection, which restores what they held."""
        for connection in tuple(self._connections.values()):
            self._close(connection)
        self._selector.close()

    def turn(self, pause_s: float) -> None:
        """Wait at most so long for something to happen, then do what there is to do, and no more."""
        for key, events in self._selector.select(pause_s):
            connection: Connection | None = key.data
            if key.fileobj is self._listener:
                self._accept()
            elif connection is not None:
                if events & selectors.EVENT_WRITE:
                    connection.send()
                if events & selectors.EVENT_READ:
                    connection.receive(self._clock.monotonic_s())
        for connection in tuple(self._connections.values()):
            self._serve(connection)
        self._keeper.tick()
        self._notifier.alive()

    def _pause_s(self) -> float:
        if any(connection.has_line for connection in self._connections.values()):
            return 0.0
        pause_s = min(self._keeper.due_in_s(), _LONGEST_PAUSE_S)
        watchdog_s = self._notifier.watchdog_s
        return pause_s if watchdog_s is None else min(pause_s, watchdog_s / 3)

    def _serve(self, connection: Connection) -> None:
        now_s = self._clock.monotonic_s()
        for _ in range(_LINES_A_TURN):
            if not connection.has_line or connection.ended:
                break
            answer, sensible = self._keeper.answer(
                connection.number, connection.peer, connection.take_line(now_s)
            )
            connection.send(answer)
            if not sensible:
                connection.ended = True
        if connection.overlong or connection.stalled(now_s):
            connection.send(refusal_line(0, Code.MALFORMED, "a line is too long, or never ends"))
            connection.ended = True
        if connection.ended:
            self._close(connection)
            return
        wanted = selectors.EVENT_READ | (selectors.EVENT_WRITE if connection.wants_to_send else 0)
        if self._selector.get_key(connection.socket).events != wanted:
            self._selector.modify(connection.socket, wanted, connection)

    def _accept(self) -> None:
        try:
            accepted, _ = self._listener.accept()
        except OSError:  # gone again, or out of file handles: then there is one idle connection less
            self._evict()
            return
        if len(self._connections) >= MOST_CONNECTIONS:
            self._evict()
        self._numbers += 1
        try:
            connection = Connection(accepted, self._numbers, self._clock.monotonic_s())
        except OSError:
            accepted.close()
            return
        self._connections[connection.number] = connection
        self._selector.register(accepted, selectors.EVENT_READ, connection)

    def _evict(self) -> None:
        """Close the connection that has been silent for the longest time, of those without a lease."""
        idle = [one for one in self._connections.values() if not self._keeper.holds(one.number)]
        if idle:
            self._close(min(idle, key=lambda one: one.active_s))

    def _close(self, connection: Connection) -> None:
        del self._connections[connection.number]
        self._selector.unregister(connection.socket)
        with contextlib.suppress(OSError):
            connection.socket.close()
        self._keeper.gone(connection.number)
