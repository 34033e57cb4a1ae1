"""The mixin over a stand-in for vLLM's scheduler: its interface, its order of events, and a second account.

The stand-in counts request by request and the slow way; the plugin's few additions must come to the same.
"""

from __future__ import annotations

import logging
from collections import deque
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlgov.clock import VirtualClock
from rlgov.engine.plugin import rpc, scheduler
from rlgov.engine.plugin.counters import COLUMNS
from rlgov.engine.plugin.selftest import Report

GOOD = Report({"release": True, "single_engine": True, "cap": True, "counters": True})


class StockRequest:
    def __init__(self, request_id: str, prompt: int, output: int) -> None:
        self.request_id = request_id
        self.num_prompt_tokens = prompt
        self.wanted = output
        self.num_computed_tokens = 0
        self.num_output_placeholders = 0
        self.is_prefill_chunk = False
        self.known = 0  # tokens it had when it was admitted: computing these is prefill
        self.admissions = 0
        self.token_times_s: list[float] = []

    @property
    def num_tokens(self) -> int:
        return self.num_prompt_tokens + len(self.token_times_s)

    @property
    def left(self) -> int:
        if len(self.token_times_s) + self.num_output_placeholders >= self.wanted:
            return 0
        return self.num_tokens + self.num_output_placeholders - self.num_computed_tokens


@dataclass
class Cached:
    num_computed_tokens: list[int]
    resumed_req_ids: set[str]


@dataclass
class Output:
    scheduled_new_reqs: list[Any]
    scheduled_cached_reqs: Cached
    num_scheduled_tokens: dict[str, int]
    total_num_scheduled_tokens: int
    finished_req_ids: set[str]
    preempted_req_ids: set[str] | None
    sampling: list[StockRequest] = field(default_factory=list)
    prefill: int = 0
    begin_s: float = 0.0
    running: int = 0


class StockScheduler:
    """First come first served, decodes first, then prompts in chunks under a token budget."""

    def __init__(self, clock: VirtualClock, max_num_seqs: int = 8, budget: int = 64) -> None:
        self.scheduler_config = SimpleNamespace(max_num_seqs=max_num_seqs)
        self.cache_config = SimpleNamespace(kv_cache_size_tokens=None, num_gpu_blocks=100, block_size=16)
        self.max_num_running_reqs = max_num_seqs
        self.max_num_active_reqs = max_num_seqs
        self.num_spec_tokens = 0
        self.requests: dict[str, StockRequest] = {}
        self.waiting: deque[StockRequest] = deque()
        self.kv_holding_waiting: deque[StockRequest] = deque()
        self.running: list[StockRequest] = []
        self.finished_req_ids: set[str] = set()
        self.to_preempt: set[str] = set()
        self.clock = clock
        self.budget = budget
        self.everything: list[StockRequest] = []
        self.prefilled = 0
        self.preempted = 0
        self.finished = 0
        self.aborted = 0
        self.intervals: list[tuple[float, float, int]] = []

    def add_request(self, request: StockRequest) -> None:
        self.requests[request.request_id] = request
        self.waiting.append(request)
        self.everything.append(request)

    def get_request_counts(self) -> tuple[int, int]:
        return len(self.running), len(self.waiting)

    def get_kv_cache_usage(self) -> float:
        return min(1.0, sum(request.num_computed_tokens for request in self.running) / 1600)

    def finish_requests(self, request_id: str, _: object) -> list[StockRequest]:
        request = self.requests[request_id]
        (self.running if request in self.running else self.waiting).remove(request)
        del self.requests[request_id]
        self.finished_req_ids.add(request_id)
        self.aborted += 1
        return [request]

    def schedule(self, throttle_prefills: bool = False) -> Output:  # noqa: FBT001, FBT002, ARG002  # vLLM's interface
        begin_s, budget = self.clock.monotonic_s(), self.budget
        scheduled: dict[str, int] = {}
        known: list[StockRequest] = []
        preempted: set[str] = set()
        for request in list(self.running):
            if request.request_id in self.to_preempt:
                self.running.remove(request)
                request.num_computed_tokens = 0
                self.waiting.appendleft(request)
                preempted.add(request.request_id)
            elif tokens := min(request.left, budget):
                scheduled[request.request_id] = tokens
                budget -= tokens
                known.append(request)
        self.to_preempt.clear()
        self.preempted += len(preempted)
        new: list[StockRequest] = []
        resumed: list[StockRequest] = []
        while self.waiting and budget > 0 and len(self.running) < self.max_num_active_reqs and not preempted:
            request = self.waiting.popleft()
            self.running.append(request)
            (resumed if request.admissions else new).append(request)
            request.admissions += 1
            request.known = request.num_tokens
            scheduled[request.request_id] = tokens = min(request.left, budget)
            budget -= tokens
        output = Output(
            [SimpleNamespace(req_id=one.request_id, num_computed_tokens=0) for one in new],
            Cached([one.num_computed_tokens for one in known + resumed], {one.request_id for one in resumed}),
            scheduled,
            sum(scheduled.values()),
            self.finished_req_ids,
            preempted,
            begin_s=begin_s,
        )
        for name, tokens in scheduled.items():
            request = self.requests[name]
            output.prefill += tokens if request.num_computed_tokens < request.known else 0
            request.num_computed_tokens += tokens
            goal = request.num_tokens + request.num_output_placeholders
            request.is_prefill_chunk = request.num_computed_tokens < goal
            if not request.is_prefill_chunk:
                request.num_output_placeholders += 1
                output.sampling.append(request)
        self.finished_req_ids = set()
        output.running = len(self.running)
        return output

    def update_from_output(self, output: Output, _: object = None) -> dict[int, Any]:
        outputs = []
        for request in output.sampling:
            if request.request_id in self.requests:
                request.num_output_placeholders -= 1
                request.token_times_s.append(self.clock.monotonic_s())
                outputs.append(SimpleNamespace(new_token_ids=[7]))
                if len(request.token_times_s) == request.wanted:
                    self.running.remove(request)
                    del self.requests[request.request_id]
                    self.finished_req_ids.add(request.request_id)
                    self.finished += 1
        if output.total_num_scheduled_tokens:
            self.prefilled += output.prefill
            self.intervals.append((output.begin_s, self.clock.monotonic_s(), output.running))
        return {0: SimpleNamespace(outputs=outputs, scheduler_stats=None)} if outputs else {}


