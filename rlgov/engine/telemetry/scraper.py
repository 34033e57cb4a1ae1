"""Reads an engine's metrics page again and again in a thread, so that nobody waits for the network."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Self
from urllib.parse import urlsplit

import requests
from urllib3.exceptions import HTTPError

from rlgov.engine.telemetry.names import PROCESS_CPU
from rlgov.engine.telemetry.page import MAX_PAGE_BYTES, sample_from_page
from rlgov.engine.telemetry.progress import Progress
from rlgov.errors import ConfigError, TelemetryError

if TYPE_CHECKING:
    from types import TracebackType

    from rlgov.clock import Clock
    from rlgov.engine.samples import EngineSample

TIMEOUT_SHARE: Final = 0.5
"""Of the interval: an answer that takes longer is given up, so that scrapes never pile up."""
STALE_AFTER_INTERVALS: Final = 3.0
SAME_PAGES: Final = 24
"""So many answers cost a process CPU time that shows on its page. The smallest server there is was seen to
give 16 equal ones."""
_CHUNK_BYTES: Final = 64 * 1024


@dataclass(frozen=True, slots=True)
class Reading:
    """The last good sample and how far it can be trusted."""

    sample: EngineSample | None  # None before the first good one
    age_s: float  # infinite before the first one
    blind: bool  # too old to act on
    stalled: bool  # has work, and no counter moves
    failures: int  # in a row, since the last good sample
    failure: str  # why the last scrape failed; empty when it did not


class Scraper:
    """Scrapes one address once an interval, in a daemon thread.

    Only the given address is asked: redirects are not followed, proxies and credentials of the environment
    are not used, and a body is read up to ``max_bytes``.

    Args:
        url: The metrics page, such as ``http://127.0.0.1:8000/metrics``.
        clock: Dates the samples.
        engine_id: Name of the engine in its samples; by default the address.
        interval_s: Time from one scrape to the next.
        timeout_s: For a whole answer; by default half the interval, and never longer than it.
        stale_after_s: Age from which the last sample counts as blind; by default three intervals.
        max_bytes: Longest body.
    """

    def __init__(
        self,
        url: str,
        clock: Clock,
        *,
        engine_id: str = "",
        interval_s: float = 1.0,
        timeout_s: float | None = None,
        stale_after_s: float | None = None,
        max_bytes: int = MAX_PAGE_BYTES,
    ) -> None:
        timeout_s = TIMEOUT_SHARE * interval_s if timeout_s is None else timeout_s
        if not 0 < timeout_s <= interval_s:
            raise ConfigError(
                f"the scrape timeout must be above 0 and at most the interval of {interval_s} s, "
                f"got {timeout_s} s"
            )
        parts = urlsplit(url)
        if parts.scheme not in {"http", "https"} or not parts.hostname:
            raise ConfigError(f"{url!r} is no address of a metrics page; use http://HOST:PORT/metrics")
        self._url = url
        self._clock = clock
        self._engine_id = engine_id or parts.netloc
        self._interval_s = interval_s
        self._timeout_s = timeout_s
        self._stale_after_s = STALE_AFTER_INTERVALS * interval_s if stale_after_s is None else stale_after_s
        self._max_bytes = max_bytes
        self._lock = threading.Lock()  # guards what follows
        self._sample: EngineSample | None = None
        self._failure = ""
        self._failures = 0
        self._progress = Progress()
        self._page = ""  # the last one, for as long as it has been the same
        self._same = 0  # answers
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Begin to scrape; does nothing when it has begun."""
        if self._thread is None:
            self._stop.clear()
            self._thread = threading.Thread(target=self._loop, name=f"scrape {self._engine_id}", daemon=True)
            self._thread.start()

    def close(self) -> None:
        """Stop; safe to call twice. Waits for a scrape in progress, for its timeout at the longest."""
        self._stop.set()
        thread, self._thread = self._thread, None
        if thread is not None:
            thread.join(2 * self._timeout_s + 1.0)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def latest(self) -> Reading:
        """What is known now; never waits for the network."""
        with self._lock:
            sample, failure, failures = self._sample, self._failure, self._failures
            stalled = self._progress.stalled
        age_s = float("inf") if sample is None else max(self._clock.monotonic_s() - sample.at_s, 0.0)
        return Reading(
            sample=sample,
            age_s=age_s,
            blind=age_s > self._stale_after_s,
            stalled=stalled,
            failures=failures,
            failure=failure,
        )

    def scrape(self) -> bool:
        """Read the page once, in the caller's thread, and keep it; returns whether it could be read."""
        at_s = self._clock.monotonic_s()
        try:
            page = self._fetch(at_s)
            sample = sample_from_page(page, at_s=at_s, engine_id=self._engine_id)
            self._refuse_a_copy(page)
        except TelemetryError as error:
            with self._lock:
                self._failure = str(error)
                self._failures += 1
            return False
        with self._lock:
            self._sample = sample
            self._failure = ""
            self._failures = 0
            self._progress.observe(sample)
        return True

    def _refuse_a_copy(self, page: str) -> None:
        """Raise TelemetryError for a page that somebody keeps and hands out again and again."""
        if page != self._page:
            self._page, self._same = page, 1
            return
        self._same += 1
        if f"\n{PROCESS_CPU} " in page and self._same > SAME_PAGES:
            raise TelemetryError(
                f"{self._url} gave one and the same page {self._same} times, CPU time included; a cache "
                "stands before the engine: give the engine's own address"
            )

    def _loop(self) -> None:
        while not self._stop.is_set():
            begin_s = self._clock.monotonic_s()
            self.scrape()
            self._stop.wait(max(self._interval_s - (self._clock.monotonic_s() - begin_s), 0.0))

    def _fetch(self, begin_s: float) -> str:
        """The page's text. Raises TelemetryError with the address and what to do."""
        try:
            with (
                requests.Session() as session,
                self._answer(session) as response,
            ):
                return self._body(response, begin_s)
        except requests.exceptions.Timeout as error:
            raise TelemetryError(self._slow()) from error
        except (requests.exceptions.RequestException, HTTPError, OSError) as error:
            raise TelemetryError(
                f"{self._url} cannot be read ({error}); check the address and that the engine runs"
            ) from error

    def _answer(self, session: requests.Session) -> requests.Response:
        session.trust_env = False  # no proxies, no credentials: the page lies where the operator said
        headers = {"Accept": "text/plain", "Accept-Encoding": "identity"}
        return session.get(
            self._url, headers=headers, timeout=self._timeout_s, stream=True, allow_redirects=False
        )

    def _body(self, response: requests.Response, begin_s: float) -> str:
        if response.status_code != requests.codes.ok:
            raise TelemetryError(
                f"{self._url} answered with status {response.status_code} instead of a metrics page; "
                "check the address (redirects are not followed)"
            )
        if response.headers.get("Content-Encoding", "identity") != "identity":
            raise TelemetryError(
                f"{self._url} sends a compressed page, which was not asked for; check what answers"
            )
        body = bytearray()
        while chunk := response.raw.read1(_CHUNK_BYTES):
            body += chunk
            if len(body) > self._max_bytes:
                raise TelemetryError(
                    f"{self._url} sends more than {self._max_bytes} bytes; "
                    "something else answers there, check the address"
                )
            if self._clock.monotonic_s() - begin_s > self._timeout_s:
                raise TelemetryError(self._slow())
        try:
            return body.decode("utf-8")
        except UnicodeDecodeError as error:
            raise TelemetryError(
                f"{self._url} sends no UTF-8 text ({error}); check what answers there"
            ) from error

    def _slow(self) -> str:
        return (
            f"{self._url} did not answer within {self._timeout_s} s; the engine is overloaded or hangs: "
            "look at its log, or scrape less often"
        )
