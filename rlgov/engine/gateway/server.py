"""What the connections of clients share: bounds, counts, and who takes their requests."""

from __future__ import annotations

import asyncio
from email.utils import formatdate
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from rlgov.clock import Clock
    from rlgov.engine.gateway.connection import ClientConnection
    from rlgov.engine.gateway.settings import GatewaySettings
    from rlgov.engine.gateway.wire import Request


class Serving(Protocol):
    """What is answering a request."""

    def on_client_gone(self) -> None:
        """The client closed; nobody reads an answer any more."""
        ...

    def on_client_slow(self) -> None:
        """The client does not keep up: send no more for now."""
        ...

    def on_client_ready(self) -> None:
        """The client keeps up again."""
        ...


class Serves(Protocol):
    """Who takes complete requests."""

    def __call__(self, client: ClientConnection, request: Request) -> Serving | None:
        """Begin to answer; None when the answer was given at once."""
        ...


class Budget:
    """Bytes of request bodies in memory, all connections together.

    Args:
        limit_bytes: What may be held.
    """

    def __init__(self, limit_bytes: int) -> None:
        self._limit_bytes = limit_bytes
        self.used_bytes = 0

    def take(self, size_bytes: int) -> bool:
        """Account for some more; False when it does not fit."""
        if self.used_bytes + size_bytes > self._limit_bytes:
            return False
        self.used_bytes += size_bytes
        return True

    def give(self, size_bytes: int) -> None:
        """Account for some less."""
        self.used_bytes -= size_bytes


class Server:
    """What the client connections share.

    Args:
        settings: Bounds and timeouts.
        clock: The time.
        serve: Takes complete requests.
    """

    def __init__(self, settings: GatewaySettings, clock: Clock, serve: Serves) -> None:
        self.settings = settings
        self.now_s = clock.monotonic_s
        self.serve = serve
        self.budget = Budget(settings.max_buffered_bytes)
        self.connections: set[ClientConnection] = set()
        self.empty = asyncio.Event()
        self.empty.set()
        self.draining = False
        self.sent_bytes = 0
        self.received_bytes = 0
        self.refused: dict[int, int] = {}  # requests that never became one, by status
        self._wall_s = clock.wall_s

    def date(self) -> str:
        """Now, for a Date header."""
        return formatdate(self._wall_s(), usegmt=True)

    def sweep(self) -> None:
        """Close connections whose time is up."""
        now_s = self.now_s()
        for connection in list(self.connections):
            connection.check(now_s)

    def drain(self) -> None:
        """Take no further request on any connection; those under way are finished."""
        self.draining = True
        for connection in list(self.connections):
            connection.close_when_idle()

    def abort(self) -> None:
        """Close every connection at once."""
        for connection in list(self.connections):
            connection.abort()