class Bench:
    """A governed stand-in, and an engine loop that keeps ``depth`` iterations under way."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, depth: int = 1, **shape: int) -> None:
        self.clock = VirtualClock(monotonic_s=100.0)
        monkeypatch.setattr(scheduler, "now_s", self.clock.monotonic_s)
        self.depth = depth
        self.scheduler: Any = scheduler.governed(StockScheduler)(GOOD, self.clock, **shape)
        self.core = SimpleNamespace(
            scheduler=self.scheduler, model_executor=SimpleNamespace(is_sleeping=False)
        )
        self.queue: deque[Output] = deque()
        self.count = 0
        self.stood_still = 0.0  # request-seconds

    def add(self, prompt: int, output: int) -> str:
        self.count += 1
        name = f"r{self.count}"
        self.scheduler.add_request(StockRequest(name, prompt, output))
        return name

    def step(self, seconds: float = 0.01) -> None:
        """One turn of vLLM's loop: schedule; where enough is under way, take in the oldest result."""
        if self.scheduler.requests or self.scheduler.finished_req_ids:
            self.queue.append(self.scheduler.schedule(False))  # noqa: FBT003  # as vLLM calls it
        self.clock.advance_s(seconds)
        if self.queue and (len(self.queue) >= self.depth or not self.scheduler.requests):
            self.scheduler.update_from_output(self.queue.popleft(), None)

    def stand_still(self, seconds: float) -> None:
        """Nothing is scheduled for a while, as when another part of the engine holds it up."""
        self.clock.advance_s(seconds)
        self.stood_still += seconds * len(self.scheduler.running)

    def drain(self) -> None:
        for _ in range(10_000):
            if not (self.scheduler.requests or self.scheduler.finished_req_ids or self.queue):
                return
            self.step()
        pytest.fail("the stand-in does not come to an end")

    def sample(self) -> dict[str, Any]:
        sample: dict[str, Any] = rpc.rlgov_state(self.core)["sample"]
        return sample


