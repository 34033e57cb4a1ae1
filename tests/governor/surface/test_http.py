"""What the surface answers, and above all what it refuses: no refused order may reach the loop."""

from __future__ import annotations

import contextlib
import json
import socket
import stat
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rlgov.clock import VirtualClock
from rlgov.errors import ConfigError
from rlgov.governor import http as surface_http
from rlgov.governor.listen import TcpAddress, UnixAddress
from rlgov.governor.records import Command, CommandKind, Condition, Governed, Mode, Tick
from rlgov.governor.surface import MOST_ORDERS, Surface

MakeTick = Callable[..., Tick]
Ask = Callable[..., tuple[int, dict[str, str], bytes]]

ORDER = b'{"mode": "active"}'
JSON = "application/json"
PATIENCE_S = 60


@pytest.fixture
def nothing_passed_on(listening: Surface) -> Iterator[Surface]:
    """The surface; at the end no order may have reached the loop, and the next proper one must."""
    yield listening
    assert listening.commands() == ()
    assert _port(listening)  # still listening


def _port(surface: Surface) -> int:
    address = surface.addresses[1]
    assert isinstance(address, TcpAddress)
    with socket.create_connection((address.host, address.port), timeout=PATIENCE_S):
        return address.port


def _say(surface: Surface, text: bytes, *, unix: bool = False) -> bytes:
    """Send bytes as they are, and read until the other side hangs up."""
    tcp, path = surface.addresses[1], surface.addresses[0]
    assert isinstance(tcp, TcpAddress)
    assert isinstance(path, UnixAddress)
    with socket.socket(socket.AF_UNIX if unix else socket.AF_INET, socket.SOCK_STREAM) as link:
        link.settimeout(PATIENCE_S)
        link.connect(str(path.path) if unix else (tcp.host, tcp.port))
        with contextlib.suppress(OSError):  # it hung up before we were done
            link.sendall(text)
        answer = b""
        with contextlib.suppress(ConnectionError):
            while part := link.recv(65536):
                answer += part
        return answer


# What may be read.


def test_pages_are_answered_on_both_listeners(listening: Surface, ask: Ask, make_tick: MakeTick) -> None:
    listening.publish(make_tick())
    for unix in (False, True):
        status, headers, page = ask("GET", "/metrics", unix=unix)
        assert status == 200
        assert headers["Content-Type"].startswith("text/plain; version=0.0.4")
        assert b"rlgov_governor_power_watts 2000.0" in page
        status, _, body = ask("GET", "/status", unix=unix)
        assert json.loads(body)["tick"]["window"]["energy_j"] == 2000.0
        assert status == 200


def test_health_follows_progress(
    listening: Surface, ask: Ask, make_tick: MakeTick, clock: VirtualClock
) -> None:
    assert ask("GET", "/healthz")[0] == 200  # starting
    assert ask("GET", "/readyz")[0] == 503
    listening.publish(make_tick())
    assert ask("GET", "/readyz")[0] == 200
    clock.advance_s(9.0)
    assert ask("GET", "/healthz")[0] == 200
    clock.advance_s(2.0)
    status, _, body = ask("GET", "/healthz")
    assert status == 503
    assert "silent for 11 s" in json.loads(body)["why"][0]
    listening.publish(make_tick())
    assert ask("GET", "/healthz")[0] == 200


def test_a_start_that_takes_forever_is_not_alive(ask: Ask, clock: VirtualClock) -> None:
    clock.advance_s(200.0)
    assert ask("GET", "/healthz")[0] == 503


def test_blind_or_tripped_is_alive_but_not_ready(
    listening: Surface, ask: Ask, make_tick: MakeTick, make_condition: Callable[..., Condition]
) -> None:
    listening.publish(make_tick(seen={"blind": 1.0}))
    assert (ask("GET", "/healthz")[0], ask("GET", "/readyz")[0]) == (200, 503)
    listening.publish(make_tick(conditions=(make_condition("Tripped"),)))
    assert (ask("GET", "/healthz")[0], ask("GET", "/readyz")[0]) == (200, 503)
    assert b"Tripped" in ask("GET", "/readyz")[2]
    listening.publish(make_tick(conditions=(make_condition("Throttled"),)))
    assert ask("GET", "/readyz")[0] == 200


