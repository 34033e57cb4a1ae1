"""Sends single requests of a load run and records what came back.

While an answer streams, nobody waits for its tokens: after the first one the bytes pile up and are counted
once a second and at the end. That is what lets one core follow thousands of streams.
"""

from __future__ import annotations

import asyncio
import io
from dataclasses import dataclass
from typing import TYPE_CHECKING

import aiohttp

from rlgov.errors import DeploymentError
from rlgov.workload.load_result import FINISHED_WELL, RequestResult, Verdict
from rlgov.workload.load_stream import ERROR_CHARACTERS, StreamEnd, StreamScan

if TYPE_CHECKING:
    from types import SimpleNamespace

    from rlgov.clock import Clock
    from rlgov.config import LoadSettings
    from rlgov.workload.load_plan import PlannedRequest

OK = 200
DRAIN_S = 1.0
CONNECT_TIMEOUT_S = 60.0
KEEPALIVE_S = (
    2.0  # below the five seconds after which vLLM closes, so that no request meets a closing connection
)
LARGE_BODY_BYTES = 2**20  # from here on aiohttp wants a file-like body
PATHS = {"completions": "/v1/completions", "chat": "/v1/chat/completions"}
MODELS_TIMEOUT_S = 30.0


@dataclass(slots=True)
class _Progress:
    """Of one request, filled while it goes; times are absolute."""

    dispatched_s: float
    sent_s: float | None = None
    first_token_s: float | None = None
    status: int | None = None


class LoadClient:
    """One server, one pool of connections. Use it as an asynchronous context manager.

    Args:
        settings: The server's address, the API and the time limit of a request.
        clock: Its monotonic time stamps everything.
        api_key: Sent as a bearer token, if any.
        run_id: Beginning of every request's X-Request-Id.
    """

    def __init__(self, settings: LoadSettings, clock: Clock, api_key: str | None, run_id: str) -> None:
        self._settings = settings
        self._clock = clock
        self._run_id = run_id
        base = settings.url.rstrip("/").removesuffix("/v1")
        self._base = base
        self._url = base + PATHS[settings.api]
        # A compressed stream would be held back until its compressor has enough.
        headers = {"Content-Type": "application/json", "Accept-Encoding": "identity"}
        if api_key:
            headers["Authorization"] = f"Bearer {api_key}"
        trace = aiohttp.TraceConfig()
        trace.on_request_headers_sent.append(self._on_headers_sent)
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEPALIVE_S, ttl_dns_cache=None),
            headers=headers,
            cookie_jar=aiohttp.DummyCookieJar(),
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_TIMEOUT_S),
            trace_configs=[trace],
        )

    async def __aenter__(self) -> LoadClient:  # noqa: PYI034  # not to be subclassed
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._session.close()

    async def _on_headers_sent(
        self,
        _session: aiohttp.ClientSession,
        context: SimpleNamespace,
        _parameters: aiohttp.TraceRequestHeadersSentParams,
    ) -> None:
        seen = context.trace_request_ctx
        if isinstance(seen, _Progress):
            seen.sent_s = self._clock.monotonic_s()

    async def first_model(self) -> str:
        """The name of the first model the server lists. Raises DeploymentError when there is none."""
        url = f"{self._base}/v1/models"
        remedy = "check --url and whether the server is up, or name the model with --model"
        try:
            timeout = aiohttp.ClientTimeout(total=MODELS_TIMEOUT_S)
            async with self._session.get(url, timeout=timeout) as response:
                if response.status != OK:
                    raise DeploymentError(f"{url} answered with status {response.status}; {remedy}")
                return str((await response.json(content_type=None))["data"][0]["id"])
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            reason = str(error) or type(error).__name__
            raise DeploymentError(f"{url} cannot be read ({reason}); {remedy}") from error
        except (ValueError, LookupError, TypeError) as error:
            raise DeploymentError(f"{url} lists no model; {remedy}") from error

    async def send(
        self, request: PlannedRequest, body: bytes, start_s: float, intended_s: float
    ) -> RequestResult:
        """Send one request and follow its answer to the end. No fault of the server raises, it is recorded.

        Args:
            request: What it asks for.
            body: Its JSON.
            start_s: The start of the run; the result's times count from here.
            intended_s: When it should have been sent, after the start.
        """
        seen = _Progress(self._clock.monotonic_s())
        scan = StreamScan()
        verdict, error, end = Verdict.FAILED, "", None
        try:
            async with asyncio.timeout(self._settings.timeout_s):
                verdict, error, end = await self._exchange(request, body, seen, scan)
        except TimeoutError:
            verdict, error = Verdict.TIMEOUT, f"no end within {self._settings.timeout_s:g} s"
        except asyncio.CancelledError:
            verdict, error = Verdict.CANCELLED, "the run was interrupted"
        except aiohttp.ClientPayloadError:
            verdict, error = Verdict.TRUNCATED, "the connection was cut within the stream"
        except (aiohttp.ClientError, OSError) as problem:
            streaming = seen.status == OK
            verdict = Verdict.TRUNCATED if streaming else Verdict.FAILED
            error = _reason(problem)
        finished_s = self._clock.monotonic_s()

        def after_start(at_s: float | None) -> float | None:
            return None if at_s is None else at_s - start_s

        return RequestResult(
            index=request.index,
            intended_s=intended_s,
            verdict=verdict,
            prompt_tokens_asked=request.prompt_tokens,
            output_tokens_asked=request.output_tokens,
            dispatched_s=seen.dispatched_s - start_s,
            sent_s=after_start(seen.sent_s),
            first_token_s=after_start(seen.first_token_s),
            finished_s=finished_s - start_s,
            prompt_tokens=end.prompt_tokens if end else None,
            output_tokens=end.output_tokens if end else None,
            cached_tokens=end.cached_tokens if end else None,
            events=scan.events,
            finish_reason=end.finish_reason if end else None,
            status=seen.status,
            error=error,
        )

    async def _exchange(
        self, request: PlannedRequest, body: bytes, seen: _Progress, scan: StreamScan
    ) -> tuple[Verdict, str, StreamEnd | None]:
        data = io.BytesIO(body) if len(body) >= LARGE_BODY_BYTES else body
        headers = {"X-Request-Id": f"{self._run_id}-{request.index}"}
        async with self._session.post(
            self._url, data=data, headers=headers, trace_request_ctx=seen, allow_redirects=False
        ) as response:
            seen.status = response.status
            if response.status != OK:
                text = (await response.content.read(ERROR_CHARACTERS)).decode(errors="replace")
                return Verdict.REJECTED, f"status {response.status}: {' '.join(text.split())}", None
            await self._follow(response.content, seen, scan)
        end = scan.end()
        exact_prompt = self._settings.api == "completions"
        verdict, error = judge(request, end, exact_prompt=exact_prompt)
        return verdict, error, end

    async def _follow(self, content: aiohttp.StreamReader, seen: _Progress, scan: StreamScan) -> None:
        while not scan.head_seen:
            data = await content.readany()
            if not data:
                return
            scan.feed(data)
        if scan.first_is_token:
            seen.first_token_s = self._clock.monotonic_s()
        while not content.is_eof():
            try:
                async with asyncio.timeout(DRAIN_S):
                    await content.wait_eof()
            except TimeoutError:
                pass
            if data := content.read_nowait():
                scan.feed(data)
        if data := content.read_nowait():
            scan.feed(data)


