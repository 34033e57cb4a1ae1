"""A stand-in for zeusd's HTTP API over its Unix socket, as its documentation describes it.

Only what clocks need: discovery, whoami, locking and resetting. The clocks end up in the stand-in for the
NVIDIA driver, as if zeusd had set them.
"""

from __future__ import annotations

import http.server
import json
import socketserver
import threading
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import parse_qs, urlsplit

if TYPE_CHECKING:
    from tests.fakes.nvml import NvmlStub


class FakeZeusd:
    """Serves until it is closed.

    Args:
        path: Its socket.
        stub: Whose clocks it sets.
    """

    def __init__(self, path: Path, stub: NvmlStub) -> None:
        self.path = path
        self.stub = stub
        self.groups = ["gpu-control", "gpu-read"]
        self.addresses = True  # older ones do not tell them
        self.token = ""
        self.scopes = ["gpu-control"]
        self.order = list(range(stub.state.gpu_count))  # its number -> the driver's GPU
        self.broken: dict[int, str] = {}  # its number -> what it says
        self.garbage = b""  # sent in place of every answer
        self.requests: list[str] = []
        self._server = _Server(str(path), _handler(self))
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,))
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def discover(self) -> dict[str, object]:
        gpus = []
        for number, gpu in enumerate(self.order):
            told: dict[str, object] = {"id": number, "name": "NVIDIA Stub 80GB"}
            if self.addresses:
                told["pci_address"] = f"0000:{0x21 + 0x20 * gpu:02x}:00.0"
            gpus.append(told)
        return {
            "gpus": gpus,
            "cpus": [],
            "enabled_api_groups": self.groups,
            "auth_required": bool(self.token),
        }

    def change(self, what: str, query: dict[str, str]) -> tuple[int, dict[str, object]]:
        assert query["block"] == "true"
        errors = {}
        for text in query["gpu_ids"].split(","):
            number = int(text)
            if number in self.broken:
                errors[text] = self.broken[number]
                continue
            gpu = self.stub.gpu(self.order[number])
            reset = what == "reset_gpu_locked_clocks"
            gpu.locked_low_mhz = 0 if reset else int(query["min_clock_mhz"])
            gpu.locked_high_mhz = 0 if reset else int(query["max_clock_mhz"])
        return (403, {"errors": errors}) if errors else (200, {})

    def answer(self, method: str, path: str, authorization: str) -> tuple[int, dict[str, object]]:
        target = urlsplit(path)
        if (method, target.path) == ("GET", "/discover"):
            return 200, self.discover()
        if self.token and authorization != f"Bearer {self.token}":
            return 401, {"error": "Authentication required."}
        if (method, target.path) == ("GET", "/auth/whoami") and self.token:
            return 200, {"sub": "rlgov", "scopes": self.scopes}
        what = target.path.removeprefix("/gpu/")
        if method == "POST" and what in {"set_gpu_locked_clocks", "reset_gpu_locked_clocks"}:
            return self.change(what, {name: values[0] for name, values in parse_qs(target.query).items()})
        return 404, {"error": "not found"}


class _Server(socketserver.ThreadingMixIn, socketserver.UnixStreamServer):
    daemon_threads = False
    block_on_close = True


def _handler(zeusd: FakeZeusd) -> type[http.server.BaseHTTPRequestHandler]:
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.serve()

        def do_POST(self) -> None:
            self.serve()

        def serve(self) -> None:
            zeusd.requests.append(f"{self.command} {self.path}")
            status, content = zeusd.answer(self.command, self.path, self.headers.get("Authorization", ""))
            done = status == 200 and self.command == "POST"
            body = zeusd.garbage or (b"" if done else json.dumps(content).encode())
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def address_string(self) -> str:
            return "unix"

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002  # the base class's name
            """Say nothing."""

    return Handler
