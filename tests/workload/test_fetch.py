from __future__ import annotations

import hashlib
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from rlgov.errors import TraceError
from rlgov.workload.fetch import CATALOGUE, FetchedTrace, PublicTrace, fetch_trace

BODY = b"arrival_s,prompt_tokens,output_tokens\n" + b"".join(b"%d,100,10\n" % i for i in range(30_000))
SHA256 = hashlib.sha256(BODY).hexdigest()


@dataclass
class Behaviour:
    """How the server behaves, and what it was asked."""

    body: bytes = BODY
    ranges: bool = True
    etag: str | None = None
    statuses: list[int] = field(default_factory=list)  # served first, one a request
    cut_after: list[int] = field(
        default_factory=list
    )  # bytes sent before the connection breaks, one a request
    asked: list[str | None] = field(default_factory=list)  # the Range header of each request
    on_request: list[bytes] = field(default_factory=list)  # the body changes to these, one a request


class Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        plan: Behaviour = self.server.plan  # type: ignore[attr-defined]  # set by the fixture
        wanted = self.headers.get("Range")
        plan.asked.append(wanted)
        if plan.on_request:
            plan.body = plan.on_request.pop(0)
            plan.etag = f'"{hashlib.sha256(plan.body).hexdigest()[:8]}"'
        if plan.statuses:
            self.send_error(plan.statuses.pop(0))
            return
        start = 0
        match = re.fullmatch(r"bytes=(\d+)-", wanted or "")
        unchanged = self.headers.get("If-Range") in {None, plan.etag}
        if match and plan.ranges and unchanged:
            start = int(match[1])
            if start >= len(plan.body):
                self.send_response(416)
                self.send_header("Content-Range", f"bytes */{len(plan.body)}")
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{len(plan.body) - 1}/{len(plan.body)}")
        else:
            self.send_response(200)
        rest = plan.body[start:]
        self.send_header("Content-Length", str(len(rest)))
        if plan.etag:
            self.send_header("ETag", plan.etag)
        self.end_headers()
        if plan.cut_after:
            rest = rest[: plan.cut_after.pop(0)]
            self.close_connection = True
        self.wfile.write(rest)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002  # the base class's name
        """Keep the test output clean."""


@pytest.fixture
def server() -> Iterator[tuple[Behaviour, str]]:
    plan = Behaviour()
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        http.plan = plan  # type: ignore[attr-defined]  # read by the handler
        thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield plan, f"http://127.0.0.1:{http.server_address[1]}/trace.csv"
        finally:
            http.shutdown()
            thread.join()


def get(url: str, folder: Path, sha256: str | None = SHA256, **options: object) -> FetchedTrace:
    entry = PublicTrace("t", url, "trace.csv", "tidy", sha256, "CC0", "nobody")
    values = {"first_wait_s": 0.0, "attempts": 4} | options
    return fetch_trace("t", folder, catalogue={"t": entry}, **values)  # type: ignore[arg-type]  # test options


def test_a_trace_is_fetched_and_checked(server: tuple[Behaviour, str], tmp_path: Path) -> None:
    _, url = server
    seen: list[tuple[int, int | None]] = []
    fetched = get(url, tmp_path / "new", progress=lambda done, total: seen.append((done, total)))
    assert fetched.path.read_bytes() == BODY
    assert (fetched.sha256, fetched.verified, fetched.downloaded) == (SHA256, True, True)
    assert seen[-1] == (len(BODY), len(BODY))
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["trace.csv"]


def test_a_trace_that_is_there_is_not_fetched_again(server: tuple[Behaviour, str], tmp_path: Path) -> None:
    plan, url = server
    get(url, tmp_path)
    again = get(url, tmp_path)
    assert not again.downloaded
    assert again.verified
    assert len(plan.asked) == 1


def test_a_cut_connection_is_taken_up_where_it_broke(server: tuple[Behaviour, str], tmp_path: Path) -> None:
    plan, url = server
    plan.cut_after = [100_000, 50_000]
    assert get(url, tmp_path).path.read_bytes() == BODY
    assert plan.asked[0] is None
    assert len(plan.asked) == 3
    starts = [int(re.sub(r"\D", "", asked or "")) for asked in plan.asked[1:]]
    assert 0 < starts[0] < starts[1] <= 150_000


def test_a_later_call_resumes(server: tuple[Behaviour, str], tmp_path: Path) -> None:
    plan, url = server
    (tmp_path / "trace.csv.part").write_bytes(BODY[:1000])
    assert get(url, tmp_path).path.read_bytes() == BODY
    assert plan.asked == ["bytes=1000-"]


def test_a_finished_part_needs_no_more_bytes(server: tuple[Behaviour, str], tmp_path: Path) -> None:
    plan, url = server
    (tmp_path / "trace.csv.part").write_bytes(BODY)
    assert get(url, tmp_path).path.read_bytes() == BODY
    assert len(plan.asked) == 1


@pytest.mark.parametrize("stale", [b"x" * 500, b"x" * (len(BODY) + 5)], ids=["other version", "too long"])
def test_a_stale_part_is_dropped(server: tuple[Behaviour, str], tmp_path: Path, stale: bytes) -> None:
    _, url = server
    (tmp_path / "trace.csv.part").write_bytes(stale)
    assert get(url, tmp_path).path.read_bytes() == BODY


