from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlgov.deployments.live import LiveDeployment
from rlgov.deployments.live_limits import LiveLimits
from rlgov.deployments.live_open import open_live
from rlgov.deployments.live_parts import LiveSettings
from rlgov.deployments.measured import MeasuredWindows
from rlgov.deployments.recorded import RecordedDeployment
from rlgov.deployments.replayed import recorded_trace
from rlgov.deployments.simulated import SimulatedDeployment
from rlgov.engine.samples import StackInterval
from rlgov.errors import ConfigError, DeploymentError, EngineError, HardwareError, RlgovError
from rlgov.journal import read_journal
from rlgov.records import Configuration, Limits, Window
from rlgov.simulation.profile import load_profile

if TYPE_CHECKING:
    from tests.fakes.world import World

PROFILE = load_profile("h100-qwen3-32b")
LIMITS = PROFILE.limits()
FAST = LIMITS.fastest
SLOW = Configuration(1080, 64, 4)
SIZES = LIMITS.axis_sizes
INDICES = st.tuples(*(st.integers(0, n - 1) for n in SIZES))


def governed(
    fake: ModuleType, world: World, *, limits: Limits = LIMITS, metered: bool = True, **more: Any
) -> LiveDeployment:
    return open_live(
        fake.FakeStack(world), limits, world.clock, hardware=fake.FakeGpus(world, metered=metered), **more
    )


def assert_given_back(world: World) -> None:
    assert world.batch_cap == 256
    assert world.lease_ends_s is None
    assert world.lock_mhz is None


# --------------------------------------------------------------------------- pacing


def test_windows_are_contiguous_and_do_not_drift(fake_stack: ModuleType) -> None:
    world = fake_stack.World(rate_per_s=1.0, call_s=0.002)
    with governed(fake_stack, world) as live:
        windows = [live.start(0)]
        windows += [live.advance(FAST) for _ in range(1000)]
    assert windows[0].start_s == 0.0
    for before, after in pairwise(windows):
        assert after.start_s == pytest.approx(before.start_s + before.duration_s, abs=1e-6)
        assert after.duration_s == pytest.approx(1.0, abs=0.01)
    end_s = windows[-1].start_s + windows[-1].duration_s
    assert end_s == pytest.approx(1001.0, abs=0.02)
    assert live.status.overruns == 0


def test_an_overrun_shows_in_the_length_of_its_window(fake_stack: ModuleType) -> None:
    world = fake_stack.World()
    with governed(fake_stack, world) as live:
        live.start(0)
        world.clock.advance_s(2.3)  # the policy took its time
        late, after = live.advance(FAST), live.advance(FAST)
    assert late.duration_s == pytest.approx(2.3)
    assert after.duration_s == pytest.approx(0.7)  # back on the grid
    assert live.status.overruns == 1


# --------------------------------------------------------------------------- the start


def test_an_episode_starts_at_the_fastest_whatever_it_finds(fake_stack: ModuleType) -> None:
    world = fake_stack.World(tp_degree=1, batch_cap=32, lock_mhz=600)
    with governed(fake_stack, world) as live:
        window = live.start(0)
        assert window.configuration == FAST
        assert (window.switching, window.blind) == (0.0, 0.0)
        assert world.lock_mhz == FAST.sm_clock_mhz
        live.advance(SLOW)
        again = live.start(0)
        assert (again.start_s, again.configuration) == (0.0, FAST)
    assert world.switches == 1


def test_an_episode_may_start_at_another_tp_degree(fake_stack: ModuleType) -> None:
    world = fake_stack.World()
    with governed(fake_stack, world, start=replace(FAST, tp_degree=2)) as live:
        assert live.start(0).configuration == replace(FAST, tp_degree=2)
    with pytest.raises(ConfigError, match="not offered"):
        governed(fake_stack, world, start=replace(FAST, tp_degree=3))


