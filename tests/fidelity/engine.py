"""The real vLLM: started, set apart on its cores, loaded, and asked for its iterations."""

from __future__ import annotations

import asyncio
import secrets
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
from numpy.typing import NDArray

from rlgov.clock import SystemClock
from rlgov.config import LoadSettings
from rlgov.engine.identity import family
from rlgov.engine.process import EngineProcess, EngineSpec
from rlgov.errors import EngineError
from rlgov.workload.load import run_load_blocking
from rlgov.workload.load_result import LoadResult
from rlgov.workload.trace import Trace
from tests.fakes.tiny_model import ARGUMENTS, Shape, write_tiny_model
from tests.fidelity import machine
from tests.fidelity.iterations import COLUMNS
from tests.fidelity.plan import MAX_MODEL_LEN, VOCABULARY, Plan

CLOCK = SystemClock()
STOP_S = 20.0
START_S = 600.0
WORKER = "VLLM::Worker"
ENGINE = "VLLM::Engine"


@dataclass(frozen=True, slots=True, eq=False)
class Run:
    """One load, what the engine did meanwhile, and how many cores others kept busy."""

    result: LoadResult
    rows: NDArray[np.float64]  # of the ring, in the order of COLUMNS
    others: float


class RealEngine:
    """One vLLM on the CPU."""

    def __init__(
        self, process: EngineProcess, runner: asyncio.Runner, apart: str, kv_capacity_tokens: int
    ) -> None:
        self._process = process
        self._runner = runner
        self._cursor = 0
        self._pids = [one.pid for one in family(process.identity)]
        self.apart = apart
        self.kv_capacity_tokens = kv_capacity_tokens

    @classmethod
    @contextmanager
    def started(
        cls, program: Path, shape: Shape, plan: Plan, folder: Path, *, realtime: bool
    ) -> Iterator[Self]:
        """Start it, and stop it when the block is left."""
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        model_core, _ = machine.cores()
        spec = EngineSpec(
            engine_id=secrets.token_hex(8),
            command=(str(program),),
            model=str(write_tiny_model(folder / "model", shape)),
            tp_degree=1,
            gpu_uuids=(),
            host="127.0.0.1",
            port=port,
            max_num_seqs=plan.batch_caps[0],
            arguments=(
                *(a for a in ARGUMENTS if "kv-cache" not in a),
                "--kv-cache-memory-bytes=1073741824",
                f"--max-model-len={MAX_MODEL_LEN}",
                f"--max-num-batched-tokens={plan.max_num_batched_tokens}",
                "--no-enable-prefix-caching",
                "--no-enable-log-requests",
                "--disable-uvicorn-access-log",
            ),
            environment={
                "HF_HUB_OFFLINE": "1",
                "OMP_NUM_THREADS": "1",
                "VLLM_NO_USAGE_STATS": "1",
                "VLLM_CPU_OMP_THREADS_BIND": str(min(model_core)),
            },
            log_path=folder / "vllm.log",
            token=secrets.token_hex(16),
            plugin=True,
            start_timeout_s=START_S,
        )
        with asyncio.Runner() as runner:
            process = runner.run(EngineProcess.launch(spec, CLOCK))
            try:
                runner.run(process.wait_ready())
                runner.run(process.warm_up())
                info = runner.run(process.plugin_info())
                if info is None or not info.cap_supported:
                    raise EngineError(
                        f"rlgov's plugin does not govern this vLLM ({process.note}); `make vllm`"
                    )
                pids = [one.pid for one in family(process.identity)]
                with machine.set_apart(pids, worker=WORKER, engine=ENGINE, realtime=realtime) as apart:
                    sample = runner.run(process.sample(START_S))
                    yield cls(process, runner, apart, sample.kv_capacity_tokens or 0)
            finally:
                runner.run(process.stop(STOP_S))

    def hold(self, trace: Trace, concurrency: int, duration_s: float, seed: int) -> Run:
        """A closed loop for so long, with the cap open."""
        return self._run(trace, None, seed, concurrency=concurrency, duration_s=duration_s)

    def replay(self, trace: Trace, batch_cap: int, seed: int) -> Run:
        """A trace at its times under a cap."""
        return self._run(trace, batch_cap, seed)

    def _run(
        self,
        trace: Trace,
        batch_cap: int | None,
        seed: int,
        concurrency: int | None = None,
        duration_s: float | None = None,
    ) -> Run:
        self._runner.run(self._process.set_cap(batch_cap, None))
        self._rows()
        settings = LoadSettings(
            url=f"http://{self._process.spec.host}:{self._process.spec.port}",
            vocabulary=VOCABULARY,
            seed=seed,
            concurrency=concurrency,
            duration_s=duration_s,
        )
        before = machine.usage(self._pids, CLOCK.monotonic_s())
        result = run_load_blocking(trace, settings, CLOCK)
        others = machine.usage(self._pids, CLOCK.monotonic_s()).others_since(before)
        if result.interrupted:
            raise KeyboardInterrupt
        if not result.all_complete:
            raise EngineError(
                f"vLLM did not serve every request of {trace.name}: {result.summary.verdicts}, "
                f"{result.summary.errors}; see {self._process.spec.log_path}"
            )
        rows, dropped = self._rows()
        if dropped and concurrency is not None:
            raise EngineError(f"{dropped} iterations of the calibration are lost: make its loops shorter")
        return Run(result, rows, others)

    def _rows(self) -> tuple[NDArray[np.float64], int]:
        found: list[tuple[float, ...]] = []
        dropped = 0
        while True:
            answer = self._runner.run(self._process.iterations(self._cursor))
            order = [answer.columns.index(name) for name in COLUMNS]
            found += [tuple(row[i] for i in order) for row in answer.rows]
            dropped += answer.dropped
            self._cursor = answer.cursor
            if not answer.rows:
                return np.array(found, dtype=np.float64).reshape(-1, len(COLUMNS)), dropped
