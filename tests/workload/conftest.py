"""A scripted server for the load generator: it does to each request what a test says."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from typing import Any

import pytest
from aiohttp import web

Behaviour = Callable[["ScriptedServer", web.Request, dict[str, Any]], Awaitable[web.StreamResponse]]


class ScriptedServer:
    """An OpenAI-compatible server within the test's own event loop.

    ``behave`` answers generation requests; without one every request is answered exactly as it asks.
    """

    def __init__(self, behave: Behaviour | None) -> None:
        self._behave = behave
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[Mapping[str, str]] = []
        self.release = asyncio.Event()  # for behaviours that wait
        self.url = ""

    async def models(self, _request: web.Request) -> web.Response:
        return web.json_response({"object": "list", "data": [{"id": "scripted", "object": "model"}]})

    async def generate(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        self.bodies.append(body)
        self.headers.append(request.headers.copy())
        if self._behave is not None:
            return await self._behave(self, request, body)
        return await self.stream(request, self.events(body))

    def events(
        self, body: dict[str, Any], *, tokens: int | None = None, reason: str = "length", usage: bool = True
    ) -> list[object]:
        """The events of an answer as vLLM words them."""
        count = body["max_tokens"] if tokens is None else tokens
        prompt = len(body["prompt"]) if "prompt" in body else 7
        events: list[object] = [{"choices": [{"text": "x", "finish_reason": None}]} for _ in range(count - 1)]
        events += [{"choices": [{"text": "x" if count else "", "finish_reason": reason}]}]
        if usage:
            events += [{"choices": [], "usage": {"prompt_tokens": prompt, "completion_tokens": count}}]
        return [*events, "[DONE]"]

    async def stream(self, request: web.Request, events: list[object]) -> web.StreamResponse:
        """Send events as one stream."""
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        for event in events:
            text = event if isinstance(event, str) else json.dumps(event)
            await response.write(f"data: {text}\n\n".encode())
        await response.write_eof()
        return response


@pytest.fixture(scope="session")
def scripted() -> Callable[..., Any]:
    """``async with scripted(behave) as server``: a server that runs meanwhile."""

    @asynccontextmanager
    async def run(behave: Behaviour | None = None) -> AsyncIterator[ScriptedServer]:
        server = ScriptedServer(behave)
        app = web.Application(client_max_size=2**26)
        app.router.add_get("/v1/models", server.models)
        app.router.add_post("/v1/completions", server.generate)
        app.router.add_post("/v1/chat/completions", server.generate)
        runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=1.0)
        await runner.setup()
        try:
            site = web.TCPSite(runner, "127.0.0.1", 0, backlog=2048)
            await site.start()
            server.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
            yield server
        finally:
            server.release.set()
            await runner.cleanup()

    return run


@pytest.fixture
def free_port() -> Callable[[], int]:
    """Gives a port of the loopback that nobody listens on."""

    def find() -> int:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port: int = probe.getsockname()[1]
            return port

    return find
