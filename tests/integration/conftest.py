"""One real vLLM on the CPU behind `rlgov serve`, for every test of this folder."""

from __future__ import annotations

import asyncio
import functools
import importlib.util
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Self

import numpy as np
import pytest

from rlgov.clock import SystemClock
from rlgov.config import LoadSettings
from rlgov.engine.control.client import StackClient
from rlgov.engine.samples import StackInterval, StackState
from rlgov.workload.load import run_load
from rlgov.workload.load_result import LoadResult, RequestResult
from rlgov.workload.trace import Trace

HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parents[1]
VENV = REPOSITORY / ".venv-vllm"
START_S = 600.0  # an engine takes a minute on idle cores, and these are shared
CLOCK = SystemClock()


def _module(path: Path) -> ModuleType:
    name = f"rlgov_integration_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # where dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def _wait_until(
    what: str, met: Callable[[], bool], *, timeout_s: float = START_S, poll_s: float = 0.1
) -> None:
    until_s = CLOCK.monotonic_s() + timeout_s
    while not met():
        if CLOCK.monotonic_s() > until_s:
            pytest.fail(f"not within {timeout_s:g} s: {what}")
        CLOCK.sleep_s(poll_s)


@pytest.fixture(scope="session")
def wait_until() -> Callable[..., None]:
    """``wait_until(what, met)``: wait until ``met()`` is true, or fail and say what was waited for."""
    return _wait_until


@pytest.fixture(scope="session")
def vllm_program() -> Path:
    """The real vLLM; its tests are skipped with a reason where it is not installed."""
    program, unavailable = VENV / "bin" / "vllm", VENV / ".unavailable"
    if unavailable.is_file():
        pytest.skip(f"no vLLM for the CPU: {unavailable.read_text(encoding='utf-8').splitlines()[0]}")
    if not (VENV / ".installed").is_file() or not program.is_file():
        pytest.skip("no vLLM for the CPU in .venv-vllm; install it with: make vllm")
    return program


@pytest.fixture(scope="session")
def tiny_profile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    profile: Path = _module(HERE / "tiny_profile.py").write_tiny_profile(
        tmp_path_factory.mktemp("profile") / "tiny.yaml"
    )
    return profile


@pytest.fixture(scope="session")
def tiny_bundle(tiny_profile: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A policy trained on the simulator for the tiny profile; seconds of training, so no good one."""
    out = tmp_path_factory.mktemp("training") / "tiny"
    arguments = (
        "--total-steps", "16384", "--environments", "16", "--traces", "synthetic:conversation",
        "--episode-s", "60", "--evaluation.every-steps", "16384", "--evaluation.episodes", "2",
        "--no-warm-start", "--load-bins", "1", "--slo-scales", "1.0",
    )  # fmt: skip
    command = [sys.executable, "-m", "rlgov", "train", "--profile", str(tiny_profile), "--out", str(out)]
    subprocess.run([*command, *arguments], check=True, capture_output=True)
    return out / "policy.safetensors"


@dataclass
class RunningStack:
    """A `rlgov serve` that runs."""

    process: subprocess.Popen[bytes]
    run: Path
    url: str
    client: StackClient

    @property
    def control(self) -> Path:
        return self.run / "control.sock"

    def interval(self) -> StackInterval:
        return self.client.interval(sys.maxsize)

    def running(self) -> int:
        return sum(sample.running for sample in self.interval().engines)

    def set_cap(self, cap: int) -> StackState:
        return self.client.configure(batch_cap=cap)

    def switch(self, tp_degree: int) -> StackState:
        """Ask for a degree, and wait until the switch has ended."""
        self.client.configure(tp_degree=tp_degree)
        _wait_until(f"the switch to TP {tp_degree} ended", lambda: not self.client.state().switching)
        return self.client.state()


@pytest.fixture(scope="session")
def stack(
    vllm_program: Path, tiny_profile: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[RunningStack]:
    folder = tmp_path_factory.mktemp("stack")
    tiny_model = _module(REPOSITORY / "tests" / "fakes" / "tiny_model.py")
    model = tiny_model.write_tiny_model(folder / "tiny")  # the name the profile has
    run = folder / "serve"
    command = [
        sys.executable, "-m", "rlgov", "serve", "--model", str(model), "--profile", str(tiny_profile),
        "--start-tp", "1", "--gpus", "none", "--port", "0", "--vllm", str(vllm_program), "--run", str(run),
        "--", *tiny_model.ARGUMENTS, "--max-model-len=1024",
    ]  # fmt: skip
    log = (folder / "serve.log").open("wb")
    with log:
        process = subprocess.Popen(
            command,
            cwd=REPOSITORY,
            # Two workers on one NUMA node: vLLM cannot bind each to its own.
            env={**os.environ, "HF_HUB_OFFLINE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"},
            stdout=log,
            stderr=subprocess.STDOUT,
        )
    try:
        said = folder / "serve.log"

        def serving() -> bool:
            if process.poll() is not None:
                pytest.fail(f"rlgov serve ended with {process.returncode}:\n{said.read_text()}")
            return (run / "control.sock").exists() and "http://" in said.read_text(encoding="utf-8")

        _wait_until("rlgov serve answers", serving)
        url = next(
            word.rstrip(".,")
            for word in said.read_text(encoding="utf-8").split()
            if word.startswith("http://")
        )
        with StackClient(run / "control.sock", timeout_s=30.0) as client:
            _wait_until("the first engine serves", lambda: serving() and client.state().ready)
            yield RunningStack(process, run, url, client)
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(timeout=120)
            except subprocess.TimeoutExpired:
                process.kill()
        process.wait()


@pytest.fixture
def make_load(stack: RunningStack) -> Callable[..., Load]:
    """Makes loads against the stack."""
    return functools.partial(Load, stack.url)


@dataclass
class Load:
    """Streams kept under way in a thread, until the block is left; what came of them is in ``results``."""

    url: str
    concurrency: int
    output_tokens: int
    prompt_tokens: int = 24
    segment_s: float = 8.0
    results: list[LoadResult] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._done = threading.Event()
        # Two of them: while one of them ends a segment, the other one keeps the server busy.
        self._threads = [threading.Thread(target=self._keep, args=(k,)) for k in range(2)]

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        for thread in self._threads:
            thread.join()

    @property
    def requests(self) -> list[RequestResult]:
        return [request for result in self.results for request in result.requests]

    def _keep(self, number: int) -> None:
        n = 64
        trace = Trace(
            "fixed",
            np.linspace(0.0, 1.0, n),
            np.full(n, self.prompt_tokens, dtype=np.int64),
            np.full(n, self.output_tokens, dtype=np.int64),
            np.zeros(n, dtype=np.int64),
            1.0,
        )
        segment_s = self.segment_s * (1.0 + 0.5 * number)
        while not self._done.is_set():
            settings = LoadSettings(
                url=self.url,
                concurrency=max(self.concurrency // 2, 1),
                duration_s=segment_s,
                vocabulary=256,
                seed=len(self.results),
            )
            self.results.append(asyncio.run(run_load(trace, settings, CLOCK)))
