"""HTTP of the governor's surface: its own thread, a handful of paths, and strict limits.

Paths are compared byte by byte with the few that exist, so there is nothing to normalise. A connection
answers one request and lives ten seconds at most, however slowly it speaks or listens; the number of
connections is bounded for each listener, so a crowd on one of them leaves the others alone.
"""

from __future__ import annotations

import asyncio
import hmac
import logging
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Literal, Protocol, TypeVar

from aiohttp import web
from pydantic import BaseModel, ConfigDict, ValidationError

from rlgov.config import explain
from rlgov.engine.control.unix_socket import bind_unix
from rlgov.errors import ConfigError, RlgovError
from rlgov.governor.listen import TcpAddress, UnixAddress
from rlgov.governor.records import Command, CommandKind, Mode

if TYPE_CHECKING:
    import socket
    from collections.abc import Awaitable, Callable

    from rlgov.governor.health import Health
    from rlgov.governor.listen import Address

LOG: Final = logging.getLogger(__name__)
LARGEST_BODY_BYTES: Final = 16 * 1024
LARGEST_HEAD_LINE_BYTES: Final = 4096
MOST_CONNECTIONS: Final = 32
CONNECTION_LIFE_S: Final = 10.0
LINGER_S: Final = 2.0
"""How long the rest of a refused body is read, so that its sender gets to see the answer."""
START_TIMEOUT_S: Final = 10.0
_SETTLE_S: Final = 0.02
_UNAVAILABLE: Final = 503


class Told(Protocol):
    """What the server speaks for. Called from the server's thread; must not block."""

    def health(self) -> Health:
        """Of the loop."""
        ...

    def metrics(self) -> bytes:
        """The metrics page."""
        ...

    def status(self) -> dict[str, Any]:
        """The status page."""
        ...

    def order(self, command: Command) -> bool:
        """Pass an operator's order on; False when too many wait already."""
        ...

    def answered(self, code: int) -> None:
        """Count an answer."""
        ...

    def refused(self, kind: str) -> None:
        """Count an order that was not passed on."""
        ...


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class _ModeOrder(_Strict):
    mode: Literal["observe", "shadow", "active"]


class _RearmOrder(_Strict):
    pass


_QUIET: Final = logging.getLogger(f"{__name__}.clients")
_QUIET.setLevel(logging.CRITICAL)  # what a client sends that is no HTTP is its own affair, not the log's

OrderT = TypeVar("OrderT", _ModeOrder, _RearmOrder)


@dataclass(frozen=True, slots=True)
class _Access:
    """Who may give orders over a listener."""

    over_tcp: bool
    token: str | None

    def refusal(self, request: web.Request) -> tuple[int, str] | None:
        """Why an order is refused, None if it is not."""
        if not self.over_tcp:
            return None
        if self.token is None:
            return 403, "orders over TCP need a token; start with --token-file, or use the Unix socket"
        given = request.headers.get("Authorization", "").encode("utf-8", errors="surrogateescape")
        if not hmac.compare_digest(given, b"Bearer " + self.token.encode()):
            return 401, "orders over TCP need the header 'Authorization: Bearer TOKEN' with the right token"
        return None


