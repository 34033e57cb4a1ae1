"""How exactly the load generator sends, and how many streams it follows on one core."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from rlgov.config import LoadSettings
from rlgov.workload.load import run_load_blocking
from rlgov.workload.load_result import LoadResult
from rlgov.workload.trace import Trace
from tests.benchmarks.stream_server import PERIOD_S
from tests.benchmarks.timing import CLOCK, Figure, cpu_s

STREAMS = (500, 1000, 2000, 4000)
TOKENS = 100
RAMP_S = 5.0  # requests begin spread over this; then all stream at once
PROMPT_TOKENS = 256
BUSY_CORE = 0.9
LATE_S = 0.02  # from here on the sends hold each other up


@contextmanager
def stream_server() -> Iterator[str]:
    """Its address."""
    command = [sys.executable, "-m", "tests.benchmarks.stream_server"]
    root = Path(__file__).resolve().parents[2]
    with subprocess.Popen(command, cwd=root, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        yield f"http://127.0.0.1:{int(process.stdout.readline())}"
        process.terminate()


def _trace(streams: int) -> Trace:
    arrival_s = np.sort(np.random.default_rng(0).uniform(0, RAMP_S, streams))
    same = np.ones(streams, dtype=np.int64)
    return Trace("streams", arrival_s, same * PROMPT_TOKENS, same * TOKENS, same * 0, RAMP_S)


def measure() -> list[Figure]:
    """All figures of this section."""
    figures: list[Figure] = []
    with stream_server() as url:
        settings = LoadSettings(url=url, timeout_s=60)
        run_load_blocking(_trace(100), settings, CLOCK)  # code is warm from here on
        for streams in STREAMS:
            before_s = cpu_s()
            result = run_load_blocking(_trace(streams), settings, CLOCK)
            figures += _figures(streams, result, (cpu_s() - before_s) / result.summary.span_s)
    return figures


def _figures(streams: int, result: LoadResult, core: float) -> list[Figure]:
    summary = result.summary
    key = f"load_{streams}"
    complete = summary.verdicts.get("complete", 0)
    pace = summary.tpot_s.p50
    ratio = 0.0 if pace is None else pace / PERIOD_S
    late, ttft = summary.lateness_s, summary.ttft_s
    if core > BUSY_CORE:
        limit = "the core"
    else:
        limit = "connecting so fast" if (late.p99 or 0) > LATE_S else "the schedule"
    name = f"load generator, {streams} streams at {1 / PERIOD_S:g} tokens/s"
    return [
        Figure(f"{key}_core", core, "cores", name,
               f"{complete} complete, at most {summary.concurrency_peak} at once; limited by {limit}"),
        Figure(f"{key}_late_p50_ms", 1e3 * (late.p50 or 0), "ms", "  send late by, median"),
        Figure(f"{key}_late_p99_ms", 1e3 * (late.p99 or 0), "ms", "  send late by, 99th percentile",
               f"at {streams / RAMP_S:,.0f} sends a second"),
        Figure(f"{key}_ttft_p99_ms", 1e3 * (ttft.p99 or 0), "ms", "  TTFT it sees, 99th percentile",
               "the server answers at once"),
        Figure(f"{key}_pace", ratio, "of schedule", "  time per token it sees"),
    ]  # fmt: skip
