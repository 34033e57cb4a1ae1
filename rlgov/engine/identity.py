"""Which process is which: a pid alone may be another process tomorrow. Read from /proc; Linux only."""

from __future__ import annotations

import os
import signal
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

_PROC = Path("/proc")
_BOOT_ID = _PROC / "sys/kernel/random/boot_id"


@dataclass(frozen=True, slots=True)
class ProcessIdentity:
    """One process, told from every other one that had or will have the same pid."""

    pid: int
    start_ticks: int  # after boot, in clock ticks
    boot_id: str


@dataclass(frozen=True, slots=True)
class _Stat:
    pid: int
    ended: bool  # a zombie: it has ended, and nobody has asked for its exit status
    parent: int
    session: int
    start_ticks: int


def identify(pid: int) -> ProcessIdentity | None:
    """The process that has this pid now, be it a zombie; None if there is none."""
    stat = _stat(pid)
    return None if stat is None else ProcessIdentity(pid, stat.start_ticks, boot_id())


def is_running(identity: ProcessIdentity) -> bool:
    """Whether this very process lives; a zombie does not."""
    stat = _stat(identity.pid)
    return (
        stat is not None
        and not stat.ended
        and stat.start_ticks == identity.start_ticks
        and identity.boot_id == boot_id()
    )


def send_signal(identity: ProcessIdentity, number: int) -> bool:
    """Signal this very process, and no other that may get its pid meanwhile; False if it has gone.

    Raises:
        PermissionError: The process belongs to somebody else.
    """
    try:
        handle = os.pidfd_open(identity.pid)
    except ProcessLookupError:
        return False
    except OSError:  # a kernel before 5.3
        handle = -1
    try:
        if not is_running(identity):
            return False
        if handle < 0:
            os.kill(identity.pid, number)
        else:
            signal.pidfd_send_signal(handle, number)
    except ProcessLookupError:
        return False
    else:
        return True
    finally:
        if handle >= 0:
            os.close(handle)


def family(leader: ProcessIdentity, mark: str | None = None) -> list[ProcessIdentity]:
    """Living processes that belong to a session leader: its session, its descendants, and who has its mark.

    vLLM's processes stay in the session of the API server, also when that one has died. A session id is
    not given to a new process as long as one member lives.

    Args:
        leader: The process that was started in a session of its own; it may have gone.
        mark: An environment entry ``NAME=value`` that only these processes have. It finds those that left the
            session; those that rewrote their title have lost it.
    """
    if leader.boot_id != boot_id():
        return []
    stats = {stat.pid: stat for stat in map(_stat, _pids()) if stat is not None}
    found = set()
    holder = stats.get(leader.pid)
    if holder is None or holder.start_ticks == leader.start_ticks:
        found = {stat.pid for stat in stats.values() if leader.pid in {stat.pid, stat.session}}
        found |= _descendants(found, stats)
    if mark is not None:
        found |= {pid for pid in stats if pid not in found and _has_mark(pid, mark)}
    found.discard(os.getpid())
    return [
        ProcessIdentity(pid, stats[pid].start_ticks, leader.boot_id)
        for pid in sorted(found)
        if not stats[pid].ended
    ]


def is_helper(identity: ProcessIdentity) -> bool:
    """Whether this is Python's own helper, which tidies up when all others have ended."""
    with suppress(OSError):
        return b"multiprocessing.resource_tracker" in (_PROC / str(identity.pid) / "cmdline").read_bytes()
    return False


def boot_id() -> str:
    """Differs after every boot of the machine."""
    return _BOOT_ID.read_text(encoding="ascii").strip()


def _descendants(roots: set[int], stats: dict[int, _Stat]) -> set[int]:
    found: set[int] = set()
    grown = set(roots)
    while grown:
        grown = {pid for pid, stat in stats.items() if stat.parent in grown} - found - roots
        found |= grown
    return found


def _pids() -> list[int]:
    return [int(folder.name) for folder in _PROC.iterdir() if folder.name.isdigit()]


def _has_mark(pid: int, mark: str) -> bool:
    with suppress(OSError):
        return mark.encode() in (_PROC / str(pid) / "environ").read_bytes().split(b"\0")
    return False


def _stat(pid: int) -> _Stat | None:
    try:
        text = (_PROC / str(pid) / "stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    # The name in parentheses may itself hold spaces and parentheses.
    fields = text.rpartition(")")[2].split()
    return _Stat(
        pid=pid,
        ended=fields[0] in {"Z", "X"},
        parent=int(fields[1]),
        session=int(fields[3]),
        start_ticks=int(fields[19]),
    )
