"""How an engine's process begins, and how all that came of it ends."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from rlgov.engine.identity import ProcessIdentity, family, is_running, send_signal
from rlgov.errors import EngineError

if TYPE_CHECKING:
    from rlgov.clock import Clock
    from rlgov.engine.spec import EngineSpec

POLL_S = 0.01
KILL_S = 10.0
STDERR = 2
_HANDLED = (signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGPIPE, signal.SIGTERM, signal.SIGCHLD)


async def kill_family(
    leader: ProcessIdentity,
    clock: Clock,
    *,
    mark: str | None = None,
    known: list[ProcessIdentity] | None = None,
) -> int:
    """Kill a session leader and everything that belongs to it, also after it has gone itself.

    Args:
        leader: The process that was started in a session of its own.
        clock: Bounds the wait.
        mark: As in :func:`rlgov.engine.identity.family`.
        known: Processes seen to belong to it earlier.

    Returns:
        How many processes were killed.

    Raises:
        EngineError: Some cannot be killed.
    """
    killed: set[ProcessIdentity] = set()
    until_s = clock.monotonic_s() + KILL_S
    while True:
        left = [one for one in {*family(leader, mark), *(known or [])} if is_running(one)]
        if not left:
            return len(killed)
        if clock.monotonic_s() >= until_s:
            pids = sorted(one.pid for one in left)
            raise EngineError(
                f"processes {pids} do not end on SIGKILL: they hang in the kernel or a driver; see dmesg "
                "and nvidia-smi, and start no other engine on their GPUs"
            )
        # New ones may have been forked meanwhile: until none is left.
        for one in left:
            with suppress(PermissionError):
                if send_signal(one, signal.SIGKILL):
                    killed.add(one)
        await asyncio.sleep(POLL_S)


def check_port(spec: EngineSpec) -> None:
    """See that nobody listens where an engine is to listen. Raises EngineError."""
    kind = socket.AF_INET6 if ":" in spec.host else socket.AF_INET
    with socket.socket(kind, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((spec.host, spec.port))
            probe.listen(1)
        except OSError as error:
            raise EngineError(
                f"engine {spec.engine_id} cannot listen at {spec.host}:{spec.port}: {error}; choose another "
                "port or end the process that listens there"
            ) from None


def spawn(spec: EngineSpec, command: list[str], environment: dict[str, str]) -> int:
    """Start a process in a session of its own that writes to the log; returns its pid. Raises EngineError."""
    append = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
    try:
        log = os.open(spec.log_path, append, 0o640)
    except OSError as error:
        raise EngineError(f"the log {spec.log_path} cannot be written: {error}") from None
    try:
        # Not subprocess.Popen: its object expects to outlive the process, and an engine outlives rlgov.
        return os.posix_spawnp(
            command[0],
            command,
            environment,
            file_actions=[
                (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
                (os.POSIX_SPAWN_DUP2, log, 1),
                (os.POSIX_SPAWN_DUP2, log, 2),
                *((os.POSIX_SPAWN_CLOSE, number) for number in _inheritable()),
            ],
            setsid=True,
            setsigmask=(),
            setsigdef=_HANDLED,
        )
    except OSError as error:
        raise EngineError(
            f"engine {spec.engine_id}: {command[0]} cannot be run: {error.strerror}; name the vllm program "
            "of an environment in which vLLM is installed"
        ) from None
    finally:
        os.close(log)


def _inheritable() -> list[int]:
    """Open files that would go down to a child: an engine would hold them, say a lock, for all its life."""
    found = []
    for entry in Path("/proc/self/fd").iterdir():
        number = int(entry.name)
        with suppress(OSError):  # the listing has closed its own
            if number > STDERR and os.get_inheritable(number):
                found.append(number)
    return found
