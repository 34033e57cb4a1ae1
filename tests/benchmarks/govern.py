"""What the governor costs: one decision, and the running process beside a stack of fake engines under load.

The policy is an untrained network of the usual size with the fallback behind it: its figures are a trained
one's, its decisions are not. GPUs are the stand-in for the NVIDIA driver.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from rlgov.agents.bundle import (
    SCHEMA_VERSION,
    BundlePolicy,
    FeatureRange,
    Layer,
    Manifest,
    NetworkLayout,
    ObservationStatistics,
    Offer,
    load_bundle,
    write_bundle,
)
from rlgov.agents.fallback import with_fallback
from rlgov.deployments.live_open import open_live
from rlgov.envs.observation import FEATURES, OBSERVATION_SCHEMA
from rlgov.governor.core import Core
from rlgov.governor.loop import Governor
from rlgov.governor.records import Mode
from rlgov.hardware.null import NullEvents
from rlgov.simulation.forecast import Forecast
from rlgov.simulation.physics import build_tables
from rlgov.simulation.profile import load_profile
from tests.benchmarks.timing import CLOCK, Figure
from tests.fakes import nvml, world

PROFILE = "h100-qwen3-32b"
ROOT = Path(__file__).resolve().parents[2]
TICKS = 4000
SETTLE_S = 15.0
MEASURED_S = 60.0
START_S = 120.0
HIDDEN = (64, 64)


def measure() -> list[Figure]:
    """A decision by itself, then the process."""
    with tempfile.TemporaryDirectory() as folder:
        bundle = untrained(Path(folder) / "policy.safetensors")
        figures = decisions(bundle)
        if nvml.compiler() is None:
            sys.stderr.write(
                "no C compiler for the stand-in for the NVIDIA driver: the process is left out\n"
            )
            return figures
        return figures + process(bundle, Path(folder))


def untrained(path: Path) -> Path:
    """A bundle with random weights, for the profile."""
    limits = load_profile(PROFILE).limits()
    rng = np.random.default_rng(0)
    widths = (len(FEATURES), *HIDDEN, sum(limits.axis_sizes))
    layers = tuple(
        Layer((rng.normal(size=(b, a)) / np.sqrt(a)).astype(np.float32), np.zeros(b, dtype=np.float32))
        for a, b in pairwise(widths)
    )
    manifest = Manifest(
        schema_version=SCHEMA_VERSION,
        name="untrained",
        observation_schema=OBSERVATION_SCHEMA,
        features=tuple(FeatureRange(name=f.name, low=f.low, high=f.high) for f in FEATURES),
        offer=Offer.of(limits),
        network=NetworkLayout(widths=widths, activation="tanh", masked=True),
        profile_name=PROFILE,
        profile_digest="0" * 64,
        training_digest="0" * 64,
        samples=1000,
        versions={},
    )
    seen = rng.normal(size=(1000, len(FEATURES))).astype(np.float32)
    write_bundle(path, manifest, layers, ObservationStatistics.of(seen))
    return path


def decisions(bundle: Path) -> list[Figure]:
    """Wall time of the core's tick, from window to decision, with conditions and prediction."""
    profile = load_profile(PROFILE)
    limits, tables = profile.limits(), build_tables(profile)
    there = world.World(rate_per_s=8.0)
    gpus = world.FakeGpus(there)
    deployment = open_live(world.FakeStack(there), limits, there.clock, hardware=gpus, acting=False)
    core = Core(
        deployment.limits,
        with_fallback(BundlePolicy(load_bundle(bundle)), tables, limits),
        mode=Mode.ACTIVE,
        forecast=Forecast(tables, deployment.limits),
    )
    spent_s: list[float] = []
    tick = core.tick

    def timed(*arguments: Any) -> Any:
        began_s = CLOCK.monotonic_s()
        told = tick(*arguments)
        spent_s.append(CLOCK.monotonic_s() - began_s)
        return told

    core.tick = timed  # type: ignore[method-assign, assignment]  # a stopwatch around it
    run = Governor(deployment, core, there.clock, clocks=gpus.clocks, events=NullEvents()).run()
    for _ in range(TICKS):
        next(run)
    deployment.close()
    median_s, p99_s = np.quantile(spent_s, (0.5, 0.99))
    note = "policy, fallback, guard, conditions, prediction"
    return [
        Figure("govern_tick_p50_ms", 1e3 * float(median_s), "ms", "governor: one tick, median", note),
        Figure("govern_tick_p99_ms", 1e3 * float(p99_s), "ms", "governor: one tick, p99", "budget 1 ms"),
    ]


