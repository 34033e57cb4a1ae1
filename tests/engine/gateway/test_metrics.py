"""The metrics page: valid, complete, and with the engine's beside it."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families

from rlgov.engine.gateway.ledger import Entry, Ledger
from rlgov.engine.gateway.metrics import GatewayMetrics
from rlgov.engine.samples import Outcome, RequestRecord
from tests.fakes.scripted import (
    WHOLE_STREAM,
    Heard,
    Line,
    RawClient,
    answer_of,
    ask,
    eventually,
    get,
    metric,
    post,
    proxy,
    run,
    scripted,
)

STREAM = {"prompt": "x", "stream": True}
ENGINE_PAGE = b'# HELP vllm:x Some.\n# TYPE vllm:x gauge\nvllm:x{engine="0"} 3.0\n'


def families(page: bytes) -> dict[str, Metric]:
    """As Prometheus reads it: raises for a page it would refuse; a family may stand there once."""
    found = list(text_string_to_metric_families(page.decode()))
    names = [family.name for family in found]
    assert len(names) == len(set(names))
    return dict(zip(names, found, strict=True))


def test_the_page_counts_and_brings_the_engines_page() -> None:
    async def answer(heard: Heard, line: Line) -> None:
        await line.write(
            answer_of(ENGINE_PAGE, kind="text/plain; version=0.0.4")
            if heard.target == "/metrics"
            else WHOLE_STREAM
        )

    async def body() -> None:
        async with scripted(answer) as engine, proxy(engine.upstream()) as gateway:
            for _ in range(3):
                await ask(gateway, post(STREAM))
            response = await ask(gateway, get("/metrics"))
            assert response.header("content-type").startswith("text/plain; version=0.0.4")
            page = response.body
            assert families(page)["vllm:x"].samples[0].value == 3.0
            assert metric(page, 'rlgov_gateway_requests_total{outcome="served"}') == 3
            assert metric(page, "rlgov_gateway_output_tokens_total") == 9
            assert metric(page, "rlgov_gateway_prompt_tokens_total") == 21
            assert metric(page, "rlgov_gateway_ttft_seconds_count") == 3
            assert metric(page, "rlgov_gateway_tpot_seconds_count") == 3
            assert metric(page, "rlgov_gateway_routed") == 1
            assert metric(page, "rlgov_gateway_sent_bytes_total") > 0
            head = await _head(gateway.port)
            assert head.startswith(b"HTTP/1.1 200")
            assert head.endswith(b"\r\n\r\n")

    run(body())


async def _head(port: int) -> bytes:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(b"HEAD /metrics HTTP/1.1\r\nHost: gw\r\nConnection: close\r\n\r\n")
    data = await reader.read()
    writer.close()
    return data


@pytest.mark.parametrize(
    "bad",
    [
        answer_of(b"<html>", kind="text/html"),
        answer_of(b"no", 500, "text/plain"),
        answer_of(ENGINE_PAGE, kind="text/plain")[:-10],
        b"",
        b"what?",
        answer_of(b"x" * 9_000_000, kind="text/plain"),
    ],
)
def test_an_engine_page_that_cannot_be_had_spoils_nothing(bad: bytes) -> None:
    async def answer(_heard: Heard, line: Line) -> None:
        await line.write(bad)
        await asyncio.sleep(100)

    async def body() -> None:
        async with scripted(answer) as engine, proxy(engine.upstream(), metrics_timeout_s=0.1) as gateway:
            response = await ask(gateway, get("/metrics"))
            assert response.status == 200
            assert "rlgov_gateway_held_requests" in families(response.body)
            assert not any(name.startswith("vllm") for name in families(response.body))

    run(body())


def test_without_an_engine_there_is_a_page_too() -> None:
    async def body() -> None:
        async with proxy(None) as gateway:
            page = (await ask(gateway, get("/metrics"))).body
            assert metric(page, "rlgov_gateway_routed") == 0

    run(body())


def test_a_scraper_that_leaves_is_no_trouble() -> None:
    async def answer(_heard: Heard, line: Line) -> None:
        await line.write(b"")
        await asyncio.sleep(100)

    async def body() -> None:
        async with scripted(answer) as engine, proxy(engine.upstream()) as gateway:
            client = await RawClient.to(gateway)
            await client.send(get("/metrics"))
            await eventually(lambda: engine.heard)
            await client.close()
            await eventually(lambda: not gateway._tasks)
            await eventually(lambda: engine.abandoned == 1)

    run(body())


class Extra:
    def collect(self) -> Iterator[Metric]:
        yield GaugeMetricFamily("rlgov_extra", "More.", value=5)


def test_other_parts_put_theirs_on_the_page() -> None:
    async def body() -> None:
        async with proxy(None) as gateway:
            gateway.add_metrics(Extra())
            assert metric((await ask(gateway, get("/metrics"))).body, "rlgov_extra") == 5

    run(body())


def test_a_family_that_both_sides_have_stands_there_once() -> None:
    metrics = GatewayMetrics(lambda: dict.fromkeys(_names(), 1.0))
    clash = (
        b"# HELP rlgov_gateway_routed x\n# TYPE rlgov_gateway_routed gauge\nrlgov_gateway_routed 7\n"
        + ENGINE_PAGE
    )
    page = metrics.page(clash)
    assert metric(page, "rlgov_gateway_routed") == 1
    assert "vllm:x" in families(page)


def _names() -> list[str]:
    return ["held_requests", "in_flight_requests", "connections", "buffered_bytes", "routed",
            "received_bytes", "sent_bytes", "refused_messages"]  # fmt: skip


def closed(ledger: Ledger, count: int) -> None:
    for k in range(count):
        entry = Entry(str(k), 0.0)
        ledger.enter(entry)
        ledger.close(entry, Outcome.SERVED, 1.0)


def ids(records: tuple[RequestRecord, ...]) -> list[str]:
    return [record.request_id for record in records]


def test_a_cursor_brings_what_is_new_and_says_what_was_lost() -> None:
    ledger = Ledger(5)
    closed(ledger, 3)
    first = ledger.traffic(0, 2.0)
    assert ids(first.closed) == ["0", "1", "2"]
    assert ledger.traffic(first.cursor, 2.0).closed == ()
    closed(ledger, 7)
    late = ledger.traffic(first.cursor, 2.0)
    assert ids(late.closed) == ["2", "3", "4", "5", "6"]
    assert (late.dropped, late.cursor) == (2, 10)


def test_a_cursor_of_another_gateway_starts_anew() -> None:
    ledger = Ledger(5)
    closed(ledger, 3)
    assert len(ledger.traffic(99, 0.0).closed) == 3


def test_open_requests_are_there_in_order() -> None:
    ledger = Ledger(5)
    entries = [Entry(str(k), float(k)) for k in range(3)]
    for entry in entries:
        ledger.enter(entry)
    ledger.close(entries[1], Outcome.FAILED, 5.0)
    traffic = ledger.traffic(0, 6.0)
    assert ids(traffic.open) == ["0", "2"]
    assert [record.outcome for record in traffic.closed] == [Outcome.FAILED]