def _own_times_s(intervals: list[tuple[float, float, int]]) -> list[float]:
    """Of each iteration what the ones before it have not covered; together the time with any under way."""
    own_s, reached_s = [], 0.0
    for begin_s, end_s, _ in intervals:
        own_s.append(end_s - max(begin_s, reached_s))
        reached_s = end_s
    return own_s


def _check_against_the_slow_account(bench: Bench) -> None:
    stock, sample = bench.scheduler, bench.sample()
    times = [request.token_times_s for request in stock.everything]
    assert sample["generated_tokens"] == sum(len(each) for each in times)
    assert sample["prompt_tokens"] == sum(request.num_prompt_tokens for request in stock.everything)
    assert sample["arrived"] == len(stock.everything)
    assert (sample["finished"], sample["failed"]) == (stock.finished, stock.aborted)
    assert sample["preemptions"] == stock.preempted
    assert sample["prefill_tokens"] == stock.prefilled
    assert sample["iterations"] == len(stock.intervals)
    own_s = _own_times_s(stock.intervals)
    assert sample["busy_s"] == pytest.approx(sum(own_s))
    # Between iterations nobody waits in this loop but where it stands still, with the requests it has.
    at_least = sum(one * ran for one, (_, _, ran) in zip(own_s, stock.intervals, strict=True))
    assert sample["running_s"] == pytest.approx(at_least + bench.stood_still)
    assert sample["token_gaps"] == sum(max(0, len(each) - 1) for each in times)
    assert sample["token_gap_s"] == pytest.approx(sum(each[-1] - each[0] for each in times if each))


actions = st.lists(
    st.one_of(
        st.tuples(st.just("add"), st.integers(1, 90), st.integers(1, 12)),
        st.tuples(st.just("step"), st.sampled_from([0.01, 0.03, 0.2]), st.just(0)),
        st.tuples(st.just("abort"), st.integers(0, 20), st.just(0)),
        st.tuples(st.just("preempt"), st.integers(0, 20), st.just(0)),
        st.tuples(st.just("cap"), st.integers(1, 8), st.just(0)),
        st.tuples(st.just("wait"), st.sampled_from([0.5, 2.0]), st.just(0)),
    ),
    max_size=40,
)


@settings(deadline=None)  # on a loaded machine one example may take long
@given(actions, st.sampled_from([1, 2]))
def test_counts_what_a_slow_account_counts(events: list[tuple[str, Any, int]], depth: int) -> None:
    with pytest.MonkeyPatch.context() as monkeypatch:
        bench = Bench(monkeypatch, depth)
        for what, value, more in events:
            names = sorted(bench.scheduler.requests)
            if what == "add":
                bench.add(value, more)
            elif what == "step":
                bench.step(value)
            elif what == "abort" and names:
                bench.scheduler.finish_requests(names[value % len(names)], "aborted")
            elif what == "preempt" and names and not bench.queue:  # in overlap vLLM delivers late tokens
                bench.scheduler.to_preempt.add(names[value % len(names)])
            elif what == "cap":
                rpc.rlgov_cap(bench.core, value, None)
            elif what == "wait" and not bench.queue:
                bench.stand_still(value)
        bench.drain()
        _check_against_the_slow_account(bench)
        assert bench.sample()["waiting_tokens"] == 0
        assert not bench.scheduler.rlgov_counters.prefilling


def test_gauges_of_a_busy_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RLGOV_ENGINE_ID", "tp2-7")
    bench = Bench(monkeypatch, max_num_seqs=2, budget=64)
    for _ in range(3):
        bench.add(prompt=100, output=4)
    bench.step()
    sample = bench.sample()
    assert (sample["running"], sample["waiting"]) == (1, 2)
    assert sample["waiting_tokens"] == 36 + 100 + 100
    assert sample["batch_cap"] == sample["max_num_seqs"] == 2
    assert sample["kv_capacity_tokens"] == 1600
    assert sample["kv_usage"] == pytest.approx(0.04)
    assert (sample["engine_id"], sample["source"], sample["histograms"]) == ("tp2-7", "plugin", {})