def process(bundle: Path, folder: Path) -> list[Figure]:
    """Processor time and memory of ``rlgov govern`` at one tick a second."""
    clocks_mhz = load_profile(PROFILE).limits().sm_clocks_mhz
    library = nvml.build(folder / "nvml")
    with contextlib.ExitStack() as undo:
        stub = nvml.NvmlStub(folder / "gpus", library, 4, clocks_mhz=clocks_mhz)
        undo.callback(stub.close)
        for number in range(4):
            stub.gpu(number).name_bytes = b"NVIDIA H100 80GB HBM3"
        place = undo.enter_context(serving(folder))
        undo.enter_context(
            running(
                ["load", "--url", place["url"], "--duration-s", "600", "--out", str(folder / "load")], folder
            )
        )
        command = [
            "govern", str(bundle), "--control", place["control"], "--gpus", *stub.uuids, "--clocks", "direct",
            "--mode", "active", "--journal", str(folder / "journal"),
            "--listen", str(folder / "governor.sock"),
        ]  # fmt: skip
        environment = os.environ | stub.environment | {"RLGOV_CLAIMS_DIR": str(folder / "claims")}
        governor = undo.enter_context(running(command, folder, environment))
        CLOCK.sleep_s(SETTLE_S)
        if governor.poll() is not None:
            raise RuntimeError("rlgov govern ended: " + (folder / "govern.log").read_text(encoding="utf-8"))
        began_s, before_s = CLOCK.monotonic_s(), cpu_of(governor.pid)
        CLOCK.sleep_s(MEASURED_S)
        share = (cpu_of(governor.pid) - before_s) / (CLOCK.monotonic_s() - began_s)
        memory_mb = rss_mb(governor.pid)
    return [
        Figure("govern_cpu_percent", 100 * share, "%", "governor: of one core, at 1 Hz", "budget 1 %"),
        Figure("govern_rss_mb", memory_mb, "MB", "governor: resident memory", "budget 100 MB"),
    ]


@contextlib.contextmanager
def running(
    arguments: list[str], folder: Path, environment: dict[str, str] | None = None
) -> Iterator[subprocess.Popen[bytes]]:
    """An ``rlgov`` command, until the end of the block."""
    with (folder / f"{arguments[0]}.log").open("wb") as log:
        started = subprocess.Popen(
            [sys.executable, "-m", "rlgov", *arguments], cwd=ROOT, stdout=log, stderr=log, env=environment
        )
    try:
        yield started
    finally:
        started.send_signal(signal.SIGTERM)
        try:
            started.wait(START_S)
        except subprocess.TimeoutExpired:
            started.kill()
            started.wait()


@contextlib.contextmanager
def serving(folder: Path) -> Iterator[dict[str, str]]:
    """A stack of fake engines: where it listens."""
    program = folder / "vllm"
    engine = ROOT / "tests" / "fakes" / "engine.py"
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{engine}" "$@"\n', encoding="utf-8")
    program.chmod(0o755)
    arguments = [
        "serve", "--model", "Qwen/Qwen3-32B", "--profile", PROFILE, "--gpus", "none", "--port", "0", "--json",
        "--vllm", str(program), "--run", str(folder / "serve"), "--", "--fake-token-ms", "20",
    ]  # fmt: skip
    with running(arguments, folder) as process_:
        until_s = CLOCK.monotonic_s() + START_S
        said = folder / "serve.log"
        while True:
            text = said.read_text(encoding="utf-8")
            begin = text.find("{\n")
            with contextlib.suppress(ValueError):
                place: dict[str, str] = json.JSONDecoder().raw_decode(text[max(begin, 0) :])[0]
                break
            if process_.poll() is not None or CLOCK.monotonic_s() > until_s:
                raise RuntimeError(f"rlgov serve does not serve: {text}")
            CLOCK.sleep_s(0.1)
        yield place


def cpu_of(pid: int) -> float:
    """Processor time of a process so far, in seconds."""
    fields = Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def rss_mb(pid: int) -> float:
    """Resident memory of a process."""
    pages = int(Path(f"/proc/{pid}/statm").read_text(encoding="ascii").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20
