"""The plugin's HTTP interface on vLLM's own API server: ``/rlgov/v1/...``, each call with the token.

:class:`Api` decides and answers in plain values, without a web framework; :class:`Endpoint` puts it into
vLLM's application. The paths lie outside those that vLLM's ``--api-key`` guards, hence a token of their own.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import rlgov
from rlgov.engine.plugin.selftest import installed_version

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping

    Handler = Callable[[Mapping[str, str], bytes], Awaitable[dict[str, Any]]]

PREFIX = "/rlgov/v1"
CURSOR_DIGITS = 15
BODY_LIMIT = 4096  # bytes; the largest sensible body has a few dozen
CALL_TIMEOUT_S = 10.0  # an iteration of the engine may take seconds, and the answer comes after it
SLEEP_TIMEOUT_S = 300.0  # weights are copied to the host and back

logger = logging.getLogger("vllm.rlgov")


class Engine(Protocol):
    """The engine as the API server reaches it."""

    async def call(self, method: str, *args: object) -> Any:
        """Call a method of :mod:`rlgov.engine.plugin.rpc` in the engine's process."""
        ...

    async def sleep(self, level: int) -> None:
        """Free GPU memory."""
        ...

    async def wake(self) -> None:
        """Take the memory back."""
        ...


@dataclass(frozen=True, slots=True)
class Facts:
    """What the API server knows and the engine does not."""

    sleep_supported: bool
    checks: dict[str, bool]


