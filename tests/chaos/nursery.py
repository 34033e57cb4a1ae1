"""Programs of rlgov that start in no time: forks of a process that has imported them already.

``python -m tests.chaos.nursery`` reads an object a line, ``{"argv": [...], "env": {...}, "log": PATH}``; it
runs `rlgov ARGV` in a fork of its own, and answers with the pid. No threads; it ends with its input.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from typing import Any, NoReturn

import rlgov.agents.fallback
import rlgov.commands.govern
import rlgov.governor.loop
import rlgov.governor.opening
import rlgov.governor.surface  # noqa: F401  # these imports are what takes time
from rlgov.cli import main


def _become(order: dict[str, Any]) -> NoReturn:
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    os.setsid()
    log = os.open(order["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    null = os.open(os.devnull, os.O_RDONLY)
    for handle, number in ((null, 0), (log, 1), (log, 2)):
        os.dup2(handle, number)
    os.environ.update(order["env"])
    sys.argv = ["rlgov", *order["argv"]]
    code = 1
    try:
        main()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    finally:
        import atexit

        atexit._run_exitfuncs()
        sys.stdout.flush()
        os._exit(code)


def serve() -> None:
    """Fork as told, until the end of standard input."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the kernel buries the dead
    signal.signal(signal.SIGINT, signal.default_int_handler)
    while line := sys.stdin.buffer.readline():
        order = json.loads(line)
        pid = os.fork()
        if pid == 0:
            _become(order)
        sys.stdout.write(f"{pid}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    serve()
