"""A server and a control socket, played by answers that the test writes."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar, Self

import pytest

from rlgov.clock import SystemClock
from rlgov.doctor import server as doctor_server
from rlgov.doctor.finding import Finding, Level
from rlgov.doctor.server import DEV_PATHS, check_control, check_url, listens_on_all
from rlgov.engine.samples import EngineInfo, StackState


class Answers(BaseHTTPRequestHandler):
    """GET answers of a path; OPTIONS is refused as FastAPI does."""

    protocol_version = "HTTP/1.1"
    pages: ClassVar[dict[str, tuple[int, str]]] = {}
    asked: ClassVar[list[str]] = []

    def do_GET(self) -> None:
        self._answer(*self.pages.get(self.path, (404, "")))

    def do_OPTIONS(self) -> None:
        self._answer(405 if self.path in self.pages else 404, "")

    def log_message(self, *_: Any) -> None:
        """Quiet."""

    def _answer(self, status: int, text: str) -> None:
        self.asked.append(f"{self.command} {self.path}")
        content = text.encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


Serve = Callable[..., str]


@pytest.fixture
def serve() -> Iterator[Serve]:
    """Starts a server with these pages and gives its URL."""
    started: list[ThreadingHTTPServer] = []

    def start(pages: dict[str, tuple[int, str]], host: str = "127.0.0.1") -> str:
        handler = type("Handler", (Answers,), {"pages": pages, "asked": []})
        server = ThreadingHTTPServer((host, 0), handler)
        started.append(server)
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return f"http://127.0.0.1:{server.server_port}"

    yield start
    for server in started:
        server.shutdown()
        server.server_close()


def _pages() -> dict[str, tuple[int, str]]:
    return {
        "/health": (200, ""),
        "/version": (200, '{"version": "0.32.0"}'),
        "/rlgov/v1/state": (401, ""),
    }


def _check(url: str) -> dict[str, Finding]:
    return {finding.check: finding for finding in check_url(url, SystemClock())}


def test_a_vllm_with_plugin_is_fine_but_for_the_metrics_it_lacks(serve: Serve) -> None:
    found = _check(serve(_pages()))
    levels = {check: finding.level for check, finding in found.items()}
    assert levels.pop("server metrics") is Level.FAIL
    assert set(levels.values()) == {Level.OK}
    assert "vLLM" in found["server"].said
    assert "server address" in levels


def test_a_real_page_is_understood(serve: Serve, shared_dir: Path) -> None:
    page = (shared_dir / "data" / "vllm_metrics_0.32.txt").read_text(encoding="utf-8")
    found = _check(serve({**_pages(), "/metrics": (200, page)}))
    assert found["server metrics"].level is Level.OK
    assert "running" in found["server metrics"].said


def test_pages_of_something_else_are_told_apart(serve: Serve) -> None:
    pages = {"/health": (404, ""), "/metrics": (200, "<html></html>"), "/version": (200, "[]")}
    found = _check(serve(pages))
    assert found["server"].level is Level.FAIL
    assert found["server version"].level is Level.WARN
    assert found["server metrics"].level is Level.FAIL
    assert found["server plugin"].level is Level.WARN
    assert "RLGOV_PLUGIN" in found["server plugin"].remedy


def test_open_control_endpoints_are_found_without_being_used(serve: Serve) -> None:
    pages = {**_pages(), "/collective_rpc": (200, ""), "/pause": (200, "")}
    found = _check(serve(pages))["server control"]
    assert found.level is Level.WARN
    assert "/collective_rpc, /pause" in found.said
    assert "VLLM_SERVER_DEV_MODE" in found.remedy


def test_control_endpoints_are_never_called(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, str]] = []
    ask = doctor_server._Server.ask

    def note(self: Any, path: str, method: str = "GET") -> tuple[int, str]:
        asked.append((method, path))
        return ask(self, path, method)

    monkeypatch.setattr(doctor_server._Server, "ask", note)
    _check(serve({**_pages(), **dict.fromkeys(DEV_PATHS, (200, ""))}))
    assert {method for method, path in asked if path in DEV_PATHS} == {"OPTIONS"}
    assert {method for method, _ in asked} == {"GET", "OPTIONS"}


def test_a_plugin_without_a_token_is_a_failure(serve: Serve) -> None:
    found = _check(serve({**_pages(), "/rlgov/v1/state": (200, "{}")}))
    assert found["server plugin"].level is Level.FAIL


def test_a_gateway_is_known_by_its_health(serve: Serve) -> None:
    found = _check(serve({**_pages(), "/rlgov/healthz": (503, "")}))
    assert "gateway" in found["server"].said
    assert "server plugin" not in found


@pytest.mark.parametrize("url", ["localhost:8000", "ftp://x", "http://", "http://x:port"])
def test_what_is_no_address_is_refused(url: str) -> None:
    (found,) = check_url(url, SystemClock())
    assert found.level is Level.FAIL
    assert "http://127.0.0.1:8000" in found.remedy


def test_a_server_that_is_not_there() -> None:
    (found,) = check_url("http://127.0.0.1:1", SystemClock())
    assert found.level is Level.FAIL
    assert "nothing answers" in found.said


def test_an_endless_page_is_cut(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor_server, "_MOST_BYTES", 2**17)
    with doctor_server._Server(serve({"/metrics": (200, "x" * 2**22)})) as server:
        status, text = server.ask("/metrics")
    assert status == 200
    assert 2**17 < len(text) < 2**20


def test_a_server_on_every_interface_is_a_warning(serve: Serve) -> None:
    found = _check(serve(_pages(), host="0.0.0.0"))["server address"]  # noqa: S104  # what is warned of
    assert found.level is Level.WARN
    assert "--host 127.0.0.1" in found.remedy


def test_listeners_are_read_from_both_tables(tmp_path: Path) -> None:
    head = "  sl  local_address rem_address   st\n"
    four, six = tmp_path / "tcp", tmp_path / "tcp6"
    four.write_text(f"{head}   0: 0100007F:1F40 00000000:0000 0A 0\n", encoding="ascii")
    assert not listens_on_all(8000, (four, six))
    six.write_text(f"{head}   0: {'0' * 32}:1F40 {'0' * 32}:0000 0A 0\n", encoding="ascii")
    assert listens_on_all(8000, (four, six))
    assert not listens_on_all(8001, (four, six))
    six.write_text(f"{head}   0: {'0' * 32}:1F40 {'0' * 32}:0000 01 0\n", encoding="ascii")
    assert not listens_on_all(8000, (four, six))


class FakeClient:
    state_told: ClassVar[StackState]

    def __init__(self, socket_path: Path) -> None:
        assert socket_path == Path("control.sock")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Nothing to close."""

    def state(self) -> StackState:
        return self.state_told


@pytest.mark.parametrize(("ready", "level"), [(True, Level.OK), (False, Level.FAIL)])
def test_the_state_of_a_stack(monkeypatch: pytest.MonkeyPatch, *, ready: bool, level: Level) -> None:
    engine = EngineInfo("a", 2, (), "active", "http://x", 1, "0.32.0", "plugin")
    FakeClient.state_told = StackState(
        0.0, 2, 64, switching=False, ready=ready, held=3, tp_refused={4: "no GPUs"}, engines=(engine,),
        conditions={"EngineHung": "it hangs"},
    )  # fmt: skip
    monkeypatch.setattr(doctor_server, "StackClient", FakeClient)
    stack, refused, condition = check_control(Path("control.sock"))
    assert stack.level is level
    assert "TP 2, cap 64, 3 held; a (active, cap by plugin)" in stack.said
    assert "TP 4 cannot be had now: no GPUs" in refused.said
    assert (condition.check, condition.said) == ("stack EngineHung", "it hangs")


def test_a_stack_that_is_not_there(tmp_path: Path) -> None:
    (found,) = check_control(tmp_path / "control.sock")
    assert found.level is Level.FAIL
    assert "rlgov serve" in found.remedy
