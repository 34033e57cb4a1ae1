"""What rlgov asks of one engine over HTTP: is it alive, a completion, its counters, its cap, sleep and wake.

Every call opens a connection of its own: a few a second on the loopback cost little, there is nothing to
close, and no kept connection that may have died with an earlier engine. Every call has a time limit, no
redirect is followed, and an answer beyond a limit is not read.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field, fields, replace
from http import HTTPStatus
from typing import TYPE_CHECKING, Any

import aiohttp
from pydantic import TypeAdapter, ValidationError

from rlgov.engine.samples import EngineIterations, EngineSample
from rlgov.engine.telemetry.page import sample_from_page
from rlgov.errors import EngineError, TelemetryError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from rlgov.clock import Clock

MAX_ANSWER_BYTES = 8 * 2**20
CALL_S = 5.0  # for calls that take no work of the engine
PROBE_PROMPT = (1, 2, 3)  # token ids, which every model has
FINISHED = frozenset({"length", "stop"})
CAP_FIELD = "max_num_running_seqs"  # of the proposed runtime configuration; in no release so far


@dataclass(frozen=True, slots=True)
class PluginInfo:
    """What the plugin inside an engine says about itself."""

    vllm_version: str | None
    rlgov_version: str | None
    cap_supported: bool
    note: str = ""  # why it stepped aside
    checks: dict[str, bool] = field(default_factory=dict)
    asleep: bool = False
    sleep_supported: bool = False


@dataclass(frozen=True, slots=True)
class PluginState:
    """The answer of the plugin's state call."""

    sample: EngineSample | None  # None where the plugin cannot read this version of vLLM
    plugin: PluginInfo


_STATE = TypeAdapter(PluginState)
_ITERATIONS = TypeAdapter(EngineIterations)


class NoSuchCallError(EngineError):
    """The engine does not know the call: the plugin, or a version of vLLM, is missing."""


class RefusedError(EngineError):
    """The engine knows the call and cannot do it; the message gives its reason."""


class UnreachableError(EngineError):
    """No connection, or no answer in time."""


