"""What the governor decides, tells and lets go of, on a world in virtual time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from rlgov.envs.guard import GuardSettings, Reason
from rlgov.envs.observation import FEATURES
from rlgov.envs.serving_env import ServingEnv
from rlgov.envs.watch import WatchSettings
from rlgov.errors import EngineError, HardwareError
from rlgov.governor.core import Core
from rlgov.governor.facts import Facts
from rlgov.governor.records import CONDITIONS, Command, CommandKind, Mode, Severity
from rlgov.governor.safety import SafetySettings
from rlgov.hardware.events import XidEvent
from rlgov.hardware.keeper.errors import ForeignWriter, KeeperGone, LeaseLost
from rlgov.hardware.nvml import NvmlError
from rlgov.simulation.forecast import Forecast, stated_error
from rlgov.simulation.physics import build_tables
from rlgov.simulation.profile import load_profile

SLOWEST = (11, 5, 0)  # of the profile's axes; TP stays
T_S = 15.0


def failing(world: Any, *names: str, error: Exception | None = None) -> None:
    """Calls of these names fail from now on; no names: none does."""
    raised = EngineError("the socket is gone") if error is None else error

    def before(name: str) -> None:
        if name in names:
            raise raised

    world.before_call = before


# --------------------------------------------------------------------------- modes


def test_active_acts_and_shadow_touches_nothing(govern: Callable[..., Any]) -> None:
    active, shadow, observing = govern(SLOWEST), govern(SLOWEST, mode=Mode.SHADOW), govern(None)
    for each in (active, shadow, observing):
        each.tick(20)
    assert active.world.lock_mhz is not None
    assert active.world.lock_mhz < 1980
    assert active.ticks[-1].acting
    writes = {"lock", "renew", "restore", "configure"}
    assert not writes & set(shadow.world.calls)
    assert not writes & set(observing.world.calls)
    assert shadow.ticks[-1].decision.applied.sm_clock_mhz == 210  # as if its decisions were carried out
    assert shadow.ticks[-1].window.sm_clock_mhz == 1980
    assert not any(tick.acting for tick in shadow.ticks)
    assert all(tick.decision is None and tick.reason == "OBSERVED" for tick in observing.ticks)


def test_an_order_changes_the_mode_at_once_and_back(govern: Callable[..., Any]) -> None:
    governed = govern(SLOWEST, mode=Mode.SHADOW)
    governed.tick(5)
    governed.orders.append(Command(CommandKind.MODE, Mode.ACTIVE))
    governed.tick(6)
    assert governed.world.lock_mhz is not None
    assert governed.core.episode == 1
    governed.orders.append(Command(CommandKind.MODE, Mode.SHADOW))
    governed.tick()
    assert governed.given_back


def test_a_governor_without_a_policy_stays_an_observer(govern: Callable[..., Any]) -> None:
    governed = govern(None)
    governed.orders.append(Command(CommandKind.MODE, Mode.ACTIVE))
    assert governed.tick(3).mode is Mode.OBSERVE
    assert not governed.deployment.acting


def test_the_first_slow_decision_takes_small_steps_and_up_is_at_once(govern: Callable[..., Any]) -> None:
    governed = govern(lambda n: SLOWEST if n <= 4 else (0, 0, 0))
    governed.tick(6)
    clocks = [tick.decision.applied.sm_clock_mhz for tick in governed.ticks]
    assert clocks == [1530, 1080, 600, 210, 1980, 1980]


# --------------------------------------------------------------------------- the same code as training


class _Recorded:
    """The windows of a run as a deployment, whatever is asked."""

    def __init__(self, windows: list[Any], limits: Any) -> None:
        self.limits, self._windows, self._next = limits, windows, 0

    def start(self, seed: int) -> Any:  # noqa: ARG002  # the protocol's
        self._next = 1
        return self._windows[0]

    def advance(self, configuration: Any) -> Any:  # noqa: ARG002  # the protocol's
        self._next += 1
        return self._windows[self._next - 1]

    @property
    def finished(self) -> bool:
        return self._next >= len(self._windows)

    def close(self) -> None:
        """Nothing to close."""


def test_one_sequence_of_windows_gives_the_same_through_training_and_service(
    govern: Callable[..., Any],
) -> None:
    rng = np.random.default_rng(5)
    wishes = [tuple(int(rng.integers(k)) for k in (12, 6, 3)) for _ in range(400)]
    governed = govern(lambda n: wishes[n - 1])

    def hiccup(name: str) -> None:
        if name == "interval" and rng.random() < 0.05:
            raise EngineError("busy")

    governed.world.before_call = hiccup
    seen: list[tuple[Any, ...]] = []
    for _ in range(300):
        tick = governed.tick()
        seen.append((governed.core.observation.copy(), tick))
        governed.world.rate_per_s = 40.0 if 100 < tick.number < 130 else 4.0
    windows = [tick.window for _, tick in seen]
    assert {tick.reason for _, tick in seen} >= {"POLICY", "RATE_LIMIT", "BLIND", "SLO_OVERRIDE"}
    env = ServingEnv(
        _Recorded(windows, governed.deployment.limits), guard=GuardSettings(), watch=WatchSettings()
    )
    observation, _ = env.reset(seed=0)
    for number, (told, tick) in enumerate(seen[:-1]):
        assert np.array_equal(observation, told[0]), number
        observation, _, _, _, info = env.step(np.array(wishes[number]))
        assert info["applied"] == tick.decision.applied, number
        assert info["reason"] == tick.reason, number
        assert seen[number + 1][1].reward_terms in ({}, info["reward_terms"])


# --------------------------------------------------------------------------- what it cannot see


def test_blind_holds_the_fastest_then_gives_back_then_goes_on(govern: Callable[..., Any]) -> None:
    governed = govern(SLOWEST)
    governed.tick(5)
    failing(governed.world, "interval", "configure", "state")
    began_s = governed.world.clock.monotonic_s()
    tick = governed.tick()
    assert tick.reason == "BLIND"
    assert tick.acting
    assert governed.names() >= {"Blind", "StackUnreachable"}
    governed.tick()
    assert governed.world.lock_mhz == 1980
    governed.until(lambda tick: not tick.acting, 10)
    assert governed.world.lock_mhz is None
    assert governed.world.clock.monotonic_s() - began_s < T_S
    failing(governed.world)
    governed.until(lambda tick: tick.acting and tick.decision.applied.sm_clock_mhz < 1980, 10)
    assert "Blind" not in governed.names()
    governed.until(lambda _: governed.world.batch_cap < 256, 10)


def test_what_could_not_be_given_back_is_tried_again(govern: Callable[..., Any]) -> None:
    governed = govern(SLOWEST)
    governed.tick(5)
    failing(governed.world, "interval", "configure", "restore", error=HardwareError("busy"))
    governed.until(lambda tick: not tick.acting)
    governed.tick(2)
    assert governed.world.lock_mhz is not None
    failing(governed.world)
    governed.orders.append(Command(CommandKind.MODE, Mode.SHADOW))
    governed.tick(2)
    assert governed.given_back


def test_without_a_meter_nothing_is_decided_on(govern: Callable[..., Any]) -> None:
    governed = govern(SLOWEST, metered=False)
    governed.tick(10)
    assert "NotMetered" in governed.names()
    assert {tick.reason for tick in governed.ticks} == {"BLIND"}
    assert governed.given_back


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -5.0, 1e300])
@pytest.mark.parametrize("name", ["running", "energy_j", "kv_usage", "duration_s", "waiting_tokens"])
def test_a_window_of_garbage_slows_nothing(govern: Callable[..., Any], name: str, value: float) -> None:
    governed = govern(SLOWEST)
    tick = governed.tick(3)
    garbage = replace(tick.window, **{name: value})
    told = governed.core.tick(garbage, Facts(now_s=2000.0, wall_s=0.0, acting=True))
    assert told.reason == "BLIND"
    assert told.decision.applied == governed.core.limits.fastest


# --------------------------------------------------------------------------- an engine that hangs


def test_a_stalled_engine_gets_everything_back_until_it_moves(govern: Callable[..., Any]) -> None:
    governed = govern(SLOWEST)
    governed.tick(10)
    world = governed.world
    serve, world._serve = world._serve, lambda *_: None
    began_s = world.clock.monotonic_s()
    tick = governed.until(lambda tick: tick.reason == "STALLED", 20)
    assert not tick.acting
    assert governed.given_back
    assert world.clock.monotonic_s() - began_s < T_S
    assert "EngineStalled" in governed.names()
    calls = len(world.calls)
    governed.tick(5)
    assert not {"lock", "configure"} & set(world.calls[calls:])
    world._serve = serve
    governed.until(lambda tick: tick.acting and tick.reason != "STALLED", 40)
    assert "EngineStalled" not in governed.names()


def test_idle_is_neither_stalled_nor_blind(govern: Callable[..., Any], fake_stack: ModuleType) -> None:
    governed = govern((3, 0, 0), world=fake_stack.World(rate_per_s=0.0))
    governed.tick(40)
    assert {tick.reason for tick in governed.ticks[1:]} == {"IDLE"}
    assert governed.ticks[-1].acting
    assert governed.world.lock_mhz == 1530


def test_an_engine_that_restarts_is_told_of_and_its_window_is_not_used(govern: Callable[..., Any]) -> None:
    governed = govern(SLOWEST)
    governed.tick(6)
    before = governed.core.observation.copy()
    governed.world.engine_starts += 1
    tick = governed.tick()
    assert tick.reason == "BLIND"
    assert np.array_equal(governed.core.observation, before)
    assert "EngineRestarted" in governed.names()
    governed.tick(3)
    assert governed.ticks[-1].reason != "BLIND"
    governed.tick(70)
    assert "EngineRestarted" not in governed.names()


# --------------------------------------------------------------------------- a policy that does harm


def test_a_harmful_policy_trips_longer_each_time_and_is_then_latched(
    govern: Callable[..., Any], fake_stack: ModuleType
) -> None:
    watch = WatchSettings(
        trip_overrides=2, trip_within_s=600.0, backoff_s=30.0, latch_after=3, trip_override_s=200.0
    )
    governed = govern((11, 0, 0), world=fake_stack.World(rate_per_s=25.0), watch=watch)
    trips: list[int] = []
    lengths: list[int] = []
    was = False
    for _ in range(1500):
        tick = governed.tick()
        tripped = tick.reason == "TRIPPED"
        if tripped and (not trips or not was):
            trips.append(tick.number)
            lengths.append(0)
        lengths[-1:] = [lengths[-1] + tripped] if lengths else []
        was = tripped
        if len(trips) == 3:
            break
    assert len(trips) == 3
    assert lengths[1] >= 1.8 * lengths[0]
    tick = governed.tick()
    assert not tick.acting
    assert governed.given_back
    held = {condition.name: condition for condition in tick.conditions}
    assert held["Tripped"].severity is Severity.CRITICAL
    governed.tick(200)
    assert governed.ticks[-1].reason == "TRIPPED"
    governed.orders.append(Command(CommandKind.REARM))
    assert governed.until(lambda tick: tick.acting, 5)


@pytest.mark.parametrize(
    "wish",
    [
        lambda _: (float("nan"),) * 3,
        lambda _: (-1, 10**9, 77),
        lambda _: (0, 0),
        lambda _: 1 / 0,
        lambda _: ("a", "b", "c"),
        lambda _: (None, None, None),
    ],
)
def test_a_policy_that_answers_garbage_slows_nothing_and_never_moves_tp(
    govern: Callable[..., Any], wish: Any
) -> None:
    governed = govern(wish)
    governed.tick(10)
    assert {tick.decision.applied for tick in governed.ticks} == {governed.core.limits.fastest}
    assert governed.world.switches == 0


def test_tp_switches_stay_within_their_budget(govern: Callable[..., Any]) -> None:
    governed = govern(
        lambda n: (0, 0, n % 3),
        guard=GuardSettings(tp_dwell_s=0.0),
        watch=WatchSettings(tp_switches_per_hour=7),
    )
    governed.tick(1500)
    assert governed.world.switches == 7


# --------------------------------------------------------------------------- clocks that do not do as told


def test_a_clock_that_is_ignored_is_left_alone_for_a_while(govern: Callable[..., Any]) -> None:
    governed = govern((3, 0, 0))
    governed.world.clocks_ignored = True
    governed.until(lambda _: "ActuationUnverified" in governed.names(), 12)
    assert not governed.ticks[-1].acting
    assert governed.given_back
    assert "1530 MHz were asked for" in governed.condition("ActuationUnverified")
    first = governed.ticks[-1].number
    second = governed.until(lambda tick: tick.acting, 60).number
    assert 25 < second - first < 35
    third = governed.until(lambda tick: not tick.acting, 60).number
    assert 55 < governed.until(lambda tick: tick.acting, 90).number - third < 65


def test_a_foreign_writer_is_yielded_to_until_armed_again(govern: Callable[..., Any]) -> None:
    governed = govern((3, 0, 0))
    governed.tick(3)
    failing(governed.world, "renew", error=ForeignWriter("somebody locked GPU-a", ("GPU-a",)))
    governed.tick(2)
    assert "ForeignWriter" in governed.names()
    assert not governed.ticks[-1].acting
    failing(governed.world)
    governed.tick(100)
    assert not governed.ticks[-1].acting
    assert governed.ticks[-1].decision is not None  # as in shadow
    governed.orders.append(Command(CommandKind.REARM))
    governed.tick()
    assert governed.ticks[-1].acting


def test_a_lost_lease_is_taken_anew_and_a_keeper_that_is_gone_is_waited_for(
    govern: Callable[..., Any],
) -> None:
    governed = govern((3, 0, 0))
    governed.tick(3)
    failing(governed.world, "renew", error=LeaseLost("too late"))
    governed.tick()
    failing(governed.world)
    governed.tick(2)
    assert governed.ticks[-1].acting
    assert "LeaseLost" in governed.names()
    assert governed.world.lock_mhz == 1530
    failing(governed.world, "renew", "lock", error=KeeperGone("no keeper"))
    governed.tick(30)
    assert "KeeperGone" in governed.names()
    failing(governed.world)
    governed.tick(2)
    assert "KeeperGone" not in governed.names()
    assert governed.world.lock_mhz == 1530


def test_no_permission_is_said_once_and_not_tried_again(govern: Callable[..., Any]) -> None:
    governed = govern((3, 0, 0))
    failing(governed.world, "lock", error=NvmlError("nvmlDeviceSetGpuLockedClocks", "NO_PERMISSION"))
    governed.tick(20)
    assert "PermissionDenied" in governed.names()
    assert governed.world.calls.count("lock") == 1
    assert governed.ticks[-1].actuation.failures == {"clock/NO_PERMISSION": 1}


@pytest.mark.parametrize("code", ["GPU_IS_LOST", "RESET_REQUIRED"])
def test_a_lost_gpu_ends_governing_of_the_group(govern: Callable[..., Any], code: str) -> None:
    governed = govern((3, 0, 0))
    governed.tick(3)
    failing(governed.world, "renew", error=NvmlError("nvmlDeviceSetGpuLockedClocks", code, "GPU-b"))
    governed.tick(2)
    assert "GpuLost" in governed.names()
    assert governed.world.lock_mhz is None
    failing(governed.world)
    governed.tick(50)
    assert governed.given_back


@pytest.mark.parametrize(("xid", "fatal"), [(79, True), (48, True), (13, False)])
def test_an_xid_that_says_the_gpu_is_not_to_be_trusted_ends_governing(
    govern: Callable[..., Any], xid: int, *, fatal: bool
) -> None:
    governed = govern((3, 0, 0))
    governed.tick(3)
    governed.faults.planned = [XidEvent(0.0, "GPU-c", xid)]
    governed.tick(5)
    assert governed.ticks[-1].acting is not fatal
    assert ("GpuLost" in governed.names()) is fatal
    assert governed.given_back is fatal


def test_transient_errors_of_the_driver_are_counted_and_borne(govern: Callable[..., Any]) -> None:
    governed = govern((3, 0, 0), safety=SafetySettings(clock_failures=3, pause_s=10.0))
    for code in ("TIMEOUT", "UNKNOWN", "IN_USE"):
        failing(governed.world, "lock", error=NvmlError("nvmlDeviceSetGpuLockedClocks", code))
        governed.tick()
        governed.tick()
        failing(governed.world)
        governed.tick(2)
        assert governed.world.lock_mhz == 1530
        governed.deployment.set_acting(False)
    assert set(governed.ticks[-1].actuation.failures) == {"clock/TIMEOUT", "clock/UNKNOWN", "clock/IN_USE"}
    failing(governed.world, "lock", error=NvmlError("nvmlDeviceSetGpuLockedClocks", "UNKNOWN"))
    governed.world.lock_mhz = None
    governed.until(lambda tick: not tick.acting, 20)
    assert "ActuationUnverified" in governed.names()


# --------------------------------------------------------------------------- what is told


def test_a_wall_clock_that_jumps_changes_nothing_but_is_told(govern: Callable[..., Any]) -> None:
    governed, other = govern(SLOWEST), govern(SLOWEST)
    for each in (governed, other):
        each.tick(5)
        each.world.clock.step_wall_s(-3600.0 if each is governed else 0.0)
        each.tick(5)
    assert "WallClockJump" in governed.names()
    assert "WallClockJump" not in other.names()
    assert [tick.decision for tick in governed.ticks] == [tick.decision for tick in other.ticks]


def test_every_condition_is_declared_says_what_to_do_and_keeps_its_beginning(
    govern: Callable[..., Any],
) -> None:
    governed = govern(SLOWEST)
    failing(governed.world, "lock", error=NvmlError("nvmlDeviceSetGpuLockedClocks", "NO_PERMISSION"))
    governed.world.tp_refused = {1: "no room"}
    governed.tick(5)
    for condition in governed.ticks[-1].conditions:
        assert condition.name in CONDITIONS
        assert condition.message
        assert condition.remedy
    denied = [c for t in governed.ticks for c in t.conditions if c.name == "PermissionDenied"]
    assert len({condition.since_s for condition in denied}) == 1
    assert {"PermissionDenied", "TpRefused", "NoKeeper"} <= governed.names()


def test_a_mismatch_keeps_its_hands_off_whatever_is_ordered(govern: Callable[..., Any]) -> None:
    governed = govern(SLOWEST, mismatches=("another card",))
    governed.tick(5)
    assert governed.given_back
    assert not governed.ticks[-1].acting
    assert governed.condition("BundleMismatch") == "another card"


def test_a_tick_says_what_the_decision_would_take(govern: Callable[..., Any]) -> None:
    profile = load_profile("h100-qwen3-32b")
    tables = build_tables(profile)
    governed = govern(
        (5, 0, 0),
        mode=Mode.SHADOW,
        forecast=Forecast(tables, profile.limits()),
        forecast_error=stated_error(profile),
    )
    prediction = governed.tick(20).prediction
    assert prediction.energy_j < prediction.fastest_energy_j
    assert prediction.power_w == pytest.approx(prediction.energy_j)
    assert prediction.error == pytest.approx(0.095)
    assert set(governed.ticks[-1].reward_terms) == {"energy", "miss", "switch", "clip"}


def test_the_core_reads_no_clock_and_touches_no_file() -> None:
    import ast
    import inspect

    import rlgov.governor.conditions
    import rlgov.governor.core
    import rlgov.governor.facts
    import rlgov.governor.safety

    for module in (
        rlgov.governor.core,
        rlgov.governor.safety,
        rlgov.governor.conditions,
        rlgov.governor.facts,
    ):
        tree = ast.parse(inspect.getsource(module))
        imported = {
            name
            for node in ast.walk(tree)
            for name in (
                [alias.name for alias in node.names]
                if isinstance(node, ast.Import)
                else [node.module]
                if isinstance(node, ast.ImportFrom) and node.module
                else []
            )
        }
        assert not imported & {"os", "pathlib", "socket", "threading", "rlgov.clock", "time", "io"}
    assert Reason.OOD.name == "OOD"
    assert FEATURES
    assert Core.__doc__