def test_status_says_what_to_do_and_is_json_whatever_a_window_holds(
    listening: Surface, ask: Ask, make_tick: MakeTick, make_condition: Callable[..., Condition]
) -> None:
    listening.publish(make_tick(seen={"kv_usage": float("nan")}, conditions=(make_condition("Blind"),)))
    document = json.loads(ask("GET", "/status")[2], parse_constant=pytest.fail)
    assert document["tick"]["window"]["kv_usage"] is None
    (held,) = document["conditions"]
    assert held["remedy"] == "look into Blind"
    assert held["for_s"] == 1.0
    assert document["totals"]["reasons"] == {"POLICY": 1}


def test_the_socket_is_for_owner_and_group(listening: Surface) -> None:
    address = listening.addresses[0]
    assert isinstance(address, UnixAddress)
    assert stat.S_IMODE(address.path.stat().st_mode) == 0o660


def test_a_closed_surface_leaves_no_socket(governed: Governed, tmp_path: Path) -> None:
    path = tmp_path / "s"
    surface = Surface(governed, VirtualClock(), addresses=(UnixAddress(path),))
    with surface:
        assert path.is_socket()
    assert not path.exists()
    surface.close()


def test_a_place_that_is_taken_is_refused_with_the_remedy(
    governed: Governed, listening: Surface, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="another governor listens"):
        Surface(governed, VirtualClock(), addresses=(listening.addresses[0],)).start()
    with pytest.raises(ConfigError, match="cannot listen there"):
        Surface(governed, VirtualClock(), addresses=(listening.addresses[1],)).start()
    taken = tmp_path / "file"
    taken.write_text("mine", encoding="utf-8")
    with pytest.raises(ConfigError, match="is no socket"):
        Surface(governed, VirtualClock(), addresses=(UnixAddress(taken),)).start()
    assert taken.read_text(encoding="utf-8") == "mine"


# What may be ordered.


def test_orders_reach_the_loop_in_order(listening: Surface, ask: Ask, token: str) -> None:
    assert ask("POST", "/v1/mode", ORDER, unix=True, Content_Type=JSON)[0] == 202
    signed = {"Content_Type": JSON, "Authorization": f"Bearer {token}"}
    assert ask("POST", "/v1/rearm", b"{}", **signed)[0] == 202
    assert ask("POST", "/v1/mode", b'{"mode":"observe"}', **signed)[0] == 202
    assert listening.commands() == (
        Command(CommandKind.MODE, Mode.ACTIVE),
        Command(CommandKind.REARM),
        Command(CommandKind.MODE, Mode.OBSERVE),
    )
    assert listening.commands() == ()


def test_orders_that_nobody_fetches_are_bounded(listening: Surface, ask: Ask) -> None:
    codes = [ask("POST", "/v1/rearm", b"{}", unix=True, Content_Type=JSON)[0] for _ in range(MOST_ORDERS + 2)]
    assert codes == [202] * MOST_ORDERS + [503, 503]
    assert len(listening.commands()) == MOST_ORDERS
    assert ask("POST", "/v1/rearm", b"{}", unix=True, Content_Type=JSON)[0] == 202
    page = listening.metrics().decode()
    assert f'commands_total{{command="rearm",outcome="accepted"}} {MOST_ORDERS + 1}.0' in page
    assert 'commands_total{command="rearm",outcome="refused"} 2.0' in page


@pytest.mark.usefixtures("nothing_passed_on")
@pytest.mark.parametrize(
    "authorization",
    [
        None,
        "",
        "Bearer",
        "Bearer ",
        "Bearer wrong",
        "bearer {token}",
        "Basic {token}",
        "{token}",
        "Bearer {token}x",
    ],
)
def test_tcp_needs_the_right_token(ask: Ask, token: str, authorization: str | None) -> None:
    headers = {} if authorization is None else {"Authorization": authorization.format(token=token)}
    status, _, body = ask("POST", "/v1/mode", ORDER, Content_Type=JSON, **headers)
    assert status == 401
    assert token.encode() not in body


def test_tcp_without_any_token_takes_no_orders(governed: Governed) -> None:
    with Surface(governed, VirtualClock(), addresses=(TcpAddress("127.0.0.1", 0),)) as surface:
        (address,) = surface.addresses
        assert isinstance(address, TcpAddress)
        with socket.create_connection((address.host, address.port), timeout=PATIENCE_S) as link:
            body = b"{}"
            link.sendall(b"POST /v1/rearm HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n")
            link.sendall(b"Authorization: Bearer \r\nContent-Length: %d\r\n\r\n%b" % (len(body), body))
            answer = link.recv(65536)
        assert b" 403 " in answer
        assert b"--token-file" in answer
        assert surface.commands() == ()