class SurfaceServer:
    """Serves one surface on several listeners, from a thread of its own.

    Args:
        told: What is spoken for.
        addresses: Where to listen.
        token: What orders over TCP have to show; without one they are refused.
    """

    def __init__(self, told: Told, addresses: tuple[Address, ...], token: str | None) -> None:
        self._told = told
        self._asked = addresses
        self._token = token
        self._bound: list[Address] = []
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stop: asyncio.Event | None = None
        self._failure: Exception | None = None
        self._started = threading.Event()
        self._thread = threading.Thread(target=self._run, name="rlgov-surface", daemon=True)

    @property
    def addresses(self) -> tuple[Address, ...]:
        """Where it listens, with the ports that were taken."""
        return tuple(self._bound)

    def start(self) -> None:
        """Listen.

        Raises:
            ConfigError: A place cannot be listened at.
        """
        if not self._asked:
            return
        self._thread.start()
        self._started.wait(START_TIMEOUT_S)
        if self._failure is not None:
            self._thread.join()
            raise self._failure

    def close(self) -> None:
        """Stop listening; safe to call twice."""
        loop, stop = self._loop, self._stop
        if loop is not None and stop is not None and self._thread.is_alive():
            loop.call_soon_threadsafe(stop.set)
            self._thread.join()

    def _run(self) -> None:
        try:
            asyncio.run(self._serve())
        except RlgovError as error:
            self._failure = error
        except OSError as error:
            self._failure = ConfigError(f"cannot listen ({error}); give another place with --listen")
        finally:
            self._started.set()

    async def _serve(self) -> None:
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        runners: list[web.AppRunner] = []
        servers: list[asyncio.Server] = []
        listening: list[_Limited] = []
        try:
            for address in self._asked:
                runner = self._runner(_Access(isinstance(address, TcpAddress), self._token))
                await runner.setup()
                runners.append(runner)
                listening.append(_Limited(runner))
                servers.append(await self._listen(address, listening[-1]))
            self._started.set()
            await self._stop.wait()
        finally:
            # First nobody new; then those accepted just before get their protocol and are hung up on. Closing
            # a server at once would leak a connection that asyncio has accepted and not yet wrapped.
            for server in servers:
                for listener in server.sockets:
                    self._loop.remove_reader(listener.fileno())
            await asyncio.sleep(_SETTLE_S)
            for limited in listening:
                limited.abort()
            await asyncio.sleep(_SETTLE_S)
            for server in servers:
                server.close()
            for runner in runners:
                await runner.cleanup()
            for address in self._bound:
                if isinstance(address, UnixAddress):
                    address.path.unlink(missing_ok=True)

    async def _listen(self, address: Address, factory: _Limited) -> asyncio.Server:
        loop = asyncio.get_running_loop()
        if isinstance(address, UnixAddress):
            listener = bind_unix(address.path, flag="--listen", who="governor")
            server = await loop.create_unix_server(factory, sock=listener)
            self._bound.append(address)
            return server
        try:
            server = await loop.create_server(factory, address.host, address.port)
        except OSError as error:
            raise ConfigError(
                f"{address.host}:{address.port}: cannot listen there ({error.strerror or error}); "
                "give another place with --listen"
            ) from error
        bound: socket.socket = server.sockets[0]
        self._bound.append(TcpAddress(address.host, bound.getsockname()[1]))
        return server

    def _runner(self, access: _Access) -> web.AppRunner:
        application = web.Application(client_max_size=LARGEST_BODY_BYTES)
        application.router.add_route("*", "/{anything:.*}", _Pages(self._told, access).answer)
        return web.AppRunner(
            application,
            access_log=None,
            logger=_QUIET,
            handle_signals=False,
            shutdown_timeout=0.5,
            keepalive_timeout=0.0,
            lingering_time=LINGER_S,
            max_line_size=LARGEST_HEAD_LINE_BYTES,
            max_field_size=LARGEST_HEAD_LINE_BYTES,
        )


class _Limited:
    """Makes the protocol of each new connection: bounded in number and in life."""

    def __init__(self, runner: web.AppRunner) -> None:
        if runner.server is None:
            raise ConfigError("the surface's server was not set up")
        self._server = runner.server

    def __call__(self) -> asyncio.Protocol:
        if len(self._server.connections) >= MOST_CONNECTIONS:
            return _Refused()
        handler = self._server()
        asyncio.get_running_loop().call_later(CONNECTION_LIFE_S, _abort, handler)
        return handler

    def abort(self) -> None:
        """Hang up on everybody."""
        for handler in self._server.connections:
            _abort(handler)


def _abort(handler: asyncio.Protocol) -> None:
    transport = getattr(handler, "transport", None)
    if isinstance(transport, asyncio.Transport):
        transport.abort()


class _Refused(asyncio.Protocol):
    """Hangs up at once."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Hang up."""
        transport.close()


