"""The control socket: what goes through it comes out equal, and what is wrong is refused with a reason."""

from __future__ import annotations

import asyncio
import json
import math
import socket
import stat
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlgov.engine.control.client import StackClient
from rlgov.engine.control.schema import INTERVAL, LIMITS, STATE, ConfigurationRequest
from rlgov.engine.control.server import LARGEST_BODY_BYTES, ControlServer
from rlgov.engine.samples import (
    EngineInfo,
    EngineIterations,
    EngineSample,
    Histogram,
    Outcome,
    RequestRecord,
    StackInterval,
    StackLimits,
    StackState,
    Traffic,
)
from rlgov.errors import ConfigError, DeploymentError, EngineError

STATE_VALUE = StackState(
    now_s=12.5, tp_degree=2, batch_cap=64, switching=False, ready=True, held=0,
    tp_refused={4: "needs 4 GPUs"}, last_switch={"from": 1.0, "outcome": "done"},
    engines=(EngineInfo("tp2-a", 2, ("GPU-1", "GPU-2"), "active", "http://127.0.0.1:1", 7, None, "plugin"),),
)  # fmt: skip
LIMITS_VALUE = StackLimits("m", (64, 8), (4, 2), ("GPU-1",), 4, 8192, (0, 100), (60.0, 2.5), "restart")


class _Target:
    """Remembers what was asked of it."""

    def __init__(self) -> None:
        self.asked: list[ConfigurationRequest] = []
        self.fail: Exception | None = None
        self.wait_s = 0.0

    def limits(self) -> StackLimits:
        return LIMITS_VALUE

    def state(self) -> StackState:
        return STATE_VALUE

    async def interval(self, after: int) -> StackInterval:
        await asyncio.sleep(self.wait_s)
        return StackInterval(STATE_VALUE, Traffic(1.0, after + 1, (), ()), ())

    async def iterations(self, after: int, engine_id: str) -> EngineIterations:
        if self.fail is not None:
            raise self.fail
        return EngineIterations(engine_id, after + 1, 0, ("t_s", "running"), ((0.5, 3.0),))

    async def configure(self, request: ConfigurationRequest) -> StackState:
        if self.fail is not None:
            raise self.fail
        self.asked.append(request)
        return replace(STATE_VALUE, batch_cap=request.batch_cap or 0)


@contextmanager
def _serving(target: _Target, path: Path) -> Iterator[None]:
    """A control server in a thread of its own."""
    loop = asyncio.new_event_loop()
    server = ControlServer(target, path)
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    try:
        asyncio.run_coroutine_threadsafe(server.start(), loop).result(20)
        yield
    finally:
        asyncio.run_coroutine_threadsafe(server.close(), loop).result(20)
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


@pytest.fixture
def target() -> _Target:
    return _Target()


@pytest.fixture
def path(tmp_path: Path, target: _Target) -> Iterator[Path]:
    with _serving(target, tmp_path / "control.sock"):
        yield tmp_path / "control.sock"


def _raw(path: Path, request: bytes) -> bytes:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as link:
        link.settimeout(20)
        link.connect(str(path))
        link.sendall(request)
        parts = []
        while part := link.recv(65536):
            parts.append(part)
    return b"".join(parts)


def _post(path: Path, body: bytes) -> tuple[int, dict[str, Any]]:
    head = "POST /v1/configuration HTTP/1.1\r\nHost: x\r\nConnection: close\r\n"
    head += f"Content-Length: {len(body)}\r\n\r\n"
    answer = _raw(path, head.encode() + body)
    return int(answer.split(b" ", 2)[1]), json.loads(answer.split(b"\r\n\r\n", 1)[1])


def test_the_client_reads_what_the_stack_says(path: Path) -> None:
    with StackClient(path) as client:
        assert client.limits() == LIMITS_VALUE
        assert client.state() == STATE_VALUE
        assert client.interval(41).traffic.cursor == 42


