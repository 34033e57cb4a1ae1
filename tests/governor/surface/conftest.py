"""A governor's ticks without a governor."""

from __future__ import annotations

import contextlib
import http.client
import socket
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from rlgov.clock import VirtualClock
from rlgov.governor.listen import TcpAddress, UnixAddress
from rlgov.governor.records import Actuation, Condition, Governed, Mode, Prediction, Severity, Tick
from rlgov.governor.surface import Surface
from rlgov.records import Configuration, Decision, Limits, ServiceLevel, Window

LIMITS = Limits(
    sm_clocks_mhz=(1980, 1500, 1000),
    batch_caps=(256, 64),
    tp_degrees=(4, 2),
    interval_s=1.0,
    service_level=ServiceLevel(1.0, 0.075),
    allotted_gpus=4,
    tdp_w=700.0,
    kv_capacity_tokens=(800_000, 300_000),
    switch_s=(1.5, 1.5),
    max_num_batched_tokens=1024,
)
SLOWER = Configuration(1500, 256, 4)
TOKEN = "a-token-of-more-than-16-letters"  # noqa: S105  # of no governor but the tests'

MakeTick = Callable[..., Tick]
Answer = tuple[int, dict[str, str], bytes]
Ask = Callable[..., Answer]


def window(start_s: float = 0.0, **values: Any) -> Window:
    """A second of ordinary traffic at the fastest configuration."""
    usual = Window(
        start_s=start_s,
        duration_s=1.0,
        arrivals=4.0,
        prompt_tokens=2000.0,
        output_tokens=800.0,
        prefill_tokens=2000.0,
        served=3.0,
        misses=0.0,
        overdue=0.0,
        preemptions=0.0,
        running=20.0,
        waiting=1.0,
        waiting_tokens=300.0,
        oldest_wait_s=0.1,
        running_mean=19.0,
        busy_fraction=1.0,
        kv_usage=0.2,
        ttft_p50_s=0.1,
        ttft_p99_s=0.4,
        tpot_p50_s=0.02,
        tpot_p99_s=0.04,
        itl_mean_s=0.025,
        energy_j=2000.0,
        measured_clock_mhz=1980.0,
        throttled_fraction=0.0,
        sm_clock_mhz=1980.0,
        batch_cap=256.0,
        tp_degree=4.0,
        switching=0.0,
        age_s=0.05,
    )
    return replace(usual, **values)


def condition(name: str = "Blind", severity: Severity = Severity.WARNING, since_s: float = 0.0) -> Condition:
    return Condition(name, severity, since_s, f"{name} is the matter", f"look into {name}")


@pytest.fixture
def governed() -> Governed:
    return Governed(
        policy="learned",
        policy_digest="0123456789abcdef",
        profile="h100-qwen3-32b",
        gpu_names=("NVIDIA H100", "NVIDIA H100"),
        gpu_uuids=("GPU-aaaa", "GPU-bbbb"),
        model="Qwen3-32B",
        limits=LIMITS,
        versions={"rlgov": "1.2.3"},
        started_wall_s=1000.0,
        target="control.sock",
    )


@pytest.fixture
def clock() -> VirtualClock:
    return VirtualClock(monotonic_s=50.0, wall_s=1000.0)


@pytest.fixture
def make_tick() -> MakeTick:
    """Ticks in shadow mode, one after another, that ask for a slower clock than the one in force."""
    count = 0

    def make(*, seen: dict[str, Any] | None = None, **values: Any) -> Tick:
        nonlocal count
        count += 1
        usual = Tick(
            number=count,
            at_s=float(count),
            wall_s=1000.0 + count,
            mode=Mode.SHADOW,
            acting=False,
            window=window(count - 1.0, **(seen or {})),
            decision=Decision(float(count), SLOWER, SLOWER, "POLICY"),
            reason="POLICY",
            ood_score=0.25,
            actuation=Actuation(
                "keeper",
                lease_left_s=2.5,
                asked_mhz=1500,
                applied_mhz=1500,
                measured_mhz=1498.0,
                verdict="held",
                failures={"lock": 2},
            ),
            reward_terms={"energy": -0.5, "miss": 0.0},
            prediction=Prediction(1500.0, 0.03, 1500.0, 2000.0, 0.06),
            decision_duration_s=0.0015,
            overruns=1,
        )
        return replace(usual, **values)

    return make


@pytest.fixture
def surface(governed: Governed, clock: VirtualClock) -> Iterator[Surface]:
    """Without anything to listen at."""
    with Surface(governed, clock) as made:
        yield made


@pytest.fixture
def listening(governed: Governed, clock: VirtualClock, tmp_path: Path) -> Iterator[Surface]:
    """At a Unix socket, and at a TCP port where orders need the token."""
    addresses = (UnixAddress(tmp_path / "s"), TcpAddress("127.0.0.1", 0))
    with Surface(governed, clock, addresses=addresses, token=TOKEN) as made:
        yield made


@pytest.fixture
def ask(listening: Surface) -> Ask:
    """One request over TCP, or over the Unix socket with ``unix=True``: status, headers, body."""

    def request(
        method: str, path: str, body: bytes | None = None, *, unix: bool = False, **headers: str
    ) -> Answer:
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        connection = _unix(listening) if unix else _tcp(listening)
        try:
            with contextlib.suppress(BrokenPipeError):  # refused by its head: the body is not waited for
                connection.request(method, path, body=body, headers=named)
            response = connection.getresponse()
            return response.status, dict(response.getheaders()), response.read()
        finally:
            connection.close()

    return request


def _tcp(surface: Surface) -> http.client.HTTPConnection:
    address = surface.addresses[1]
    assert isinstance(address, TcpAddress)
    return http.client.HTTPConnection(address.host, address.port, timeout=30)


def _unix(surface: Surface) -> http.client.HTTPConnection:
    address = surface.addresses[0]
    assert isinstance(address, UnixAddress)
    connection = http.client.HTTPConnection("localhost", timeout=30)
    connection.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    connection.sock.settimeout(30)
    connection.sock.connect(str(address.path))
    return connection


@pytest.fixture
def token() -> str:
    return TOKEN


@pytest.fixture
def make_condition() -> Callable[..., Condition]:
    return condition


@pytest.fixture
def limits() -> Limits:
    return LIMITS
