"""The scraper against real servers that misbehave: it never waits, never believes, always says why."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from rlgov.clock import SystemClock, VirtualClock
from rlgov.engine.telemetry.scraper import Reading, Scraper
from rlgov.errors import ConfigError
from tests.fakes.metrics_page import Seen, render

PATIENCE_S = 60.0  # for a loaded machine; nothing waits so long when it works
Answer = Callable[[BaseHTTPRequestHandler], None]


class Server:
    """Answers every GET with ``answer``, which a test may change."""

    def __init__(self) -> None:
        self.answer: Answer = whole(render())
        self.paths: list[str] = []
        self.released = threading.Event()  # lets answers that hang go at the end
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:  # the name the base class calls
                outer.paths.append(self.path)
                self.close_connection = True
                outer.answer(self)

            def log_message(self, *_: object) -> None:
                """Nothing: tests are quiet."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = False
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05})
        self._thread.start()
        self.url = f"http://127.0.0.1:{self._server.server_port}/metrics"

    def close(self) -> None:
        self.released.set()
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


def whole(text: str, status: int = 200, **headers: str) -> Answer:
    def answer(handler: BaseHTTPRequestHandler) -> None:
        body = text.encode()
        handler.send_response(status)
        handler.send_header("Content-Length", str(len(body)))
        for name, value in headers.items():
            handler.send_header(name.replace("_", "-"), value)
        handler.end_headers()
        handler.wfile.write(body)

    return answer


def written(head: bytes, *chunks: bytes) -> Answer:
    """Raw bytes, then the connection is closed."""

    def answer(handler: BaseHTTPRequestHandler) -> None:
        try:
            handler.wfile.write(head)
            for chunk in chunks:
                handler.wfile.write(chunk)
        except OSError:
            pass  # the client has seen enough

    return answer


@pytest.fixture
def server() -> Iterator[Server]:
    one = Server()
    try:
        yield one
    finally:
        one.close()


@contextmanager
def scraping(url: str, **settings: float) -> Iterator[Scraper]:
    scraper = Scraper(url, SystemClock(), engine_id="e", **settings)  # type: ignore[arg-type]  # by name
    try:
        yield scraper
    finally:
        scraper.close()


def test_the_thread_brings_samples_without_being_asked(server: Server) -> None:
    with scraping(server.url, interval_s=0.2, timeout_s=0.2, stale_after_s=PATIENCE_S) as scraper:
        assert scraper.latest().blind
        assert scraper.latest().age_s == math.inf
        scraper.start()
        scraper.start()  # once is enough
        first = wait_for(scraper, lambda: scraper.latest().sample is not None)
        assert first.sample is not None
        assert (first.sample.running, first.blind, first.failure) == (3, False, "")
        server.answer = whole(render({"0": Seen(running=9)}))
        later = wait_for(scraper, lambda: (s := scraper.latest().sample) is not None and s.running == 9)
        assert later.sample is not None
        assert later.sample.at_s > first.sample.at_s
    assert set(server.paths) == {"/metrics"}


def wait_for(scraper: Scraper, condition: Callable[[], bool]) -> Reading:
    clock = SystemClock()
    until_s = clock.monotonic_s() + PATIENCE_S
    while not condition():
        assert clock.monotonic_s() < until_s, scraper.latest()
        clock.sleep_s(0.02)
    return scraper.latest()


CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
ENDLESS = b"HTTP/1.1 200 OK\r\nContent-Length: 100000000\r\n\r\n"
PAGE = render().encode()


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (whole(""), "empty"),
        (whole("<html>sign in</html>\n"), "HTML"),
        (whole("up 1\n"), "not vLLM's"),
        (whole(render(), status=500), "status 500"),
        (whole(render(), status=404), "status 404"),
        (whole("", status=302, Location="http://127.0.0.1:9/metrics"), "status 302"),
        (whole(render(), Content_Encoding="gzip"), "compressed"),
        (written(ENDLESS, *[b"x 1\n" * 4096] * 6000), "more than 1000000 bytes"),
        (written(CHUNKED, *[b"4000\r\n" + b"x 1\n" * 4096 + b"\r\n"] * 6000), "more than 1000000 bytes"),
        (written(b"HTTP/1.1 200 OK\r\nContent-Length: 99999\r\n\r\n", PAGE), "cannot be read"),
        (written(CHUNKED, b"%x\r\n" % len(PAGE), PAGE[:5000]), "cannot be read"),
        (written(b"HTTP/1.1 200 OK\r\n\r\n", PAGE[: PAGE.index(b"# HELP vllm:time_to")]), "was cut"),
        (written(b"HTTP/1.1 200 OK\r\n\r\n", b"\xff\xfe\n"), "UTF-8"),
        (written(b"SSH-2.0-OpenSSH\r\n"), "cannot be read"),
        (written(b""), "cannot be read"),
    ],
)
def test_a_bad_answer_is_named_and_the_last_good_sample_stays(
    server: Server, answer: Answer, said: str
) -> None:
    scraper = Scraper(
        server.url,
        SystemClock(),
        interval_s=PATIENCE_S,
        timeout_s=PATIENCE_S,
        stale_after_s=PATIENCE_S,
        max_bytes=1_000_000,
    )
    assert scraper.scrape()
    good = scraper.latest().sample
    server.answer = answer
    assert not scraper.scrape()
    assert not scraper.scrape()
    seen = scraper.latest()
    assert seen.sample == good
    assert seen.failures == 2
    assert said in seen.failure
    assert "127.0.0.1" in seen.failure or "metrics page" in seen.failure
    server.answer = whole(render())
    assert scraper.scrape()
    assert (scraper.latest().failure, scraper.latest().failures) == ("", 0)
    assert set(server.paths) == {"/metrics"}


