"""One machine with GPUs, a keeper, a governor and a serving stack, all but the stack as real processes.

The driver is the stand-in of tests/fakes/nvml.py, whose state this process reads directly: what is locked is
known without asking anybody.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import select
import signal
import subprocess
import sys
import threading
import urllib.request
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Protocol

from rlgov.clock import SystemClock
from rlgov.errors import RlgovError
from rlgov.governor.client import SurfaceClient
from rlgov.hardware.keeper.client import KeeperLink
from rlgov.hardware.keeper.options import LONGEST_PROMISED_S
from tests.chaos.serving import Target, serving
from tests.fakes.nvml import NvmlStub

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from types import TracebackType
    from typing import Self

REPOSITORY = Path(__file__).resolve().parents[2]
PROMISED_S = LONGEST_PROMISED_S
PATIENCE_S = 90.0  # for what is not measured, on a machine that does a lot else
POLL_S = 0.01
GPUS = 4
TOP_MHZ = 1980
SLOW = "static:600/64/4"
NAME = b"NVIDIA H100 80GB HBM3"
CLOCKS_MHZ = tuple(sorted({*range(TOP_MHZ, 180, -30), 405}, reverse=True))  # the profile's are among them


class Program(Protocol):
    """A process that was started."""

    pid: int

    def running(self) -> bool:
        """Whether it has not ended; a stopped process has not."""
        ...

    def wait(self, timeout_s: float) -> None:
        """Wait for its end. Raises AssertionError when that does not come."""
        ...


class Started:
    """A child of this process."""

    def __init__(self, argv: Sequence[str], environment: Mapping[str, str], log: Path) -> None:
        with log.open("ab") as file:
            self._process = subprocess.Popen(
                [sys.executable, "-m", *argv],
                env={**os.environ, **environment},
                cwd=REPOSITORY,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self.pid = self._process.pid

    @property
    def code(self) -> int | None:
        """Its exit code, once it has ended."""
        return self._process.poll()

    def running(self) -> bool:
        return self._process.poll() is None

    def wait(self, timeout_s: float) -> None:
        try:
            self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"process {self.pid} does not end within {timeout_s:g} s") from None


class Forked:
    """A fork of a nursery; nobody's exit code."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self._handle: int | None = None
        with contextlib.suppress(ProcessLookupError):
            self._handle = os.pidfd_open(pid)

    def running(self) -> bool:
        return not self._ended(0.0)

    def wait(self, timeout_s: float) -> None:
        if not self._ended(timeout_s):
            raise AssertionError(f"process {self.pid} does not end within {timeout_s:g} s")

    def _ended(self, timeout_s: float) -> bool:
        if self._handle is not None and select.select((self._handle,), (), (), timeout_s)[0]:
            os.close(self._handle)
            self._handle = None
        return self._handle is None


