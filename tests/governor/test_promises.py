"""The promises under faults in any order: a state machine over a world in virtual time.

Whatever happens - stack down, engine stalled, restarts, garbage, a driver that refuses, a foreign writer, a
governor that is killed - within 15 s the clocks are back or as high as they go, what is done stays within
bounds, and nothing is done on data that is stale.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from rlgov.errors import EngineError
from rlgov.governor.records import CONDITIONS, Command, CommandKind, Mode
from rlgov.hardware.clocks import ClockCheck
from rlgov.hardware.events import XidEvent
from rlgov.hardware.keeper.errors import ForeignWriter, LeaseLost
from rlgov.hardware.nvml import NvmlError
from rlgov.simulation.profile import load_profile

LIMITS = load_profile("h100-qwen3-32b").limits()
TOP_MHZ = LIMITS.sm_clocks_mhz[0]
T_S = 15.0
TTL_S = 3.0
CODES = ("TIMEOUT", "UNKNOWN", "IN_USE", "NOT_SUPPORTED", "INVALID_ARGUMENT", "GPU_IS_LOST", "NO_PERMISSION")


class LeasedClocks:
    """The world's clocks as a keeper holds them: a lock that is not renewed is undone."""

    present = True

    def __init__(self, world: Any, supported_mhz: tuple[int, ...]) -> None:
        self.world = world
        self.supported_mhz = supported_mhz
        self.ends_s = float("-inf")
        self.foreign = False
        self.locks: list[tuple[float, int]] = []

    def expire(self) -> None:
        """What the keeper does by itself."""
        if self.world.lock_mhz is not None and not self.foreign and self._now_s() >= self.ends_s:
            self.world.lock_mhz = None

    def _now_s(self) -> float:
        return float(self.world.clock.monotonic_s())

    def lock(self, sm_clock_mhz: int) -> None:
        self.expire()
        self.world.enter("lock")
        self._refuse()
        self.world.lock_mhz = sm_clock_mhz
        self.ends_s = self._now_s() + TTL_S
        self.locks.append((self._now_s(), sm_clock_mhz))

    def renew(self) -> None:
        self.expire()
        self.world.enter("renew")
        self._refuse()
        if self.world.lock_mhz is None:
            raise LeaseLost("the lease ended")
        self.ends_s = self._now_s() + TTL_S

    def restore(self) -> None:
        self.expire()
        self.world.enter("restore")
        if not self.foreign:
            self.world.lock_mhz = None

    def check(self) -> ClockCheck:
        self.expire()
        return ClockCheck(None if self.foreign else self.world.lock_mhz, ())

    def rearm(self) -> None:
        self.foreign = False
        self.world.lock_mhz = None

    def _refuse(self) -> None:
        if self.foreign:
            raise ForeignWriter("somebody else set it", ("GPU-a",))