def test_an_idle_engine_is_not_busy_and_an_iteration_under_way_is(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(monkeypatch)
    bench.clock.advance_s(50)
    assert bench.sample()["busy_s"] == 0
    bench.add(10, 5)
    output = bench.scheduler.schedule()
    bench.clock.advance_s(3)
    assert bench.sample()["busy_s"] == pytest.approx(3)
    assert bench.sample()["running_s"] == pytest.approx(3)
    bench.scheduler.update_from_output(output)
    assert bench.sample()["busy_s"] == pytest.approx(3)


def test_lowering_the_cap_admits_less_and_preempts_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(monkeypatch, max_num_seqs=6)
    for _ in range(20):
        bench.add(4, 10)
    bench.step()
    assert len(bench.scheduler.running) == 6
    assert rpc.rlgov_cap(bench.core, 2, None) == {"batch_cap": 2, "max_num_seqs": 6}
    bench.step()
    assert len(bench.scheduler.running) == 6
    assert bench.scheduler.max_num_running_reqs == 6  # never touched: vLLM dies of it
    for _ in range(12):
        bench.step()
    assert len(bench.scheduler.running) == 2
    assert rpc.rlgov_cap(bench.core, None, None)["batch_cap"] == 6
    bench.step()
    assert len(bench.scheduler.running) == 6
    bench.drain()
    assert bench.sample()["preemptions"] == 0
    assert bench.sample()["finished"] == 20


def test_a_cap_set_while_idle_holds_for_the_next_request(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(monkeypatch)
    rpc.rlgov_cap(bench.core, 1, None)
    bench.add(4, 3)
    bench.add(4, 3)
    bench.step()
    assert len(bench.scheduler.running) == 1


def test_a_lease_that_nobody_renews_opens_the_cap_in_the_next_iteration(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    bench = Bench(monkeypatch)
    rpc.rlgov_cap(bench.core, 1, 5.0)
    for _ in range(4):
        bench.add(4, 2000)
    bench.step(4.9)
    bench.step(0.2)
    assert len(bench.scheduler.running) == 1
    bench.step()
    assert len(bench.scheduler.running) == 4


def test_a_lease_that_ends_while_idle_shows_in_the_state(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(monkeypatch)
    rpc.rlgov_cap(bench.core, 1, 5.0)
    assert bench.sample()["batch_cap"] == 1
    bench.clock.advance_s(5)
    assert bench.sample()["batch_cap"] == 8


def test_rows_of_iterations_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(monkeypatch, depth=2)
    for _ in range(5):
        bench.add(50, 6)
    bench.drain()
    answer, sample = rpc.rlgov_iterations(bench.core, 0), bench.sample()
    columns = {name: [row[at] for row in answer["rows"]] for at, name in enumerate(COLUMNS)}
    assert answer["columns"] == list(COLUMNS)
    assert (answer["cursor"], answer["dropped"]) == (sample["iterations"], 0)
    assert sum(columns["step_s"]) == pytest.approx(sample["busy_s"])
    assert sum(columns["prefill_tokens"]) == 250
    assert sum(columns["decode_tokens"]) == 5 * 5  # the first token comes with the prompt
    assert columns["t_s"] == sorted(columns["t_s"])
    assert columns["context_tokens"][0] == 64
    assert rpc.rlgov_iterations(bench.core, answer["cursor"])["rows"] == []


def test_a_request_aborted_while_its_first_token_is_computed_gets_none(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    bench = Bench(monkeypatch, depth=2)
    name = bench.add(10, 5)
    other = bench.add(10, 5)
    bench.step()
    assert bench.queue
    bench.scheduler.finish_requests(name, "aborted")
    bench.drain()
    sample = bench.sample()
    assert (sample["generated_tokens"], sample["token_gaps"]) == (5, 4), other
    assert (sample["finished"], sample["failed"]) == (1, 1)


def test_a_request_preempted_in_its_prompt_waits_for_all_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(monkeypatch, budget=64)
    name = bench.add(100, 5)
    bench.step()
    assert bench.sample()["waiting_tokens"] == 36
    bench.scheduler.to_preempt.add(name)
    bench.step()
    assert bench.sample()["waiting_tokens"] == 100
    bench.drain()
    assert bench.sample()["prefill_tokens"] == 164


def test_a_preemption_between_two_tokens_is_one_long_gap(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(monkeypatch)
    name = bench.add(10, 5)
    for seconds in (0.1, 0.1, 0.1):
        bench.step(seconds)
    bench.scheduler.to_preempt.add(name)
    bench.step(1.0)  # computes nothing
    bench.step(0.1)  # prompt and three tokens again, and the fourth
    bench.step(0.1)
    sample = bench.sample()
    assert (sample["generated_tokens"], sample["token_gaps"], sample["preemptions"]) == (5, 4, 1)
    assert sample["token_gap_s"] == pytest.approx(0.1 + 0.1 + 1.1 + 0.1)
    assert sample["prefill_tokens"] == 10 + 13


def test_an_error_in_the_counting_ends_the_counting_and_not_the_engine(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    bench = Bench(monkeypatch)
    bench.add(10, 5)
    bench.step()

    def fail(*_: object) -> None:
        raise KeyError("moved elsewhere")

    monkeypatch.setattr(bench.scheduler, "get_kv_cache_usage", fail)
    with caplog.at_level(logging.ERROR, logger="vllm.rlgov"):
        bench.drain()
    assert bench.scheduler.finished == 1
    assert "serving goes on" in caplog.text
    state = rpc.rlgov_state(bench.core)
    assert state["sample"] is None
    assert state["checks"]["counters"] is False
    assert "moved elsewhere" in state["note"]
    assert state["cap_supported"]
    assert rpc.rlgov_cap(bench.core, 3, None)["batch_cap"] == 3


def test_a_cap_out_of_range_is_an_answer_and_no_exception(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(monkeypatch)
    assert "at least 1" in rpc.rlgov_cap(bench.core, 0, None)["error"]
    assert rpc.rlgov_cap(bench.core, 1000, None)["batch_cap"] == 8


def test_an_engine_without_the_scheduler_says_how_to_get_it() -> None:
    core = SimpleNamespace(scheduler=object())
    state = rpc.rlgov_state(core)
    assert (state["sample"], state["cap_supported"], state["asleep"]) == (None, False, False)
    for answer in (rpc.rlgov_cap(core, 3, None), rpc.rlgov_iterations(core, 0), rpc.rlgov_cost(core)):
        assert "--scheduler-cls" in answer["error"]


def test_the_stock_scheduler_is_asked_for_and_the_setting_put_back() -> None:
    seen: list[object] = []

    class Settings:
        scheduler_cls: str | None = "rlgov.engine.plugin.scheduler.RlgovScheduler"

        def get_scheduler_cls(self) -> type:
            seen.append(self.scheduler_cls)
            return StockScheduler

    settings = Settings()
    assert scheduler.stock_scheduler(SimpleNamespace(scheduler_config=settings)) is StockScheduler
    assert seen == [None]
    assert settings.scheduler_cls == "rlgov.engine.plugin.scheduler.RlgovScheduler"


@pytest.mark.parametrize("asked", ["0", "1"])
def test_a_vllm_of_another_layout_gets_its_own_scheduler(monkeypatch: pytest.MonkeyPatch, asked: str) -> None:
    """Here vllm cannot be imported at all, which is as much another layout as can be."""
    monkeypatch.setenv("RLGOV_PLUGIN", asked)

    class Plain:
        def __init__(self, vllm_config: object, block_size: int) -> None:
            self.made = (vllm_config, block_size)

    config = SimpleNamespace(
        scheduler_config=SimpleNamespace(scheduler_cls="x", get_scheduler_cls=lambda: Plain),
        parallel_config=SimpleNamespace(data_parallel_size=1),
    )
    made: Any = scheduler.RlgovScheduler(vllm_config=config, block_size=16)
    assert type(made) is Plain
    assert made.made == (config, 16)
    if asked == "1":
        state = rpc.rlgov_state(SimpleNamespace(scheduler=made))
        assert "laid out otherwise" in state["note"]
        assert not state["cap_supported"]
    rpc.step_aside(Report({}, (rpc.NOT_GOVERNED,)))
