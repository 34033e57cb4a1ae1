"""The fake vLLM server (tests/fakes/engine.py) for every test of the serving path."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from rlgov.clock import SystemClock

REPOSITORY = Path(__file__).resolve().parents[2]
FAKE = REPOSITORY / "tests" / "fakes" / "engine.py"
START_S = 60.0  # on a loaded machine; a healthy start takes under a second
TOKEN = "fake-token"  # noqa: S105  # of a fake


@dataclass
class FakeServer:
    """A fake that runs. ``tests/fakes/engine_faults.py`` lists the faults."""

    process: subprocess.Popen[bytes]
    log_path: Path
    port: int
    token: str = TOKEN

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def fault(self, **changes: Any) -> None:
        """Misbehave from now on; ``reset=True`` first takes back what was asked before."""
        body = json.dumps(changes).encode()
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(f"{self.url}/fake/fault", data=body, headers=headers)  # noqa: S310  # loopback
        with urllib.request.urlopen(request, timeout=START_S) as answer:  # noqa: S310  # as above
            answer.read()

    def state(self) -> dict[str, Any]:
        """What the fake was asked and how it was started."""
        with urllib.request.urlopen(f"{self.url}/fake/state", timeout=START_S) as answer:  # noqa: S310  # loopback
            state: dict[str, Any] = json.loads(answer.read())
            return state

    def log(self) -> str:
        return self.log_path.read_text(encoding="utf-8", errors="replace")


def _wait_started(process: subprocess.Popen[bytes], log_path: Path) -> int:
    clock = SystemClock()
    until_s = clock.monotonic_s() + START_S
    while clock.monotonic_s() < until_s:
        log = log_path.read_text(encoding="utf-8", errors="replace")
        if started := re.search(r"startup complete on port (\d+)", log):
            return int(started[1])
        if process.poll() is not None:
            pytest.fail(f"the fake engine ended with {process.returncode}:\n{log}")
        clock.sleep_s(0.01)
    pytest.fail(f"the fake engine did not start within {START_S:g} s:\n{log_path.read_text()}")


@pytest.fixture(scope="session")
def fake_command() -> tuple[str, ...]:
    """For EngineSpec.command: `serve MODEL ...` is appended."""
    return (sys.executable, str(FAKE))


@pytest.fixture(scope="session")
def fake_program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The fake as one executable file, to be named where the path of a `vllm` program is asked for."""
    program = tmp_path_factory.mktemp("fake") / "vllm"
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{FAKE}" "$@"\n', encoding="utf-8")
    program.chmod(0o755)
    return program


@pytest.fixture
def free_port() -> Callable[[], int]:
    """Gives a port of the loopback that nobody listens on."""

    def find() -> int:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port: int = probe.getsockname()[1]
            return port

    return find


@pytest.fixture
def start_fake(tmp_path: Path) -> Iterator[Callable[..., FakeServer]]:
    """Starts fakes on ports of their own: ``start_fake("--fake-token-ms", "2", plugin=True)``."""
    started: list[subprocess.Popen[bytes]] = []

    def start(*arguments: str, plugin: bool = True, environment: dict[str, str] | None = None) -> FakeServer:
        log_path = tmp_path / f"fake-{len(started)}.log"
        settings = {"RLGOV_PLUGIN": str(int(plugin)), "RLGOV_PLUGIN_TOKEN": TOKEN}
        command = [sys.executable, str(FAKE), "serve", "fake/model", "--port", "0", *arguments]
        with log_path.open("wb") as log:
            process = subprocess.Popen(
                command,
                env={**os.environ, **settings, **(environment or {})},
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        started.append(process)
        return FakeServer(process, log_path, _wait_started(process, log_path))

    yield start
    for process in started:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
