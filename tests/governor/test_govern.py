"""``rlgov govern`` as a program: over ``rlgov serve`` with fake engines, on a stand-in for the driver."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from rlgov.clock import SystemClock
from rlgov.engine.control.client import StackClient
from rlgov.journal import read_journal
from rlgov.simulation.profile import load_profile

if TYPE_CHECKING:
    from tests.fakes.nvml import NvmlStub

CLOCKS_MHZ = load_profile("h100-qwen3-32b").limits().sm_clocks_mhz
PATIENCE_S = 90.0
CLOCK = SystemClock()


def wait_for(what: Callable[[], Any], why: Callable[[], str] = lambda: "") -> Any:
    until_s = CLOCK.monotonic_s() + PATIENCE_S
    while not (found := what()):
        assert CLOCK.monotonic_s() < until_s, why()
        CLOCK.sleep_s(0.05)
    return found


@pytest.fixture(scope="module")
def control(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The control socket of a running stack of fake engines that serves Qwen3-32B, as it says."""
    folder = tmp_path_factory.mktemp("serve")
    program = folder / "vllm"
    engine = repository / "tests" / "fakes" / "engine.py"
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{engine}" "$@"\n', encoding="utf-8")
    program.chmod(0o755)
    said = folder / "said.json"
    command = [
        sys.executable, "-m", "rlgov", "serve", "--model", "Qwen/Qwen3-32B", "--profile", "h100-qwen3-32b",
        "--gpus", "none", "--port", "0", "--vllm", str(program), "--run", str(folder / "run"), "--json",
    ]  # fmt: skip
    with said.open("wb") as out, (folder / "log").open("wb") as log:
        process = subprocess.Popen(command, cwd=repository, stdout=out, stderr=log)
    try:
        wait_for(
            lambda: said.read_text().endswith("}\n") or process.poll() is not None,
            (folder / "log").read_text,
        )
        yield Path(json.loads(said.read_text())["control"])
    finally:
        process.send_signal(signal.SIGTERM)
        assert process.wait(PATIENCE_S) == 0


@pytest.fixture
def stub(make_nvml_stub: Callable[..., NvmlStub]) -> NvmlStub:
    """Four cards that the profile is of."""
    made = make_nvml_stub(4, clocks_mhz=CLOCKS_MHZ)
    for number in range(4):
        made.gpu(number).name_bytes = b"NVIDIA H100 80GB HBM3"
    return made


@pytest.fixture
def start(
    control: Path, stub: NvmlStub, repository: Path, tmp_path: Path
) -> Iterator[Callable[..., subprocess.Popen[bytes]]]:
    """Starts ``rlgov govern``; what is left at the end is killed."""
    started: list[subprocess.Popen[bytes]] = []

    def run(policy: str = "ecofreq", *more: str, **environment: str) -> subprocess.Popen[bytes]:
        command = [
            sys.executable, "-m", "rlgov", "govern", policy, "--control", str(control),
            "--profile", "h100-qwen3-32b", "--gpus", *stub.uuids, "--clocks", "direct",
            "--journal", str(tmp_path / "journal"), "--listen", str(tmp_path / "governor.sock"), "--json",
            *more,
        ]  # fmt: skip
        variables = (
            os.environ | stub.environment | {"RLGOV_CLAIMS_DIR": str(tmp_path / "claims")} | environment
        )
        with (tmp_path / "out").open("wb") as out, (tmp_path / "err").open("wb") as err:
            started.append(subprocess.Popen(command, cwd=repository, stdout=out, stderr=err, env=variables))
        return started[-1]

    yield run
    for process in started:
        if process.poll() is None:
            process.kill()
            process.wait()


def slowed(stub: NvmlStub) -> bool:
    return all(lock is not None and lock < CLOCKS_MHZ[0] for lock in stub.locks_mhz())


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_a_signal_ends_it_and_gives_everything_back(
    start: Callable[..., Any],
    stub: NvmlStub,
    control: Path,
    tmp_path: Path,
    number: signal.Signals,
    code: int,
) -> None:
    process = start("ecofreq", "--mode", "active")
    wait_for(lambda: slowed(stub) or process.poll() is not None, (tmp_path / "err").read_text)
    assert process.poll() is None, (tmp_path / "err").read_text()
    process.send_signal(number)
    assert process.wait(PATIENCE_S) == code, (tmp_path / "err").read_text()
    assert stub.locks_mhz() == (None,) * 4
    with StackClient(control, timeout_s=PATIENCE_S) as client:
        assert client.state().batch_cap == 256
    said = json.loads((tmp_path / "out").read_text())
    assert (said["mode"], said["clocks"], said["mismatches"]) == ("active", "direct", [])
    journal = read_journal(tmp_path / "journal")
    assert journal.header.versions["governor.mode"] == "active"
    assert any(entry.decision is not None for entry in journal.intervals)


@pytest.mark.slow
def test_shadow_decides_without_a_right_and_without_a_write(
    start: Callable[..., Any], stub: NvmlStub, tmp_path: Path
) -> None:
    stub.state.unprivileged = 1
    process = start()
    wait_for(
        lambda: (tmp_path / "journal").exists() and '"decision":{' in read(tmp_path / "journal"),
        (tmp_path / "err").read_text,
    )
    process.send_signal(signal.SIGTERM)
    assert process.wait(PATIENCE_S) == 0
    assert stub.writes == ()


@pytest.mark.slow
def test_systemd_is_told_that_it_is_ready_alive_and_stopping(
    start: Callable[..., Any], tmp_path: Path
) -> None:
    path = tmp_path / "notify"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind(str(path))
        listener.settimeout(PATIENCE_S)
        process = start("ecofreq", NOTIFY_SOCKET=str(path), WATCHDOG_USEC="30000000")
        assert listener.recv(1000).startswith(b"READY=1")
        assert [listener.recv(1000) for _ in range(3)] == [b"WATCHDOG=1"] * 3
        process.send_signal(signal.SIGTERM)
        told = b""
        while told != b"STOPPING=1":
            told = listener.recv(1000)
    assert process.wait(PATIENCE_S) == 0


@pytest.mark.slow
def test_active_is_refused_where_cards_and_profile_differ(
    start: Callable[..., Any], stub: NvmlStub, tmp_path: Path
) -> None:
    for number in range(4):
        stub.gpu(number).name_bytes = b"NVIDIA H200"
    assert start("ecofreq", "--mode", "active").wait(PATIENCE_S) == 2
    told = (tmp_path / "err").read_text()
    assert "the GPUs are NVIDIA H200" in told
    assert "--mode shadow" in told
    assert stub.writes == ()


@pytest.mark.slow
def test_active_is_refused_where_clocks_are_not_to_be_set(
    start: Callable[..., Any], stub: NvmlStub, tmp_path: Path
) -> None:
    stub.gpu(2).mig = 1
    assert start("ecofreq", "--mode", "active").wait(PATIENCE_S) == 2
    assert "MIG" in (tmp_path / "err").read_text()


def test_a_damaged_bundle_is_refused_in_every_mode(start: Callable[..., Any], tmp_path: Path) -> None:
    path = tmp_path / "policy.safetensors"
    path.write_bytes(b"\x00" * 100)
    assert start(str(path)).wait(PATIENCE_S) == 2
    assert "policy.safetensors" in (tmp_path / "err").read_text()


def read(folder: Path) -> str:
    return "".join(path.read_text() for path in folder.iterdir())