class _Pages:
    """What each path answers."""

    def __init__(self, told: Told, access: _Access) -> None:
        self._told = told
        self._access = access
        self._reads: dict[str, Callable[[], web.Response]] = {
            "/metrics": self._metrics,
            "/healthz": self._healthz,
            "/readyz": self._readyz,
            "/status": self._status,
        }
        self._orders: dict[str, Callable[[web.Request], Awaitable[web.Response]]] = {
            "/v1/mode": self._mode,
            "/v1/rearm": self._rearm,
        }

    async def answer(self, request: web.Request) -> web.Response:
        """Answer one request; every failure is one JSON object with a sentence."""
        try:
            response = await self._answer(request)
        except web.HTTPException as error:
            response = _error(error.status, error.reason)
        except Exception:  # a page that cannot be made must not end the server
            LOG.exception("no answer to %s %s", request.method, request.path)
            response = _error(500, "the page could not be made; see the governor's log")
        self._told.answered(response.status)
        response.force_close()
        response.headers["Connection"] = "close"
        response.headers["Server"] = "rlgov"
        response.headers["Cache-Control"] = "no-store"
        response.headers["X-Content-Type-Options"] = "nosniff"
        return response

    async def _answer(self, request: web.Request) -> web.Response:
        path = request.raw_path
        if path in self._reads:
            if request.method not in {"GET", "HEAD"}:
                return _error(405, f"{path} can only be read; use GET", allow="GET, HEAD")
            return self._reads[path]()
        if path in self._orders:
            if request.method != "POST":
                return _error(405, f"{path} takes an order; use POST", allow="POST")
            response = await self._orders[path](request)
            if response.status >= 400:  # noqa: PLR2004  # client and server errors begin here
                self._told.refused(path.rpartition("/")[2])
            return response
        known = ", ".join([*self._reads, *self._orders])
        return _error(404, f"there is no such path; known are {known}")

    def _metrics(self) -> web.Response:
        # As a header: aiohttp takes the parameter `version` in no other way.
        return web.Response(
            body=self._told.metrics(),
            headers={"Content-Type": "text/plain; version=0.0.4; charset=utf-8"},
        )

    def _healthz(self) -> web.Response:
        health = self._told.health()
        body = {"alive": health.alive, "tick_age_s": health.tick_age_s, "why": list(health.why)}
        return web.json_response(body, status=200 if health.alive else _UNAVAILABLE)

    def _readyz(self) -> web.Response:
        health = self._told.health()
        body = {"ready": health.ready, "why": list(health.why)}
        return web.json_response(body, status=200 if health.ready else _UNAVAILABLE)

    def _status(self) -> web.Response:
        return web.json_response(self._told.status())

    async def _mode(self, request: web.Request) -> web.Response:
        order = await self._order(request, _ModeOrder)
        if isinstance(order, web.Response):
            return order
        return self._pass_on(Command(CommandKind.MODE, Mode(order.mode)))

    async def _rearm(self, request: web.Request) -> web.Response:
        order = await self._order(request, _RearmOrder)
        if isinstance(order, web.Response):
            return order
        return self._pass_on(Command(CommandKind.REARM))

    async def _order(self, request: web.Request, schema: type[OrderT]) -> OrderT | web.Response:
        refusal = self._access.refusal(request)
        if refusal is not None:
            return _error(*refusal)
        if request.content_type != "application/json":
            return _error(415, "an order is JSON; send it with Content-Type: application/json")
        if (request.content_length or 0) > LARGEST_BODY_BYTES:
            return _error(413, f"an order has at most {LARGEST_BODY_BYTES} bytes")
        body = await request.read()
        try:
            return schema.model_validate_json(body)
        except ValidationError as error:
            return _error(400, explain(error))

    def _pass_on(self, command: Command) -> web.Response:
        if not self._told.order(command):
            return _error(_UNAVAILABLE, "too many orders wait; see /healthz, the loop may have stopped")
        return web.json_response({"accepted": command.kind.value}, status=202)


def _error(status: int, text: str | None, *, allow: str | None = None) -> web.Response:
    headers = {"Allow": allow} if allow is not None else None
    return web.json_response({"error": text or "refused"}, status=status, headers=headers)