class Nursery:
    """Starts governors in no time; close it.

    Args:
        library: Folder of the stand-in for the driver's library: the loader reads its variable only once.
    """

    def __init__(self, library: Path) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.chaos.nursery"],
            cwd=REPOSITORY,
            env={**os.environ, "LD_LIBRARY_PATH": str(library)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._turn = threading.Lock()

    def start(self, argv: Sequence[str], environment: Mapping[str, str], log: Path) -> Forked:
        """`rlgov ARGV`. May be called from any thread."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        order = {"argv": list(argv), "env": dict(environment), "log": str(log)}
        with self._turn:
            self._process.stdin.write(json.dumps(order) + "\n")
            self._process.stdin.flush()
            return Forked(int(self._process.stdout.readline()))

    def close(self) -> None:
        """End it; what it has started goes on."""
        self._process.communicate()


@dataclass
class Scene:
    """A context manager: the stack serves, nothing else runs yet.

    Args:
        library: Folder of the stand-in for the driver's library.
        lease_s: Longest lease that the keeper grants.
        interval_s: Of the governor's loop.
        policy: What it wants.
        restore_mhz: Clock at which an administrator holds the GPUs; None: they are not locked.
        seed: Of the traffic.
        nursery: Starts the governors; without one each is a Python of its own.
        control: Control socket of a stack that serves already; None: a toy.
        profile: Of that stack.
        gpus: How many there are.
    """

    library: Path
    lease_s: float = 2.0
    interval_s: float = 0.5
    policy: str = SLOW
    restore_mhz: int | None = None
    seed: int = 0
    nursery: Nursery | None = None
    control: Path | None = None
    profile: str = "h100-qwen3-32b"
    gpus: int = GPUS
    clock: SystemClock = field(default_factory=SystemClock)
    keeper: Started | None = None
    governor: Program | None = None

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as undo:
            # Of its own, and short: the path of a Unix socket has at most 107 characters.
            self.folder = Path(
                undo.enter_context(TemporaryDirectory(prefix="rlgov-", ignore_cleanup_errors=True))
            )
            self.stub = NvmlStub(self.folder / "nvml", self.library, self.gpus, CLOCKS_MHZ)
            undo.callback(self.stub.close)
            for number in range(self.gpus):
                self.stub.gpu(number).name_bytes = NAME
                if self.restore_mhz is not None:
                    self.foreign_lock(number, self.restore_mhz)
            (self.folder / "keeper").mkdir(mode=0o755)
            self.log = self.folder / "log"
            if self.control is None:
                self.control = self.folder / "stack.sock"
                self.stack: Target = undo.enter_context(serving(self.control, self.stub.uuids, self.seed))
            undo.callback(self._kill)
            self._undo = undo.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is not None:
            sys.stderr.write(self.said())
        self._undo.close()

    # ------------------------------------------------------------------ processes

    def start_keeper(self) -> Started:
        """A keeper that serves."""
        flags = ["--longest-lease-s", str(self.lease_s), *self._keeper_flags()]
        keeper = Started(["rlgov.hardware.keeper", *flags], self.stub.environment, self.log)
        self.keeper = keeper
        self.until("the keeper serves", lambda: self._serves(keeper))
        return keeper

    def stop_post(self) -> None:
        """What systemd's ExecStopPost does when a keeper has ended."""
        program = Started(
            ["rlgov.hardware.keeper", "--restore-left", *self._keeper_flags()],
            self.stub.environment,
            self.log,
        )
        program.wait(PATIENCE_S)
        assert program.code == 0, self.said()

    def start_governor(self, journal: str = "journal") -> Program:
        """A governor in active mode; it has still to come up."""
        argv = [
            "govern", self.policy, "--mode", "active", "--profile", self.profile,
            "--control", str(self.control), "--gpus", *self.stub.uuids,
            "--clocks", "keeper", "--keeper-socket", str(self.folder / "keeper" / "keeper.sock"),
            "--journal", str(self.folder / journal), "--listen", str(self.folder / "governor.sock"),
            "--listen", "127.0.0.1:0",
            "--interval-s", str(self.interval_s), "--json",
        ]  # fmt: skip
        if self.nursery is None:
            self.governor = Started(["rlgov", *argv], self.stub.environment, self.log)
        else:
            self.governor = self.nursery.start(argv, self.stub.environment, self.log)
        return self.governor

    def start(self) -> None:
        """A keeper and a governor that has slowed the GPUs down."""
        self.start_keeper()
        self.start_governor()
        self.until_governed()

    def until_governed(self) -> None:
        """Wait until all GPUs are locked below what was found."""
        self.until("the governor slows the GPUs down", self.governed)

    @staticmethod
    def signal(program: Program | None, number: signal.Signals) -> None:
        """Send a signal to a process that may have ended."""
        if program is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(program.pid, number)

    def _kill(self) -> None:
        for program in (self.governor, self.keeper):
            if program is not None and program.running():
                self.signal(program, signal.SIGKILL)
                program.wait(PATIENCE_S)

    def _keeper_flags(self) -> list[str]:
        flags = ["--state-dir", str(self.folder / "keeper")]
        return flags + ([] if self.restore_mhz is None else ["--restore-clock-mhz", str(self.restore_mhz)])

    def _serves(self, keeper: Started) -> bool:
        assert keeper.running(), f"the keeper ended: {self.said()}"
        with (
            contextlib.suppress(RlgovError),
            KeeperLink(self.folder / "keeper" / "keeper.sock", PATIENCE_S) as link,
        ):
            link.state()
            return True
        return False

    # ------------------------------------------------------------------ what is seen

    def as_found(self, number: int) -> bool:
        """Whether a GPU is at the saved state, or higher."""
        mhz = self.stub.locks_mhz()[number]
        return mhz is None or (self.restore_mhz is not None and mhz >= self.restore_mhz)

    def restored(self) -> bool:
        """Whether all GPUs are at the saved state, or higher."""
        return all(self.as_found(number) for number in range(self.gpus))

    def governed(self) -> bool:
        """Whether no GPU is."""
        assert self.governor is None or self.governor.running(), f"the governor ended: {self.said()[-3000:]}"
        return not any(self.as_found(number) for number in range(self.gpus))

    def status(self) -> dict[str, Any]:
        """The governor's status page; empty while it does not answer."""
        try:
            return SurfaceClient(str(self.folder / "governor.sock")).status()
        except RlgovError:
            return {}

    def page(self) -> str:
        """The metrics page of the newest governor, over TCP."""
        address = re.findall(r"http://127\.0\.0\.1:\d+", self.said())[-1]
        with urllib.request.urlopen(f"{address}/metrics", timeout=PATIENCE_S) as answer:  # noqa: S310  # loopback
            text: str = answer.read().decode()
        return text

    def conditions(self) -> set[str]:
        """Names of what holds now, as the status page tells."""
        return {condition["name"] for condition in self.status().get("conditions", ())}

    def saved(self) -> set[str]:
        """Files of saved locks."""
        return {path.name for path in (self.folder / "keeper").glob("gpu-*")}

    def phases(self) -> set[str]:
        """What the GPUs are to the keeper, which has nothing unread from anybody who is gone."""
        with KeeperLink(self.folder / "keeper" / "keeper.sock", PATIENCE_S) as link:
            for _ in range(2):  # an answer may be older than the end of another connection, not two
                phases = {str(gpu.phase) for gpu in link.state().gpus}
        return phases

    def said(self) -> str:
        """What all the processes wrote."""
        return self.log.read_text(encoding="utf-8", errors="replace") if self.log.exists() else ""

    def until(self, what: str, true: Callable[[], bool], timeout_s: float = PATIENCE_S) -> float:
        """Wait until something is true; how long that took, in seconds."""
        began_s = self.clock.monotonic_s()
        while not true():
            if self.clock.monotonic_s() - began_s > timeout_s:
                seen = f"locked: {self.stub.locks_mhz()}; {self.said()[-3000:]}"
                raise AssertionError(f"not within {timeout_s:g} s: {what}; {seen}")
            self.clock.sleep_s(POLL_S)
        return self.clock.monotonic_s() - began_s

    # ------------------------------------------------------------------ what others do

    def foreign_lock(self, number: int, mhz: int) -> None:
        """Somebody else locks a GPU; 0 removes whatever lock there is."""
        gpu = self.stub.gpu(number)
        gpu.locked_low_mhz = gpu.locked_high_mhz = mhz