def test_iterations_are_passed_on_with_cursor_and_engine(path: Path, target: _Target) -> None:
    with StackClient(path) as client:
        told = client.iterations(7, "tp2-a&b/c")
        assert told == EngineIterations("tp2-a&b/c", 8, 0, ("t_s", "running"), ((0.5, 3.0),))
        assert client.iterations(0).engine_id == ""
        target.fail = EngineError("no engine takes requests now")
        with pytest.raises(EngineError, match="no engine takes requests"):
            client.iterations(0)


def test_a_configuration_arrives_as_it_was_asked_for(path: Path, target: _Target) -> None:
    with StackClient(path) as client:
        assert client.configure(batch_cap=8, tp_degree=2, lease_s=3.0).batch_cap == 8
    assert target.asked == [ConfigurationRequest(batch_cap=8, tp_degree=2, lease_s=3.0)]


@pytest.mark.parametrize(
    ("error", "kind"),
    [(ConfigError("no such degree"), DeploymentError), (EngineError("no engine answers"), EngineError)],
)
def test_a_refusal_keeps_its_kind_and_its_reason(
    path: Path, target: _Target, error: Exception, kind: type[Exception]
) -> None:
    target.fail = error
    with StackClient(path) as client, pytest.raises(kind, match=str(error)):
        client.configure(batch_cap=8)


def test_a_hanging_stack_is_told_from_an_absent_one(tmp_path: Path, path: Path, target: _Target) -> None:
    target.wait_s = 30.0
    with StackClient(path, timeout_s=0.2) as client, pytest.raises(DeploymentError, match=r"within 0\.2 s"):
        client.interval(0)
    with (
        StackClient(tmp_path / "none.sock") as client,
        pytest.raises(DeploymentError, match="start `rlgov serve`"),
    ):
        client.state()


def test_a_client_outlives_a_restart_of_the_stack(tmp_path: Path, target: _Target) -> None:
    client = StackClient(tmp_path / "control.sock")
    for _ in range(2):
        with _serving(target, tmp_path / "control.sock"):
            assert client.state() == STATE_VALUE
    client.close()


