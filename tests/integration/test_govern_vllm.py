"""The whole of it: a learned policy governs a real vLLM through a keeper, and things go wrong.

Two minutes of a trace. Its first governor is killed, the keeper is killed and started again, and the second
governor is asked to end. Shares the server of test_real_vllm.py, and runs before it.
"""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from prometheus_client.parser import text_string_to_metric_families

from rlgov.clock import SystemClock
from rlgov.config import LoadSettings
from rlgov.journal import read_journal
from rlgov.workload.load import run_load
from rlgov.workload.load_result import LoadResult, Verdict
from rlgov.workload.synthesis import SPECS, synthesize
from rlgov.workload.trace import Trace
from tests.chaos.scene import PATIENCE_S, PROMISED_S, Scene, Started

if TYPE_CHECKING:
    from tests.integration.conftest import RunningStack

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("real-vllm")]

CLOCK = SystemClock()
TRACE_S = 120.0
RATE_PER_S = 1.0  # two cores hold it, beside everything else
KILL_AT_S, KEEPER_AT_S = 40.0, 80.0
LARGEST_CAP = 32


def _conversation() -> Trace:
    """Two minutes of generated conversation, a sixteenth as long as people's: the model is as small."""
    spec = replace(SPECS["conversation"], rate_per_s=RATE_PER_S, duration_s=TRACE_S)
    trace = synthesize(spec, np.random.default_rng(3))
    return Trace(
        "conversation",
        trace.arrival_s.copy(),
        np.clip(trace.prompt_tokens // 16, 4, 200),
        np.clip(trace.output_tokens // 8, 2, 64),
        np.zeros(len(trace.arrival_s), dtype=np.int64),
        trace.duration_s,
    )


@dataclass
class _Replay:
    """A trace that is sent in a thread of its own."""

    url: str
    trace: Trace
    result: list[LoadResult] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.began_s = CLOCK.monotonic_s()
        self._thread = threading.Thread(target=self._send)
        self._thread.start()

    def _send(self) -> None:
        settings = LoadSettings(url=self.url, vocabulary=256, max_model_len=1024)
        self.result.append(asyncio.run(run_load(self.trace, settings, CLOCK)))

    def wait_for(self, at_s: float) -> None:
        """Until the trace has come so far."""
        CLOCK.sleep_s(self.began_s + at_s - CLOCK.monotonic_s())

    def finish(self) -> LoadResult:
        self._thread.join()
        (result,) = self.result
        return result


def _values(page: str) -> dict[str, float]:
    """Every sample of a page by name; of several the sum. The parser raises for what is no page."""
    values: dict[str, float] = {}
    for family in text_string_to_metric_families(page):
        for sample in family.samples:
            values[sample.name] = values.get(sample.name, 0.0) + sample.value
    return values


def _audit(journal: Path, bundle: Path, profile: Path, out: Path) -> dict[str, Any]:
    done = subprocess.run(
        [
            sys.executable, "-m", "rlgov", "replay", "--journal", str(journal), "--policy", str(bundle),
            "--profile", str(profile), "--out", str(out), "--json",
        ],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    report: dict[str, Any] = json.loads(done.stdout)
    return report


def _kill_the_governor(scene: Scene, stack: RunningStack) -> None:
    governor = scene.governor
    assert governor is not None
    scene.signal(governor, signal.SIGKILL)
    scene.until("all clocks are as they were found", scene.restored, PROMISED_S)
    scene.until("the cap is open", lambda: stack.client.state().batch_cap == LARGEST_CAP, PROMISED_S)
    governor.wait(PATIENCE_S)


def _kill_the_keeper(scene: Scene) -> None:
    keeper = scene.keeper
    assert keeper is not None
    scene.signal(keeper, signal.SIGKILL)
    keeper.wait(PATIENCE_S)
    scene.until("the governor misses its keeper", lambda: "KeeperGone" in scene.conditions())
    written = scene.stub.state.write_count
    scene.start_keeper()
    assert {gpu for gpu, mhz in scene.stub.writes[written:] if mhz is None} == {0, 1}
    scene.until_governed()
    scene.until("all is well again", lambda: "KeeperGone" not in scene.conditions())


def _end_the_governor(scene: Scene, stack: RunningStack) -> None:
    governor = scene.governor
    assert isinstance(governor, Started)
    scene.signal(governor, signal.SIGTERM)
    scene.until("all clocks are as they were found", scene.restored, PROMISED_S)
    governor.wait(PATIENCE_S)
    assert governor.code == 0
    assert scene.stub.locks_mhz() == (None, None)
    assert stack.client.state().batch_cap == LARGEST_CAP


def _check_what_an_operator_sees(page: dict[str, float], status: dict[str, Any]) -> None:
    assert page["rlgov_governor_ticks_total"] > 10
    assert page["rlgov_governor_requests_served_total"] > 0
    assert page["process_resident_memory_bytes"] < 100e6
    assert status["governed"]["policy_digest"]
    assert status["tick"]["acting"] is True
    assert status["tick"]["actuation"]["clocks"] == "keeper"
    assert status["totals"]["raised"]["KeeperGone"] == 1
    assert {condition["severity"] for condition in status["conditions"]} <= {"info", "warning"}, status


def test_two_minutes_of_a_trace_with_a_killed_governor_and_a_killed_keeper(
    stack: RunningStack,
    tiny_profile: Path,
    tiny_bundle: Path,
    nvml_library: Path,
    wait_until: Callable[..., None],
    tmp_path: Path,
) -> None:
    trace = _conversation()
    scene = Scene(
        nvml_library,
        lease_s=10.0,
        interval_s=1.0,
        policy=str(tiny_bundle),
        control=stack.control,
        profile=str(tiny_profile),
        gpus=2,
    )
    journals = ("first", "second")
    with scene:
        scene.start_keeper()
        scene.start_governor("first")
        scene.until_governed()
        replay = _Replay(stack.url, trace)
        try:
            replay.wait_for(KILL_AT_S)
            _kill_the_governor(scene, stack)
            scene.start_governor("second")
            scene.until_governed()
            replay.wait_for(KEEPER_AT_S)
            _kill_the_keeper(scene)
            page, status = _values(scene.page()), scene.status()
        finally:
            result = replay.finish()
        _end_the_governor(scene, stack)
        audits = [
            _audit(scene.folder / name, tiny_bundle, tiny_profile, tmp_path / name) for name in journals
        ]
        intervals = [len(read_journal(scene.folder / name).intervals) for name in journals]
    wait_until("no switch runs", lambda: not stack.client.state().switching)
    if stack.client.state().tp_degree != 1:
        stack.switch(1)  # the tests that follow count on it

    # Nothing was lost, and nobody got less than was asked for.
    assert len(result.requests) == len(trace.arrival_s)
    assert Counter(request.verdict for request in result.requests) == {Verdict.COMPLETE: len(trace.arrival_s)}
    assert all(request.output_tokens == request.output_tokens_asked for request in result.requests)
    assert all(request.prompt_tokens == request.prompt_tokens_asked for request in result.requests)
    _check_what_an_operator_sees(page, status)
    # Both governors' decisions are taken again from their journals.
    for audit, count in zip(audits, intervals, strict=True):
        assert audit["equal"] is True
        assert audit["reasons_changed"] == 0
        assert count >= 20
        assert audit["observations_compared"] == count - 1
