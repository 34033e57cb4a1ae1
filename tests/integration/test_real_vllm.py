"""The live deployment on a real vLLM: its actions really act, and nothing is lost.

One server serves all of these tests, in this order, after test_govern_vllm.py: starting one takes a minute.
They run in one process of pytest-xdist for the same reason.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import urllib.request
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from rlgov.agents.audit import audit_journal
from rlgov.agents.bundle import BundlePolicy, load_bundle
from rlgov.calibration.table import read_header, read_iterations, read_points
from rlgov.deployments.replayed import recorded_trace
from rlgov.journal import read_journal
from rlgov.workload.load_result import RequestResult, Verdict

if TYPE_CHECKING:
    from tests.fakes.nvml import NvmlStub
    from tests.integration.conftest import Load, RunningStack

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("real-vllm")]

HERE = Path(__file__).resolve().parent
WINDOWS = 30


def _assert_whole(requests: list[RequestResult], at_least: int) -> None:
    """Every request was answered with exactly the tokens it asked for."""
    assert Counter(request.verdict for request in requests) == {Verdict.COMPLETE: len(requests)}
    assert all(request.output_tokens == request.output_tokens_asked for request in requests)
    assert all(request.prompt_tokens == request.prompt_tokens_asked for request in requests)
    assert len(requests) >= at_least


def test_the_plugin_holds_the_cap_and_says_so(stack: RunningStack) -> None:
    (engine,) = stack.client.state().engines
    assert (engine.phase, engine.tp_degree, engine.cap_by) == ("active", 1, "plugin")
    assert engine.version == "0.32.0+cpu"
    (sample,) = stack.interval().engines
    assert sample.source == "plugin"
    assert sample.max_num_seqs == 32
    assert sample.kv_capacity_tokens == 16_384


def test_the_batch_cap_follows_commands_under_load(
    stack: RunningStack, make_load: Callable[..., Load], wait_until: Callable[..., None]
) -> None:
    generated = []
    with make_load(concurrency=40, output_tokens=40) as load:
        for cap in (32, 4, 16, 1, 32):
            assert stack.set_cap(cap).batch_cap == cap
            wait_until(f"exactly {cap} requests run", lambda cap=cap: stack.running() == cap)
            before = stack.interval().engines[0]
            seen = [stack.running() for _ in range(20)]
            assert max(seen) <= cap
            generated.append(stack.interval().engines[0].generated_tokens - before.generated_tokens)
    assert min(generated) > 0
    _assert_whole(load.requests, at_least=60)
    sample = stack.interval().engines[0]
    assert sample.preemptions == 0
    assert (sample.failed or 0) == 0


def test_the_cap_is_taken_while_nothing_runs(stack: RunningStack) -> None:
    assert stack.running() == 0
    assert stack.set_cap(4).batch_cap == 4
    assert stack.interval().engines[0].batch_cap == 4
    assert stack.set_cap(32).batch_cap == 32


def test_a_cap_whose_lease_is_not_renewed_falls_open(
    stack: RunningStack, wait_until: Callable[..., None]
) -> None:
    assert stack.client.configure(batch_cap=1, lease_s=1.0).batch_cap == 1
    wait_until(
        "the engine's cap is the largest again",
        lambda: stack.interval().engines[0].batch_cap == 32 and stack.client.state().batch_cap == 32,
    )


def test_chat_and_everything_else_goes_through_the_gateway(stack: RunningStack) -> None:
    def get(path: str, body: dict[str, Any] | None = None) -> bytes:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(  # noqa: S310  # loopback
            stack.url + path, data=data, headers={"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=120) as answer:  # noqa: S310  # as above
            content: bytes = answer.read()
            return content

    model = json.loads(get("/v1/models"))["data"][0]["id"]
    question = {
        "model": model,
        "messages": [{"role": "user", "content": "hi"}],
        "max_tokens": 7,
        "ignore_eos": True,
        "stream": True,
    }
    events = [line for line in get("/v1/chat/completions", question).split(b"\n\n") if line]
    assert events[-1] == b"data: [DONE]"
    # Nobody asked for usage: the gateway did, for its own count, and took it out again.
    assert all(json.loads(event[6:])["choices"] for event in events[:-1])
    pages = {family.name for family in text_string_to_metric_families(get("/metrics").decode())}
    assert {"rlgov_gateway_requests", "vllm:num_requests_running"} <= pages
    newest = max(stack.client.interval(0).traffic.closed, key=lambda record: record.arrival_s)
    assert (newest.output_tokens, newest.finish_reason) == (7, "length")


def test_the_tp_degree_changes_under_load_without_losing_a_request(
    stack: RunningStack, make_load: Callable[..., Load]
) -> None:
    before = stack.interval().traffic.cursor
    with make_load(concurrency=8, output_tokens=64) as load:
        up = stack.switch(2)
        assert (up.tp_degree, up.last_switch["outcome"]) == (2, "done"), up
        down = stack.switch(1)
        assert (down.tp_degree, down.last_switch["outcome"]) == (1, "done"), down
    assert [engine.tp_degree for engine in down.engines] == [1]
    _assert_whole(load.requests, at_least=100)
    records = stack.client.interval(before).traffic.closed
    engines_used = {record.engine_id for record in records if record.outcome == "served"}
    assert len(engines_used) == 3
    assert {record.outcome for record in records} == {"served"}


def test_a_policy_from_the_simulator_governs_it_and_replays_equally(
    stack: RunningStack,
    make_load: Callable[..., Load],
    make_nvml_stub: Callable[..., NvmlStub],
    tiny_profile: Path,
    tiny_bundle: Path,
    tmp_path: Path,
) -> None:
    driver = make_nvml_stub(gpus=2)
    journal_path = tmp_path / "live.jsonl"
    command = [
        sys.executable, str(HERE / "governed.py"), "--control", str(stack.control), "--profile",
        str(tiny_profile), "--bundle", str(tiny_bundle), "--journal", str(journal_path), "--windows",
        str(WINDOWS), "--start-tp", "1", "--gpus", *driver.uuids,
    ]  # fmt: skip
    with make_load(concurrency=6, output_tokens=48) as load:
        done = subprocess.run(
            command, env={**os.environ, **driver.environment}, capture_output=True, text=True, check=False
        )
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout)
    assert figures["windows"] == WINDOWS
    assert figures["blind_windows"] == 0
    assert figures["energy_j"] > 0
    assert figures["served"] > 0
    _assert_whole(load.requests, at_least=20)

    # Its actions reached the driver and the engine, and everything was given back.
    locked = {clock for _, clock in driver.writes if clock is not None}
    assert len(locked) > 1
    assert driver.locks_mhz() == (None, None)
    assert stack.client.state().batch_cap == 32

    journal = read_journal(journal_path)
    assert len(journal.intervals) == WINDOWS + 1
    audit = audit_journal(journal, BundlePolicy(load_bundle(tiny_bundle)))
    assert audit.equal, audit.audit.summary()
    assert audit.observations_compared == WINDOWS
    trace = recorded_trace(journal, "live")
    assert set(trace.output_tokens.tolist()) == {48}
    assert set(trace.prompt_tokens.tolist()) == {24}


def test_it_is_characterised_and_the_iterations_add_up(stack: RunningStack, tmp_path: Path) -> None:
    out = tmp_path / "run"
    command = [
        sys.executable, "-m", "rlgov", "characterize", "--deployment", "live", "--control",
        str(stack.control), "--url", stack.url, "--gpus", "none", "--tp", "1", "--caps", "16", "4",
        "--classes", "short-in/short-out", "--length-scale", "0.25", "--concurrency", "8", "--vocabulary",
        "256", "--warm-up-s", "1", "--measure-s", "4", "--cool-down-s", "0", "--out", str(out), "--json",
    ]  # fmt: skip
    told = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    assert (told["measured_now"], told["rows"], told["failed_requests"]) == (2, 2, 0)
    iterations = read_iterations(out)
    assert iterations is not None
    running = {}
    for point in read_points(out).to_dict("records"):
        rows = iterations[iterations["point_id"] == point["point_id"]]
        assert len(rows) == point["iterations"] > 0
        assert point["served"] > 0
        assert point["itl_p50_s"] > 0
        running[point["batch_cap"]] = point["running_mean"]
        assert rows["running"].max() <= min(point["batch_cap"], 8)
        # As the engine counts them, and as its iterations do; a request's first token comes of its prompt.
        tokens = rows["decode_tokens"].sum() + point["served"]
        assert tokens == pytest.approx(point["generated_tokens"], rel=0.1, abs=32)
    assert running[4] <= 4.01
    assert running[4] < running[16] <= 8.01
    assert read_header(out).versions["vllm"].startswith("0.32")
    assert stack.client.state().batch_cap == 32  # given back


def test_a_killed_engine_is_never_an_empty_success(
    stack: RunningStack, make_load: Callable[..., Load], wait_until: Callable[..., None]
) -> None:
    wait_until("no switch runs", lambda: not stack.client.state().switching)
    (engine,) = [engine for engine in stack.client.state().engines if engine.phase == "active"]
    assert engine.pid is not None
    with make_load(concurrency=12, output_tokens=200, segment_s=4.0) as load:
        wait_until("requests run", lambda: stack.running() >= 8)
        os.kill(engine.pid, signal.SIGKILL)
        wait_until(
            "the gateway serves from another engine",
            lambda: any(
                other.phase == "active" and other.engine_id != engine.engine_id
                for other in stack.client.state().engines
            ),
        )
    broken = [request for request in load.requests if request.verdict != Verdict.COMPLETE]
    _assert_whole([request for request in load.requests if request.verdict == Verdict.COMPLETE], at_least=8)
    # A stream that had begun ends in an error its client sees; nothing looks like a whole answer and is none.
    assert {request.verdict for request in broken} <= {Verdict.TRUNCATED, Verdict.FAILED}, broken
    assert all(request.error for request in broken)
    records = stack.client.interval(0).traffic.closed
    assert sum(record.outcome == "failed" for record in records) == len(broken)


def test_the_end_of_serve_leaves_no_process(stack: RunningStack) -> None:
    pids = [engine.pid for engine in stack.client.state().engines if engine.pid is not None]
    assert pids
    stack.process.send_signal(signal.SIGTERM)
    assert stack.process.wait(timeout=180) == 0
    sessions = {pid for pid in pids if Path(f"/proc/{pid}").exists()}
    assert sessions == set()
    assert not stack.control.exists()
