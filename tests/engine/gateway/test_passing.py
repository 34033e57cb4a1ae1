"""What goes through the gateway, and how: bytes, heads, connections."""

from __future__ import annotations

import asyncio
import io
import json

import aiohttp
import pytest

from rlgov.engine.samples import Outcome
from tests.fakes.scripted import (
    DONE,
    STREAM_HEAD,
    WHOLE_STREAM,
    Heard,
    Line,
    RawClient,
    answer_of,
    ask,
    chunk,
    completion,
    eventually,
    get,
    post,
    proxy,
    run,
    scripted,
    stream_of,
    token,
    usage,
)

STREAM = {"prompt": "x", "stream": True}


def test_a_stream_arrives_byte_for_byte_without_the_usage_nobody_asked_for() -> None:
    async def body() -> None:
        async with scripted(WHOLE_STREAM) as engine, proxy(engine.upstream()) as gateway:
            response = await ask(gateway, post(STREAM))
            assert response.complete
            assert response.body == token() + token() + token(reason="length") + DONE
            assert response.header("content-type") == "text/event-stream; charset=utf-8"
            sent = json.loads(engine.heard[0].body)
            assert sent == STREAM | {"stream_options": {"include_usage": True}}

    run(body())


def test_the_usage_asked_for_arrives() -> None:
    async def body() -> None:
        async with scripted(WHOLE_STREAM) as engine, proxy(engine.upstream()) as gateway:
            response = await ask(gateway, post(STREAM | {"stream_options": {"include_usage": True}}))
            assert usage() in response.body

    run(body())


@pytest.mark.parametrize("piece", [1, 2, 3, 7, 50])
def test_however_the_engine_cuts_its_bytes(piece: int) -> None:
    async def answer(_heard: Heard, line: Line) -> None:
        for k in range(0, len(WHOLE_STREAM), piece):
            await line.write(WHOLE_STREAM[k : k + piece])
            await asyncio.sleep(0)

    async def body() -> None:
        async with scripted(answer) as engine, proxy(engine.upstream()) as gateway:
            response = await ask(gateway, post(STREAM))
            assert response.complete
            assert response.body == token() + token() + token(reason="length") + DONE

    run(body())


def test_a_request_is_stamped() -> None:
    async def body() -> None:
        async with scripted(WHOLE_STREAM) as engine, proxy(engine.upstream("e1")) as gateway:
            response = await ask(gateway, post(STREAM, headers="X-Request-Id: my-id\r\n"))
            assert response.header("x-request-id") == "my-id"
            assert engine.heard[0].headers["x-request-id"] == "my-id"
            traffic = gateway.traffic(0)
            (record,) = traffic.closed
            assert record.outcome is Outcome.SERVED
            assert (record.request_id, record.engine_id, record.dispatches) == ("my-id", "e1", 1)
            assert (record.prompt_tokens, record.output_tokens, record.finish_reason) == (7, 3, "length")
            assert record.dispatched_s is not None
            assert record.first_token_s is not None
            assert record.last_token_s is not None
            assert record.finished_s is not None
            assert (
                record.arrival_s
                <= record.dispatched_s
                <= record.first_token_s
                <= record.last_token_s
                <= record.finished_s
                <= traffic.now_s
            )
            assert gateway.traffic(traffic.cursor).closed == ()

    run(body())