@pytest.mark.usefixtures("nothing_passed_on")
@pytest.mark.parametrize(
    ("body", "why"),
    [
        (b"", "JSON"),
        (b"{", ""),
        (b"[]", ""),
        (b'"active"', ""),
        (b"{}", "mode"),
        (b'{"mode": "turbo"}', "mode"),
        (b'{"mode": "ACTIVE"}', "mode"),
        (b'{"mode": 1}', "mode"),
        (b'{"mode": "active", "force": true}', "force"),
        (b'{"mode": "active"} {"mode": "active"}', ""),
        (b"\xff\xfe", ""),
        (b'{"mode": NaN}', ""),
        (b"[" * 5000, ""),
    ],
)
def test_a_malformed_order_is_refused_by_name(ask: Ask, body: bytes, why: str) -> None:
    status, _, answer = ask("POST", "/v1/mode", body, unix=True, Content_Type=JSON)
    assert status == 400
    assert why in json.loads(answer)["error"]


@pytest.mark.usefixtures("nothing_passed_on")
def test_an_order_of_another_type_is_refused(ask: Ask) -> None:
    for kind in ("text/plain", "application/x-www-form-urlencoded", "application/jsonx"):
        assert ask("POST", "/v1/mode", ORDER, unix=True, Content_Type=kind)[0] == 415


@pytest.mark.usefixtures("nothing_passed_on")
def test_a_large_body_is_refused(ask: Ask, listening: Surface) -> None:
    large = b'{"mode": "active"' + b" " * 20_000 + b"}"
    assert ask("POST", "/v1/mode", large, unix=True, Content_Type=JSON)[0] == 413
    chunked = b"POST /v1/mode HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    chunked += b"Transfer-Encoding: chunked\r\n\r\n"
    chunked += b"1000\r\n%b\r\n" % (b" " * 0x1000) * 64 + b"0\r\n\r\n"
    assert b" 413 " in _say(listening, chunked, unix=True).split(b"\r\n")[0]


@pytest.mark.usefixtures("nothing_passed_on")
@pytest.mark.parametrize(
    "path",
    [
        "/",
        "//metrics",
        "/metrics/",
        "/metrics/../status",
        "/../status",
        "/%2e%2e/status",
        "/status%00",
        "/v1/../v1/mode",
        "/v1//mode",
        "/v1/%6dode",
        "/v1/mode/",
        "/v1/mode?mode=active",
        "/V1/MODE",
        "/etc/passwd",
        "/..%2f..%2fetc%2fpasswd",
    ],
)
def test_there_are_no_other_paths(ask: Ask, path: str) -> None:
    for method in ("GET", "POST"):
        assert ask(method, path, ORDER, unix=True, Content_Type=JSON)[0] in {400, 404}


@pytest.mark.usefixtures("nothing_passed_on")
@pytest.mark.parametrize("method", ["GET", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "HEAD"])
def test_orders_are_only_posted(ask: Ask, method: str) -> None:
    status, headers, _ = ask(method, "/v1/mode", ORDER, unix=True, Content_Type=JSON)
    assert status == 405
    assert headers["Allow"] == "POST"


@pytest.mark.usefixtures("nothing_passed_on")
@pytest.mark.parametrize("unix", [False, True])
def test_a_second_request_on_a_connection_is_not_read(listening: Surface, unix: bool) -> None:  # noqa: FBT001  # parametrized
    get = b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n"
    order = b"POST /v1/mode HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    order += b"Content-Length: %d\r\n\r\n%b" % (len(ORDER), ORDER)
    assert _say(listening, get + order, unix=unix).count(b"HTTP/1.1 ") == 1