def test_the_start_waits_for_a_switch_in_progress_only_so_long(fake_stack: ModuleType) -> None:
    world = fake_stack.World(tp_degree=2, switching_to=1, switch_ends_s=1e9)
    with (
        governed(fake_stack, world, settings=LiveSettings(ready_timeout_s=30.0)) as live,
        pytest.raises(DeploymentError, match=r"TP degree 4 within 30 s \(ready: True, switching: True"),
    ):
        live.start(0)
    assert world.clock.monotonic_s() == pytest.approx(1030.0, abs=1.0)
    assert_given_back(world)


def test_a_start_degree_that_cannot_be_had_is_done_without(fake_stack: ModuleType) -> None:
    world = fake_stack.World(tp_degree=2, switch_fails=True)
    with governed(fake_stack, world) as live:
        window = live.start(0)
    assert window.tp_degree == 2
    assert window.tp_refused == 0b001
    assert live.status.tp_refused == {4: "it would not start"}


def test_a_stack_stuck_at_a_degree_of_no_profile_is_refused(fake_stack: ModuleType) -> None:
    world = fake_stack.World(tp_degree=3, tp_refused={4: "no memory"})
    with (
        governed(fake_stack, world) as live,
        pytest.raises(DeploymentError, match=r"stays at TP degree 3.*TP 4: no memory"),
    ):
        live.start(0)


@pytest.mark.parametrize("call", ["state", "configure", "interval"])
def test_a_hiccup_at_the_start_is_survived_and_a_silence_is_not(fake_stack: ModuleType, call: str) -> None:
    world = fake_stack.World()
    with governed(fake_stack, world) as live:
        world.before_call = raising(call, EngineError("busy"), 2)
        assert live.start(0).blind == 0.0
        world.before_call = raising(call, EngineError("gone"), 99)
        with pytest.raises(EngineError, match="gone"):
            live.start(0)
        world.before_call = lambda _: None


def test_order_of_use_is_enforced(fake_stack: ModuleType) -> None:
    live = governed(fake_stack, fake_stack.World())
    with pytest.raises(DeploymentError, match="before start"):
        live.advance(FAST)
    live.start(0)
    live.close()
    with pytest.raises(DeploymentError, match="before start"):
        live.advance(FAST)
    with pytest.raises(DeploymentError, match="after close"):
        live.start(0)


# --------------------------------------------------------------------------- acting


def test_the_lease_of_the_cap_is_renewed_every_interval_and_lets_go_of_it(fake_stack: ModuleType) -> None:
    world = fake_stack.World()
    with governed(fake_stack, world) as live:
        live.start(0)
        world.leases_s.clear()
        for _ in range(5):
            assert live.advance(SLOW).batch_cap == 64
        assert world.leases_s == [3.0] * 5
        world.clock.advance_s(3.5)  # nobody renews it
        world.catch_up()
        assert world.batch_cap == 256


def test_the_clock_is_locked_when_it_changes_only(fake_stack: ModuleType) -> None:
    world = fake_stack.World()
    with governed(fake_stack, world) as live:
        live.start(0)
        world.calls.clear()
        windows = [live.advance(c) for c in (FAST, SLOW, SLOW, SLOW, FAST, FAST)]
        assert world.calls.count("lock") == 2
    assert [w.sm_clock_mhz for w in windows] == [1980, 1080, 1080, 1080, 1980, 1980]


def test_a_lock_that_fails_shows_and_is_tried_again(fake_stack: ModuleType) -> None:
    world = fake_stack.World()
    with governed(fake_stack, world) as live:
        live.start(0)
        world.before_call = raising("lock", HardwareError("the driver is busy"))
        window = live.advance(SLOW)
        assert (window.sm_clock_mhz, window.batch_cap, window.blind) == (1980, 64, 0.0)
        assert (live.status.failed_actions, live.status.last_problem) == (1, "the driver is busy")
        assert live.advance(SLOW).sm_clock_mhz == 1080