class Promises(RuleBasedStateMachine):
    """Faults and ticks in any order. ``govern`` and ``fake`` are set by the test."""

    govern: Callable[..., Any]
    fake: ModuleType

    def __init__(self) -> None:
        super().__init__()
        self.rng = np.random.default_rng(0)
        self.world = self.fake.World()
        self.clocks = LeasedClocks(self.world, self.fake.SUPPORTED_MHZ)
        self.down = self.refused = ""
        self.stalled = False
        self.serve = self.world._serve
        self.bad_since_s: float | None = None
        self.world.before_call = self._before
        self.wish: Any = (11, 5, 0)
        self.switches_before = 0
        self.governed: Any = None
        self.begin()

    def begin(self) -> None:
        self.governed = self.govern(
            lambda _: self.wish, world=self.world, clocks=self.clocks, mode=Mode.ACTIVE
        )
        self.governed.tick()  # it waits for a stack that does not answer, for ever

    def _before(self, name: str) -> None:
        if self.down and name in {"interval", "state", "configure"}:
            raise EngineError(self.down)
        if self.refused and name in {"lock", "renew", "restore"}:
            raise NvmlError("nvmlDeviceSetGpuLockedClocks", self.refused, "GPU-a")

    @property
    def now_s(self) -> float:
        return float(self.world.clock.monotonic_s())

    @property
    def bad(self) -> bool:
        return bool(self.down) or self.stalled or self.governed is None or self.clocks.foreign

    # ------------------------------------------------------------------ what happens

    @precondition(lambda self: self.governed is not None)
    @rule(count=st.integers(1, 6))
    def some_ticks(self, count: int) -> None:
        self.tick(count)

    @precondition(lambda self: self.governed is not None)
    @rule(count=st.integers(8, 40))
    def many_ticks(self, count: int) -> None:
        self.tick(count)

    @precondition(lambda self: self.governed is not None and not self.bad)
    @rule(load=st.sampled_from((4.0, 8.0)))
    def slow_down(self, load: float) -> None:
        """Healthy for a while, at the slowest there is: from where faults do harm."""
        self.refused, self.wish = "", (11, 5, 0)
        self.load(load)
        self.governed.orders += [Command(CommandKind.REARM), Command(CommandKind.MODE, Mode.ACTIVE)]
        self.tick(10)

    def go_on(self, count: int) -> None:
        """Every fault is followed by some time: a run of faults alone would show nothing."""
        if self.governed is None:
            self.nobody_governs_for(float(count))
        else:
            self.tick(count)

    def tick(self, count: int) -> None:
        for _ in range(count):
            calls = len(self.world.calls)
            yielded = any(
                condition.name == "ForeignWriter"
                for before in self.governed.ticks[-1:]
                for condition in before.conditions
            )
            since = len(self.clocks.locks)
            tick = self.governed.tick()
            names = {condition.name for condition in tick.conditions}
            assert names <= set(CONDITIONS)
            if yielded and "ForeignWriter" in names:
                assert not {"lock", "renew"} & set(self.world.calls[calls:])
            # What was locked since the tick before was decided by that one.
            before = self.governed.ticks[-2] if len(self.governed.ticks) > 1 else None
            for _, locked_mhz in self.clocks.locks[since:]:
                assert before is not None
                assert before.acting
                assert locked_mhz == before.decision.applied.sm_clock_mhz
                if before.window.blind or before.reason in {"BLIND", "STALLED", "TRIPPED", "SLO_OVERRIDE"}:
                    assert locked_mhz == TOP_MHZ
            if tick.decision is not None and tick.decision.asked.sm_clock_mhz == TOP_MHZ:
                assert tick.decision.applied.sm_clock_mhz == TOP_MHZ  # up is never delayed
            self.check()

    @precondition(lambda self: self.governed is None)
    @rule(seconds=st.floats(0.1, 10.0))
    def nobody_governs(self, seconds: float) -> None:
        self.nobody_governs_for(seconds)

    def nobody_governs_for(self, seconds: float) -> None:
        self.world.clock.advance_s(seconds)
        self.world.catch_up()
        self.clocks.expire()

    @precondition(lambda self: self.governed is not None)
    @rule()
    def kill_the_governor(self) -> None:
        self.governed = None  # it gives nothing back: the keeper's lease does

    @precondition(lambda self: self.governed is None)
    @rule()
    def start_the_governor(self) -> None:
        if not self.down:
            self.begin()

    @rule(why=st.sampled_from(("", "no answer within 1 s", "the socket is gone")), count=st.integers(1, 25))
    def stack(self, why: str, count: int) -> None:
        self.down = why
        self.go_on(count)

    @rule(stalled=st.booleans(), count=st.integers(1, 25))
    def engine_stalls(self, count: int, *, stalled: bool) -> None:
        self.world.catch_up()
        self.stalled = stalled
        self.world._serve = (lambda *_: None) if stalled else self.serve
        self.go_on(count)

    @rule()
    def engine_restarts(self) -> None:
        self.world.engine_starts += 1

    @rule(unreadable=st.booleans(), count=st.integers(1, 25))
    def meter(self, count: int, *, unreadable: bool) -> None:
        self.world.gpu_unreadable = unreadable
        self.go_on(count)

    @rule(code=st.sampled_from(("", "", "", *CODES)), count=st.integers(1, 25))
    def driver(self, code: str, count: int) -> None:
        self.refused = code
        self.go_on(count)

    @rule()
    def somebody_else_locks(self) -> None:
        self.clocks.foreign = True
        self.world.lock_mhz = TOP_MHZ
        self.go_on(5)

    @precondition(lambda self: self.governed is not None)
    @rule(xid=st.sampled_from((13, 31, 79)))
    def xid(self, xid: int) -> None:
        self.governed.faults.planned.append(XidEvent(self.now_s, "GPU-a", xid))

    @rule(rate_per_s=st.sampled_from((0.0, 2.0, 8.0, 40.0)))
    def other_load(self, rate_per_s: float) -> None:
        self.load(rate_per_s)

    def load(self, rate_per_s: float) -> None:
        self.world.catch_up()
        self.world.rate_per_s = rate_per_s
        self.world._next_arrival_s = self.world._now_s + self.world._gap_s()

    @rule(
        wish=st.one_of(
            st.tuples(st.integers(0, 11), st.integers(0, 5), st.integers(0, 2)),
            st.sampled_from(((11, 5, 2), (0, 0, 0), (float("nan"), 0.0, float("inf")), (-3, 99, 7))),
        ),
        count=st.integers(1, 25),
    )
    def policy_wants(self, wish: Any, count: int) -> None:
        self.wish = wish
        self.go_on(count)

    @precondition(lambda self: self.governed is not None)
    @rule(command=st.sampled_from((*Mode, "rearm")))
    def order(self, command: Mode | str) -> None:
        if isinstance(command, Mode):
            self.governed.orders.append(Command(CommandKind.MODE, command))
        else:
            self.governed.orders.append(Command(CommandKind.REARM))

    @rule(by_s=st.sampled_from((-3600.0, 3600.0)))
    def wall_clock_jumps(self, by_s: float) -> None:
        self.world.clock.step_wall_s(by_s)

    def teardown(self) -> None:
        self.world.before_call = lambda _: None  # what the test leaves behind can be closed

    # ------------------------------------------------------------------ what must hold

    def check(self) -> None:
        """The clocks are back in time."""
        self.clocks.expire()
        if not self.bad:
            self.bad_since_s = None
            return
        if self.bad_since_s is None:
            self.bad_since_s = self.now_s
        # While the driver refuses even to restore, nobody can; the keeper goes on trying.
        if self.refused:
            self.bad_since_s = self.now_s
        idle = self.stalled and not self.down and self.governed is not None and not self.clocks.foreign
        if idle and not (self.world._waiting or self.world._running):
            self.bad_since_s = self.now_s  # nothing to serve: nothing that could stall
        if self.now_s - self.bad_since_s >= T_S:
            assert self.world.lock_mhz in {None, TOP_MHZ}

    @invariant()
    def in_time(self) -> None:
        self.check()

    @invariant()
    def within_bounds(self) -> None:
        assert self.world.lock_mhz is None or self.world.lock_mhz in LIMITS.sm_clocks_mhz
        assert self.world.batch_cap in LIMITS.batch_caps

    @invariant()
    def within_budget(self) -> None:
        elapsed_s = self.now_s - 1000.0
        starts = 1 + self.world.engine_starts
        assert self.world.switches <= starts + elapsed_s / 60.0 + 12 * starts


@pytest.mark.slow
def test_promises_hold_whatever_happens(govern: Callable[..., Any], fake_stack: ModuleType) -> None:
    machine = type("Bound", (Promises,), {"govern": staticmethod(govern), "fake": fake_stack})
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=60,
            stateful_step_count=50,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