class Refusal(Exception):  # noqa: N818  # an answer, not a failure
    """Another answer than 200."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status = status
        self.reason = reason


class Api:
    """Answers to the calls of a governor.

    Args:
        token: What a caller must show; with an empty one every call is refused.
        engine: The engine.
        facts: What the API server knows.
    """

    def __init__(self, token: str, engine: Engine, facts: Facts) -> None:
        self._token = token
        self._engine = engine
        self._facts = facts
        self._routes: dict[tuple[str, str], Handler] = {
            ("GET", "/state"): self._state,
            ("GET", "/iterations"): self._iterations,
            ("GET", "/cost"): self._cost,
            ("POST", "/cap"): self._cap,
            ("POST", "/sleep"): self._sleep,
            ("POST", "/wake"): self._wake,
        }

    async def answer(
        self, method: str, path: str, query: Mapping[str, str], authorization: str, body: bytes
    ) -> tuple[int, dict[str, Any]]:
        """Status and JSON object for one call.

        Args:
            method: Of HTTP.
            path: Below PREFIX.
            query: Parameters of the URL.
            authorization: The header; empty without one.
            body: At most one byte more than BODY_LIMIT.
        """
        try:
            self._admit(authorization)
            return 200, await self._handler(method, path, body)(query, body)
        except Refusal as refusal:
            return refusal.status, {"error": refusal.reason}

    def _handler(self, method: str, path: str, body: bytes) -> Handler:
        handler = self._routes.get((method, path))
        if handler is None:
            raise Refusal(404, f"there is no {method} {PREFIX}{path}")
        if len(body) > BODY_LIMIT:
            raise Refusal(413, f"the body is larger than {BODY_LIMIT} bytes")
        return handler

    def _admit(self, authorization: str) -> None:
        if not self._token:
            raise Refusal(401, "vLLM was started without RLGOV_PLUGIN_TOKEN, so nobody may govern it")
        shown = authorization.encode("utf-8", "surrogateescape")
        if not hmac.compare_digest(shown, f"Bearer {self._token}".encode()):
            raise Refusal(401, "the header 'Authorization: Bearer TOKEN' is missing, or holds another token")

    async def _state(self, query: Mapping[str, str], body: bytes) -> dict[str, Any]:
        _no_query(query)
        _fields(body, {})
        state = await self._call("rlgov_state")
        return {
            "sample": state["sample"],
            "plugin": {
                "vllm_version": state["vllm_version"],
                "rlgov_version": rlgov.__version__,
                "cap_supported": state["cap_supported"],
                "note": state["note"],
                "checks": {**self._facts.checks, **state["checks"]},
                "asleep": state["asleep"],
                "sleep_supported": self._facts.sleep_supported,
            },
        }

    async def _iterations(self, query: Mapping[str, str], body: bytes) -> dict[str, Any]:
        _no_query({name: value for name, value in query.items() if name != "after"})
        _fields(body, {})
        text = query.get("after", "0")
        if not (text.isascii() and text.isdigit() and len(text) <= CURSOR_DIGITS):
            raise Refusal(
                400, f"after is {text[:40]!r}, but a cursor is a whole number, 0 or a cursor answered before"
            )
        return _or_conflict(await self._call("rlgov_iterations", int(text)))

    async def _cost(self, query: Mapping[str, str], body: bytes) -> dict[str, Any]:
        _no_query(query)
        _fields(body, {})
        return _or_conflict(await self._call("rlgov_cost"))

    async def _cap(self, query: Mapping[str, str], body: bytes) -> dict[str, Any]:
        _no_query(query)
        fields = _fields(body, {"batch_cap": _REQUIRED, "lease_s": _REQUIRED})
        batch_cap, lease_s = fields["batch_cap"], fields["lease_s"]
        if batch_cap is not None and (type(batch_cap) is not int or not 1 <= batch_cap < 2**31):
            raise Refusal(400, "batch_cap must be a whole number from 1 on, or null for the maximum")
        if lease_s is not None and (
            type(lease_s) not in {int, float} or not math.isfinite(lease_s) or lease_s <= 0
        ):
            raise Refusal(400, "lease_s must be a positive number of seconds, or null for no lease")
        return _or_conflict(await self._call("rlgov_cap", batch_cap, lease_s))

    async def _sleep(self, query: Mapping[str, str], body: bytes) -> dict[str, Any]:
        _no_query(query)
        level = _fields(body, {"level": 1})["level"]
        if type(level) is not int or level != 1:
            raise Refusal(400, "level must be 1: weights to the host, KV cache dropped")
        self._need_sleep()
        state = await self._call("rlgov_state")
        sample = state["sample"]
        if sample is None:
            raise Refusal(
                409, f"the engine cannot be read, so nobody knows whether it is idle: {state['note']}"
            )
        if sample["running"] or sample["waiting"]:
            raise Refusal(
                409,
                f"{sample['running']} requests are running and {sample['waiting']} are waiting here; "
                "send new ones elsewhere and wait until these are done",
            )
        await self._within(SLEEP_TIMEOUT_S, self._engine.sleep(level), "sleep")
        return {"asleep": (await self._call("rlgov_state"))["asleep"]}

    async def _wake(self, query: Mapping[str, str], body: bytes) -> dict[str, Any]:
        _no_query(query)
        _fields(body, {})
        self._need_sleep()
        await self._within(SLEEP_TIMEOUT_S, self._engine.wake(), "wake")
        return {"asleep": (await self._call("rlgov_state"))["asleep"]}

    def _need_sleep(self) -> None:
        if not self._facts.sleep_supported:
            # vLLM itself answers 200 on a platform where sleeping does nothing.
            raise Refusal(409, "this engine cannot sleep; start vLLM with --enable-sleep-mode (needs a GPU)")

    async def _call(self, method: str, *args: object) -> Any:
        return await self._within(CALL_TIMEOUT_S, self._engine.call(method, *args), method)

    async def _within(self, timeout_s: float, call: Awaitable[Any], what: str) -> Any:
        # Shielded: vLLM is to find somebody waiting when the answer comes late.
        running = asyncio.ensure_future(call)
        try:
            return await asyncio.wait_for(asyncio.shield(running), timeout_s)
        except TimeoutError:
            running.add_done_callback(_retrieve)
            raise Refusal(
                504, f"the engine did not answer {what} within {timeout_s:g} s; it hangs or is busy"
            ) from None
        except Exception as error:
            raise Refusal(503, f"the engine failed at {what}: {error}") from error


_REQUIRED = object()


def _fields(body: bytes, known: dict[str, object]) -> dict[str, Any]:
    """The fields of a JSON object, an empty one for no body; ``known`` names them with their defaults."""
    try:
        found = json.loads(body) if body else {}
    except (ValueError, RecursionError):
        raise Refusal(400, "the body is not JSON") from None
    if not isinstance(found, dict):
        raise Refusal(400, "the body is not a JSON object")
    unknown = sorted(set(found) - set(known))
    if unknown:
        raise Refusal(400, f"unknown field {unknown[0][:40]!r}; known: {', '.join(known) or 'none'}")
    missing = [name for name, default in known.items() if default is _REQUIRED and name not in found]
    if missing:
        raise Refusal(400, f"the field {missing[0]!r} is missing")
    return {**known, **found}


def _no_query(query: Mapping[str, str]) -> None:
    if query:
        raise Refusal(400, f"unknown parameter {next(iter(query))[:40]!r}")


def _or_conflict(result: dict[str, Any]) -> dict[str, Any]:
    if "error" in result:
        raise Refusal(409, str(result["error"]))
    return result


def _retrieve(done: asyncio.Future[Any]) -> None:
    """Look at a late result, so that asyncio does not complain of one nobody looked at."""
    if not done.cancelled():
        done.exception()


class Endpoint:
    """vLLM's endpoint plugin: puts :class:`Api` into its application.

    Args:
        token: What a caller must show.
    """

    name = "rlgov"
    required_tasks = ("generate",)

    def __init__(self, token: str) -> None:
        self._token = token
        self._api: Api | None = None
        self._runtime_config = False

    def attach_router(self, app: Any) -> None:
        """Add the routes. Called by vLLM before the engine is there."""
        paths = {getattr(route, "path", "") for route in app.routes}
        self._runtime_config = "/v1/runtime_config" in paths
        app.router.add_route(PREFIX + "/{call:path}", self._handle, methods=["GET", "POST"])

    async def init_state(self, engine_client: Any, state: object, args: object) -> None:  # noqa: ARG002  # vLLM's protocol
        """Take the engine. Called by vLLM once it is there."""
        if engine_client is None:
            return
        model = engine_client.vllm_config.model_config
        core = getattr(engine_client, "engine_core", None)
        facts = Facts(
            sleep_supported=bool(getattr(model, "enable_sleep_mode", False)),
            checks={
                "runtime_config_route": self._runtime_config,
                "utility_calls": hasattr(core, "call_utility_async"),
            },
        )
        self._api = Api(self._token, _VllmEngine(engine_client), facts)
        logger.info("rlgov: answering at %s for vLLM %s", PREFIX, installed_version())

    async def _handle(self, request: Any) -> Any:
        from starlette.responses import JSONResponse

        if self._api is None:
            return JSONResponse({"error": "there is no engine behind this server"}, status_code=503)
        body = bytearray()
        async for chunk in request.stream():
            body += chunk
            if len(body) > BODY_LIMIT:
                break
        status, content = await self._api.answer(
            request.method,
            "/" + request.path_params["call"],
            dict(request.query_params),
            request.headers.get("authorization", ""),
            bytes(body),
        )
        headers = {"WWW-Authenticate": "Bearer"} if status == 401 else None  # noqa: PLR2004  # Unauthorized
        return JSONResponse(content, status_code=status, headers=headers)


class _VllmEngine:
    """vLLM's engine client."""

    def __init__(self, client: Any) -> None:
        self._client = client

    async def call(self, method: str, *args: object) -> Any:
        return await self._client.engine_core.call_utility_async(method, *args)

    async def sleep(self, level: int) -> None:
        # "wait": whatever slipped in since the check is served, not aborted.
        await self._client.sleep(level, "wait")

    async def wake(self) -> None:
        await self._client.wake_up()
