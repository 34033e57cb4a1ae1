"""What an operator sees of a governor, and what he may tell it. The loop hands ticks over and never waits.

:class:`Surface` is the only thing the loop knows: it counts each tick, keeps it for the status page, passes
it to TensorBoard's own thread, and collects orders that the loop polls. Serving HTTP happens in another
thread; nothing there can delay a tick or end the loop.
"""

from __future__ import annotations

import queue
from typing import TYPE_CHECKING, Any, Final, Self

from rlgov.governor.exposition import Exposition
from rlgov.governor.health import judge
from rlgov.governor.http import SurfaceServer
from rlgov.governor.status import status_document
from rlgov.governor.tensorboard import NullEvents

if TYPE_CHECKING:
    from types import TracebackType

    from rlgov.clock import Clock
    from rlgov.governor.health import Health
    from rlgov.governor.listen import Address
    from rlgov.governor.records import Command, Governed, Tick
    from rlgov.governor.tensorboard import EventSink

MOST_ORDERS: Final = 16
"""Orders that may wait for the loop."""


class Surface:
    """Shows a governor and takes orders for it. A context manager that closes itself.

    Args:
        governed: What does not change.
        clock: Monotonic time for health, wall time for the uptime.
        addresses: Where to listen; see :func:`rlgov.governor.listen.parse_addresses`. None at all is fine.
        token: What orders over TCP have to show.
        events: Where TensorBoard's points go.
    """

    def __init__(
        self,
        governed: Governed,
        clock: Clock,
        *,
        addresses: tuple[Address, ...] = (),
        token: str | None = None,
        events: EventSink | None = None,
    ) -> None:
        self._governed = governed
        self._clock = clock
        self._started_s = clock.monotonic_s()
        self._last: tuple[Tick, float] | None = None  # replaced as a whole, so that readers need no lock
        self._orders: queue.Queue[Command] = queue.Queue(MOST_ORDERS)
        self._events: EventSink = NullEvents() if events is None else events
        self._exposition = Exposition(governed, self.health, lambda: self._events.dropped)
        self._server = SurfaceServer(self, addresses, token)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    @property
    def addresses(self) -> tuple[Address, ...]:
        """Where it listens, with the ports that were taken; empty before :meth:`start`."""
        return self._server.addresses

    def start(self) -> None:
        """Begin to listen. Raises ConfigError where a place cannot be listened at."""
        self._server.start()

    def publish(self, tick: Tick) -> None:
        """Show a tick. Never blocks and never waits for a reader; call it from one thread."""
        self._exposition.observe(tick)
        self._last = (tick, self._clock.monotonic_s())
        self._events.write(tick)

    def commands(self) -> tuple[Command, ...]:
        """The orders since the last call, oldest first."""
        orders: list[Command] = []
        while True:
            try:
                orders.append(self._orders.get_nowait())
            except queue.Empty:
                return tuple(orders)

    def close(self) -> None:
        """Stop listening and write out what waits; safe to call twice."""
        self._server.close()
        self._events.close()

    # What the server asks for, from its thread.

    def health(self) -> Health:
        """Whether the loop lives and may be relied on, now."""
        tick, published_s = self._last or (None, None)
        return judge(
            tick,
            started_s=self._started_s,
            published_s=published_s,
            now_s=self._clock.monotonic_s(),
            interval_s=self._governed.limits.interval_s,
        )

    def metrics(self) -> bytes:
        """The metrics page."""
        return self._exposition.page()

    def status(self) -> dict[str, Any]:
        """The status page."""
        tick = self._last[0] if self._last is not None else None
        totals = self._exposition.totals()
        return status_document(self._governed, tick, totals, self.health(), self._clock.wall_s())

    def order(self, command: Command) -> bool:
        """Queue an operator's order; False when too many wait already."""
        try:
            self._orders.put_nowait(command)
        except queue.Full:
            return False
        self._exposition.ordered(command.kind.value, "accepted")
        return True

    def answered(self, code: int) -> None:
        """Count an HTTP answer."""
        self._exposition.answered(code)

    def refused(self, kind: str) -> None:
        """Count an order that was not passed on."""
        self._exposition.ordered(kind, "refused")
