from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from aiohttp import web

from rlgov.clock import SystemClock
from rlgov.config import LoadSettings
from rlgov.errors import ConfigError, DeploymentError
from rlgov.workload.load import run_load, run_load_blocking
from rlgov.workload.load_result import LoadResult, RequestResult, Verdict
from rlgov.workload.trace import Trace

CLOCK = SystemClock()
PATIENCE_S = 120.0  # far above anything that happens, also on a busy machine


def _trace(count: int, spacing_s: float = 0.002, prefix: int = 0) -> Trace:
    return Trace(
        "t",
        np.arange(count, dtype=np.float64) * spacing_s,
        np.arange(count) % 7 + 1 + prefix,
        np.arange(count) % 5 + 1,
        np.full(count, prefix),
        max(count * spacing_s, 1e-6),
    )


def _run(
    scripted: Callable[..., Any],
    behave: Any = None,
    *,
    trace: Trace | None = None,
    check: Callable[[Any], None] | None = None,
    **changes: Any,
) -> LoadResult:
    async def main() -> LoadResult:
        async with scripted(behave) as server, asyncio.timeout(PATIENCE_S):
            settings = LoadSettings(url=server.url, **changes)
            result = await run_load(trace or _trace(3), settings, CLOCK)
            if check is not None:
                check(server)
            return result

    return asyncio.run(main())


def _one(result: LoadResult) -> RequestResult:
    """The common fate of all requests."""
    assert len(result.requests) == result.planned
    assert len({(row.verdict, row.error) for row in result.requests}) == 1
    return result.requests[0]


def test_every_request_is_sent_once_with_exact_counts(scripted: Callable[..., Any]) -> None:
    trace = _trace(40, prefix=3)

    def check(server: Any) -> None:
        asked = sorted((len(body["prompt"]), body["max_tokens"]) for body in server.bodies)
        assert asked == sorted(zip(trace.prompt_tokens.tolist(), trace.output_tokens.tolist(), strict=True))
        assert len({headers["X-Request-Id"] for headers in server.headers}) == 40
        assert all("Authorization" not in headers for headers in server.headers)

    result = _run(scripted, trace=trace, check=check)
    assert result.all_complete
    assert result.model == "scripted"
    assert [row.index for row in result.requests] == list(range(40))
    assert [row.intended_s for row in result.requests] == trace.arrival_s.tolist()
    for row in result.requests:
        assert row.output_tokens == row.output_tokens_asked
        assert row.prompt_tokens == row.prompt_tokens_asked
        assert row.events == row.output_tokens_asked + 2  # usage and [DONE]
        order = (row.dispatched_s, row.sent_s, row.first_token_s, row.finished_s)
        assert None not in order
        assert list(order) == sorted(order)  # type: ignore[type-var]  # none is None, see above
        assert row.lateness_s is not None
        assert row.lateness_s > -0.01
    summary = result.summary
    assert summary.output_tokens == int(trace.output_tokens.sum())
    assert summary.prefix_tokens_asked == 120


