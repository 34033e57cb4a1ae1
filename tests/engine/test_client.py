"""What the client makes of answers that no healthy engine gives."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from dataclasses import asdict
from typing import Any

import pytest
from aiohttp import web

from rlgov.clock import VirtualClock
from rlgov.engine.client import (
    MAX_ANSWER_BYTES,
    EngineClient,
    NoSuchCallError,
    RefusedError,
    UnreachableError,
)
from rlgov.engine.samples import EngineIterations, EngineSample
from rlgov.errors import EngineError

PATIENCE_S = 60.0
SAMPLE = EngineSample(
    at_s=1.0, source="plugin", engine_id="e1", running=1, waiting=0, kv_usage=0.5, generated_tokens=9.0,
    prompt_tokens=3.0, prefill_tokens=3.0, preemptions=0.0, finished=1.0,
)  # fmt: skip
PLUGIN = {
    "vllm_version": "0.32.0",
    "rlgov_version": "1",
    "cap_supported": True,
    "note": "",
    "checks": {"version": True},
    "asleep": False,
    "sleep_supported": False,
}
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


def _client(port: int) -> EngineClient:
    return EngineClient(
        host="127.0.0.1",
        port=port,
        token="t",  # noqa: S106  # of a test
        api_key="k",
        engine_id="e1",
        clock=VirtualClock(),
    )


def _ask(handler: Handler, call: Callable[[EngineClient], Awaitable[Any]]) -> Any:
    async def play() -> Any:
        app = web.Application()
        app.router.add_route("*", "/{path:.*}", handler)
        runner = web.AppRunner(app, shutdown_timeout=0.1)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        try:
            return await call(_client(runner.addresses[0][1]))
        finally:
            await runner.cleanup()

    return asyncio.run(play())


def _answer(body: Any, status: int = 200) -> Handler:
    async def handler(_request: web.Request) -> web.StreamResponse:
        text = body if isinstance(body, str) else json.dumps(body)
        return web.Response(text=text, status=status, content_type="application/json")

    return handler


def _state(**changes: Any) -> dict[str, Any]:
    return {"sample": {**asdict(SAMPLE), **changes}, "plugin": PLUGIN}


def test_a_good_state_is_read() -> None:
    state = _ask(_answer(_state()), lambda client: client.plugin_state(PATIENCE_S))
    assert state.sample == SAMPLE
    assert state.plugin.checks == {"version": True}


@pytest.mark.parametrize(
    "body",
    [
        {},
        [],
        "",
        "{",
        {"plugin": PLUGIN},
        {"sample": asdict(SAMPLE)},
        _state(running="1"),
        _state(running=1.5),
        _state(running=None),
        _state(generated_tokens=-1.0),
        json.dumps(_state(kv_usage=float("nan"))),
        json.dumps(_state(busy_s=float("inf"))),
        _state(engine_id="another"),
        {"sample": {k: v for k, v in asdict(SAMPLE).items() if k != "finished"}, "plugin": PLUGIN},
    ],
)
def test_a_state_that_cannot_be_is_an_error(body: Any) -> None:
    with pytest.raises(EngineError, match="e1"):
        _ask(_answer(body), lambda client: client.plugin_state(PATIENCE_S))


@pytest.mark.parametrize(
    ("status", "error"), [(404, NoSuchCallError), (409, RefusedError), (401, EngineError), (504, EngineError)]
)
def test_refusals_are_told_apart(status: int, error: type[EngineError]) -> None:
    with pytest.raises(error, match=f"{status}: because") as raised:
        _ask(_answer({"error": "because"}, status), lambda client: client.set_plugin_cap(1, None, PATIENCE_S))
    assert type(raised.value) is error


@pytest.mark.parametrize("told", [None, "3", True, 0, 2.5])
def test_a_cap_in_force_is_a_whole_number(told: Any) -> None:
    with pytest.raises(EngineError, match="batch_cap"):
        _ask(_answer({"batch_cap": told}), lambda client: client.set_plugin_cap(3, None, PATIENCE_S))


@pytest.mark.parametrize(
    ("reason", "tokens", "good"),
    [("length", 2, True), ("stop", 2, True), ("length", 1, False), ("abort", 0, False), (None, 2, False)],
)
def test_a_completion_counts_by_tokens_and_finish_reason(reason: Any, tokens: int, *, good: bool) -> None:
    body = {"choices": [{"finish_reason": reason}], "usage": {"completion_tokens": tokens}}
    if good:
        _ask(_answer(body), lambda client: client.complete(2, PATIENCE_S))
    else:
        with pytest.raises(EngineError, match="drops requests"):
            _ask(_answer(body), lambda client: client.complete(2, PATIENCE_S))


@pytest.mark.parametrize("body", [{}, {"choices": []}, {"choices": None, "usage": None}, {"usage": {}}])
def test_a_completion_without_choices_or_usage(body: Any) -> None:
    with pytest.raises(EngineError):
        _ask(_answer(body), lambda client: client.complete(2, PATIENCE_S))


def test_iterations_are_of_the_engine_that_was_asked() -> None:
    body = {"cursor": 9, "dropped": 2, "columns": ["t_s", "running"], "rows": [[0.5, 3], [1, 4.0]]}
    told = _ask(_answer(body), lambda client: client.plugin_iterations(7))
    assert told == EngineIterations("e1", 9, 2, ("t_s", "running"), ((0.5, 3.0), (1.0, 4.0)))


@pytest.mark.parametrize(
    "body", [{}, {"cursor": -1.5}, {"cursor": 1, "dropped": 0, "columns": [], "rows": [["x"]]}, []]
)
def test_iterations_that_are_none_are_an_error(body: Any) -> None:
    with pytest.raises(EngineError, match="e1"):
        _ask(_answer(body), lambda client: client.plugin_iterations(0))


def test_a_huge_page_is_not_read() -> None:
    sent = 0

    async def handler(request: web.Request) -> web.StreamResponse:
        nonlocal sent
        response = web.StreamResponse()
        await response.prepare(request)
        for _ in range(MAX_ANSWER_BYTES // 65536 * 10):
            await response.write(b"x" * 65536)
            sent += 65536
        return response

    with pytest.raises(EngineError, match=f"more than {MAX_ANSWER_BYTES} bytes"):
        _ask(handler, lambda client: client.metrics_sample(PATIENCE_S))
    assert sent < 3 * MAX_ANSWER_BYTES


def test_redirects_are_not_followed() -> None:
    asked = []

    async def handler(request: web.Request) -> web.StreamResponse:
        asked.append(request.path)
        raise web.HTTPFound("/elsewhere")

    assert not _ask(handler, lambda client: client.healthy(PATIENCE_S))
    with pytest.raises(EngineError, match="302"):
        _ask(handler, lambda client: client.metrics_sample(PATIENCE_S))
    assert asked == ["/health", "/metrics"]


def test_each_side_gets_its_own_secret() -> None:
    seen: dict[str, str | None] = {}

    async def handler(request: web.Request) -> web.StreamResponse:
        seen[request.path] = request.headers.get("Authorization")
        return web.Response(status=500)

    async def calls(client: EngineClient) -> None:
        for call in (client.complete(1, PATIENCE_S), client.plugin_state(PATIENCE_S)):
            with pytest.raises(EngineError):
                await call
        await client.healthy(PATIENCE_S)

    _ask(handler, calls)
    assert seen == {"/v1/completions": "Bearer k", "/rlgov/v1/state": "Bearer t", "/health": None}


def test_nobody_there(free_port: Callable[[], int]) -> None:
    client = _client(free_port())
    with pytest.raises(UnreachableError, match="cannot be reached"):
        asyncio.run(client.plugin_state(PATIENCE_S))
    assert not asyncio.run(client.healthy(PATIENCE_S))
    assert not asyncio.run(client.has_runtime_config(PATIENCE_S))


@pytest.mark.parametrize(
    "body", ["", "[]", '{"paths": 3}', '{"paths": {"/v1/runtime_config": {"get": {}}}}', "{}"]
)
def test_no_runtime_configuration(body: str) -> None:
    assert not _ask(_answer(body), lambda client: client.has_runtime_config(PATIENCE_S))
