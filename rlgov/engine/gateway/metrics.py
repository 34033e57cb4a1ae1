"""The gateway's own metrics, and the page that puts the engine's beside them."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Final

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

from rlgov.engine.samples import Outcome

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from prometheus_client.metrics_core import Metric
    from prometheus_client.registry import Collector

    from rlgov.engine.gateway.upstream import Pool, Upstream
    from rlgov.engine.gateway.wire import ResponseHead
    from rlgov.engine.samples import RequestRecord

CONTENT_TYPE: Final = b"text/plain; version=0.0.4; charset=utf-8"

_OK: Final = 200
_MAX_PAGE_BYTES: Final = 8 * 1024 * 1024


def _spaced(first: float, last: float, ratio: float) -> tuple[float, ...]:
    """Bucket bounds at equal ratios, to three digits."""
    bounds = [first]
    while bounds[-1] < last:
        bounds.append(float(f"{bounds[-1] * ratio:.3g}"))
    return tuple(bounds)


# Fine where objectives lie: neighbours are a fifth to a quarter apart, so a quantile is known that well.
_TTFT_BOUNDS_S: Final = _spaced(0.005, 120, 1.25)
_TPOT_BOUNDS_S: Final = _spaced(0.001, 2, 1.2)
_E2E_BOUNDS_S: Final = _spaced(0.02, 1000, 1.3)


class GatewayMetrics:
    """What is counted.

    Args:
        gauges: Reads the present values by name: see :class:`_Present`.
    """

    def __init__(self, gauges: Callable[[], dict[str, float]]) -> None:
        self._registry = CollectorRegistry(auto_describe=False)
        self._registry.register(_Present(gauges))
        prefix = "rlgov_gateway"
        requests = Counter(
            f"{prefix}_requests",
            "Generation requests that ended, by outcome.",
            ["outcome"],
            registry=self._registry,
        )
        self._requests: dict[Outcome, Counter] = {
            outcome: requests.labels(outcome.value) for outcome in Outcome if outcome is not Outcome.OPEN
        }
        self._redispatches = Counter(
            f"{prefix}_redispatches",
            "Generations sent again after an engine failed before their first token.",
            registry=self._registry,
        )
        self._prompt_tokens = Counter(
            f"{prefix}_prompt_tokens", "Prompt tokens of served requests.", registry=self._registry
        )
        self._output_tokens = Counter(
            f"{prefix}_output_tokens", "Output tokens of served requests.", registry=self._registry
        )
        self._ttft = Histogram(
            f"{prefix}_ttft_seconds",
            "Arrival to first token, of streams that were served.",
            buckets=_TTFT_BOUNDS_S,
            registry=self._registry,
        )
        self._tpot = Histogram(
            f"{prefix}_tpot_seconds",
            "Mean time per output token after the first, of streams that were served.",
            buckets=_TPOT_BOUNDS_S,
            registry=self._registry,
        )
        self._e2e = Histogram(
            f"{prefix}_e2e_seconds",
            "Arrival to end, of requests that were served.",
            buckets=_E2E_BOUNDS_S,
            registry=self._registry,
        )

    def add(self, collector: Collector) -> None:
        """Put another collector on the page."""
        self._registry.register(collector)

    def observe(self, record: RequestRecord) -> None:
        """Count a request that ended."""
        self._requests[record.outcome].inc()
        if record.dispatches > 1:
            self._redispatches.inc(record.dispatches - 1)
        if record.outcome is not Outcome.SERVED or record.finished_s is None:
            return
        self._e2e.observe(record.finished_s - record.arrival_s)
        self._prompt_tokens.inc(record.prompt_tokens or 0)
        tokens = record.output_tokens or 0
        self._output_tokens.inc(tokens)
        if record.first_token_s is not None:
            self._ttft.observe(record.first_token_s - record.arrival_s)
            if tokens > 1 and record.last_token_s is not None:
                self._tpot.observe((record.last_token_s - record.first_token_s) / (tokens - 1))

    def page(self, engine_page: bytes | None) -> bytes:
        """Everything in Prometheus' text format, followed by the engine's page where there is one."""
        own: bytes = generate_latest(self._registry)
        if engine_page is None:
            return own
        return own + _without(engine_page, _families(own))


class _Present:
    """Values that are read when somebody asks."""

    _GAUGES: Final = {
        "held_requests": "Requests that wait for an engine or for a slot.",
        "in_flight_requests": "Requests sent to an engine and not finished.",
        "connections": "Client connections.",
        "buffered_bytes": "Request bodies in memory.",
        "routed": "1 when an engine takes requests.",
    }
    _COUNTERS: Final = {
        "received_bytes": "Bytes read from clients.",
        "sent_bytes": "Bytes written to clients.",
        "refused_messages": "What clients sent that was no usable request.",
    }

    def __init__(self, read: Callable[[], dict[str, float]]) -> None:
        self._read = read

    def collect(self) -> Iterator[Metric]:
        """The present values."""
        values = self._read()
        for name, help_text in self._GAUGES.items():
            yield GaugeMetricFamily(f"rlgov_gateway_{name}", help_text, value=values[name])
        for name, help_text in self._COUNTERS.items():
            yield CounterMetricFamily(f"rlgov_gateway_{name}", help_text, value=values[name])


def _families(page: bytes) -> set[bytes]:
    """Names of the families on a page."""
    return {line.split(b" ", 3)[2] for line in page.splitlines() if line.startswith(b"# TYPE ")}


def _without(page: bytes, families: set[bytes]) -> bytes:
    """A page less the families that are ours already: a family may stand on a page only once."""
    if families.isdisjoint(_families(page)):
        return page if page.endswith(b"\n") else page + b"\n"
    kept = []
    skipping = False
    for line in page.splitlines(keepends=True):
        if line.startswith((b"# HELP ", b"# TYPE ")):
            skipping = line.split(b" ", 3)[2].strip() in families
        if not skipping:
            kept.append(line)
    return b"".join(kept)


class _Page:
    """Receives a page."""

    def __init__(self, done: asyncio.Future[bytes | None]) -> None:
        self._done = done
        self._parts: list[bytes] = []
        self._size_bytes = 0
        self._usable = False

    def on_head(self, head: ResponseHead) -> None:
        """Only plain text with status 200 is a page: an error page would spoil ours."""
        self._usable = head.status == _OK and head.header(b"content-type").startswith(b"text/plain")

    def on_body(self, data: bytes) -> None:
        """Some of the page."""
        self._size_bytes += len(data)
        if self._size_bytes > _MAX_PAGE_BYTES:
            self._usable = False
        elif self._usable:
            self._parts.append(data)

    def on_end(self) -> None:
        """The whole page."""
        if not self._done.done():
            self._done.set_result(b"".join(self._parts) if self._usable else None)

    def on_lost(self, why: str, *, untouched: bool) -> None:
        """No page."""
        del why, untouched
        if not self._done.done():
            self._done.set_result(None)


async def fetch_page(pool: Pool, upstream: Upstream, timeout_s: float) -> bytes | None:
    """The engine's own metrics page; None when it cannot be had in time, or is none."""
    connection = None
    done: asyncio.Future[bytes | None] = asyncio.get_running_loop().create_future()
    try:
        async with asyncio.timeout(timeout_s):
            connection = await pool.connect(upstream)
            request = b"GET /metrics HTTP/1.1\r\nHost: %b\r\nAccept: text/plain\r\n\r\n" % upstream.authority
            connection.send(_Page(done), (request,), head_request=False)
            return await done
    except OSError:  # TimeoutError is one
        return None
    finally:
        if connection is not None and connection.busy:
            connection.abort()