def test_a_stalled_server_delays_no_send(scripted: Callable[..., Any]) -> None:
    """No answer begins before the last request has arrived: a generator that waits would never end."""
    count = 30

    async def stall(server: Any, request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        if len(server.bodies) == count:
            server.release.set()
        await server.release.wait()
        answer: web.StreamResponse = await server.stream(request, server.events(body))
        return answer

    result = _run(scripted, stall, trace=_trace(count, 0.01))
    assert result.all_complete
    assert result.summary.concurrency_peak == count
    last_sent_s = max(row.sent_s or 0 for row in result.requests)
    for row in result.requests:
        # Every latency holds the whole stall from the intended time on.
        assert row.ttft_s is not None
        assert row.intended_s + row.ttft_s >= last_sent_s
        assert row.ttft_s >= 0.01 * (count - 1) - row.intended_s - 0.01


@pytest.mark.parametrize(
    ("events", "verdict", "error"),
    [
        ([{"choices": [{"text": "", "finish_reason": "abort"}]}, "[DONE]"], "lost", "abort"),
        (["[DONE]"], "lost", "empty stream"),
        ([], "truncated", "without [DONE]"),
        ([{"choices": [{"text": "a", "finish_reason": None}]}], "truncated", "without [DONE]"),
        ([{"error": {"message": "engine dead"}}, "[DONE]"], "failed", "engine dead"),
    ],
)
def test_status_200_is_not_enough(
    scripted: Callable[..., Any], events: list[object], verdict: str, error: str
) -> None:
    async def answer(server: Any, request: web.Request, _body: dict[str, Any]) -> web.StreamResponse:
        sent: web.StreamResponse = await server.stream(request, events)
        return sent

    result = _run(scripted, answer)
    row = _one(result)
    assert (row.verdict, row.status) == (verdict, 200)
    assert error in row.error
    assert result.summary.attainment == 0
    assert not result.all_complete
    if verdict == "lost":
        assert row.first_token_s is None


@pytest.mark.parametrize(
    ("changes", "verdict"),
    [
        ({"tokens": 9}, "inexact"),
        ({"usage": False}, "inexact"),
        ({"reason": "stop"}, "complete"),
        ({"reason": "content_filter"}, "lost"),
    ],
)
def test_only_the_exact_tokens_are_complete(
    scripted: Callable[..., Any], changes: dict[str, Any], verdict: str
) -> None:
    async def answer(server: Any, request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        sent: web.StreamResponse = await server.stream(request, server.events(body, **changes))
        return sent

    assert _one(_run(scripted, answer)).verdict == verdict


def test_a_prompt_that_the_server_counts_otherwise_is_inexact(scripted: Callable[..., Any]) -> None:
    async def answer(server: Any, request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        events = server.events({**body, "prompt": [*body["prompt"], 1]})
        sent: web.StreamResponse = await server.stream(request, events)
        return sent

    assert "prompt tokens" in _one(_run(scripted, answer)).error


def test_a_connection_cut_within_the_stream_is_truncated(scripted: Callable[..., Any]) -> None:
    async def cut(server: Any, request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        await response.write(f"data: {json.dumps(server.events(body)[0])}\n\n".encode())
        assert request.transport is not None
        request.transport.close()
        return response

    row = _one(_run(scripted, cut))
    assert row.verdict == Verdict.TRUNCATED
    assert row.status == 200


def test_a_connection_closed_without_an_answer_is_failed(scripted: Callable[..., Any]) -> None:
    async def close(_server: Any, request: web.Request, _body: dict[str, Any]) -> web.StreamResponse:
        assert request.transport is not None
        request.transport.abort()
        return web.Response()

    row = _one(_run(scripted, close))
    assert row.verdict == Verdict.FAILED
    assert row.sent_s is not None
    assert row.status is None


def test_a_refused_connection_is_failed_and_counted(free_port: Callable[[], int]) -> None:
    settings = LoadSettings(url=f"http://127.0.0.1:{free_port()}", model="m")
    result = asyncio.run(run_load(_trace(5), settings, CLOCK))
    row = _one(result)
    assert row.verdict == Verdict.FAILED
    assert "no connection" in row.error
    assert row.sent_s is None
    assert result.summary.verdicts == {"failed": 5}
    assert result.summary.errors == {row.error: 5}


@pytest.mark.parametrize("status", [503, 400, 302])
def test_another_status_is_a_rejection_with_its_words(scripted: Callable[..., Any], status: int) -> None:
    async def reject(_server: Any, _request: web.Request, _body: dict[str, Any]) -> web.StreamResponse:
        return web.Response(status=status, text="queue\n full")

    row = _one(_run(scripted, reject))
    assert (row.verdict, row.status) == (Verdict.REJECTED, status)
    assert row.error == f"status {status}: queue full"


def test_an_answer_without_end_is_given_up(scripted: Callable[..., Any]) -> None:
    async def hang(server: Any, request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        await response.write(f"data: {json.dumps(server.events(body)[0])}\n\n".encode())
        await server.release.wait()
        return response

    row = _one(_run(scripted, hang, timeout_s=3.0))
    assert row.verdict == Verdict.TIMEOUT
    assert row.first_token_s is not None
    assert row.tpot_s is None


def test_too_many_under_way_are_counted_as_errors(scripted: Callable[..., Any]) -> None:
    async def hang(server: Any, _request: web.Request, _body: dict[str, Any]) -> web.StreamResponse:
        await server.release.wait()
        return web.Response()

    result = _run(scripted, hang, trace=_trace(10), max_outstanding=4, timeout_s=3.0)
    assert result.summary.verdicts == {"timeout": 4, "unsent": 6}
    assert result.summary.attainment == 0
    assert "max_outstanding" in result.requests[-1].error


def test_a_closed_loop_keeps_so_many_under_way(scripted: Callable[..., Any]) -> None:
    most = [0, 0]

    async def count(server: Any, request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        most[0] += 1
        most[1] = max(most)
        await asyncio.sleep(0.002)
        answer: web.StreamResponse = await server.stream(request, server.events(body))
        most[0] -= 1
        return answer

    # The recorded times would take an hour: a closed loop does not use them.
    result = _run(scripted, count, trace=_trace(30, 120.0), concurrency=4)
    assert result.all_complete
    assert len(result.requests) == 30
    assert most[1] == result.summary.concurrency_peak == 4


def test_a_closed_loop_with_a_duration_goes_round(scripted: Callable[..., Any]) -> None:
    result = _run(scripted, trace=_trace(2), concurrency=2, duration_s=0.5)
    assert len(result.requests) > 4
    assert [row.index for row in result.requests] == list(range(len(result.requests)))
    assert not result.interrupted


@pytest.mark.parametrize("concurrency", [None, 2])
def test_a_stop_gives_up_what_is_under_way_and_still_tells(
    scripted: Callable[..., Any], concurrency: int | None
) -> None:
    stop: list[asyncio.Event] = []

    async def stall(server: Any, request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        if len(server.bodies) == 3:
            stop[0].set()
        if len(server.bodies) >= 2:
            await server.release.wait()
        answer: web.StreamResponse = await server.stream(request, server.events(body))
        return answer

    async def main() -> LoadResult:
        stop.append(asyncio.Event())
        async with scripted(stall) as server, asyncio.timeout(PATIENCE_S):
            settings = LoadSettings(url=server.url, concurrency=concurrency)
            # Beyond the third the requests are hours away.
            trace = Trace(
                "t", np.array([0.0, 0.01, 0.02, 9e3]), np.ones(4, int), np.ones(4, int), np.zeros(4, int), 1e4
            )
            return await run_load(trace, settings, CLOCK, stop=stop[0])

    result = asyncio.run(main())
    assert result.interrupted
    assert result.planned == 4
    assert result.summary.verdicts == {"complete": 1, "cancelled": 2}


def test_equal_seeds_send_equal_prompts(scripted: Callable[..., Any]) -> None:
    sent: list[list[Any]] = []

    def keep(server: Any) -> None:
        sent.append(sorted(body["prompt"] for body in server.bodies))

    for seed in (5, 5, 6):
        _run(scripted, trace=_trace(12), check=keep, seed=seed)
    assert sent[0] == sent[1] != sent[2]


def test_chat_is_judged_by_output_only(scripted: Callable[..., Any]) -> None:
    result = _run(scripted, api="chat")
    assert result.all_complete
    assert any("approximate" in note for note in result.notes)


def test_the_key_comes_from_the_environment(
    scripted: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SOME_KEY", "s3cret")

    def check(server: Any) -> None:
        assert {headers["Authorization"] for headers in server.headers} == {"Bearer s3cret"}

    _run(scripted, check=check, api_key_env="SOME_KEY")
    monkeypatch.delenv("SOME_KEY")
    with pytest.raises(ConfigError, match="SOME_KEY"):
        _run(scripted, api_key_env="SOME_KEY")


def test_a_large_prompt_is_sent_whole(scripted: Callable[..., Any]) -> None:
    trace = Trace("t", np.zeros(1), np.array([300_000]), np.ones(1, int), np.zeros(1, int), 1.0)
    assert _run(scripted, trace=trace).all_complete


def test_an_error_of_our_own_is_not_taken_for_the_servers(
    scripted: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(_scan: Any, _data: bytes) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr("rlgov.workload.load_stream.StreamScan.feed", broken)
    with pytest.raises(ZeroDivisionError):
        _run(scripted)


def test_it_runs_in_another_thread_too(free_port: Callable[[], int]) -> None:
    settings = LoadSettings(url=f"http://127.0.0.1:{free_port()}", model="m")
    with ThreadPoolExecutor(1) as pool:
        result = pool.submit(run_load_blocking, _trace(2), settings, CLOCK).result()
    assert result.summary.verdicts == {"failed": 2}


def test_progress_ends_at_the_whole(scripted: Callable[..., Any]) -> None:
    told: list[tuple[int, int, str]] = []

    async def main() -> None:
        async with scripted() as server:
            settings = LoadSettings(url=server.url)
            await run_load(_trace(4), settings, CLOCK, progress=lambda *said: told.append(said))

    asyncio.run(main())
    assert told[-1][:2] == (4, 4)


def test_a_server_that_lists_no_model_is_refused_with_a_remedy(free_port: Callable[[], int]) -> None:
    settings = LoadSettings(url=f"http://127.0.0.1:{free_port()}")
    with pytest.raises(DeploymentError, match="--url"):
        run_load_blocking(_trace(1), settings, CLOCK)