def test_a_server_that_does_not_answer_is_given_up(server: Server) -> None:
    server.answer = lambda _handler: (server.released.wait(PATIENCE_S), None)[1]
    with scraping(server.url, interval_s=1.0, timeout_s=0.2) as scraper:
        assert not scraper.scrape()
        assert "did not answer within 0.2 s" in scraper.latest().failure


def test_a_page_that_drips_is_given_up(server: Server) -> None:
    def drip(handler: BaseHTTPRequestHandler) -> None:
        handler.wfile.write(ENDLESS)
        while not server.released.wait(0.02):
            try:
                handler.wfile.write(b"x 1\n")
            except OSError:
                return

    server.answer = drip
    with scraping(server.url, interval_s=1.0, timeout_s=0.3) as scraper:
        assert not scraper.scrape()
        assert "did not answer within 0.3 s" in scraper.latest().failure


def test_nothing_listens(server: Server) -> None:
    url = server.url
    server.close()
    with scraping(url) as scraper:
        assert not scraper.scrape()
        assert "check the address and that the engine runs" in scraper.latest().failure


def test_an_old_sample_is_blind(server: Server) -> None:
    clock = VirtualClock(100.0)
    scraper = Scraper(server.url, clock, interval_s=PATIENCE_S, stale_after_s=3.0)
    assert scraper.scrape()
    assert not scraper.latest().blind
    clock.advance_s(3.0)
    assert not scraper.latest().blind
    clock.advance_s(0.5)
    seen = scraper.latest()
    assert (seen.blind, seen.age_s) == (True, 3.5)
    clock.step_wall_s(-3600.0)  # wall time does not matter
    assert scraper.scrape()
    assert not scraper.latest().blind


def test_counters_that_stand_still_under_load_are_a_stall(server: Server) -> None:
    scraper = Scraper(server.url, SystemClock(), interval_s=PATIENCE_S)
    frozen = whole(render())
    server.answer = frozen
    for _ in range(4):
        assert scraper.scrape()
    assert scraper.latest().stalled
    server.answer = whole(render({"0": Seen(generated_tokens=2000)}))
    assert scraper.scrape()
    assert not scraper.latest().stalled


@pytest.mark.parametrize("tells_cpu_time", [True, False])
def test_a_page_that_a_cache_hands_out_again_and_again_is_noticed(
    server: Server, *, tells_cpu_time: bool
) -> None:
    """An idle engine, so its counters say nothing; the CPU time of a real one moves with every answer."""

    def page(cpu_s: float) -> Answer:
        idle = render({"0": Seen(running=0, waiting=0)})
        return whole(idle + f"process_cpu_seconds_total {cpu_s}\n" if tells_cpu_time else idle)

    clock = VirtualClock(100.0)
    scraper = Scraper(server.url, clock, interval_s=PATIENCE_S, stale_after_s=3.0)
    for second in range(20):
        server.answer = page(second / 100)
        assert scraper.scrape()
        clock.advance_s(1.0)
    taken = []
    for _ in range(30):  # the last page, for ever
        taken.append(scraper.scrape())
        clock.advance_s(1.0)
    assert all(taken) is not tells_cpu_time
    assert taken[:16] == [True] * 16
    seen = scraper.latest()
    assert seen.blind is tells_cpu_time
    if tells_cpu_time:
        assert "one and the same page" in seen.failure
        server.answer = page(9.0)
        assert scraper.scrape()
        assert not scraper.latest().blind


def test_proxies_of_the_environment_are_not_used(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.setenv("no_proxy", "")
    scraper = Scraper(server.url, SystemClock(), interval_s=PATIENCE_S)
    assert scraper.scrape(), scraper.latest().failure


@pytest.mark.parametrize("url", ["file:///etc/passwd", "ftp://x/metrics", "127.0.0.1:8000/metrics", ""])
def test_addresses_that_are_no_web_pages_are_refused(url: str) -> None:
    with pytest.raises(ConfigError, match="http://HOST:PORT/metrics"):
        Scraper(url, SystemClock())


def test_a_timeout_longer_than_the_interval_is_refused() -> None:
    with pytest.raises(ConfigError, match="at most the interval"):
        Scraper("http://127.0.0.1:1/metrics", SystemClock(), interval_s=1.0, timeout_s=1.5)


def test_closing_ends_the_thread(server: Server) -> None:
    with Scraper(server.url, SystemClock(), interval_s=0.05) as scraper:
        wait_for(scraper, lambda: scraper.latest().sample is not None)
    assert not any("scrape" in thread.name for thread in threading.enumerate())
    scraper.close()
