"""Windows from measurements: what makes them blind, who counts as a miss, and what else they hold."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from rlgov.deployments.measured import MeasuredWindows
from rlgov.engine.samples import Outcome, RequestRecord, StackInterval, Traffic
from rlgov.errors import DeploymentError
from rlgov.hardware.meter import GpuReading, MeterReading
from rlgov.hardware.throttle import GPU_IDLE, HW_THERMAL, SW_POWER_CAP
from rlgov.journal import Interval, decode, encode
from rlgov.records import Limits, ServiceLevel, Window
from rlgov.simulation.profile import load_profile
from tests.fakes.measurements import NO_METER, info, interval, meter, request, sample, state

LIMITS = load_profile("h100-qwen3-32b").limits().with_service_level(ServiceLevel(ttft_s=1.0, tpot_s=0.1))
ASKED = LIMITS.fastest
BEGIN_S = 500.0


def begun(first: StackInterval | None = None, reading: MeterReading = NO_METER) -> MeasuredWindows:
    windows = MeasuredWindows()
    windows.start(first or interval(BEGIN_S), reading, LIMITS)
    return windows


def after(
    at_s: float,
    open_: tuple[RequestRecord, ...] = (),
    closed: tuple[RequestRecord, ...] = (),
    **values: Any,
) -> StackInterval:
    """The stack ``at_s`` seconds into the episode."""
    traffic = Traffic(BEGIN_S + at_s, values.pop("cursor", 10), open_, closed, values.pop("dropped", 0))
    return interval(BEGIN_S + at_s, traffic, **values)


def closed(outcome: Outcome, arrival_s: float = 0.1, **values: Any) -> RequestRecord:
    return request(BEGIN_S + arrival_s, outcome=outcome, finished_s=BEGIN_S + 0.9, **values)


def step(windows: MeasuredWindows, seen: StackInterval, reading: MeterReading = NO_METER) -> Window:
    return windows.next(seen, reading, ASKED)


# --------------------------------------------------------------------------- misses


@pytest.mark.parametrize(
    ("values", "served", "misses"),
    [
        ({"outcome": Outcome.SERVED, "first": 0.5, "last": 0.9, "tokens": 5}, 1, 0),
        ({"outcome": Outcome.SERVED, "first": 0.1, "last": 0.51, "tokens": 5}, 1, 1),  # 102 ms a token
        ({"outcome": Outcome.SERVED, "first": 0.1, "last": 0.5, "tokens": 5}, 1, 0),  # exactly at the limit
        ({"outcome": Outcome.SERVED, "first": 0.9, "last": 0.9, "tokens": 1}, 1, 0),
        ({"outcome": Outcome.SERVED, "first": 0.9, "last": 0.99, "tokens": None}, 1, 0),
        ({"outcome": Outcome.FAILED}, 0, 1),
        ({"outcome": Outcome.FAILED, "first": 0.2}, 0, 1),
        ({"outcome": Outcome.REJECTED}, 0, 1),
        ({"outcome": Outcome.INVALID}, 0, 0),
        ({"outcome": Outcome.CANCELLED}, 0, 0),
    ],
)
def test_which_ends_are_misses(values: dict[str, Any], served: int, misses: int) -> None:
    first, last = values.get("first"), values.get("last")
    record = request(
        BEGIN_S + 0.0,
        outcome=values["outcome"],
        first_token_s=None if first is None else BEGIN_S + first,
        last_token_s=None if last is None else BEGIN_S + last,
        finished_s=BEGIN_S + 0.95,
        output_tokens=values.get("tokens"),
    )
    window = step(begun(), after(0.99, closed=(record,)))
    assert (window.arrivals, window.served, window.misses) == (1, served, misses)


def test_a_late_request_is_a_miss_when_its_limit_passes_and_never_again() -> None:
    windows = begun()
    waits = request(BEGIN_S + 0.2)
    early, at, later = (step(windows, after(t, (waits,), cursor=1)) for t in (1.1, 1.2, 2.0))
    assert (early.misses, early.overdue) == (0, 0)
    assert early.oldest_wait_s == pytest.approx(0.9)
    assert (at.misses, at.overdue) == (1, 1)  # the limit has passed at this very moment
    assert (later.misses, later.overdue) == (0, 1)
    first = replace(waits, first_token_s=BEGIN_S + 2.5)
    window = step(windows, after(3.0, (first,)))
    assert (window.misses, window.overdue) == (0, 0)
    assert window.ttft_p50_s == pytest.approx(2.3)
    slow = replace(
        first,
        outcome=Outcome.SERVED,
        last_token_s=BEGIN_S + 5.0,
        finished_s=BEGIN_S + 5.0,
        output_tokens=11,
    )
    window = step(windows, after(6.0, closed=(slow,)))
    assert (window.misses, window.served) == (0, 1)
    assert window.tpot_p50_s == pytest.approx(0.25)


def test_a_client_that_gives_up_late_was_missed() -> None:
    gone = closed(Outcome.CANCELLED, arrival_s=0.1)
    gone = replace(gone, finished_s=BEGIN_S + 1.3)
    window = step(begun(), after(1.5, closed=(gone,)))
    assert (window.arrivals, window.served, window.misses) == (1, 0, 1)


def test_requests_from_before_the_episode_are_no_arrivals_and_no_second_misses() -> None:
    old = request(BEGIN_S - 5.0, "old")
    fresh = request(BEGIN_S - 0.5, "fresh")
    windows = begun(interval(BEGIN_S, Traffic(BEGIN_S, 0, (old, fresh), (closed(Outcome.FAILED),))))
    assert windows.open_requests == 2
    window = step(windows, after(1.0, (old, fresh)))
    assert (window.arrivals, window.misses, window.overdue) == (0, 1, 2)  # only the fresh one's limit passed
    assert window.waiting == 2
    ends = tuple(
        replace(
            one,
            outcome=Outcome.SERVED,
            first_token_s=BEGIN_S + 1.5,
            last_token_s=BEGIN_S + 1.6,
            output_tokens=3,
        )
        for one in (old, fresh)
    )
    window = step(windows, after(2.0, closed=ends))
    assert (window.served, window.misses) == (2, 0)
    assert windows.take() == []  # a recording of the episode cannot place them
    assert windows.unrecorded == 2


def test_one_request_id_sent_twice_is_two_requests() -> None:
    twice = (request(BEGIN_S + 0.1, "same"), request(BEGIN_S + 0.2, "same"))
    windows = begun()
    assert step(windows, after(0.5, twice)).arrivals == 2
    assert step(windows, after(0.6, twice)).arrivals == 0


# --------------------------------------------------------------------------- waiting


def test_held_requests_wait_and_their_prompts_are_still_to_be_computed() -> None:
    held = request(BEGIN_S + 0.1, "held", dispatched_s=None, engine_id=None, prompt_tokens=700)
    runs = request(BEGIN_S + 0.2, "runs", first_token_s=BEGIN_S + 0.3)
    engine = sample(BEGIN_S + 1.0, running=1, waiting_tokens=50.0)
    window = step(begun(), after(1.0, (held, runs), samples=[engine]))
    assert (window.running, window.waiting) == (1, 1)
    assert window.oldest_wait_s == pytest.approx(0.9)
    assert window.waiting_tokens == 750


def test_without_the_plugins_gauge_prompts_without_a_first_token_are_the_backlog() -> None:
    known = request(BEGIN_S + 0.1, "known", prompt_tokens=300, cached_tokens=100)
    unknown = request(BEGIN_S + 0.1, "unknown", prompt_tokens=None)
    served = closed(Outcome.SERVED, name="served", prompt_tokens=60)
    engine = sample(BEGIN_S + 1.0, waiting_tokens=None)
    window = step(begun(), after(1.0, (known, unknown), (served,), samples=[engine]))
    assert window.waiting_tokens == 200 + 60  # the unknown one counts as the mean of those that are known


def test_prompt_tokens_come_from_the_engine_once_the_gateway_does_not_know_them_on_arrival() -> None:
    windows = begun()
    engine = sample(BEGIN_S + 1.0, prompt_tokens=480.0)
    unknown = request(BEGIN_S + 0.1, prompt_tokens=None)
    assert step(windows, after(1.0, (unknown,), samples=[engine])).prompt_tokens == 480
    engine = sample(BEGIN_S + 2.0, prompt_tokens=500.0)
    assert step(windows, after(2.0, (unknown,), samples=[engine])).prompt_tokens == 20


# --------------------------------------------------------------------------- blind


def test_a_stack_that_is_not_read_gives_blind_windows_and_loses_no_request() -> None:
    windows = begun()
    first = windows.unread(BEGIN_S + 1.0, NO_METER, ASKED, why="connection refused")
    second = windows.unread(BEGIN_S + 2.0, NO_METER, ASKED)
    assert (first.blind, second.blind) == (1, 1)
    assert (first.start_s, first.duration_s, second.start_s) == (0, 1, 1)
    assert second.age_s == 2
    engine = sample(BEGIN_S + 3.0, generated_tokens=30.0, busy_s=1.5, running_s=6.0)
    done = closed(Outcome.SERVED, first_token_s=BEGIN_S + 0.5, output_tokens=1)
    window = step(windows, after(3.0, closed=(done,), samples=[engine]))
    assert windows.blind_because == ""
    assert (window.start_s, window.duration_s, window.blind) == (2, 1, 0)
    assert (window.arrivals, window.served, window.output_tokens) == (1, 1, 30)
    assert (window.busy_fraction, window.running_mean) == (0.5, 2)  # shares of the time they are of


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"samples": [], "unread": {"a": "timed out"}}, "timed out"),
        ({"samples": []}, "no sample"),
        ({"samples": [sample(BEGIN_S)]}, "not newer"),
        ({"samples": [sample(BEGIN_S + 1, "a@77")]}, "restarted"),
        ({"samples": [sample(BEGIN_S + 1, generated_tokens=5.0)]}, "went back"),
        ({"samples": [replace(sample(BEGIN_S + 1), source="metrics")]}, "source changed"),
        ({"now": state(BEGIN_S + 1, info("b")), "samples": [sample(BEGIN_S + 1, "b")]}, "not there before"),
        ({"dropped": 3}, "forgot 3 requests"),
        ({"cursor": 1}, "gateway restarted"),
    ],
)
def test_what_cannot_be_trusted_is_blind_and_says_why(values: dict[str, Any], reason: str) -> None:
    first = interval(BEGIN_S, Traffic(BEGIN_S, 2, (), ()), samples=[sample(BEGIN_S, generated_tokens=9.0)])
    values.setdefault("samples", [sample(BEGIN_S + 1, generated_tokens=9.0)])
    windows = begun(first)
    arrived = (request(BEGIN_S + 0.1),)
    window = step(windows, after(1.0, arrived, **values))
    assert window.blind == 1
    assert reason in windows.blind_because
    assert window.arrivals == 0
    assert decode(encode(Interval(window)), where="test") == Interval(window)  # finite throughout


def test_after_a_restart_the_next_pair_of_samples_counts_again() -> None:
    windows = begun(interval(BEGIN_S, samples=[sample(BEGIN_S, "a@1", generated_tokens=100.0)]))
    restarted = sample(BEGIN_S + 1, "a@2", generated_tokens=400.0)  # higher than before
    assert step(windows, after(1.0, samples=[restarted])).blind == 1
    window = step(windows, after(2.0, samples=[sample(BEGIN_S + 2, "a@2", generated_tokens=450.0)]))
    assert (window.blind, window.output_tokens) == (0, 50)


def test_order_of_use() -> None:
    windows = MeasuredWindows()
    assert windows.take() == []
    with pytest.raises(DeploymentError, match="call start"):
        step(windows, after(1.0))
    with pytest.raises(DeploymentError, match="call start"):
        windows.unread(BEGIN_S, NO_METER, ASKED)
    windows = begun()
    with pytest.raises(DeploymentError, match="cannot end"):
        step(windows, after(0.0))
    step(windows, after(1.0))
    windows.start(interval(BEGIN_S + 9), NO_METER, LIMITS)
    window = windows.next(interval(BEGIN_S + 10), NO_METER, ASKED)
    assert (window.start_s, window.duration_s) == (0, 1)


# --------------------------------------------------------------------------- TP switches


def test_both_engines_of_a_switch_count_and_the_kv_cache_is_the_active_ones() -> None:
    first = interval(
        BEGIN_S,
        samples=[sample(BEGIN_S, generated_tokens=100.0), sample(BEGIN_S, "b", generated_tokens=1.0)],
        now=state(BEGIN_S, info(), info("b", "warming", 2), switching=True),
    )
    windows = begun(first)
    old = sample(BEGIN_S + 1, generated_tokens=130.0, running=3, kv_usage=0.9, busy_s=0.8, waiting_tokens=5.0)
    new = sample(
        BEGIN_S + 1, "b", generated_tokens=11.0, running=2, kv_usage=0.1, busy_s=0.4, waiting_tokens=7.0
    )
    now = state(BEGIN_S + 1, info(phase="draining"), info("b", tp_degree=2), tp_degree=2, switching=True)
    window = step(windows, after(1.0, samples=[old, new], now=now))
    assert (window.output_tokens, window.running, window.kv_usage) == (40, 5, 0.1)
    assert (window.busy_fraction, window.waiting_tokens) == (1, 12)
    assert (window.tp_degree, window.switching, window.blind) == (2, 1, 0)


def test_an_engine_first_seen_in_a_switch_is_no_restart() -> None:
    windows = begun(interval(BEGIN_S, now=state(BEGIN_S, switching=True)))
    now = state(BEGIN_S + 1, info("b", tp_degree=2), tp_degree=2)
    window = step(windows, after(1.0, samples=[sample(BEGIN_S + 1, "b", generated_tokens=7.0)], now=now))
    assert (window.blind, window.output_tokens) == (0, 0)  # what it did before it was seen is warm-up
    window = step(
        windows,
        after(
            2.0,
            samples=[sample(BEGIN_S + 2, "b", generated_tokens=17.0)],
            now=replace(now, now_s=BEGIN_S + 2),
        ),
    )
    assert window.output_tokens == 10


def test_a_draining_engine_that_does_not_answer_is_as_full_as_the_gateway_says() -> None:
    windows = begun(interval(BEGIN_S, now=state(BEGIN_S, info(), info("b", "warming"), switching=True)))
    now = state(BEGIN_S + 1, info(phase="draining"), info("b"), switching=True)
    runs = request(BEGIN_S + 0.1, engine_id="a", first_token_s=BEGIN_S + 0.2)
    seen = after(1.0, (runs,), samples=[sample(BEGIN_S + 1, "b")], now=now, unread={"a": "gone"})
    window = step(windows, seen)
    assert (window.blind, window.running, window.waiting) == (0, 1, 0)


def test_while_no_engine_serves_requests_wait_and_miss_in_plain_sight() -> None:
    held = request(BEGIN_S + 0.0, dispatched_s=None, engine_id=None)
    now = state(BEGIN_S + 1.5, info(phase="starting"), ready=False, switching=True, held=1)
    window = step(begun(), after(1.5, (held,), samples=[], now=now))
    assert (window.blind, window.running, window.waiting, window.misses) == (0, 0, 1, 1)
    assert (window.kv_usage, window.itl_mean_s) == (0, None)


# --------------------------------------------------------------------------- the meter


def gpu(uuid: str, energy_j: float | None, **values: Any) -> GpuReading:
    return replace(GpuReading(uuid, energy_j, 300.0, 1500), **values)


def test_energy_is_of_all_gpus_and_the_clock_is_their_mean() -> None:
    windows = begun(reading=meter(BEGIN_S, gpu("g0", 1000.0), gpu("g1", 50.0, sm_clock_mhz=1700)))
    reading = meter(
        BEGIN_S + 1,
        gpu("g0", 1300.0, throttle_reasons=frozenset({SW_POWER_CAP})),
        gpu("g1", 150.0, sm_clock_mhz=1900, throttle_reasons=frozenset({GPU_IDLE})),
    )
    window = step(windows, after(1.0), reading)
    assert window.energy_j == 400
    assert window.measured_clock_mhz == (1500 + 1700 + 1500 + 1900) / 4
    assert window.throttled_fraction == 0.25  # one of two GPUs, at one of two readings
    hot = [replace(one, throttle_reasons=frozenset({HW_THERMAL})) for one in reading.gpus]
    assert step(windows, after(2.0), meter(BEGIN_S + 2, *hot)).throttled_fraction == 0.75


def test_without_a_meter_energy_is_absent_and_windows_are_not_blind() -> None:
    window = step(begun(), after(1.0))
    assert (window.energy_j, window.blind) == (None, 0)
    assert window.measured_clock_mhz == ASKED.sm_clock_mhz


@pytest.mark.parametrize(
    "bad",
    [gpu("g0", None), gpu("g0", 10.0), gpu("g0", 1100.0, reset=True), gpu("other", 1100.0)],
    ids=["unreadable", "went back", "reset", "another gpu"],
)
def test_a_meter_that_fails_for_an_interval_makes_that_window_blind(bad: GpuReading) -> None:
    windows = begun(reading=meter(BEGIN_S, gpu("g0", 1000.0)))
    window = step(windows, after(1.0, (request(BEGIN_S + 0.5),)), meter(BEGIN_S + 1, bad))
    assert (window.blind, window.energy_j) == (1, None)
    assert "meter" in windows.blind_because
    reading = meter(BEGIN_S + 2, replace(bad, energy_j=2000.0, reset=False))
    step(windows, after(2.0), reading)
    again = meter(BEGIN_S + 3, replace(bad, energy_j=2500.0, reset=False))
    window = step(windows, after(3.0), again)
    assert (window.blind, window.energy_j) == (0, 500)


def test_the_age_is_that_of_the_oldest_part() -> None:
    seen = after(1.0, samples=[sample(BEGIN_S + 0.7)])
    window = begun().next(seen, NO_METER, ASKED, handed_s=BEGIN_S + 1.2)
    assert window.age_s == pytest.approx(0.5)


# --------------------------------------------------------------------------- recording


def test_served_requests_are_recorded_once_on_the_windows_axis() -> None:
    windows = begun()
    done = {"first_token_s": BEGIN_S + 1.0, "last_token_s": BEGIN_S + 2.0, "output_tokens": 20}
    records = (
        request(BEGIN_S + 0.75, "b", outcome=Outcome.SERVED, cached_tokens=32, **done),
        request(BEGIN_S + 0.25, "a", outcome=Outcome.SERVED, **done),
        request(BEGIN_S + 0.5, "unknown", outcome=Outcome.SERVED, **(done | {"output_tokens": None})),
        request(BEGIN_S + 0.5, "failed", outcome=Outcome.FAILED),
    )
    step(windows, after(2.5, closed=records))
    assert windows.unrecorded == 2
    (first,) = windows.take(0.5)
    assert (first.arrival_s, first.prompt_tokens, first.output_tokens) == (0.25, 100, 20)
    (second,) = windows.take()
    assert (second.arrival_s, second.prefix_hit_tokens) == (0.75, 32)
    assert windows.take() == []


def test_limits_of_another_episode_take_effect() -> None:
    windows = begun()
    strict: Limits = LIMITS.with_service_level(ServiceLevel(ttft_s=0.1, tpot_s=0.1))
    windows.start(interval(BEGIN_S), NO_METER, strict)
    assert step(windows, after(1.0, (request(BEGIN_S + 0.5),))).misses == 1