def test_a_lock_that_is_not_obeyed_is_counted(fake_stack: ModuleType) -> None:
    world = fake_stack.World(clocks_ignored=True)
    with governed(fake_stack, world) as live:
        live.start(0)
        assert live.status.unverified_clocks == 0
        window = live.advance(SLOW)
    assert live.status.unverified_clocks == 1
    assert (window.sm_clock_mhz, window.measured_clock_mhz) == (1080, 1980)


def test_a_tp_switch_is_asked_for_once_and_ends_by_itself(fake_stack: ModuleType) -> None:
    world = fake_stack.World()
    with governed(fake_stack, world) as live:
        live.start(0)
        asked = [replace(FAST, tp_degree=tp) for tp in (2, 1, 2, 4, 1, 2, 2, 2)]
        windows = [live.advance(c) for c in asked]
    assert world.switches == 1
    assert [w.switching for w in windows] == [1.0] * 4 + [0.0] * 4 or [1.0] * 5 + [0.0] * 3
    assert {w.tp_degree for w in windows if w.switching} == {4.0}
    assert windows[-1].tp_degree == 2.0


def test_a_switch_that_fails_is_refused_with_its_reason_and_not_asked_for_again(
    fake_stack: ModuleType,
) -> None:
    world = fake_stack.World(switch_fails=True)
    with governed(fake_stack, world) as live:
        live.start(0)
        windows = [live.advance(replace(FAST, tp_degree=1)) for _ in range(12)]
    assert world.switches == 1
    assert windows[0].tp_refused == 0
    assert windows[-1].tp_refused == 0b100
    assert live.status.tp_refused == {1: "it would not start"}
    assert live.status.failed_actions == 0


def test_a_degree_the_stack_never_offers_is_refused_from_the_start(fake_stack: ModuleType) -> None:
    world = fake_stack.World()
    stack, gpus = fake_stack.FakeStack(world), fake_stack.FakeGpus(world)
    offered = LiveLimits(LIMITS, {1: "does not fit"})
    live = LiveDeployment(stack, offered, MeasuredWindows(), gpus.meter, gpus.clocks, world.clock)
    with live:
        live.start(0)
        window = live.advance(replace(FAST, tp_degree=1))
    assert (window.tp_degree, window.tp_refused, world.switches) == (4.0, 0b100, 0)
    with pytest.raises(DeploymentError, match="TP degree 1: does not fit"):
        LiveDeployment(
            stack, offered, MeasuredWindows(), gpus.meter, gpus.clocks, world.clock,
            start=replace(FAST, tp_degree=1),
        )  # fmt: skip


@pytest.mark.parametrize(
    ("asked", "applied"),
    [
        (Configuration(1900, 200, 4), Configuration(1980, 256, 4)),
        (Configuration(5000, 1000, 4), Configuration(1980, 256, 4)),
        (Configuration(1, 1, 4), Configuration(210, 8, 4)),
    ],
)
def test_a_setting_between_two_offered_ones_counts_as_the_faster(
    fake_stack: ModuleType, asked: Configuration, applied: Configuration
) -> None:
    with governed(fake_stack, fake_stack.World()) as live:
        live.start(0)
        assert live.advance(asked).configuration == applied


@settings(max_examples=20, deadline=None)
@given(st.lists(INDICES, min_size=1, max_size=12), st.integers(0, 99))
def test_windows_tell_what_is_in_force_and_account_for_every_request(
    fake_stack: ModuleType, indices: list[tuple[int, int, int]], seed: int
) -> None:
    world = fake_stack.World(rate_per_s=6.0, seed=seed)
    with governed(fake_stack, world) as live:
        windows = [live.start(0)]
        for index in indices:
            asked = LIMITS.configuration(index)
            window = live.advance(asked)
            assert (window.sm_clock_mhz, window.batch_cap) == (asked.sm_clock_mhz, asked.batch_cap)
            assert world.lock_mhz == asked.sm_clock_mhz
            windows.append(window)
        arrived = sum(w.arrivals for w in windows)
        served = sum(w.served for w in windows)
        assert arrived == served + live.status.unfinished_requests
        assert sum(w.misses for w in windows) <= arrived
        energy_j = sum(world.energy_j.values()) - 4 * 5000.0
        assert sum(w.energy_j or 0.0 for w in windows) == pytest.approx(energy_j)
    assert_given_back(world)