def test_the_first_token_is_stamped_when_it_comes_and_not_with_the_role() -> None:
    role = (
        b'data: {"choices":[{"index":0,"delta":{"role":"assistant","content":""},"finish_reason":null}]}\n\n'
    )
    word = b'data: {"choices":[{"index":0,"delta":{"content":"a"},"finish_reason":null}]}\n\n'
    last = b'data: {"choices":[{"index":0,"delta":{"content":"a"},"finish_reason":"stop"}]}\n\n'
    go_on = asyncio.Event()

    async def answer(_heard: Heard, line: Line) -> None:
        await line.write(STREAM_HEAD, chunk(role))
        await go_on.wait()
        await line.write(chunk(word), chunk(last), chunk(DONE), b"0\r\n\r\n")

    async def body() -> None:
        async with scripted(answer) as engine, proxy(engine.upstream()) as gateway:
            asking = asyncio.create_task(ask(gateway, post(STREAM, path="/v1/chat/completions")))
            await eventually(lambda: gateway.in_flight("one") == 1)
            await asyncio.sleep(0.02)
            (record,) = gateway.traffic(0).open
            assert record.outcome is Outcome.OPEN
            assert record.first_token_s is None
            now_s = gateway.traffic(0).now_s
            go_on.set()
            assert (await asking).body == role + word + last + DONE
            (record,) = gateway.traffic(0).closed
            assert record.first_token_s is not None
            assert record.first_token_s >= now_s

    run(body())


def test_an_answer_in_one_piece_arrives_with_its_length() -> None:
    async def body() -> None:
        async with scripted(answer_of(completion())) as engine, proxy(engine.upstream()) as gateway:
            response = await ask(gateway, post({"prompt": "x"}))
            assert json.loads(response.body) == completion()
            assert response.header("content-length") == str(len(response.body))
            (record,) = gateway.traffic(0).closed
            assert record.outcome is Outcome.SERVED
            assert record.output_tokens == 3

    run(body())


@pytest.mark.parametrize("status", [400, 401, 404, 422, 429, 503])
def test_a_refusal_passes_as_it_is_and_is_not_tried_again(status: int) -> None:
    said = b'{"error": {"message": "no", "code": 1}}'

    async def body() -> None:
        async with scripted(answer_of(said, status)) as engine, proxy(engine.upstream()) as gateway:
            response = await ask(gateway, post(STREAM))
            assert (response.status, response.body) == (status, said)
            assert len(engine.heard) == 1
            (record,) = gateway.traffic(0).closed
            no_room = status in {429, 503}
            assert record.outcome is (Outcome.REJECTED if no_room else Outcome.INVALID)

    run(body())


def test_a_refusal_inside_a_200_passes_as_it_is() -> None:
    error = b'data: {"error": {"message": "bad grammar", "code": 400}}\n\n'

    async def body() -> None:
        async with scripted(stream_of(error, DONE)) as engine, proxy(engine.upstream()) as gateway:
            response = await ask(gateway, post(STREAM))
            assert response.complete
            assert response.body == error + DONE
            assert gateway.traffic(0).closed[0].outcome is Outcome.REJECTED

    run(body())


@pytest.mark.parametrize("method", ["GET", "DELETE", "PUT", "PATCH", "OPTIONS"])
def test_any_method_and_path_go_through(method: str) -> None:
    async def body() -> None:
        async with scripted(answer_of(b"hi", 207, "text/x")) as engine, proxy(engine.upstream()) as gateway:
            client = await RawClient.to(gateway)
            await client.send(f"{method} /a/b%20c?d=e&f HTTP/1.1\r\nHost: gw\r\nX-A: 1\r\n\r\n".encode())
            response = await client.response()
            assert (response.status, response.body, response.header("content-type")) == (207, b"hi", "text/x")
            (heard,) = engine.heard
            assert (heard.method, heard.target, heard.headers["x-a"]) == (method, "/a/b%20c?d=e&f", "1")
            assert gateway.traffic(0).closed == ()  # only generations have records
            await client.close()

    run(body())


def test_head_has_a_length_and_no_body() -> None:
    async def answer(heard: Heard, line: Line) -> None:
        whole = answer_of(b"0123456789")
        await line.write(whole[:-10] if heard.method == "HEAD" else whole)

    async def body() -> None:
        async with scripted(answer) as engine, proxy(engine.upstream()) as gateway:
            client = await RawClient.to(gateway)
            await client.send(b"HEAD /x HTTP/1.1\r\nHost: gw\r\n\r\n" + get("/y", "Connection: close\r\n"))
            raw = await client.rest()
            first, _, second = raw.partition(b"\r\n\r\n")
            assert b"Content-Length: 10" in first
            assert second.startswith(b"HTTP/1.1 200")
            assert second.endswith(b"0123456789")
            await client.close()

    run(body())


