"""A keeper and its clients as real processes, over the stand-in for the NVIDIA driver."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from rlgov.clock import SystemClock
from rlgov.hardware.keeper.client import KeeperClocks, KeeperLink
from rlgov.hardware.keeper.errors import KeeperGone

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType
    from typing import Self

    from tests.fakes.nvml import NvmlStub

TTL_S = 3.0
PATIENCE_S = 60.0  # for processes to start on a busy machine; nothing is measured by it

# Leases a group, says so, then changes the clock now and then and renews in between, until it is told no.
CLIENT = """
import signal
import sys
from pathlib import Path
from rlgov.clock import SystemClock
from rlgov.hardware.keeper.client import KeeperClocks
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell has background jobs ignore it
clock = SystemClock()
clocks = KeeperClocks(Path(sys.argv[1]), tuple(sys.argv[3:]), clock, ttl_s=float(sys.argv[2]), timeout_s=10)
clocks.lock(1200)
print("locked", flush=True)
number = 0
while True:
    clock.sleep_s(0.05)
    number += 1
    if number % 6:
        clocks.renew()
    else:
        clocks.lock((1200, 1095, 1395)[number // 6 % 3])
"""


class Site:
    """One machine.

    Args:
        stub: Its driver.
        folder: The keeper's state.
    """

    def __init__(self, stub: NvmlStub, folder: Path) -> None:
        self.stub = stub
        self.folder = folder
        self.socket = folder / "keeper.sock"
        self.clock = SystemClock()
        self.environment = {**os.environ, **stub.environment}
        self.processes: list[subprocess.Popen[str]] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for process in self.processes:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
        for process in self.processes:
            process.wait()
            for stream in (process.stdout, process.stderr):
                if stream is not None:
                    stream.close()

    def spawn(self, *arguments: str) -> subprocess.Popen[str]:
        """A process that sees the driver."""
        process = subprocess.Popen(
            [sys.executable, *arguments],
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.processes.append(process)
        return process

    def keeper(self, *flags: str) -> subprocess.Popen[str]:
        """A keeper that serves."""
        process = self.start_keeper(*flags)
        self.wait_for(process)
        return process

    def start_keeper(self, *flags: str) -> subprocess.Popen[str]:
        """A keeper that may not serve yet."""
        return self.spawn("-m", "rlgov.hardware.keeper", "--state-dir", str(self.folder), *flags)

    def wait_for(self, keeper: subprocess.Popen[str]) -> None:
        """Until a keeper that was started serves."""

        def serves() -> bool:
            if keeper.poll() is not None:
                raise AssertionError(f"the keeper ended: {keeper.communicate()[1]}")
            with contextlib.suppress(KeeperGone), KeeperLink(self.socket, PATIENCE_S) as link:
                link.state()
                return True
            return False

        assert self.wait_until(serves, PATIENCE_S)

    def run(self, *flags: str) -> subprocess.CompletedProcess[str]:
        """The keeper's program, to its end."""
        return subprocess.run(
            [sys.executable, "-m", "rlgov.hardware.keeper", "--state-dir", str(self.folder), *flags],
            env=self.environment,
            capture_output=True,
            text=True,
            check=False,
            timeout=PATIENCE_S,
        )

    def client(self, *uuids: str, ttl_s: float = TTL_S) -> subprocess.Popen[str]:
        """A client that has locked its group's clocks."""
        process = self.spawn("-c", CLIENT, str(self.socket), str(ttl_s), *uuids)
        assert process.stdout is not None
        assert process.stderr is not None
        if process.stdout.readline() != "locked\n":
            raise AssertionError(process.stderr.read())
        return process

    def clocks(self, *uuids: str) -> KeeperClocks:
        """A client in this process; close it."""
        return KeeperClocks(self.socket, uuids, self.clock, timeout_s=PATIENCE_S)

    def wait_until(self, condition: Callable[[], bool], timeout_s: float) -> bool:
        """Whether it came true in time."""
        deadline_s = self.clock.monotonic_s() + timeout_s
        while not condition():
            if self.clock.monotonic_s() > deadline_s:
                return False
            self.clock.sleep_s(0.002)
        return True

    def restored(self) -> bool:
        """Whether no GPU is locked."""
        return set(self.stub.locks_mhz()) == {None}


def kill(process: subprocess.Popen[str], number: signal.Signals) -> None:
    """Send a signal, and wait for the end if it brings one."""
    process.send_signal(number)
    if number is not signal.SIGSTOP:
        process.wait(PATIENCE_S)
