from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace

import pytest

from rlgov.engine.identity import family, identify, is_running, send_signal

PARENT = """
import os, subprocess, sys, time
detached = subprocess.Popen(["sleep", "1000"], start_new_session=True)
plain = subprocess.Popen(["sleep", "1000"])
print(detached.pid, plain.pid, flush=True)
sys.stdin.read()
"""
MARK = "RLGOV_TEST_MARK=4711"


@pytest.fixture
def parent() -> Iterator[tuple[subprocess.Popen[str], int, int]]:
    """A session leader with a child in its session and one outside."""
    name, _, value = MARK.partition("=")
    with subprocess.Popen(
        [sys.executable, "-c", PARENT],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env={**os.environ, name: value},
    ) as process:
        assert process.stdout is not None
        detached, plain = map(int, process.stdout.readline().split())
        yield process, detached, plain
        for pid in (detached, plain):
            leftover = identify(pid)
            if leftover is not None:
                send_signal(leftover, signal.SIGKILL)
        process.kill()


def test_this_process_is_itself() -> None:
    me = identify(os.getpid())
    assert me is not None
    assert is_running(me)
    assert me == identify(os.getpid())


def test_another_process_with_the_same_pid_is_not_touched(
    parent: tuple[subprocess.Popen[str], int, int],
) -> None:
    process, _, _ = parent
    identity = identify(process.pid)
    assert identity is not None
    for other in (
        replace(identity, start_ticks=identity.start_ticks - 1),
        replace(identity, boot_id="an earlier boot"),
    ):
        assert not is_running(other)
        assert not send_signal(other, signal.SIGKILL)
        assert family(other) == []
    assert process.poll() is None


def test_family_is_session_and_descendants(parent: tuple[subprocess.Popen[str], int, int]) -> None:
    process, detached, plain = parent
    leader = identify(process.pid)
    assert leader is not None
    assert {one.pid for one in family(leader)} == {process.pid, detached, plain}
    process.kill()
    process.wait()
    assert not is_running(leader)
    # Orphans are found by their session, and those that left it by their environment.
    assert {one.pid for one in family(leader)} == {plain}
    assert {one.pid for one in family(leader, MARK)} == {plain, detached}


def test_a_zombie_does_not_run() -> None:
    process = subprocess.Popen([sys.executable, "-c", "pass"])
    identity = identify(process.pid)
    assert identity is not None
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # ended, not reaped
    assert identify(process.pid) == identity
    assert not is_running(identity)
    assert not send_signal(identity, signal.SIGTERM)
    process.wait()
    assert identify(process.pid) != identity