def test_without_a_hash_a_part_of_an_earlier_call_is_not_trusted(
    server: tuple[Behaviour, str], tmp_path: Path
) -> None:
    plan, url = server
    (tmp_path / "trace.csv.part").write_bytes(b"x" * 500)
    assert get(url, tmp_path, sha256=None).path.read_bytes() == BODY
    assert plan.asked == [None]


def test_a_server_without_ranges_sends_all_again(server: tuple[Behaviour, str], tmp_path: Path) -> None:
    plan, url = server
    plan.ranges = False
    plan.cut_after = [70_000]
    assert get(url, tmp_path).path.read_bytes() == BODY
    assert plan.asked[1] is not None


def test_a_file_that_changes_between_attempts_is_not_stitched(
    server: tuple[Behaviour, str], tmp_path: Path
) -> None:
    plan, url = server
    newer = BODY.replace(b",100,", b",200,")
    plan.on_request = [BODY, newer]
    plan.cut_after = [70_000]
    assert get(url, tmp_path, sha256=None).path.read_bytes() == newer


def test_a_wrong_hash_is_refused_and_nothing_is_kept(server: tuple[Behaviour, str], tmp_path: Path) -> None:
    _, url = server
    with pytest.raises(TraceError, match=f"sha256 is {SHA256}, expected 0000"):
        get(url, tmp_path, sha256="0" * 64)
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_file_on_disk_is_refused(server: tuple[Behaviour, str], tmp_path: Path) -> None:
    _, url = server
    (tmp_path / "trace.csv").write_bytes(BODY[:-5])
    with pytest.raises(TraceError, match="move the file away"):
        get(url, tmp_path)


def test_an_unknown_hash_is_said_loudly(
    server: tuple[Behaviour, str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    _, url = server
    fetched = get(url, tmp_path, sha256=None)
    assert not fetched.verified
    assert "UNVERIFIED" in caplog.text
    assert SHA256 in caplog.text


@pytest.mark.parametrize("status", [404, 403, 410])
def test_a_missing_file_is_not_asked_for_twice(
    server: tuple[Behaviour, str], tmp_path: Path, status: int
) -> None:
    plan, url = server
    plan.statuses = [status] * 9
    with pytest.raises(TraceError, match=f"HTTP {status}"):
        get(url, tmp_path)
    assert len(plan.asked) == 1
    assert list(tmp_path.iterdir()) == []


def test_a_busy_server_is_asked_again(server: tuple[Behaviour, str], tmp_path: Path) -> None:
    plan, url = server
    plan.statuses = [503, 429]
    assert get(url, tmp_path).path.read_bytes() == BODY


def test_a_server_that_stays_busy_is_given_up(server: tuple[Behaviour, str], tmp_path: Path) -> None:
    plan, url = server
    plan.statuses = [503] * 9
    with pytest.raises(TraceError, match="gave up after 4 attempts"):
        get(url, tmp_path)
    assert len(plan.asked) == 4


def test_a_connection_that_always_breaks_leaves_its_part(
    server: tuple[Behaviour, str], tmp_path: Path
) -> None:
    plan, url = server
    plan.cut_after = [70_000] * 3 + [10]
    with pytest.raises(TraceError, match="run again to go on from there"):
        get(url, tmp_path)
    part = tmp_path / "trace.csv.part"
    assert BODY.startswith(part.read_bytes())
    assert part.stat().st_size > 70_000
    assert get(url, tmp_path).path.read_bytes() == BODY


def test_a_page_in_place_of_the_trace_is_refused(server: tuple[Behaviour, str], tmp_path: Path) -> None:
    plan, url = server
    plan.body = b"<html><body>Please log in</body></html>"
    with pytest.raises(TraceError, match="what came is no trace"):
        get(url, tmp_path, sha256=None)
    assert list(tmp_path.iterdir()) == []


def test_a_trace_of_another_kind_is_refused(server: tuple[Behaviour, str], tmp_path: Path) -> None:
    plan, url = server
    plan.body = b"TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46.68,1,1\n"
    with pytest.raises(TraceError, match="expected a trace of kind tidy, got azure"):
        get(url, tmp_path, sha256=None)


def test_too_large_a_file_is_refused(server: tuple[Behaviour, str], tmp_path: Path) -> None:
    _, url = server
    with pytest.raises(TraceError, match="larger than 1000 bytes"):
        get(url, tmp_path, max_bytes=1000)
    assert list(tmp_path.iterdir()) == []


def test_nobody_listening_is_said(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match="gave up after 2 attempts"):
        get("http://127.0.0.1:9/trace.csv", tmp_path, attempts=2)


def test_an_unknown_name_lists_the_known(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match="azure-code-2023"):
        fetch_trace("azure-code-2032", tmp_path)


@pytest.mark.parametrize("name", CATALOGUE)
def test_the_catalogue_is_complete(name: str) -> None:
    entry = CATALOGUE[name]
    assert entry.name == name
    assert entry.url.startswith("https://")
    assert entry.sha256 is None or re.fullmatch("[0-9a-f]{64}", entry.sha256)
    assert entry.licence
    assert entry.citation
    assert Path(entry.file_name).name == entry.file_name
