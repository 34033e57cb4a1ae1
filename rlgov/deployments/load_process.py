"""A trace played against a serving stack by the load generator, in a process of its own."""

from __future__ import annotations

import signal
import subprocess
import sys
from typing import TYPE_CHECKING

from rlgov.errors import DeploymentError
from rlgov.workload.readers import write_trace
from rlgov.workload.trace import Trace

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

_TAIL_CHARACTERS = 800
_NOT_ALL_SERVED = 1  # exit code of `rlgov load` when some requests were not served completely
_STOP_S = 10.0


class LoadProcess:
    """Plays a trace with ``rlgov load``, anew in every episode, until it ends or is stopped.

    A process of its own keeps its thousands of streams away from the loop that governs.

    Args:
        url: The gateway.
        trace: A trace file, ``synthetic:NAME``, or a trace in memory.
        out: Folder for results and logs, one sub-folder an episode.
        arguments: More flags of ``rlgov load``.
        command: What is run, before the flags.
    """

    def __init__(
        self,
        url: str,
        trace: Trace | str | Path,
        out: Path,
        *,
        arguments: Sequence[str] = (),
        command: Sequence[str] = (sys.executable, "-m", "rlgov", "load"),
    ) -> None:
        out.mkdir(parents=True, exist_ok=True)
        if isinstance(trace, Trace):
            write_trace(trace, out / "trace.csv")
            trace = out / "trace.csv"
        self._flags = ("--url", url, "--trace", str(trace), *arguments)
        self._command = tuple(command)
        self._out = out
        self._episode = 0
        self._process: subprocess.Popen[bytes] | None = None
        self._log = out / "load.log"

    def start(self, seed: int) -> None:
        """Begin to send; ``seed`` fixes generated traffic and prompts."""
        self.stop()
        folder = self._out / f"episode-{self._episode}"
        folder.mkdir(parents=True, exist_ok=True)
        self._episode += 1
        self._log = folder / "load.log"
        with self._log.open("wb") as log:
            # In a session of its own: Ctrl-C at the terminal reaches the governor, which then stops this.
            self._process = subprocess.Popen(  # noqa: S603  # our own program
                [*self._command, *self._flags, "--end-with-input", "--seed", str(seed), "--out", str(folder)],
                stdin=subprocess.PIPE,  # ends when we do, even by SIGKILL
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    @property
    def finished(self) -> bool:
        """Whether the generator has ended. Raises DeploymentError when it failed, with the end of its log."""
        if self._process is None:
            return False
        code = self._process.poll()
        if code is None:
            return False
        _hang_up(self._process)
        if code not in {0, _NOT_ALL_SERVED}:
            tail = self._log.read_text(encoding="utf-8", errors="replace")[-_TAIL_CHARACTERS:].strip()
            msg = f"the load generator ended with code {code}; its log {self._log} says: {tail or 'nothing'}"
            raise DeploymentError(msg)
        return True

    def stop(self) -> None:
        """End it; it still writes what happened, unless it takes too long."""
        process = self._process
        if process is None:
            return
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)  # SIGINT may be ignored: background jobs inherit that
            try:
                process.wait(_STOP_S)
            except subprocess.TimeoutExpired:
                process.kill()
        process.wait()
        _hang_up(process)
        self._process = None  # only now: an interrupted stop can be called again


def _hang_up(process: subprocess.Popen[bytes]) -> None:
    if process.stdin is not None:
        process.stdin.close()