def test_another_version_is_refused(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rlgov.engine.control.client.schema_digest", lambda: "0" * 12)
    with StackClient(path) as client, pytest.raises(DeploymentError, match="another version"):
        client.state()


@pytest.mark.parametrize(
    "body",
    [
        b"", b"{}", b"[]", b"null", b"{", b'{"batch_cap": 0}', b'{"batch_cap": "8"}', b'{"batch_cap": 8.5}',
        b'{"batch_cap": true}', b'{"batch_cap": 8, "clock": 1}', b'{"tp_degree": -1}', b"\xff\xfe",
        b'{"batch_cap": 8, "lease_s": 0}', b'{"batch_cap": 8, "lease_s": NaN}', b'{"lease_s": 3.0}',
        b'{"batch_cap": 8, "lease_s": 1e9}',
    ],
)  # fmt: skip
def test_what_is_no_configuration_changes_nothing(path: Path, target: _Target, body: bytes) -> None:
    status, told = _post(path, body)
    assert status == 400
    assert told["error"].startswith("configuration: ")
    assert target.asked == []


@given(st.binary(max_size=200))
def test_no_bytes_stop_the_schema_from_answering(body: bytes) -> None:
    try:
        asked = ConfigurationRequest.model_validate_json(body)
    except ValueError:
        return
    assert asked.batch_cap is not None or asked.tp_degree is not None


@pytest.mark.parametrize("query", ["after=-1", "after=x", "after=1&more=2", "after=" + "9" * 40])
def test_a_wrong_cursor_is_refused(path: Path, query: str) -> None:
    answer = _raw(path, f"GET /v1/interval?{query} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode())
    assert answer.startswith(b"HTTP/1.1 400")


def test_too_much_is_refused_and_the_server_lives_on(path: Path, target: _Target) -> None:
    assert _post(path, b" " * (LARGEST_BODY_BYTES + 1))[0] == 413
    assert (
        _raw(path, b"GET /v1/../../etc HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n").split()[1] == b"404"
    )
    assert _raw(path, b"junk\r\n\r\n").split()[1] == b"400"
    with StackClient(path) as client:
        assert client.state() == STATE_VALUE
    assert target.asked == []


def test_only_owner_and_group_may_use_the_socket(path: Path) -> None:
    assert stat.S_IMODE(path.stat().st_mode) == 0o660


def test_a_leftover_is_replaced_and_somebody_elses_socket_is_not(tmp_path: Path, target: _Target) -> None:
    leftover = tmp_path / "control.sock"
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as dead:
        dead.bind(str(leftover))
    with _serving(target, leftover):
        with pytest.raises(ConfigError, match="another stack listens"):
            asyncio.run(ControlServer(target, leftover).start())
        with StackClient(leftover) as client:
            assert client.state() == STATE_VALUE
    assert not leftover.exists()
    leftover.write_text("mine", encoding="utf-8")
    with pytest.raises(ConfigError, match="is no socket"):
        asyncio.run(ControlServer(target, leftover).start())
    assert leftover.read_text(encoding="utf-8") == "mine"


def test_a_path_too_long_for_a_socket_is_refused(tmp_path: Path, target: _Target) -> None:
    with pytest.raises(ConfigError, match="shorter path"):
        asyncio.run(ControlServer(target, tmp_path / ("x" * 120)).start())


def test_tcp_needs_a_token(tmp_path: Path, target: _Target) -> None:
    async def ask() -> list[int]:
        server = ControlServer(target, tmp_path / "c.sock", token="secret")  # noqa: S106  # of this test
        port = await server.start(tcp_host="127.0.0.1")
        statuses = []
        async with aiohttp.ClientSession() as session:
            for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "Bearer secret"}):
                async with session.get(f"http://127.0.0.1:{port}/v1/state", headers=headers) as answer:
                    statuses.append(answer.status)
        await server.close()
        return statuses

    assert asyncio.run(ask()) == [401, 401, 200]
    with pytest.raises(ConfigError, match="needs a token"):
        asyncio.run(ControlServer(target, tmp_path / "d.sock").start(tcp_host="127.0.0.1"))


numbers = st.floats(allow_nan=False, allow_infinity=False, min_value=0, max_value=1e9)
records = st.builds(
    RequestRecord,
    st.text(max_size=9),
    numbers,
    st.sampled_from(list(Outcome)),
    dispatched_s=st.none() | numbers,
)
histograms = st.builds(
    lambda bounds: Histogram((*bounds, math.inf), tuple(float(i) for i in range(len(bounds) + 1)), 1.5, 2.0),
    st.lists(numbers, max_size=4),
)
engine_samples = st.builds(
    EngineSample, numbers, st.just("metrics"), st.text(max_size=9), st.integers(0, 99), st.integers(0, 99),
    numbers, numbers, numbers, numbers, numbers, numbers,
    histograms=st.dictionaries(st.text(max_size=5), histograms, max_size=2),
)  # fmt: skip


@given(st.lists(records, max_size=4), st.lists(engine_samples, max_size=2))
def test_values_cross_unchanged(closed: list[RequestRecord], engines: list[EngineSample]) -> None:
    value = StackInterval(STATE_VALUE, Traffic(1.0, 3, (), tuple(closed), 2), tuple(engines), {"a": "late"})
    text = INTERVAL.dump_json(value)
    assert INTERVAL.validate_json(text) == value
    json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


@pytest.mark.parametrize(("adapter", "value"), [(STATE, STATE_VALUE), (LIMITS, LIMITS_VALUE)])
def test_unknown_missing_and_mistyped_fields_are_refused(adapter: Any, value: Any) -> None:
    whole = json.loads(adapter.dump_json(value))
    name = next(iter(whole))
    for wrong in ({**whole, "extra": 1}, {k: v for k, v in whole.items() if k != name}, {**whole, name: []}):
        with pytest.raises(ValueError, match="validation error"):
            adapter.validate_json(json.dumps(wrong))