def test_heads_carry_what_they_should_and_nothing_of_the_other_hop() -> None:
    reply = (
        b"HTTP/1.1 200 OK\r\nConnection: keep-alive, X-Hop\r\nX-Hop: 1\r\nKeep-Alive: timeout=5\r\n"
        b"X-Kept: 2\r\nSet-Cookie: a=1\r\n"
        b"Set-Cookie: b=2\r\nX-Request-Id: engines\r\nContent-Length: 2\r\n\r\nok"
    )

    async def body() -> None:
        async with scripted(reply) as engine, proxy(engine.upstream()) as gateway:
            response = await ask(
                gateway,
                get(
                    "/x",
                    "Connection: X-Mine\r\nX-Mine: 1\r\nTE: trailers\r\nX-Forwarded-For: 1.2.3.4\r\n"
                    "Authorization: Bearer k\r\nX-Request-Id: a b\r\nProxy-Authorization: x\r\n",
                ),
            )
            heard = engine.heard[0].headers
            assert heard["x-forwarded-for"] == "1.2.3.4, 127.0.0.1"
            assert heard["authorization"] == "Bearer k"
            assert heard["host"] == "gw"
            assert not {"connection", "x-mine", "te", "proxy-authorization"} & heard.keys()
            assert heard["x-request-id"] not in {"a b", ""}  # unfit for a log line: replaced
            assert response.header("x-request-id") == heard["x-request-id"]
            names = [name.lower() for name, _ in response.headers]
            assert names.count("set-cookie") == 2
            assert "x-kept" in names
            assert not {"x-hop", "keep-alive", "connection"} & set(names)

    run(body())


def test_an_engine_that_ends_its_answer_by_closing() -> None:
    async def answer(_heard: Heard, line: Line) -> None:
        await line.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\n\r\nall of it")
        line.writer.close()

    async def body() -> None:
        async with scripted(answer) as engine, proxy(engine.upstream()) as gateway:
            response = await ask(gateway, get("/x"))
            assert response.complete
            assert response.body == b"all of it"

    run(body())


def test_connections_are_kept_on_both_sides() -> None:
    async def body() -> None:
        async with scripted(WHOLE_STREAM) as engine, proxy(engine.upstream()) as gateway:
            client = await RawClient.to(gateway)
            for _ in range(5):
                await client.send(post(STREAM))
                assert (await client.response()).complete
            await client.close()
            assert len(engine.heard) == 5
            assert engine.connections == 1

    run(body())


def test_pipelined_requests_are_answered_in_order() -> None:
    async def answer(heard: Heard, line: Line) -> None:
        await asyncio.sleep(0.02 if heard.target == "/0" else 0)
        await line.write(answer_of(heard.target.encode()))

    async def body() -> None:
        async with scripted(answer) as engine, proxy(engine.upstream(), max_pipelined_bytes=300) as gateway:
            client = await RawClient.to(gateway)
            await client.send(get("/0") + post(b"body", "/1") + get("/rlgov/healthz"))
            for k in range(2, 60):
                await client.send(get(f"/{k}"))
            assert (await client.response()).body == b"/0"
            assert (await client.response()).body == b"/1"
            assert json.loads((await client.response()).body) == {"status": "ok"}
            assert [(await client.response()).body.decode() for _ in range(2, 60)] == [
                f"/{k}" for k in range(2, 60)
            ]
            await client.close()

    run(body())