# --------------------------------------------------------------------------- blindness


def raising(name: str, error: BaseException, times: int = 1) -> Callable[[str], None]:
    """A hook that lets the next calls of one name fail."""
    left = [times]

    def hook(called: str) -> None:
        if called == name and left[0] > 0:
            left[0] -= 1
            raise error

    return hook


def test_a_stack_that_does_not_answer_gives_blind_windows_until_it_does(fake_stack: ModuleType) -> None:
    world = fake_stack.World()
    with governed(fake_stack, world) as live:
        live.start(0)
        world.before_call = raising("interval", EngineError("no answer"), 4)
        windows = [live.advance(SLOW) for _ in range(6)]
        assert [w.blind for w in windows] == [1.0] * 4 + [0.0] * 2
        assert (live.status.blind_windows, live.status.blind_in_a_row) == (4, 0)
        assert live.status.last_problem == "no answer"
    seen = [live_window for live_window in windows if live_window.blind]
    assert all(w.energy_j is not None and w.energy_j > 0 for w in seen)  # the meter was there
    for before, after in pairwise(windows):
        assert after.start_s == pytest.approx(before.start_s + before.duration_s, abs=1e-6)


def test_an_action_that_fails_is_no_blindness(fake_stack: ModuleType) -> None:
    world = fake_stack.World()
    with governed(fake_stack, world) as live:
        live.start(0)
        world.before_call = raising("configure", EngineError("busy"))
        window = live.advance(SLOW)
        assert (window.blind, window.batch_cap, window.sm_clock_mhz) == (0.0, 256.0, 1080.0)
        assert live.advance(SLOW).batch_cap == 64.0
    assert live.status.failed_actions == 1


def test_an_answer_that_is_no_newer_is_no_answer(fake_stack: ModuleType) -> None:
    world = fake_stack.World()
    stack = fake_stack.FakeStack(world)
    fresh = stack.interval
    old: list[StackInterval] = []
    stack.interval = lambda after: old[-1] if old else fresh(after)
    with open_live(stack, LIMITS, world.clock, hardware=fake_stack.FakeGpus(world)) as live:
        live.start(0)
        old.append(fresh(0))
        assert live.advance(FAST).blind == 1.0
        assert "it hangs, or runs on another machine" in live.status.last_problem
        old.clear()
        assert live.advance(FAST).blind == 0.0


def test_energy_that_is_missing_blinds_where_there_is_a_meter(fake_stack: ModuleType) -> None:
    world = fake_stack.World()
    with governed(fake_stack, world) as live:
        live.start(0)
        world.gpu_unreadable = True
        window = live.advance(FAST)
        assert (window.blind, window.energy_j) == (1.0, None)


def test_without_a_meter_energy_is_absent_and_nothing_else_is(fake_stack: ModuleType) -> None:
    world = fake_stack.World()
    with governed(fake_stack, world, metered=False) as live:
        assert not live.metered
        live.start(0)
        window = live.advance(SLOW)
    assert (window.blind, window.energy_j, window.sm_clock_mhz) == (0.0, None, 1080.0)


# --------------------------------------------------------------------------- giving back


