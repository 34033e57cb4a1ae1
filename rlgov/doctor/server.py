"""A running vLLM or gateway, and the control socket of a serving stack. Nothing is changed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import requests

from rlgov.doctor.finding import fail, ok, warn
from rlgov.engine.control.client import StackClient
from rlgov.engine.plugin.selftest import proven
from rlgov.errors import RlgovError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Self

    from rlgov.clock import Clock
    from rlgov.doctor.finding import Finding

_TIMEOUT_S = 10.0
_MOST_BYTES = 8 * 2**20
_OK = 200
_UNAUTHORIZED = 401
_FORBIDDEN = 403
_NOT_FOUND = 404
# Only there with VLLM_SERVER_DEV_MODE=1. Asked with OPTIONS, which does nothing: a path that is there but
# takes another method answers 405, one that is not there 404.
DEV_PATHS = (
    "/collective_rpc",
    "/pause",
    "/resume",
    "/sleep",
    "/wake_up",
    "/reset_prefix_cache",
    "/server_info",
)
_DEV_REMEDY = (
    "anyone who reaches the port can stop the engine: start vLLM without VLLM_SERVER_DEV_MODE "
    "(rlgov does not need it)"
)
_ANY_ADDRESS = {"00000000", "0" * 32}
_LISTENING = "0A"
_LOCAL = {"localhost", "127.0.0.1", "::1"}


class _Server:
    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        self._session = requests.Session()
        self._session.trust_env = False  # no proxy between us and a server that was named

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._session.close()

    def ask(self, path: str, method: str = "GET") -> tuple[int, str]:
        """Status and text of an answer; redirects are not followed, and a page without end is cut."""
        with self._session.request(
            method, self.url + path, timeout=_TIMEOUT_S, allow_redirects=False, stream=True
        ) as answer:
            content = b""
            for chunk in answer.iter_content(2**16):
                content += chunk
                if len(content) > _MOST_BYTES:
                    break
            return answer.status_code, content.decode("utf-8", errors="replace")


def check_url(url: str, clock: Clock) -> Iterator[Finding]:
    """What answers at a URL.

    Args:
        url: Of a vLLM or a gateway, such as ``http://127.0.0.1:8000``.
        clock: Dates the metrics page.
    """
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        parts, port = urlsplit(""), None
    if parts.scheme not in {"http", "https"} or not parts.hostname:
        yield fail("server", f"{url} is no address", "give one like http://127.0.0.1:8000")
        return
    with _Server(url) as server:
        try:
            yield from _check_server(server, clock)
        except requests.RequestException as error:
            yield fail("server", f"{url}: {_short(error)}", "is it started, and is this its address?")
            return
    if parts.hostname in _LOCAL and port is not None:
        yield _exposure(port)


def _check_server(server: _Server, clock: Clock) -> Iterator[Finding]:
    status, _ = server.ask("/health")
    gateway = server.ask("/rlgov/healthz")[0] != _NOT_FOUND
    kind = "gateway" if gateway else "vLLM"
    if status == _OK:
        yield ok("server", f"{kind} at {server.url}")
    else:
        yield fail("server", f"{kind} at {server.url}: /health answers {status}", "look at its log")
    yield _version(server)
    if not gateway:
        yield _plugin(server)
    yield _dev_mode(server)
    yield _metrics(server, clock)


def _version(server: _Server) -> Finding:
    status, text = server.ask("/version")
    try:
        version = str(json.loads(text)["version"])
    except (ValueError, KeyError, TypeError):
        return warn("server version", f"/version answers {status} without one", "is this a vLLM?")
    if proven(version):
        return ok("server version", version)
    return warn(
        "server version", f"vLLM {version} is not one rlgov was proven with", "see `rlgov doctor`: vllm"
    )


def _plugin(server: _Server) -> Finding:
    status, _ = server.ask("/rlgov/v1/state")
    if status in {_UNAUTHORIZED, _FORBIDDEN}:
        return ok("server plugin", "there, and asks for its token")
    if status == _OK:
        return fail("server plugin", "answers without a token", "set RLGOV_PLUGIN_TOKEN for this vLLM")
    return warn(
        "server plugin",
        "not loaded: no batch cap without a gateway",
        "start the engine by `rlgov serve`, or with RLGOV_PLUGIN=1 and VLLM_PLUGINS=rlgov",
    )


def _dev_mode(server: _Server) -> Finding:
    exposed = [path for path in DEV_PATHS if server.ask(path, "OPTIONS")[0] not in _absent()]
    if exposed:
        return warn("server control", f"open to anyone: {', '.join(exposed)}", _DEV_REMEDY)
    return ok("server control", "no development endpoints")


def _absent() -> set[int]:
    return {_UNAUTHORIZED, _FORBIDDEN, _NOT_FOUND}


def _metrics(server: _Server, clock: Clock) -> Finding:
    try:
        from rlgov.engine.telemetry.page import sample_from_page  # noqa: PLC0415  # needs the live extra
    except ModuleNotFoundError as error:
        return warn("server metrics", f"cannot be read without {error.name}", "pip install 'rlgov[live]'")
    status, text = server.ask("/metrics")
    if status != _OK:
        return fail("server metrics", f"/metrics answers {status}", "start vLLM without --disable-log-stats")
    try:
        sample = sample_from_page(text, at_s=clock.monotonic_s(), engine_id="doctor")
    except RlgovError as error:
        return fail("server metrics", str(error), "start vLLM without --disable-log-stats; see its version")
    return ok(
        "server metrics", f"{sample.running} running, {sample.waiting} waiting, {len(text) // 1024} KiB"
    )


def _exposure(port: int) -> Finding:
    if listens_on_all(port):
        return warn(
            "server address",
            f"port {port} is open on every interface; vLLM's API key guards only /v1 and a few more",
            "start it with --host 127.0.0.1 and a gateway in front of it",
        )
    return ok("server address", f"port {port} listens on named addresses only")


def listens_on_all(
    port: int, tables: tuple[Path, ...] = (Path("/proc/net/tcp"), Path("/proc/net/tcp6"))
) -> bool:
    """Whether something on this machine listens at a port on every address."""
    for table in tables:
        try:
            rows = table.read_text(encoding="ascii").splitlines()[1:]
        except OSError:
            continue
        for row in rows:
            _, local, _, state, *_ = row.split()
            address, _, number = local.partition(":")
            if state == _LISTENING and int(number, 16) == port and address in _ANY_ADDRESS:
                return True
    return False


def check_control(socket_path: Path) -> Iterator[Finding]:
    """The state of a serving stack.

    Args:
        socket_path: Its control socket.
    """
    try:
        with StackClient(socket_path) as client:
            state = client.state()
    except RlgovError as error:
        yield fail(
            "stack", str(error), "is `rlgov serve` running, and is this its run folder's control.sock?"
        )
        return
    engines = ", ".join(
        f"{engine.engine_id} ({engine.phase}, cap by {engine.cap_by})" for engine in state.engines
    )
    said = f"TP {state.tp_degree}, cap {state.batch_cap}, {state.held} held; {engines or 'no engine'}"
    if state.ready:
        yield ok("stack", said)
    else:
        yield fail("stack", f"no engine takes requests: {said}", "look at the engine's log in the run folder")
    for degree, reason in state.tp_refused.items():
        yield warn("stack TP", f"TP {degree} cannot be had now: {reason}", "wait, or mend what it names")
    for name, about in state.conditions.items():
        yield warn(f"stack {name}", about, "see the log of rlgov serve")


def _short(error: requests.RequestException) -> str:
    if isinstance(error, requests.Timeout):
        return f"no answer within {_TIMEOUT_S:g} s"
    if isinstance(error, requests.ConnectionError):
        return "nothing answers there"
    return str(error)
