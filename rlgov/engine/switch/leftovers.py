"""Processes of an engine that nobody holds a handle of: launched just before a crash, or left behind.

An engine's log file and token are its own. A process whose standard output goes to that log, or that has
the engine's id and token in its environment, belongs to that launch. (vLLM's processes overwrite their
environment when they set their title; what they write to stays.)
"""

from __future__ import annotations

import os
import signal
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from rlgov.engine.identity import ProcessIdentity, identify, is_running, send_signal

if TYPE_CHECKING:
    from rlgov.engine.spec import EngineSpec

_PROC = Path("/proc")
_OUTPUTS = ("1", "2")


def processes_of(spec: EngineSpec) -> list[ProcessIdentity]:
    """The living processes of an engine, leaders of a session first."""
    marks = {f"RLGOV_ENGINE_ID={spec.engine_id}".encode(), f"RLGOV_PLUGIN_TOKEN={spec.token}".encode()}
    log = str(spec.log_path.resolve())
    found = []
    for folder in _PROC.iterdir():
        if folder.name.isdigit() and int(folder.name) != os.getpid() and _belongs(folder, log, marks):
            identity = identify(int(folder.name))
            if identity is not None and is_running(identity):
                found.append(identity)
    return sorted(found, key=lambda identity: (not _leads_session(identity.pid), identity.pid))


def kill_leftovers(spec: EngineSpec) -> int:
    """Kill every process of an engine; gives how many there were."""
    killed = 0
    for identity in processes_of(spec):
        with suppress(PermissionError):
            killed += send_signal(identity, signal.SIGKILL)
    return killed


def _belongs(folder: Path, log: str, marks: set[bytes]) -> bool:
    # Foreign and vanishing processes cannot be read.
    for output in _OUTPUTS:
        with suppress(OSError):
            if str((folder / "fd" / output).readlink()) == log:
                return True
    with suppress(OSError):
        return marks <= set((folder / "environ").read_bytes().split(b"\0"))
    return False


def _leads_session(pid: int) -> bool:
    with suppress(ProcessLookupError):
        return os.getsid(pid) == pid
    return False
