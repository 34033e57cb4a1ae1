"""The whole loop over real processes: ``rlgov serve`` with fake engines, ``rlgov load``, an environment."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import numpy as np
import pytest
from numpy.typing import NDArray

from rlgov.agents.audit import audit_journal
from rlgov.agents.live import run_live
from rlgov.clock import SystemClock
from rlgov.deployments.load_process import LoadProcess
from rlgov.deployments.replayed import recorded_trace
from rlgov.engine.control.client import StackClient
from rlgov.envs.registration import make_live
from rlgov.journal import read_journal
from rlgov.workload.trace import Trace

if TYPE_CHECKING:
    from rlgov.records import Configuration, Limits

START_S = 90.0
REQUESTS = 30
SPAN_S = 6.0


class Script:
    """Slower and slower, and at TP 2 from the third decision on."""

    name = "script"
    guarded = True

    def start_configuration(self, limits: Limits) -> Configuration:
        return limits.fastest

    def start(self, limits: Limits, n: int) -> None:  # noqa: ARG002  # the protocol's signature
        self._decisions = 0

    def decide(
        self,
        observation: NDArray[np.float32],  # noqa: ARG002  # as above
        rows: NDArray[np.float64],  # noqa: ARG002  # as above
        mask: NDArray[np.bool_],  # noqa: ARG002  # as above
    ) -> NDArray[np.int64]:
        self._decisions += 1
        return np.array([[min(self._decisions, 6), 1, self._decisions > 2]], dtype=np.int64)


class UntilSwitched(LoadProcess):
    """The traffic, and until the switch has ended, which takes as long as the machine needs."""

    def __init__(self, place: dict[str, str], trace: Trace, out: Path) -> None:
        super().__init__(place["url"], trace, out)
        self._control = Path(place["control"])

    @property
    def finished(self) -> bool:
        if not super().finished:
            return False
        with StackClient(self._control, timeout_s=START_S) as client:
            state = client.state()
        return state.tp_degree == 2 and not state.switching


@pytest.fixture
def serving(fake_program: Path, repository: Path, tmp_path: Path) -> Iterator[dict[str, str]]:
    """Where a stack of fake engines listens: its ``url`` and its ``control`` socket."""
    said = tmp_path / "said.json"
    command = [
        sys.executable, "-m", "rlgov", "serve", "--model", "fake/model", "--profile", "h100-qwen3-32b",
        "--gpus", "none", "--port", "0", "--vllm", str(fake_program), "--run", str(tmp_path / "serve"),
        "--json", "--", "--fake-token-ms", "2",
    ]  # fmt: skip
    clock = SystemClock()
    until_s = clock.monotonic_s() + START_S
    with said.open("wb") as out, (tmp_path / "serve.log").open("wb") as log:
        process = subprocess.Popen(command, cwd=repository, stdout=out, stderr=log)
    try:
        while not said.read_text(encoding="utf-8").endswith("}\n"):
            if process.poll() is not None or clock.monotonic_s() > until_s:
                pytest.fail(f"rlgov serve does not serve:\n{(tmp_path / 'serve.log').read_text()}")
            clock.sleep_s(0.05)
        place: dict[str, str] = json.loads(said.read_text(encoding="utf-8"))
        yield place
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            code = process.wait(START_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            raise
    assert code == 0


@pytest.mark.slow
def test_a_policy_governs_a_stack_under_load_and_through_a_tp_switch(
    serving: dict[str, str], fake_stack: ModuleType, tmp_path: Path
) -> None:
    rng = np.random.default_rng(0)
    trace = Trace(
        "steady",
        np.linspace(0.0, SPAN_S, REQUESTS),
        rng.integers(20, 200, REQUESTS),
        rng.integers(20, 300, REQUESTS),
        np.zeros(REQUESTS, dtype=np.int64),
        SPAN_S,
    )
    world = fake_stack.World(rate_per_s=0.0, clock=SystemClock())  # GPUs only: their power is invented
    env = make_live(
        serving["control"],
        episode_s=None,
        hardware=fake_stack.FakeGpus(world),
        workload=UntilSwitched(serving, trace, tmp_path / "load"),
        record=tmp_path / "run.jsonl",
    )
    policy = Script()
    run = run_live(policy, env, 200)
    env.close()
    with StackClient(Path(serving["control"]), timeout_s=START_S) as client:
        state = client.state()
    assert (state.batch_cap, state.ready, world.lock_mhz) == (256, True, None)
    assert state.last_switch["outcome"]

    for before, after in pairwise(run.windows):
        assert after.start_s == pytest.approx(before.start_s + before.duration_s, abs=1e-6)
    assert {window.tp_degree for window in run.windows} == {4.0, 2.0}
    assert {window.batch_cap for window in run.windows} == {256.0, 128.0}
    figures = run.figures()
    # Over every window: the load may begin within the first one, which the figures leave out.
    assert sum(window.arrivals for window in run.windows) == REQUESTS
    served = sum(window.served for window in run.windows)
    assert served + figures.unfinished_requests == REQUESTS  # a switch loses nothing
    assert figures.energy_j > 0

    journal = read_journal(tmp_path / "run.jsonl")
    assert audit_journal(journal, policy).equal
    replayed = recorded_trace(journal, "live")
    if figures.unfinished_requests == 0:
        sent = sorted(zip(trace.prompt_tokens.tolist(), trace.output_tokens.tolist(), strict=True))
        got = sorted(zip(replayed.prompt_tokens.tolist(), replayed.output_tokens.tolist(), strict=True))
        assert got == sent
        assert np.abs(np.diff(replayed.arrival_s) - np.diff(trace.arrival_s)).mean() < 0.2