class BugError(Exception):
    """Something nobody foresaw."""


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 60),
    st.sampled_from(
        [KeyboardInterrupt(), SystemExit(1), BugError(), EngineError("gone"), HardwareError("lost")]
    ),
)
def test_everything_is_given_back_wherever_it_ends(
    fake_stack: ModuleType, at: int, error: BaseException
) -> None:
    world = fake_stack.World(rate_per_s=1.0)
    gpus = fake_stack.FakeGpus(world)
    countdown = [at]

    def hook(_: str) -> None:
        countdown[0] -= 1
        if countdown[0] == -1:
            raise error

    stack = fake_stack.FakeStack(world)
    live = open_live(stack, LIMITS, world.clock, hardware=gpus)
    world.before_call = hook
    ended_by: list[BaseException] = []
    try:
        with live:
            live.start(0)
            for k in range(8):
                live.advance(LIMITS.configuration((k, k % 6, k % 3)))
    except BaseException as raised:  # noqa: BLE001  # judged below
        ended_by.append(raised)
    live.close()
    assert_given_back(world)
    assert (stack.closed, gpus.closed) == (1, 1)
    assert ended_by in ([], [error])  # nothing else comes up ...
    if not isinstance(error, RlgovError) and countdown[0] < 0:
        assert ended_by == [error]  # ... and nothing is hidden


def test_what_cannot_be_given_back_is_said_and_tried_again(fake_stack: ModuleType) -> None:
    world = fake_stack.World()
    live = governed(fake_stack, world)
    live.start(0)
    live.advance(SLOW)
    world.before_call = raising("restore", HardwareError("run nvidia-smi by hand"), 3)
    with pytest.raises(HardwareError, match="by hand"):
        live.close()
    assert (world.batch_cap, world.lock_mhz) == (256, 1080)
    live.close()
    assert_given_back(world)


def test_a_stack_that_is_gone_keeps_nothing_else_from_being_given_back(fake_stack: ModuleType) -> None:
    world = fake_stack.World()
    live = governed(fake_stack, world)
    live.start(0)
    live.advance(SLOW)
    world.before_call = raising("configure", EngineError("gone"), 99)
    live.close()
    assert world.lock_mhz is None
    assert "falls open by its lease only" in live.status.last_problem
    world.clock.advance_s(4.0)
    world.catch_up()
    assert world.batch_cap == 256


def test_a_deployment_that_moved_nothing_gives_nothing_back(fake_stack: ModuleType) -> None:
    world = fake_stack.World(batch_cap=32, lock_mhz=None)
    governed(fake_stack, world).close()
    assert world.batch_cap == 32  # an operator's own
    assert "configure" not in world.calls


PROGRAM = """
import importlib.util, sys
spec = importlib.util.spec_from_file_location("fake", sys.argv[1])
fake = importlib.util.module_from_spec(spec)
sys.modules["fake"] = fake
spec.loader.exec_module(fake)
from rlgov.clock import SystemClock
from rlgov.deployments.live import exit_on_sigterm
from rlgov.deployments.live_open import open_live
from rlgov.records import Configuration
from rlgov.simulation.profile import load_profile

world = fake.World(rate_per_s=0.0)
live = open_live(
    fake.FakeStack(world), load_profile("h100-qwen3-32b").limits(), world.clock, hardware=fake.FakeGpus(world)
)
live._to_close.append(lambda: print("back:", world.lock_mhz, world.batch_cap, flush=True))
with exit_on_sigterm():
    live.start(0)
    live.advance(Configuration(600, 8, 4))
    print("governing:", world.lock_mhz, world.batch_cap, flush=True)
    if sys.argv[2] == "wait":
        SystemClock().sleep_s(600.0)
    if sys.argv[2] == "raise":
        raise RuntimeError("boom")
"""


@pytest.mark.parametrize(("how", "code"), [("exit", 0), ("raise", 1), ("wait", 128 + signal.SIGTERM)])
def test_a_program_that_ends_without_closing_gives_everything_back(
    repository: Path, how: str, code: int
) -> None:
    fake = repository / "tests" / "fakes" / "world.py"
    with subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(fake), how],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        cwd=repository,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "governing: 600 8\n"
        if how == "wait":
            os.kill(process.pid, signal.SIGTERM)
        assert process.stdout.read() == "back: None 256\n"
    assert process.returncode == code


# --------------------------------------------------------------------------- workloads and recordings


class Traffic:
    """A workload of so many looks."""

    def __init__(self, looks: int) -> None:
        self.seeds: list[int] = []
        self.stops = 0
        self._looks = looks

    def start(self, seed: int) -> None:
        self.seeds.append(seed)

    @property
    def finished(self) -> bool:
        self._looks -= 1
        return self._looks < 0

    def stop(self) -> None:
        self.stops += 1


