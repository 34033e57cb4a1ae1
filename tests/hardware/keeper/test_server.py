"""The keeper's socket: nonsense, floods and slow clients change no clock and hold up nobody."""

from __future__ import annotations

import json
import os
import socket
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rlgov.errors import HardwareError
from rlgov.hardware.keeper.notify import Notifier
from rlgov.hardware.keeper.protocol import (
    KINDS,
    LONGEST_LINE_BYTES,
    Request,
    parse_answer,
    request_line,
)
from rlgov.hardware.keeper.server import MOST_CONNECTIONS, Server, Signals, listen
from rlgov.hardware.keeper.values import Refused
from tests.fakes.keeper import Bench

PAIR = ("GPU-0", "GPU-1")
LOCK = Request(1, "lock", PAIR, 1200, 3.0)


class Served:
    """A server that a test turns by hand, over a keeper on a virtual clock."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.bench = Bench()
        self.signals = Signals()
        self.signals.__enter__()
        self.listener = listen(path, "")
        self.server = Server(
            self.bench.keeper, self.listener, self.signals, self.bench.clock, Notifier(environment={})
        )
        self.server.open()
        self.clients: list[socket.socket] = []

    def connect(self) -> socket.socket:
        client = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        client.settimeout(0)
        client.connect(str(self.path))
        self.clients.append(client)
        return client

    def turn(self, times: int = 3) -> None:
        for _ in range(times):
            self.server.turn(0.0)

    def ask(self, client: socket.socket, request: Request) -> dict[str, object]:
        client.sendall(request_line(request))
        self.turn()
        return parse_answer(client.recv(1_000_000), request.number)

    def ended(self, client: socket.socket) -> bool:
        """Whether the server has closed a connection; reads what came before."""
        try:
            while client.recv(65_536):
                pass
        except BlockingIOError:
            return False
        except ConnectionResetError:
            pass
        return True

    def still_serves(self) -> None:
        """A proper client is served, and no clock has changed meanwhile."""
        assert self.bench.locks_mhz() == (None,) * 4
        client = self.connect()
        assert self.ask(client, LOCK)["sm_clock_mhz"] == 1200
        assert self.ask(client, Request(2, "release")) == {"open": []}
        client.close()
        self.turn()
        self.bench.run(1.0)
        assert self.bench.machine.writes[-2:] == [("GPU-0", None), ("GPU-1", None)]

    def close(self) -> None:
        for client in self.clients:
            client.close()
        self.server.close()
        self.listener.close()
        self.signals.__exit__(None, None, None)


@pytest.fixture
def serve(socket_dir: Path) -> Iterator[Callable[[], Served]]:
    made: list[Served] = []

    def make() -> Served:
        made.append(Served(socket_dir / f"keeper{len(made)}.sock"))
        return made[-1]

    yield make
    for served in made:
        served.close()


@pytest.fixture
def served(serve: Callable[[], Served]) -> Served:
    return serve()


def test_a_client_leases_renews_and_is_missed(served: Served) -> None:
    client = served.connect()
    assert served.ask(client, LOCK)["sm_clock_mhz"] == 1200
    assert served.ask(client, Request(2, "renew"))["left_s"] == 3.0
    state = served.ask(client, Request(3, "state"))
    assert isinstance(state["gpus"], list)
    assert state["gpus"][0]["owner"] == {"pid": os.getpid(), "uid": os.getuid()}
    assert served.bench.locks_mhz() == (1200, 1200, None, None)
    client.close()
    served.turn()
    assert served.bench.locks_mhz() == (None,) * 4


def test_only_root_and_the_group_can_connect(served: Served) -> None:
    assert stat.S_IMODE(served.path.stat().st_mode) == 0o660


def test_there_must_be_such_a_group_and_such_a_folder(tmp_path: Path) -> None:
    with pytest.raises(HardwareError, match="there is no group"):
        listen(tmp_path / "keeper.sock", "no-such-group-here")
    with pytest.raises(HardwareError, match="--socket"):
        listen(tmp_path / "nowhere" / "keeper.sock", "")


def test_a_file_that_is_no_socket_is_not_replaced(tmp_path: Path) -> None:
    path = tmp_path / "keeper.sock"
    path.write_text("precious")
    with pytest.raises(HardwareError, match="cannot listen"):
        listen(path, "")
    assert path.read_text() == "precious"


def _valid(kind: str) -> dict[str, object]:
    every: dict[str, object] = {"gpus": ["GPU-0"], "sm_clock_mhz": 1200, "ttl_s": 3.0}
    return {"v": 1, "id": 1, "do": kind} | {name: every[name] for name in KINDS[kind]}


WRONG = [
    b"",
    b"\x00\xff\xfe",
    b"null",
    b"[]",
    b"{}",
    b"[" * 4000,
    b'{"v":1,"id":1,"do":"state"',
    b'{"v":2,"id":1,"do":"state"}',
    b'{"v":true,"id":1,"do":"state"}',
    b'{"v":1,"id":-1,"do":"state"}',
    b'{"v":1,"id":1e400,"do":"state"}',
    b'{"v":1,"id":' + b"9" * 5000 + b',"do":"state"}',
    b'{"v":1,"id":1,"do":"shutdown"}',
    b'{"v":1,"id":1,"do":["lock"]}',
    b'{"v":1,"id":1,"do":"state","more":1}',
    b'{"v":1,"id":1,"id":2,"do":"state"}',
    b'{"v":1,"id":1,"do":"lock"}',
    b'{"v":1,"id":1,"do":"lock","gpus":["GPU-0"],"sm_clock_mhz":NaN,"ttl_s":3}',
    b'{"v":1,"id":1,"do":"lock","gpus":["GPU-0"],"sm_clock_mhz":1200,"ttl_s":Infinity}',
    b'{"v":1,"id":1,"do":"lock","gpus":["GPU-0"],"sm_clock_mhz":1200,"ttl_s":-3}',
    b'{"v":1,"id":1,"do":"lock","gpus":["GPU-0"],"sm_clock_mhz":true,"ttl_s":3}',
    b'{"v":1,"id":1,"do":"lock","gpus":["GPU-0"],"sm_clock_mhz":"1200","ttl_s":3}',
    b'{"v":1,"id":1,"do":"lock","gpus":["../../etc/passwd"],"sm_clock_mhz":1200,"ttl_s":3}',
    b'{"v":1,"id":1,"do":"lock","gpus":[0],"sm_clock_mhz":1200,"ttl_s":3}',
    b'{"v":1,"id":1,"do":"lock","gpus":"GPU-0","sm_clock_mhz":1200,"ttl_s":3}',
    json.dumps(_valid("lock") | {"gpus": [f"GPU-{number}" for number in range(65)]}).encode(),
]


@pytest.mark.parametrize("line", WRONG)
def test_nonsense_is_answered_and_ends_the_connection(served: Served, line: bytes) -> None:
    client = served.connect()
    client.sendall(line + b"\n")
    served.turn()
    with pytest.raises(Refused) as caught:
        parse_answer(client.recv(100_000), 0)
    assert caught.value.code in {"malformed", "version"}
    assert served.ended(client)
    assert served.bench.machine.writes == []
    served.still_serves()


def test_nonsense_of_who_holds_a_lease_restores(served: Served) -> None:
    client = served.connect()
    served.ask(client, LOCK)
    client.sendall(b"whatever\n")
    served.turn()
    assert served.bench.locks_mhz() == (None,) * 4


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_no_bytes_change_a_clock_or_stop_the_keeper(served: Served, data: st.DataObject) -> None:
    harmless = st.sampled_from([kind for kind in KINDS if kind != "lock"])
    value = st.one_of(
        st.none(),
        st.booleans(),
        st.integers(),
        st.floats(),
        st.text(max_size=20),
        st.lists(st.integers(), max_size=3),
    )

    @st.composite
    def near(draw: st.DrawFn) -> bytes:
        """A request with one thing wrong."""
        content = _valid(draw(st.sampled_from(sorted(KINDS))))
        name = draw(st.sampled_from([*sorted(content), "more"]))
        if name != "more" and draw(st.booleans()):
            del content[name]
        else:
            content[name] = draw(value.filter(lambda drawn: drawn != content.get(name, "")))
        return json.dumps(content).encode()

    lines = data.draw(
        st.lists(
            st.one_of(
                st.binary(max_size=300), near(), harmless.map(lambda kind: json.dumps(_valid(kind)).encode())
            ),
            min_size=1,
            max_size=6,
        )
    )
    client = served.connect()
    for line in lines:
        try:
            client.sendall(line + b"\n")
        except (BrokenPipeError, ConnectionResetError):
            break
        served.turn()
    client.close()
    served.turn()
    served.bench.run(30)
    served.bench.ask(99, "rearm", gpus=())  # it may have said restore_all, which it may
    # A request with another clock or time is a proper one; whatever it was, nothing is left of it.
    assert served.bench.locks_mhz() == (None,) * 4
    served.still_serves()


def test_a_line_without_end_is_cut_off(served: Served) -> None:
    client = served.connect()
    for _ in range(LONGEST_LINE_BYTES // 1000 + 3):
        try:
            client.sendall(b"x" * 1000)
        except (BrokenPipeError, ConnectionResetError):
            break
        served.turn(1)
    assert served.ended(client)
    served.still_serves()


def test_a_slow_client_is_cut_off_and_holds_up_nobody(served: Served) -> None:
    slow, proper = served.connect(), served.connect()
    slow.sendall(b'{"v":1,')
    for _ in range(10):
        assert "gpus" in served.ask(proper, Request(1, "state"))
        served.bench.clock.advance_s(1.0)
    assert served.ended(slow)
    assert not served.ended(proper)


def test_a_client_that_sends_byte_by_byte_is_served(served: Served) -> None:
    client = served.connect()
    for byte in request_line(LOCK):
        client.sendall(bytes([byte]))
        served.turn(1)
    assert parse_answer(client.recv(65_536), 1)["sm_clock_mhz"] == 1200


def test_a_client_that_reads_no_answers_is_cut_off(served: Served) -> None:
    deaf, proper = served.connect(), served.connect()
    deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    for _ in range(5000):
        try:
            deaf.sendall(request_line(Request(1, "state")))
        except BlockingIOError:
            pass
        except (BrokenPipeError, ConnectionResetError):
            break
        served.turn(1)
    else:
        raise AssertionError("it was never cut off")
    assert "gpus" in served.ask(proper, Request(1, "state"))


def test_a_flood_of_requests_does_not_keep_a_lease_alive_or_others_waiting(served: Served) -> None:
    holder, flood, proper = served.connect(), served.connect(), served.connect()
    served.ask(holder, LOCK)
    flood.sendall(request_line(Request(1, "state")) * 100)
    proper.sendall(request_line(Request(5, "describe", PAIR)))
    served.bench.clock.advance_s(3.1)
    served.turn(1)  # one turn is enough for all of it
    assert served.bench.locks_mhz() == (None,) * 4
    assert "supported_mhz" in parse_answer(proper.recv(65_536), 5)
    assert flood.recv(10_000_000).count(b"\n") < 10


def test_many_connections_push_out_each_other_and_no_lease(served: Served) -> None:
    holder = served.connect()
    served.ask(holder, LOCK)
    for _ in range(3 * MOST_CONNECTIONS):
        served.connect()
        served.turn(1)
        served.bench.clock.advance_s(0.001)
    assert served.ask(holder, Request(2, "renew"))["sm_clock_mhz"] == 1200
    late = served.connect()
    assert "supported_mhz" in served.ask(late, Request(5, "describe", ("GPU-2",)))
    open_ones = sum(not served.ended(client) for client in served.clients)
    assert open_ones <= MOST_CONNECTIONS


def test_a_closed_connection_with_unread_requests_leaves_nothing(served: Served) -> None:
    client = served.connect()
    client.sendall(request_line(LOCK))
    client.close()
    served.turn()
    assert served.bench.locks_mhz() == (None,) * 4
    assert served.bench.state().gpus[0].phase == "free"


def test_the_service_manager_hears_ready_and_alive(socket_dir: Path) -> None:
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    listener.settimeout(5)
    listener.bind(str(socket_dir / "notify"))
    environment = {
        "NOTIFY_SOCKET": str(socket_dir / "notify"),
        "WATCHDOG_USEC": "3000000",
        "WATCHDOG_PID": str(os.getpid()),
    }
    notifier = Notifier(environment)
    assert environment == {}
    assert notifier.watchdog_s == 3.0
    notifier.ready("fine")
    notifier.alive()
    notifier.stopping()
    said = [listener.recv(1000) for _ in range(3)]
    assert said == [b"READY=1\nSTATUS=fine", b"WATCHDOG=1", b"STOPPING=1"]
    listener.close()
    notifier.alive()  # nobody listens: no matter
    notifier.close()
    notifier.close()


def test_a_watchdog_of_another_process_is_not_ours(tmp_path: Path) -> None:
    notifier = Notifier(
        {"NOTIFY_SOCKET": str(tmp_path / "n"), "WATCHDOG_USEC": "1000", "WATCHDOG_PID": str(os.getppid())}
    )
    assert notifier.watchdog_s is None
    notifier.close()
    assert Notifier({}).watchdog_s is None