def judge(request: PlannedRequest, end: StreamEnd, *, exact_prompt: bool) -> tuple[Verdict, str]:
    """What a stream with status 200 was worth, and why.

    Args:
        request: What was asked for.
        end: What the stream's last events said.
        exact_prompt: Whether the prompt's tokens must agree, too.
    """
    asked, got = request.output_tokens, end.output_tokens
    checks = (
        (end.error is not None, Verdict.FAILED, f"error in the stream: {end.error}"),
        (not end.done, Verdict.TRUNCATED, "the stream ended without [DONE]"),
        (end.finish_reason is None and not got, Verdict.LOST, "empty stream"),
        (end.finish_reason not in FINISHED_WELL, Verdict.LOST, f"finish reason {end.finish_reason}"),
        (got is None, Verdict.INEXACT, "no usage in the stream"),
        (got != asked, Verdict.INEXACT, "another number of output tokens than asked for"),
        (
            exact_prompt and end.prompt_tokens != request.prompt_tokens,
            Verdict.INEXACT,
            "another number of prompt tokens than sent",
        ),
    )
    found = next(((verdict, why) for wrong, verdict, why in checks if wrong), None)
    return found or (Verdict.COMPLETE, "")


def _reason(problem: Exception) -> str:
    """Short and without addresses and ports, so that equal errors can be counted together."""
    if isinstance(problem, aiohttp.ClientConnectorError):
        return f"no connection: {problem.os_error.strerror or problem.os_error}"
    if isinstance(problem, aiohttp.ServerDisconnectedError):
        return "the server closed the connection without an answer"
    return f"{type(problem).__name__}: {problem}"[:ERROR_CHARACTERS]