def test_a_chunked_request_becomes_one_with_a_length() -> None:
    async def body() -> None:
        async with scripted(answer_of(b"ok")) as engine, proxy(engine.upstream()) as gateway:
            client = await RawClient.to(gateway)
            await client.send(b"POST /x HTTP/1.1\r\nHost: gw\r\nTransfer-Encoding: chunked\r\n\r\n")
            for piece in (b"hello ", b"world"):
                await client.send(chunk(piece))
                await asyncio.sleep(0)
            await client.send(b"0\r\nX-Trailer: 1\r\n\r\n")
            assert (await client.response()).body == b"ok"
            assert engine.heard[0].body == b"hello world"
            assert engine.heard[0].headers["content-length"] == "11"
            assert "x-trailer" not in engine.heard[0].headers
            await client.close()

    run(body())


def test_a_client_that_waits_for_leave_gets_it() -> None:
    async def body() -> None:
        async with scripted(answer_of(b"ok")) as engine, proxy(engine.upstream()) as gateway:
            client = await RawClient.to(gateway)
            await client.send(
                b"POST /x HTTP/1.1\r\nHost: gw\r\nExpect: 100-continue\r\nContent-Length: 3\r\n\r\n"
            )
            assert await client.reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
            await client.send(b"abc")
            assert (await client.response()).body == b"ok"
            assert "expect" not in engine.heard[0].headers
            await client.close()

    run(body())


def test_large_bodies_go_both_ways() -> None:
    large = bytes(range(256)) * 40_000  # 10 MB

    async def answer(heard: Heard, line: Line) -> None:
        await line.write(answer_of(heard.body, kind="application/octet-stream"))

    async def body() -> None:
        async with (
            scripted(answer) as engine,
            proxy(engine.upstream()) as gateway,
            aiohttp.ClientSession() as session,
            session.post(f"http://127.0.0.1:{gateway.port}/echo", data=io.BytesIO(large)) as response,
        ):
            assert await response.read() == large

    run(body())


def test_an_old_client_gets_its_stream_up_to_the_close() -> None:
    async def body() -> None:
        async with scripted(WHOLE_STREAM) as engine, proxy(engine.upstream()) as gateway:
            client = await RawClient.to(gateway)
            await client.send(post(STREAM, version="1.0"))
            head, _, rest = (await client.rest()).partition(b"\r\n\r\n")
            assert b"Transfer-Encoding" not in head
            assert rest == token() + token() + token(reason="length") + DONE
            await client.close()

    run(body())


def test_an_ordinary_streaming_client_reads_on_as_tokens_come() -> None:
    async def answer(_heard: Heard, line: Line) -> None:
        await line.write(STREAM_HEAD)
        for k in range(20):
            await line.write(chunk(token(str(k), "length" if k == 19 else None)))
            await asyncio.sleep(0.002)
        await line.write(chunk(usage(7, 20)), chunk(DONE), b"0\r\n\r\n")

    async def body() -> None:
        async with scripted(answer) as engine, proxy(engine.upstream()) as gateway:
            url = f"http://127.0.0.1:{gateway.port}/v1/completions"
            async with aiohttp.ClientSession() as session:

                async def one() -> list[str]:
                    async with session.post(url, json=STREAM) as response:
                        lines = [line async for line in response.content if line.strip()]
                    assert lines.pop() == DONE[:-1]
                    return [json.loads(line[6:])["choices"][0]["text"] for line in lines]

                answers = await asyncio.gather(*(one() for _ in range(30)))
            assert answers == [[str(k) for k in range(20)]] * 30
            closed = gateway.traffic(0).closed
            assert [record.outcome for record in closed] == [Outcome.SERVED] * 30
            assert {record.output_tokens for record in closed} == {20}
            assert gateway.in_flight("one") == 0

    run(body())


def test_it_also_runs_on_the_standard_loop() -> None:
    async def body() -> None:
        async with scripted(WHOLE_STREAM) as engine, proxy(engine.upstream()) as gateway:
            client = await RawClient.to(gateway)
            for _ in range(2):
                await client.send(post(STREAM))
                assert (await client.response()).complete
            await client.close()

    asyncio.run(body())