@pytest.mark.usefixtures("nothing_passed_on")
@pytest.mark.parametrize(
    "text",
    [
        b"GET /status\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",  # TLS
        b"POST /v1/rearm HTTP/1.1\r\nContent-Length: -1\r\n\r\n{}",
        b"POST /v1/rearm HTTP/1.1\r\nContent-Length: 2\r\nContent-Length: 3\r\n\r\n{}",
        b"POST /v1/rearm HTTP/1.1\r\nContent-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n{}",
        b"POST /v1/rearm HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\nZZ\r\n{}",
        b"GET /" + b"a" * 100_000 + b" HTTP/1.1\r\n\r\n",
        b"GET /status HTTP/1.1\r\n" + b"X: y\r\n" * 100_000 + b"\r\n",
        b"\x00" * 4096,
    ],
)
def test_what_is_no_http_is_refused(listening: Surface, text: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(surface_http, "CONNECTION_LIFE_S", 0.5)  # some of it looks like a begin of a request
    answer = _say(listening, text, unix=True)
    assert b" 202 " not in answer
    assert b'"accepted"' not in answer


def test_slow_clients_are_cut_off_and_do_not_crowd_others_out(
    listening: Surface, ask: Ask, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(surface_http, "CONNECTION_LIFE_S", 0.5)
    tcp = listening.addresses[1]
    assert isinstance(tcp, TcpAddress)
    links = []
    try:
        for number in range(2 * surface_http.MOST_CONNECTIONS):
            link = socket.create_connection((tcp.host, tcp.port), timeout=PATIENCE_S)
            links.append(link)
            try:
                if number % 2:
                    link.sendall(b"GET /status HTTP/1.1\r\nX: ")  # a header that never ends
                else:
                    link.sendall(b"POST /v1/rearm HTTP/1.1\r\nContent-Type: application/json\r\n")
                    link.sendall(b"Content-Length: 2\r\n\r\n{")  # a body that never comes
            except OSError:
                pass  # one too many: refused at once
        assert ask("GET", "/healthz", unix=True)[0] == 200  # the other listener is untouched
        for link in links:
            while True:
                try:
                    if not link.recv(65536):
                        break
                except TimeoutError:
                    pytest.fail("a slow client was not cut off")
                except OSError:
                    break
    finally:
        for link in links:
            link.close()
    assert ask("GET", "/healthz")[0] == 200
    assert listening.commands() == ()


def test_a_client_that_does_not_read_is_cut_off(
    listening: Surface, ask: Ask, monkeypatch: pytest.MonkeyPatch, make_tick: MakeTick
) -> None:
    monkeypatch.setattr(surface_http, "CONNECTION_LIFE_S", 0.5)
    listening.publish(make_tick())
    tcp = listening.addresses[1]
    assert isinstance(tcp, TcpAddress)
    links = []
    for _ in range(surface_http.MOST_CONNECTIONS):
        link = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        link.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        link.settimeout(PATIENCE_S)
        link.connect((tcp.host, tcp.port))
        link.sendall(b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n")
        links.append(link)
    waiting = threading.Event()
    for _ in range(PATIENCE_S * 10):
        try:
            if ask("GET", "/healthz")[0] == 200:
                break
        except OSError:
            waiting.wait(0.1)
    else:
        pytest.fail("the listener stayed full")
    for link in links:
        link.close()


def test_bytes_that_are_an_order_do_reach_the_loop(listening: Surface) -> None:
    """So that the test below could fail."""
    text = b"POST /v1/mode HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    text += b"Content-Length: %d\r\n\r\n%b" % (len(ORDER), ORDER)
    assert b" 202 " in _say(listening, text, unix=True)
    assert listening.commands() == (Command(CommandKind.MODE, Mode.ACTIVE),)


@settings(max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    text=st.one_of(
        st.binary(max_size=300),
        st.builds(
            lambda method, path, headers, body: b"%b %b HTTP/1.1\r\n%b\r\n%b" % (method, path, headers, body),
            st.sampled_from([b"GET", b"POST", b"PUT", b"X" * 20]),
            st.sampled_from([b"/v1/mode", b"/v1/rearm", b"/status", b"*", b"/v1/mode#", b"http://x/v1/mode"]),
            st.binary(max_size=120),
            st.one_of(st.just(ORDER), st.binary(max_size=60)),
        ),
        st.builds(
            lambda body: (
                b"POST /v1/mode HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
                b"Content-Length: %d\r\n\r\n%b" % (len(body), body)
            ),
            st.one_of(
                st.binary(max_size=200),
                st.recursive(
                    st.none() | st.booleans() | st.floats() | st.text(max_size=10),
                    lambda inner: (
                        st.lists(inner, max_size=3)
                        | st.dictionaries(st.text(max_size=6) | st.just("mode"), inner, max_size=3)
                    ),
                ).map(lambda value: json.dumps(value).encode()),
            ),
        ),
    )
)
def test_nothing_random_becomes_an_order(listening: Surface, text: bytes) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(surface_http, "CONNECTION_LIFE_S", 0.1)  # most of it is never answered
        for unix in (True, False):
            _say(listening, text, unix=unix)
    assert listening.commands() == ()
