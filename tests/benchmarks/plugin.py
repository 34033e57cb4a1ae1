"""What the plugin costs vLLM: by itself, inside a real engine, and as throughput against a stock engine.

The two engines live side by side and take turns (stock, plugin, plugin, stock, ...) at the same load, so
that a machine that gets slower or faster does not count for either. Beside tokens a second there is the
processor time of a token: other programs on the machine add little to it.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import aiohttp

from rlgov.engine.plugin import scheduler
from rlgov.engine.plugin.selftest import Report
from tests.benchmarks.timing import CLOCK, Figure, median_of
from tests.fakes.tiny_model import ARGUMENTS, write_tiny_model

VENV = Path(__file__).resolve().parents[2] / ".venv-vllm"
BATCHES = (32, 256)
STEPS = 20_000
PAIRS = 24  # of rounds
REQUESTS = 64
CONCURRENCY = 32
OUTPUT_TOKENS = 192
START_S = 300.0
TOKEN = "benchmark"  # noqa: S105  # of an engine on loopback that lives for two minutes
T_95 = 2.069  # Student's t for PAIRS - 1 degrees of freedom, two-sided


def measure() -> list[Figure]:
    """The plugin's own time with a stand-in for vLLM's scheduler; with .venv-vllm also in a real engine."""
    figures = [_alone(batch) for batch in BATCHES]
    reason = unavailable()
    if reason:
        sys.stderr.write(f"no real engine to compare: {reason}\n")
        return figures
    return figures + asyncio.run(_real())


def unavailable() -> str:
    """Why there is no vLLM for the CPU here; empty when there is one."""
    note = VENV / ".unavailable"
    if note.is_file():
        return note.read_text(encoding="utf-8").partition("\n")[0]
    return "" if (VENV / "bin" / "vllm").is_file() else "run make vllm"


# ---- alone ----


class _Still:
    """A scheduler whose every iteration decodes the same requests, and costs as good as nothing."""

    def __init__(self, batch: int) -> None:
        names = [f"cmpl-{k}" for k in range(batch)]
        self.scheduler_config = SimpleNamespace(max_num_seqs=batch)
        self.max_num_active_reqs = batch
        self.num_spec_tokens = 0
        self.requests: dict[str, Any] = dict.fromkeys(names)
        self.running = names
        self.waiting: list[str] = []
        self.kv_holding_waiting: list[str] = []
        self.finished_req_ids: set[str] = set()
        self.output = SimpleNamespace(
            scheduled_new_reqs=[],
            scheduled_cached_reqs=SimpleNamespace(
                num_computed_tokens=[1000] * batch, resumed_req_ids=set[str]()
            ),
            num_scheduled_tokens=dict.fromkeys(names, 1),
            total_num_scheduled_tokens=batch,
            finished_req_ids=set[str](),
            preempted_req_ids=set[str](),
        )
        stats = SimpleNamespace(kv_cache_usage=0.5)
        self.result = {0: SimpleNamespace(outputs=[None] * batch, scheduler_stats=stats)}

    def schedule(self, _: bool) -> Any:  # noqa: FBT001  # vLLM's interface
        return self.output

    def update_from_output(self, _output: object, _result: object) -> Any:
        return self.result

    def get_request_counts(self) -> tuple[int, int]:
        return len(self.running), len(self.waiting)

    def get_kv_cache_usage(self) -> float:
        return 0.5


def _alone(batch: int) -> Figure:
    checks = {"release": True, "single_engine": True, "cap": True, "counters": True}
    seats: list[Any] = [_Still(batch), scheduler.governed(_Still)(Report(checks), batch)]

    def run(one: Any) -> None:
        for _ in range(STEPS):
            one.update_from_output(one.schedule(False), None)  # noqa: FBT003  # as vLLM calls it

    stock, governed = (median_of(5, lambda one=one: run(one)).cpu_s for one in seats)  # type: ignore[misc]  # bound at once
    return Figure(
        f"plugin_us_{batch}",
        1e6 * (governed - stock) / STEPS,
        "us",
        f"plugin alone, an iteration of {batch} requests",
        "budget 10",
    )


# ---- in a real engine ----


@dataclass(frozen=True)
class _Server:
    url: str
    process: subprocess.Popen[bytes]
    log: Path


async def _real() -> list[Figure]:
    with tempfile.TemporaryDirectory(prefix="rlgov-bench-") as name:
        model = write_tiny_model(Path(name) / "model")
        with _serve(model, plugin=False) as stock, _serve(model, plugin=True) as governed:
            async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
                for server in (stock, governed):
                    await _ready(session, server)
                    await _round(session, server, str(model))
                rates: dict[str, list[float]] = {"stock": [], "governed": []}
                costs: dict[str, list[float]] = {"stock": [], "governed": []}
                for pair in range(PAIRS):
                    turns = [("stock", stock), ("governed", governed)]
                    for key, server in turns if pair % 2 == 0 else reversed(turns):
                        tokens_per_s, cpu_s_per_token = await _round(session, server, str(model))
                        rates[key].append(tokens_per_s)
                        costs[key].append(cpu_s_per_token)
            cost = _get(f"{governed.url}/rlgov/v1/cost")
    step_us, mean_us = (1e6 * cost[key] / cost["iterations"] for key in ("busy_s", "own_s"))
    return [
        Figure(
            "plugin_real_us",
            1e6 * cost["own_median_s"],
            "us",
            "plugin in a real engine, an iteration",
            f"budget 10; median; mean {mean_us:.1f} of {step_us:,.0f} us",
        ),
        Figure(
            "stock_tokens_per_s",
            statistics.median(rates["stock"]),
            "tokens/s",
            "stock vLLM, tiny model on the CPU",
            f"{CONCURRENCY} at once, {OUTPUT_TOKENS} tokens each",
        ),
        _change("plugin_rate_percent", "change of tokens/s with the plugin", rates),
        _change("plugin_cpu_percent", "change of processor time of a token", costs),
    ]


def _change(key: str, what: str, taken: dict[str, list[float]]) -> Figure:
    """By how much the governed engine differs, from the logarithms of the ratio in each pair."""
    ratios = [math.log(ours / theirs) for ours, theirs in zip(taken["governed"], taken["stock"], strict=True)]
    centre = statistics.mean(ratios)
    half = T_95 * statistics.stdev(ratios) / math.sqrt(PAIRS)
    low, high = (100 * math.expm1(centre + sign * half) for sign in (-1, 1))
    note = f"95 % interval {low:+.1f} to {high:+.1f}, {PAIRS} pairs of rounds"
    return Figure(key, 100 * math.expm1(centre), "%", what, note)


@contextlib.contextmanager
def _serve(model: Path, *, plugin: bool) -> Iterator[_Server]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [str(VENV / "bin" / "vllm"), "serve", str(model), *ARGUMENTS]
    command += ["--host=127.0.0.1", f"--port={port}", f"--max-num-seqs={CONCURRENCY}"]
    command += ["--max-model-len=1024", "--no-enable-log-requests", "--disable-uvicorn-access-log"]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "VLLM_NO_USAGE_STATS": "1"}
    for name in ("RLGOV_PLUGIN", "VLLM_PLUGINS"):
        environment.pop(name, None)
    if plugin:
        command += ["--scheduler-cls=rlgov.engine.plugin.scheduler.RlgovScheduler"]
        environment |= {"RLGOV_PLUGIN": "1", "RLGOV_PLUGIN_TOKEN": TOKEN, "VLLM_PLUGINS": "rlgov"}
    log = model.parent / f"{'plugin' if plugin else 'stock'}.log"
    with log.open("wb") as out:
        process = subprocess.Popen(
            command, env=environment, stdout=out, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        yield _Server(f"http://127.0.0.1:{port}", process, log)
    finally:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(30)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


async def _ready(session: aiohttp.ClientSession, server: _Server) -> None:
    until_s = CLOCK.monotonic_s() + START_S
    while CLOCK.monotonic_s() < until_s and server.process.poll() is None:
        with contextlib.suppress(aiohttp.ClientError):
            async with session.get(f"{server.url}/health") as answer:
                if answer.ok:
                    return
        await asyncio.sleep(0.5)
    tail = server.log.read_text(encoding="utf-8", errors="replace")[-2000:]
    msg = f"vLLM did not start; the end of its log:\n{tail}"
    raise RuntimeError(msg)


async def _round(session: aiohttp.ClientSession, server: _Server, model: str) -> tuple[float, float]:
    """Tokens a second of one round, and processor seconds a token."""
    slots = asyncio.Semaphore(CONCURRENCY)

    async def one(number: int) -> int:
        prompt = [1, *(3 + (7 * number + k) % 250 for k in range(64))]
        body = {"model": model, "prompt": prompt, "max_tokens": OUTPUT_TOKENS, "ignore_eos": True}
        async with slots, session.post(f"{server.url}/v1/completions", json=body) as answer:
            tokens: int = (await answer.json())["usage"]["completion_tokens"]
            return tokens

    begin_s, begin_cpu_s = CLOCK.monotonic_s(), _cpu_s(server.process.pid)
    tokens = sum(await asyncio.gather(*(one(number) for number in range(REQUESTS))))
    if tokens != REQUESTS * OUTPUT_TOKENS:
        msg = f"{tokens} tokens instead of {REQUESTS * OUTPUT_TOKENS}"
        raise RuntimeError(msg)
    wall_s, processor_s = CLOCK.monotonic_s() - begin_s, _cpu_s(server.process.pid) - begin_cpu_s
    return tokens / wall_s, processor_s / tokens


def _cpu_s(session: int) -> float:
    """Processor time of every process of a session: vLLM's server and its engine."""
    ticks = 0
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            fields = stat.read_text(encoding="ascii", errors="replace").rpartition(")")[2].split()
            if int(fields[3]) == session:
                ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


def _get(url: str) -> dict[str, Any]:
    request = urllib.request.Request(url, headers={"Authorization": f"Bearer {TOKEN}"})  # noqa: S310  # loopback
    with urllib.request.urlopen(request, timeout=30) as answer:  # noqa: S310  # as above
        found: dict[str, Any] = json.loads(answer.read())
        return found
