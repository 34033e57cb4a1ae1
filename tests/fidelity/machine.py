"""Who else uses the machine, and how the measurement is kept apart from them."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

TICKS_PER_S = os.sysconf("SC_CLK_TCK")
PRIORITY = 20


@dataclass(frozen=True, slots=True)
class Usage:
    """Processor seconds so far."""

    all_s: float  # of everybody, on all cores
    own_s: float  # of the engine and of this process
    at_s: float

    def others_since(self, earlier: Usage) -> float:
        """Mean number of cores that others kept busy since then."""
        spent_s = (self.all_s - earlier.all_s) - (self.own_s - earlier.own_s)
        return max(spent_s, 0.0) / max(self.at_s - earlier.at_s, 1e-9)


def usage(pids: Iterable[int], at_s: float) -> Usage:
    """Of the machine, and of these processes and this one."""
    with Path("/proc/stat").open(encoding="ascii") as file:
        user, nice, system, _idle, _iowait, irq, softirq, *_ = map(int, file.readline().split()[1:])
    own = sum(_ticks(pid) for pid in {*pids, os.getpid()})
    return Usage((user + nice + system + irq + softirq) / TICKS_PER_S, own / TICKS_PER_S, at_s)


def _ticks(pid: int) -> int:
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace")
    except OSError:
        return 0
    fields = stat.rpartition(")")[2].split()
    return int(fields[11]) + int(fields[12])


def cores() -> tuple[set[int], set[int]]:
    """Cores for the model, and for everything else; the same one where there is but one."""
    usable = sorted(os.sched_getaffinity(0))
    return {usable[-1]}, set(usable[:-1]) or {usable[-1]}


def name_of(pid: int) -> str:
    """The name a process goes by."""
    try:
        return Path(f"/proc/{pid}/comm").read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""


@contextmanager
def set_apart(pids: Iterable[int], *, worker: str, engine: str, realtime: bool) -> Iterator[str]:
    """Give the model a core of its own and the others the rest; before other programs, where allowed.

    The engine's loop shares the model's core: the two take turns, and each of them spins while it waits for
    the other, so on a core of its own it would only keep other programs from that core.

    Args:
        pids: Processes of the engine; this one is added, and put back when the block is left.
        worker: Beginning of the name of the process that runs the model ...
        engine: ... and of the one whose main thread is the engine's loop.
        realtime: Ask for real-time scheduling: ordinary programs then hardly disturb the measurement. But the
            kernel stops real-time programs for 50 ms of each second in which they use a core whole
            (sched_rt_runtime_us), so on an idle machine it does more harm than good.

    Yields:
        What was done, in words.
    """
    usable = os.sched_getaffinity(0)
    model, rest = cores()
    refused = False
    for pid in {*pids, os.getpid()}:
        name = name_of(pid)
        for thread in _threads(pid):
            loop = name.startswith(engine) and thread == pid
            try:
                os.sched_setaffinity(thread, model if loop or name.startswith(worker) else rest)
                if realtime and not refused:
                    os.sched_setscheduler(thread, os.SCHED_RR, os.sched_param(PRIORITY))
            except PermissionError:
                refused = True
            except ProcessLookupError:
                continue
    kind = "real-time priority" if realtime and not refused else "ordinary priority"
    if refused:
        kind += ": real time is not permitted here"
    try:
        yield f"model and loop on core {min(model)}, all else on {', '.join(map(str, sorted(rest)))}, {kind}"
    finally:
        for thread in _threads(os.getpid()):
            with suppress(ProcessLookupError):
                os.sched_setscheduler(thread, os.SCHED_OTHER, os.sched_param(0))
                os.sched_setaffinity(thread, usable)


def _threads(pid: int) -> list[int]:
    try:
        return [int(name) for name in os.listdir(f"/proc/{pid}/task")]  # noqa: PTH208  # /proc
    except OSError:
        return []
