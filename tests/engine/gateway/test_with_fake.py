"""The gateway in front of servers that are processes of their own, and die as such."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from collections.abc import Callable
from typing import Any

import aiohttp
import pytest
from prometheus_client.parser import text_string_to_metric_families

from rlgov.engine.gateway.gateway import Gateway, Upstream
from rlgov.engine.samples import Outcome
from tests.fakes.scripted import RawClient, ask, eventually, get, post, proxy, run

StartFake = Callable[..., Any]


def upstream(fake: Any, engine_id: str = "one") -> Upstream:
    return Upstream(engine_id, "127.0.0.1", fake.port)


async def stream(gateway: Gateway, tokens: int, path: str = "/v1/completions") -> list[dict[str, Any]]:
    """The events of one stream, closing mark and all."""
    asked: dict[str, Any] = {"max_tokens": tokens, "stream": True, "ignore_eos": True}
    asked |= {"messages": [{"role": "user", "content": "hello"}]} if "chat" in path else {"prompt": "hello"}
    async with (
        aiohttp.ClientSession() as session,
        session.post(f"http://127.0.0.1:{gateway.port}{path}", json=asked) as response,
    ):
        assert response.status == 200, await response.text()
        lines = [line async for line in response.content if line.strip()]
    assert lines.pop().strip() == b"data: [DONE]"
    return [json.loads(line.removeprefix(b"data: ")) for line in lines]


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_streams_are_whole_and_counted(start_fake: StartFake, path: str) -> None:
    fake = start_fake("--fake-token-ms", "1")

    async def body() -> None:
        async with proxy(upstream(fake)) as gateway:
            answers = await asyncio.gather(*(stream(gateway, 5 + k, path) for k in range(10)))
            for k, events in enumerate(answers):
                assert all(event["choices"] for event in events)  # no usage that nobody asked for
                choices = [event["choices"][0] for event in events]
                text = "".join(
                    choice.get("text") or choice.get("delta", {}).get("content", "") for choice in choices
                )
                assert len(text) == 5 + k
            closed = gateway.traffic(0).closed
            assert {record.outcome for record in closed} == {Outcome.SERVED}
            assert sorted(record.output_tokens or 0 for record in closed) == list(range(5, 15))
            assert all(record.prompt_tokens for record in closed)
            assert all(record.finish_reason == "length" for record in closed)

    run(body())


def test_a_killed_engine_costs_no_request_that_had_no_token(start_fake: StartFake) -> None:
    old = start_fake("--fake-token-ms", "1", "--max-num-seqs", "2", "--fake-fault", "hang=true")
    new = start_fake("--fake-token-ms", "1")

    async def body() -> None:
        async with proxy(upstream(old, "old")) as gateway:
            tasks = [asyncio.create_task(stream(gateway, 5)) for _ in range(8)]
            await eventually(lambda: gateway.in_flight("old") == 8)
            os.killpg(old.process.pid, signal.SIGKILL)
            await eventually(lambda: gateway.held == 8)
            gateway.route(upstream(new, "new"))
            await asyncio.gather(*tasks)
            closed = gateway.traffic(0).closed
            assert {(record.outcome, record.engine_id) for record in closed} == {(Outcome.SERVED, "new")}
            assert gateway.in_flight("old") == 0

    run(body())


def test_a_killed_engine_is_told_in_the_stream_it_had_begun(start_fake: StartFake) -> None:
    fake = start_fake("--fake-token-ms", "20")

    async def body() -> None:
        async with proxy(upstream(fake)) as gateway:
            client = await RawClient.to(gateway)
            await client.send(
                post({"prompt": "hello", "max_tokens": 2000, "stream": True, "ignore_eos": True})
            )
            await client.reader.readuntil(b"data: ")
            os.killpg(fake.process.pid, signal.SIGKILL)
            raw = await client.rest()
            assert b'"error"' in raw
            assert b"[DONE]" not in raw
            assert not raw.endswith(b"0\r\n\r\n")
            assert gateway.traffic(0).closed[0].outcome is Outcome.FAILED
            await client.close()

    run(body())


@pytest.mark.parametrize("fault", ["abort", "done-only", "empty", "500"])
@pytest.mark.parametrize("streams", [True, False])
def test_what_a_draining_engine_answers_is_tried_again(
    *, start_fake: StartFake, fault: str, streams: bool
) -> None:
    fake = start_fake("--fake-token-ms", "1")
    fake.fault(requests=fault, count=1)

    async def body() -> None:
        async with proxy(upstream(fake)) as gateway:
            asked = {"prompt": "hello", "max_tokens": 3, "stream": streams}
            response = await ask(gateway, post(asked))
            assert (response.status, response.complete) == (200, True)
            (record,) = gateway.traffic(0).closed
            assert (record.outcome, record.dispatches, record.output_tokens) == (Outcome.SERVED, 2, 3)

    run(body())


def test_sigterm_to_an_engine_with_streams_loses_none_silently(start_fake: StartFake) -> None:
    """Without a shutdown timeout vLLM aborts with HTTP 200: each stream ends whole or with an error."""
    old = start_fake("--fake-token-ms", "30", "--max-num-seqs", "4")
    new = start_fake("--fake-token-ms", "1")

    async def one(gateway: Gateway) -> bytes:
        client = await RawClient.to(gateway)
        await client.send(post({"prompt": "hello", "max_tokens": 500, "stream": True, "ignore_eos": True}))
        response = await client.response()
        await client.close()
        return response.body

    async def body() -> None:
        async with proxy(upstream(old, "old")) as gateway:
            tasks = [asyncio.create_task(one(gateway)) for _ in range(12)]
            await eventually(lambda: sum(r.first_token_s is not None for r in gateway.traffic(0).open) >= 4)
            gateway.route(upstream(new, "new"))
            old.process.terminate()
            bodies = await asyncio.gather(*tasks)
            ends = [b"[DONE]" in one for one in bodies]
            assert all(b'"error"' in one for one, end in zip(bodies, ends, strict=True) if not end)
            closed = gateway.traffic(0).closed
            served = [record for record in closed if record.outcome is Outcome.SERVED]
            assert len(served) == sum(ends) >= 8  # those that waited in the old engine went to the new one
            assert all(record.output_tokens == 500 for record in served)

    run(body())


def test_a_client_that_leaves_stops_its_sequence(start_fake: StartFake) -> None:
    fake = start_fake("--fake-token-ms", "20")

    async def body() -> None:
        async with proxy(upstream(fake)) as gateway:
            client = await RawClient.to(gateway)
            await client.send(
                post({"prompt": "hello", "max_tokens": 3000, "stream": True, "ignore_eos": True})
            )
            await client.reader.readuntil(b"data: ")
            assert (await asyncio.to_thread(fake.state))["running"] == 1
            await client.close()

            async with asyncio.timeout(30):
                while (await asyncio.to_thread(fake.state))["running"]:  # noqa: ASYNC110  # another process
                    await asyncio.sleep(0.02)

    run(body())


def test_the_pages_of_both_make_one_valid_page(start_fake: StartFake) -> None:
    fake = start_fake("--fake-token-ms", "1")

    async def body() -> None:
        async with proxy(upstream(fake)) as gateway:
            await stream(gateway, 3)
            response = await ask(gateway, get("/metrics"))
            names = [family.name for family in text_string_to_metric_families(response.body.decode())]
            assert len(names) == len(set(names))
            assert {"vllm:num_requests_running", "rlgov_gateway_ttft_seconds"} <= set(names)

    run(body())


def test_the_plugin_is_out_of_reach_even_with_its_token(start_fake: StartFake) -> None:
    fake = start_fake()

    async def body() -> None:
        async with proxy(upstream(fake)) as gateway:
            for target in ("/rlgov/v1/state", "/%72lgov/v1/state", "/./rlgov/v1/state"):
                response = await ask(gateway, get(target, f"Authorization: Bearer {fake.token}\r\n"))
                assert response.status == 403
        asked = (await asyncio.to_thread(fake.state))["asked"]
        assert not any("rlgov" in call for call in asked)

    run(body())