class EngineClient:
    """Calls to one engine.

    Args:
        host: Where it listens.
        port: Where it listens.
        token: For the plugin's calls.
        api_key: For vLLM's own API, if it asks for one.
        engine_id: Named in every error, and given to samples of the metrics page.
        clock: Stamps the samples of the metrics page.
    """

    def __init__(
        self, *, host: str, port: int, token: str, api_key: str | None, engine_id: str, clock: Clock
    ) -> None:
        self.url = f"http://{f'[{host}]' if ':' in host else host}:{port}"
        self._token = {"Authorization": f"Bearer {token}"}
        self._api_key = {} if api_key is None else {"Authorization": f"Bearer {api_key}"}
        self._engine_id = engine_id
        self._clock = clock

    async def healthy(self, timeout_s: float = CALL_S) -> bool:
        """Whether ``/health`` says 200. It does also of an engine that hangs: see :meth:`complete`."""
        try:
            status, _ = await self._call("GET", "/health", timeout_s=timeout_s)
        except UnreachableError:
            return False
        return status == HTTPStatus.OK

    async def complete(self, output_tokens: int, timeout_s: float) -> None:
        """Have a few tokens generated, and see that they all came.

        Raises:
            EngineError: No answer in time, an error, or a completion without its tokens: vLLM answers 200
                also to what it aborts.
        """
        body = {
            "prompt": list(PROBE_PROMPT),
            "max_tokens": output_tokens,
            "temperature": 0,
            "ignore_eos": True,
        }
        status, raw = await self._call(
            "POST", "/v1/completions", timeout_s=timeout_s, headers=self._api_key, body=body
        )
        if status == HTTPStatus.UNAUTHORIZED:
            raise EngineError(
                f"{self._name} refuses rlgov's own probe (401): give its key as --api-key among vLLM's "
                "arguments or as VLLM_API_KEY"
            )
        answer = self._json("POST /v1/completions", status, raw)
        try:
            reasons = {choice["finish_reason"] for choice in answer["choices"]}
            tokens = answer["usage"]["completion_tokens"]
        except (KeyError, TypeError):
            raise EngineError(
                f"{self._name} answered a completion without choices or usage: {answer}"
            ) from None
        if not reasons or not reasons <= FINISHED or tokens != output_tokens:
            raise EngineError(
                f"{self._name} answered a completion of {output_tokens} tokens with {tokens} and finish "
                f"reason {sorted(map(str, reasons))}: it drops requests, as vLLM does while it shuts down"
            )

    async def plugin_state(self, timeout_s: float = CALL_S) -> PluginState:
        """Counters and capabilities from the plugin.

        Raises:
            NoSuchCallError: The plugin is not loaded.
            EngineError: No answer, another engine's, or one that is not understood.
        """
        status, raw = await self._call("GET", "/rlgov/v1/state", timeout_s=timeout_s, headers=self._token)
        self._json("GET /rlgov/v1/state", status, raw)
        try:
            state = _STATE.validate_json(raw, strict=True)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"]))
            raise EngineError(
                f"{self._name}: the plugin's state is not understood ({where}: {first['msg']}); install the "
                "same version of rlgov in vLLM's environment"
            ) from None
        if state.sample is None:
            return state
        numbers = [getattr(state.sample, f.name) for f in fields(state.sample)]
        if any(isinstance(value, float) and not (math.isfinite(value) and value >= 0) for value in numbers):
            raise EngineError(
                f"{self._name}: the plugin's state holds numbers that cannot be: {state.sample}"
            )
        if state.sample.engine_id != self._engine_id:
            raise EngineError(
                f"another engine ({state.sample.engine_id}) answers in the place of {self._name}; "
                "see who listens there"
            )
        return state

    async def plugin_iterations(self, after: int, timeout_s: float = CALL_S) -> EngineIterations:
        """Iterations after a cursor, from the plugin.

        Raises:
            NoSuchCallError: The plugin is not loaded.
            RefusedError: The plugin cannot count in this version of vLLM.
            EngineError: No answer, or one that is not understood.
        """
        call = f"/rlgov/v1/iterations?after={after}"
        status, raw = await self._call("GET", call, timeout_s=timeout_s, headers=self._token)
        answer = self._json("GET /rlgov/v1/iterations", status, raw)
        try:
            return _ITERATIONS.validate_json(json.dumps({"engine_id": self._engine_id} | answer))
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"]))
            raise EngineError(
                f"{self._name}: the plugin's iterations are not understood ({where}: {first['msg']}); "
                "install the same version of rlgov in vLLM's environment"
            ) from None

    async def metrics_sample(self, timeout_s: float = CALL_S) -> EngineSample:
        """Counters from the metrics page. Raises EngineError.

        An id is drawn for each launch, so it alone tells a restart: the sample has it as it is.
        """
        at_s = self._clock.monotonic_s()
        status, raw = await self._call("GET", "/metrics", timeout_s=timeout_s)
        if status != HTTPStatus.OK:
            raise EngineError(f"{self._name} answers /metrics with {status}; see its log")
        try:
            text = raw.decode("utf-8", errors="replace")
            sample = sample_from_page(text, at_s=at_s, engine_id=self._engine_id)
        except TelemetryError as error:
            raise EngineError(f"{self._name}: {error}") from error
        return replace(sample, engine_id=self._engine_id)

    async def set_plugin_cap(
        self, batch_cap: int | None, lease_s: float | None, timeout_s: float = CALL_S
    ) -> int:
        """Set the cap by the plugin; returns the one in force. Raises EngineError, RefusedError."""
        answer = await self._plugin("cap", {"batch_cap": batch_cap, "lease_s": lease_s}, timeout_s)
        return self._whole(answer, "batch_cap")

    async def has_runtime_config(self, timeout_s: float = CALL_S) -> bool:
        """Whether this vLLM can change its cap by itself."""
        try:
            status, raw = await self._call("GET", "/openapi.json", timeout_s=timeout_s)
            paths = json.loads(raw)["paths"] if status == HTTPStatus.OK else {}
            return "patch" in paths.get("/v1/runtime_config", {})
        except (UnreachableError, ValueError, KeyError, TypeError, AttributeError):
            return False

    async def set_runtime_cap(self, batch_cap: int, timeout_s: float = CALL_S) -> int:
        """Set the cap by vLLM's own call; returns the one in force. It has no lease. Raises EngineError."""
        call = "PATCH /v1/runtime_config"
        status, raw = await self._call(
            "PATCH",
            "/v1/runtime_config",
            timeout_s=timeout_s,
            headers=self._api_key,
            body={CAP_FIELD: batch_cap},
        )
        return self._whole(self._json(call, status, raw), CAP_FIELD)

    async def set_asleep(self, *, asleep: bool, timeout_s: float) -> None:
        """Put the engine to sleep or wake it up. Raises EngineError, RefusedError if unsupported."""
        answer = await self._plugin(*(("sleep", {"level": 1}) if asleep else ("wake", {})), timeout_s)
        if answer.get("asleep") is not asleep:
            raise EngineError(f"{self._name} did not {'go to sleep' if asleep else 'wake up'}: {answer}")

    async def _plugin(self, call: str, body: Mapping[str, object], timeout_s: float) -> dict[str, Any]:
        path = f"/rlgov/v1/{call}"
        status, raw = await self._call("POST", path, timeout_s=timeout_s, headers=self._token, body=body)
        return self._json(f"POST {path}", status, raw)

    async def _call(
        self,
        method: str,
        path: str,
        *,
        timeout_s: float,
        headers: Mapping[str, str] | None = None,
        body: Mapping[str, object] | None = None,
    ) -> tuple[int, bytes]:
        try:
            async with (
                aiohttp.ClientSession(
                    connector=aiohttp.TCPConnector(force_close=True, use_dns_cache=False),
                    timeout=aiohttp.ClientTimeout(total=timeout_s),
                    auto_decompress=False,
                    trust_env=False,
                ) as session,
                session.request(
                    method,
                    self.url + path,
                    json=body,
                    headers={"Accept-Encoding": "identity", **(headers or {})},
                    allow_redirects=False,
                ) as answer,
            ):
                raw = bytearray()
                async for piece in answer.content.iter_any():
                    raw += piece
                    if len(raw) > MAX_ANSWER_BYTES:
                        raise EngineError(
                            f"{self._name} answers {method} {path} with more than {MAX_ANSWER_BYTES} bytes"
                        )
                return answer.status, bytes(raw)
        except TimeoutError:
            raise UnreachableError(
                f"{self._name} did not answer {method} {path} within {timeout_s:g} s; see its log"
            ) from None
        except (aiohttp.ClientError, OSError) as error:
            raise UnreachableError(f"{self._name} cannot be reached for {method} {path}: {error}") from error

    def _json(self, call: str, status: int, raw: bytes) -> dict[str, Any]:
        """The answer's object. Raises EngineError for any status but 200 and for what is no object."""
        try:
            answer = json.loads(raw)
        except ValueError:
            answer = None
        if status == HTTPStatus.OK and isinstance(answer, dict):
            return answer
        told = answer.get("error", answer) if isinstance(answer, dict) else raw[:200].decode(errors="replace")
        message = f"{self._name} answers {call} with {status}: {told}"
        if status == HTTPStatus.NOT_FOUND:
            raise NoSuchCallError(message)
        if status == HTTPStatus.CONFLICT:
            raise RefusedError(message)
        if status == HTTPStatus.UNAUTHORIZED:
            message += "; the token is not the one this engine was started with"
        raise EngineError(message)

    def _whole(self, answer: Mapping[str, object], name: str) -> int:
        value = answer.get(name)
        if isinstance(value, int) and not isinstance(value, bool) and value >= 1:
            return value
        raise EngineError(f"{self._name} told no {name}: {dict(answer)}")

    @property
    def _name(self) -> str:
        return f"engine {self._engine_id} at {self.url}"