def test_a_workload_is_played_in_every_episode_and_ends_it(fake_stack: ModuleType) -> None:
    traffic = Traffic(3)
    with governed(fake_stack, fake_stack.World(), workload=traffic) as live:
        live.start(11)
        steps = 0
        while not live.finished:
            live.advance(FAST)
            steps += 1
        live.start(12)
    assert (steps, traffic.seeds) == (3, [11, 12])
    assert traffic.stops == 3  # before each episode, and at the end


def test_without_a_workload_it_never_ends(fake_stack: ModuleType) -> None:
    with governed(fake_stack, fake_stack.World()) as live:
        live.start(0)
        assert not live.finished


def recorded_run(fake: ModuleType, path: Path, windows: int) -> tuple[list[Window], LiveDeployment, World]:
    world: World = fake.World(rate_per_s=5.0)
    world.clock.advance_s(30.0)  # traffic from before the episode
    world.catch_up()
    live = governed(fake, world)
    recorded = RecordedDeployment(live, path, arrivals=live)
    seen = [recorded.start(3)]
    seen += [recorded.advance(SLOW if k % 2 else FAST) for k in range(windows)]
    recorded.close()
    return seen, live, world


def test_a_recording_holds_every_window_and_every_request_that_was_served(
    fake_stack: ModuleType, tmp_path: Path
) -> None:
    windows, live, _ = recorded_run(fake_stack, tmp_path / "run.jsonl", 60)
    journal = read_journal(tmp_path / "run.jsonl")
    assert [entry.window for entry in journal.intervals] == windows
    assert journal.header.limits == live.limits
    arrived = sum(w.arrivals for w in windows)
    left_out = live.status.unfinished_requests
    before = live.status.unrecorded_requests  # served in the episode, arrived before it
    assert len(journal.requests) == arrived - left_out
    assert len(journal.requests) == sum(w.served for w in windows) - before
    assert left_out > 0
    assert len({r.arrival_s for r in journal.requests}) == len(journal.requests)
    end_s = windows[-1].start_s + windows[-1].duration_s
    assert all(0 <= r.arrival_s < end_s and r.output_tokens >= 2 for r in journal.requests)


def test_a_recording_feeds_the_simulator(fake_stack: ModuleType, tmp_path: Path) -> None:
    recorded_run(fake_stack, tmp_path / "run.jsonl", 40)
    journal = read_journal(tmp_path / "run.jsonl")
    trace = recorded_trace(journal, "live")
    assert len(trace) == len(journal.requests)
    simulated = SimulatedDeployment(PROFILE, trace)
    window = simulated.start(0)
    arrivals = window.arrivals
    while not simulated.finished:
        arrivals += simulated.advance(FAST).arrivals
    assert arrivals == len(trace)


# --------------------------------------------------------------------------- opening


def test_a_stack_that_is_not_there_is_named(tmp_path: Path, fake_stack: ModuleType) -> None:
    with pytest.raises(RlgovError, match=r"control\.sock.*rlgov serve"):
        open_live(tmp_path / "control.sock", LIMITS, fake_stack.World().clock)


def test_what_was_opened_is_closed_when_the_rest_cannot_be(fake_stack: ModuleType) -> None:
    world = fake_stack.World()
    stack, gpus = fake_stack.FakeStack(world), fake_stack.FakeGpus(world)
    with pytest.raises(DeploymentError, match="--max-num-seqs 512"):
        open_live(stack, replace(LIMITS, batch_caps=(512, 256)), world.clock, hardware=gpus)
    assert (stack.closed, gpus.closed) == (1, 1)
    with pytest.raises(DeploymentError, match="'auto', 'none'"):
        open_live(stack, LIMITS, world.clock, hardware="some")
    with governed(fake_stack, world) as live:
        assert live.limits.axis_sizes == LIMITS.axis_sizes
