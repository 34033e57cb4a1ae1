"""The control socket of a serving stack: HTTP and JSON over a Unix socket.

``GET /v1/limits``, ``GET /v1/state``, ``GET /v1/interval?after=CURSOR``,
``GET /v1/iterations?after=CURSOR&engine=ID``, ``POST /v1/configuration``.
The socket's mode (0660) is its access control. TCP is off; where it is asked for, every call needs the
token.
"""

from __future__ import annotations

import hmac
from typing import TYPE_CHECKING, Protocol

from aiohttp import web
from pydantic import ValidationError

from rlgov.config import explain
from rlgov.engine.control.schema import (
    INTERVAL,
    ITERATIONS,
    LIMITS,
    SCHEMA_HEADER,
    STATE,
    ConfigurationRequest,
    schema_digest,
)
from rlgov.engine.control.unix_socket import bind_unix
from rlgov.errors import ConfigError, RlgovError

if TYPE_CHECKING:
    from pathlib import Path

    from aiohttp.typedefs import Handler, Middleware

    from rlgov.engine.samples import EngineIterations, StackInterval, StackLimits, StackState

LARGEST_BODY_BYTES = 16 * 1024


class ControlTarget(Protocol):
    """What the control socket speaks for."""

    def limits(self) -> StackLimits:
        """What is offered."""
        ...

    def state(self) -> StackState:
        """What is in force."""
        ...

    async def interval(self, after: int) -> StackInterval:
        """One reading of everything, with the requests closed after a cursor."""
        ...

    async def iterations(self, after: int, engine_id: str) -> EngineIterations:
        """Iterations of the serving engine after a cursor, which is of ``engine_id``."""
        ...

    async def configure(self, request: ConfigurationRequest) -> StackState:
        """Ask for a cap, a TP degree or both. Raises ConfigError for what is not offered."""
        ...


class ControlServer:
    """Serves one target on a Unix socket, and on TCP where asked to.

    Args:
        target: What is spoken for.
        path: Of the socket; a leftover of an earlier run is replaced.
        token: Needed on TCP by every call.
    """

    def __init__(self, target: ControlTarget, path: Path, *, token: str | None = None) -> None:
        self._target = target
        self._path = path
        self._token = token
        self._runners: list[web.AppRunner] = []

    async def start(self, *, tcp_host: str | None = None, tcp_port: int = 0) -> int | None:
        """Listen.

        Args:
            tcp_host: Listen on TCP, too; needs a token.
            tcp_port: 0 takes any free port.

        Returns:
            The TCP port, None without TCP.

        Raises:
            ConfigError: The socket cannot be made, or TCP was asked for without a token.
        """
        if tcp_host is not None and not self._token:
            raise ConfigError("control over TCP needs a token; set one, or use the Unix socket alone")
        runner = await self._runner(token=None)
        await web.SockSite(runner, bind_unix(self._path, flag="--control", who="stack")).start()
        if tcp_host is None:
            return None
        runner = await self._runner(token=self._token)
        await web.TCPSite(runner, tcp_host, tcp_port).start()
        port: int = runner.addresses[0][1]
        return port

    async def close(self) -> None:
        """Stop listening and remove the socket; safe to call twice."""
        for runner in self._runners:
            await runner.cleanup()
        if self._runners:
            self._path.unlink(missing_ok=True)
        self._runners = []

    async def _runner(self, *, token: str | None) -> web.AppRunner:
        application = web.Application(
            client_max_size=LARGEST_BODY_BYTES, middlewares=[_authorised(token), _reported]
        )
        application.router.add_get("/v1/limits", self._limits)
        application.router.add_get("/v1/state", self._state)
        application.router.add_get("/v1/interval", self._interval)
        application.router.add_get("/v1/iterations", self._iterations)
        application.router.add_post("/v1/configuration", self._configuration)
        runner = web.AppRunner(application, access_log=None, shutdown_timeout=1.0)
        await runner.setup()
        self._runners.append(runner)
        return runner

    async def _limits(self, _: web.Request) -> web.Response:
        return _json(LIMITS.dump_json(self._target.limits()))

    async def _state(self, _: web.Request) -> web.Response:
        return _json(STATE.dump_json(self._target.state()))

    async def _interval(self, request: web.Request) -> web.Response:
        return _json(INTERVAL.dump_json(await self._target.interval(_cursor(request, "interval"))))

    async def _iterations(self, request: web.Request) -> web.Response:
        after = _cursor(request, "iterations", "engine")
        found = await self._target.iterations(after, request.query.get("engine", ""))
        return _json(ITERATIONS.dump_json(found))

    async def _configuration(self, request: web.Request) -> web.Response:
        try:
            asked = ConfigurationRequest.model_validate_json(await request.read())
        except ValidationError as error:
            raise ConfigError(f"configuration: {explain(error)}") from error
        return _json(STATE.dump_json(await self._target.configure(asked)))


def _cursor(request: web.Request, call: str, *others: str) -> int:
    given = request.query.get("after", "0")
    known = set(request.query) <= {"after", *others}
    if not known or not (given.isascii() and given.isdigit() and len(given) < 20):  # noqa: PLR2004  # more digits than a cursor ever has
        raise ConfigError(f"{call} takes one number, after: the cursor of the last answer, 0 at first")
    return int(given)


def _authorised(token: str | None) -> Middleware:
    @web.middleware
    async def check(request: web.Request, handler: Handler) -> web.StreamResponse:
        given = request.headers.get("Authorization", "")
        if token is not None and not hmac.compare_digest(given.encode(), f"Bearer {token}".encode()):
            return _error("control over TCP needs the header 'Authorization: Bearer TOKEN'", 401)
        return await handler(request)

    return check


@web.middleware
async def _reported(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Every failure is one JSON object with a sentence, and never ends the server."""
    try:
        return await handler(request)
    except web.HTTPException as error:
        return _error(f"{request.method} {request.path}: {error.reason}", error.status)
    except ConfigError as error:
        return _error(str(error), 400)
    except RlgovError as error:
        return _error(str(error), 503)


def _json(body: bytes) -> web.Response:
    return web.Response(body=body, content_type="application/json", headers={SCHEMA_HEADER: schema_digest()})


def _error(text: str, status: int) -> web.Response:
    return web.json_response({"error": text}, status=status, headers={SCHEMA_HEADER: schema_digest()})
