from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from rlgov.clock import SystemClock
from rlgov.deployments.load_process import LoadProcess
from rlgov.errors import DeploymentError
from rlgov.workload.readers import read_trace
from rlgov.workload.trace import Trace

TRACE = Trace(
    "three",
    np.array([0.0, 1.0, 2.5]),
    np.array([10, 20, 30], dtype=np.int64),
    np.array([1, 2, 3], dtype=np.int64),
    np.zeros(3, dtype=np.int64),
    3.0,
)
# Stands in for `rlgov load`: notes its flags, then does what the first flag of `arguments` says.
PROGRAM = """
import pathlib, signal, sys, threading
flags = sys.argv[1:]
out = pathlib.Path(flags[flags.index("--out") + 1])
stopped = threading.Event()
signal.signal(signal.SIGTERM, lambda *_: stopped.set())
(out / "flags.txt").write_text("\\n".join(flags))
if "--wait" in flags:
    print("waiting", flush=True)
    while not stopped.wait(0.05):
        pass
    (out / "stopped.txt").write_text("yes")
if "--fail" in flags:
    sys.exit("no such server")
sys.exit(1 if "--some-missed" in flags else 0)
"""
LIMIT_S = 60.0


def player(out: Path, *arguments: str) -> LoadProcess:
    command = (sys.executable, "-c", PROGRAM)
    return LoadProcess("http://127.0.0.1:1", TRACE, out, arguments=arguments, command=command)


def until_finished(load: LoadProcess) -> None:
    clock = SystemClock()
    end_s = clock.monotonic_s() + LIMIT_S
    while not load.finished:
        assert clock.monotonic_s() < end_s, "the load generator did not end"
        clock.sleep_s(0.01)


def test_every_episode_plays_the_trace_with_its_own_seed_and_folder(tmp_path: Path) -> None:
    load = player(tmp_path, "--some-missed")
    assert not load.finished  # nothing was started
    for episode, seed in enumerate((7, 8)):
        load.start(seed)
        until_finished(load)
        folder = tmp_path / f"episode-{episode}"
        flags = (folder / "flags.txt").read_text().split("\n")
        assert flags == [
            "--url", "http://127.0.0.1:1", "--trace", str(tmp_path / "trace.csv"), "--some-missed",
            "--end-with-input", "--seed", str(seed), "--out", str(folder),
        ]  # fmt: skip
    assert read_trace(tmp_path / "trace.csv").arrival_s.tolist() == TRACE.arrival_s.tolist()
    load.stop()


def test_stopping_lets_it_write_what_happened(tmp_path: Path) -> None:
    load = player(tmp_path, "--wait")
    load.start(0)
    log, clock = tmp_path / "episode-0" / "load.log", SystemClock()
    end_s = clock.monotonic_s() + LIMIT_S
    while "waiting" not in log.read_text():
        assert clock.monotonic_s() < end_s, "the load generator did not start"
        clock.sleep_s(0.01)
    assert not load.finished
    load.stop()
    load.stop()
    assert (tmp_path / "episode-0" / "stopped.txt").read_text() == "yes"


def test_a_generator_that_cannot_work_is_an_error_with_the_end_of_its_log(tmp_path: Path) -> None:
    program = PROGRAM.replace('sys.exit("no such server")', 'print("no such server"); sys.exit(2)')
    load = LoadProcess(
        "http://x", "synthetic:code", tmp_path, arguments=("--fail",), command=(sys.executable, "-c", program)
    )
    load.start(0)
    with pytest.raises(DeploymentError, match=r"ended with code 2.*load\.log says: no such server"):
        until_finished(load)
    load.stop()
