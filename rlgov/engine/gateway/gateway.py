"""The gateway: an OpenAI-compatible streaming reverse proxy that stamps, holds and moves requests.

It speaks plain HTTP/1.1 on both sides; for TLS, put a terminator in front. It runs on any asyncio loop and is
meant for uvloop's, which halves its cost.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import uuid
from typing import TYPE_CHECKING, Final

from rlgov.engine.gateway.admission import Admission
from rlgov.engine.gateway.connection import ClientConnection
from rlgov.engine.gateway.exchange import Exchange
from rlgov.engine.gateway.ledger import Ledger
from rlgov.engine.gateway.metrics import CONTENT_TYPE, GatewayMetrics, fetch_page
from rlgov.engine.gateway.paths import (
    HEALTH_PATH,
    METRICS_PATH,
    Kind,
    decoded_path,
    kind_of,
    leads_to_control,
    origin_form,
)
from rlgov.engine.gateway.server import Server
from rlgov.engine.gateway.settings import GatewaySettings
from rlgov.engine.gateway.upstream import Pool, Upstream
from rlgov.engine.gateway.wire import error_body, header, usable_request_id
from rlgov.engine.samples import Outcome
from rlgov.errors import EngineError

if TYPE_CHECKING:
    from prometheus_client.registry import Collector

    from rlgov.clock import Clock
    from rlgov.engine.gateway.server import Serving
    from rlgov.engine.gateway.wire import Request
    from rlgov.engine.samples import Traffic

__all__ = ["Gateway", "GatewaySettings", "Upstream"]

_SWEEP_S: Final = 0.25
_BACKLOG: Final = 2048
_NO_PATH: Final = (400, "the request target is not a path")
_NO_ENGINE: Final = (503, "no engine takes requests at present")
_ONLY_GET: Final = (405, "ask with GET")
_LOG: Final = logging.getLogger(__name__)


class Gateway:
    """Takes requests of clients to the engine that is routed.

    Args:
        settings: Bounds and timeouts.
        clock: Stamps the requests, and times everything out.
    """

    def __init__(self, settings: GatewaySettings, clock: Clock) -> None:
        self.settings = settings
        self.now_s = clock.monotonic_s
        self.pool = Pool(settings, clock)
        self.port = settings.port
        self._admission: Admission[Exchange] = Admission(
            settings.max_held, settings.max_waiting, settings.hold_timeout_s
        )
        self._ledger = Ledger(settings.records)
        self._metrics = GatewayMetrics(self._present)
        self._server = Server(settings, clock, self._serve)
        self._listener: asyncio.Server | None = None
        self._upstream: Upstream | None = None
        self._in_flight: dict[str, int] = {}
        self._sweeper: asyncio.TimerHandle | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._pumping = False
        self._closing = False

    async def start(self) -> None:
        """Listen. Raises EngineError when the address cannot be had."""
        loop = asyncio.get_running_loop()
        host, port = self.settings.host, self.settings.port
        try:
            self._listener = await loop.create_server(
                lambda: ClientConnection(self._server), host, port, backlog=_BACKLOG
            )
        except OSError as error:
            msg = f"the gateway cannot listen at {host}:{port}: {error}; choose another host or port"
            raise EngineError(msg) from error
        self.port = int(self._listener.sockets[0].getsockname()[1])
        self._sweep()

    async def close(self, grace_s: float = 0) -> None:
        """Take no more requests, let what is under way finish for ``grace_s``, then close everything."""
        if self._listener is not None:
            self._listener.close()
        self._server.drain()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._server.empty.wait(), grace_s)
        if self._sweeper is not None:
            self._sweeper.cancel()
        self._closing = True
        for ticket in self._admission.waiting():
            ticket.owner.give_up("the gateway is stopping")
        await asyncio.sleep(0)  # their answers leave in the loop's next round
        self._server.abort()
        for task in list(self._tasks):
            task.cancel()
        self.pool.close()
        # Aborted transports report back in the loop's next rounds.
        await self._server.empty.wait()
        await self.pool.empty.wait()
        if self._tasks:
            await asyncio.wait(self._tasks)
        self._listener = None

    def route(self, upstream: Upstream | None) -> None:
        """Send new requests, and those held, to this engine; None: hold them."""
        self._upstream = upstream
        self._admission.set_route(self.now_s(), routed=upstream is not None)
        self.pool.retire(upstream)
        self._pump()

    def set_limit(self, concurrency: int | None) -> None:
        """Have at most so many generations at engines at once; None: as many as come."""
        self._admission.set_limit(concurrency)
        self._pump()

    def in_flight(self, engine_id: str) -> int:
        """Requests sent to this engine and not finished."""
        return self._in_flight.get(engine_id, 0)

    @property
    def held(self) -> int:
        """Requests that wait, for an engine or for a slot under the limit."""
        return self._admission.held

    def traffic(self, after: int) -> Traffic:
        """Open requests, and those closed after the cursor ``after`` of an earlier reading."""
        return self._ledger.traffic(after, self.now_s())

    def add_metrics(self, collector: Collector) -> None:
        """Put a collector of prometheus_client on the metrics page."""
        self._metrics.add(collector)

    # What exchanges call.

    def offer(self, exchange: Exchange) -> bool:
        """Queue a new exchange; False when too many wait."""
        if exchange.stamped:
            self._ledger.enter(exchange.entry)
        if not self._admission.offer(exchange.ticket, self.now_s()):
            return False
        self._pump()
        return True

    def park(self, exchange: Exchange, pause_s: float, *, fresh: bool) -> None:
        """Dispatch an exchange again later: after the pause, or as soon as the route changes."""
        now_s = self.now_s()
        self._admission.park(exchange.ticket, now_s, now_s + pause_s, fresh=fresh)
        asyncio.get_running_loop().call_later(pause_s, self._wake)
        self._pump()

    def count(self, engine_id: str, by: int) -> None:
        """Requests in flight to an engine become more or less."""
        count = self._in_flight.get(engine_id, 0) + by
        if count:
            self._in_flight[engine_id] = count
        else:
            self._in_flight.pop(engine_id, None)

    def ended(self, exchange: Exchange, outcome: Outcome) -> None:
        """An exchange has ended."""
        self._admission.release(exchange.ticket)
        if self._closing and outcome is Outcome.CANCELLED:
            outcome = Outcome.FAILED  # we left, not the client
        if exchange.stamped:
            record = self._ledger.close(exchange.entry, outcome, self.now_s())
            self._metrics.observe(record)
            if exchange.why:
                _LOG.info("request %s %s: %s", record.request_id, outcome.value, exchange.why)
        self._pump()

    # Inside.

    def _serve(self, client: ClientConnection, request: Request) -> Serving | None:
        request.request_id = usable_request_id(header(request.headers, b"x-request-id")) or uuid.uuid4().hex
        path = decoded_path(request.target)
        if path == METRICS_PATH:
            return self._serve_metrics(client, request)
        if path == HEALTH_PATH:
            self._serve_health(client, request)
            return None
        refusal = _NO_PATH if path is None else self._objection(request.method, path)
        if path is None or refusal is not None:
            self._refuse(client, request, *(refusal or _NO_PATH))
            return None
        request.target = origin_form(request.target)
        exchange = Exchange(self, client, request, kind_of(request.method, path))
        exchange.start()
        return exchange

    def _objection(self, method: bytes, path: bytes) -> tuple[int, str] | None:
        """Why a request does not go to the engine; None when it does."""
        if leads_to_control(path):
            return 403, "this path steers the engine; it is not reachable through the gateway"
        if self._upstream is None and kind_of(method, path) is Kind.PROBE:
            return _NO_ENGINE
        return None

    def _serve_health(self, client: ClientConnection, request: Request) -> None:
        if request.method not in {b"GET", b"HEAD"}:
            self._refuse(client, request, *_ONLY_GET)
        elif self._upstream is None:
            self._refuse(client, request, *_NO_ENGINE)
        else:
            client.respond(200, b'{"status": "ok"}', request_id=request.request_id)

    def _serve_metrics(self, client: ClientConnection, request: Request) -> Serving | None:
        if request.method not in {b"GET", b"HEAD"}:
            self._refuse(client, request, *_ONLY_GET)
            return None
        task = asyncio.get_running_loop().create_task(self._send_metrics(client, request))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return _Errand(task)

    async def _send_metrics(self, client: ClientConnection, request: Request) -> None:
        upstream = self._upstream
        page = None
        if upstream is not None:
            page = await fetch_page(self.pool, upstream, self.settings.metrics_timeout_s)
        client.respond(
            200, self._metrics.page(page), request_id=request.request_id, content_type=CONTENT_TYPE
        )

    def _refuse(self, client: ClientConnection, request: Request, status: int, message: str) -> None:
        headers: tuple[tuple[bytes, bytes], ...] = ()
        if status == 503:  # noqa: PLR2004  # the one status that says: later
            headers = ((b"Retry-After", b"%d" % self.settings.retry_after_s),)
        client.respond(status, error_body(status, message), request_id=request.request_id, headers=headers)

    def _pump(self) -> None:
        """Send everybody who may go. What that sets off may call this again, which has nothing to add."""
        if self._pumping:
            return
        self._pumping = True
        try:
            while self._upstream is not None and (ticket := self._admission.take()) is not None:
                ticket.owner.dispatch(self._upstream)
        finally:
            self._pumping = False

    def _wake(self) -> None:
        self._admission.wake(self.now_s())
        self._pump()

    def _sweep(self) -> None:
        """Look after everything that may have run out of time."""
        now_s = self.now_s()
        self._admission.wake(now_s)
        for ticket in self._admission.expired(now_s):
            ticket.owner.give_up(f"no engine took the request within {self.settings.hold_timeout_s:g} s")
        self._server.sweep()
        self.pool.sweep()
        self._pump()
        self._sweeper = asyncio.get_running_loop().call_later(_SWEEP_S, self._sweep)

    def _present(self) -> dict[str, float]:
        server = self._server
        return {
            "held_requests": self.held,
            "in_flight_requests": sum(self._in_flight.values()),
            "connections": len(server.connections),
            "buffered_bytes": server.budget.used_bytes,
            "routed": float(self._upstream is not None),
            "received_bytes": server.received_bytes,
            "sent_bytes": server.sent_bytes,
            "refused_messages": sum(server.refused.values()),
        }


class _Errand:
    """A task that answers a request."""

    def __init__(self, task: asyncio.Task[None]) -> None:
        self._task = task

    def on_client_gone(self) -> None:
        """Stop."""
        self._task.cancel()

    def on_client_slow(self) -> None:
        """The answer is short: let it wait in memory."""

    def on_client_ready(self) -> None:
        """As above."""
