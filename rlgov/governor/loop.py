"""The governor's loop: reads the deployment, lets the core decide, carries it out; one tick an interval.

Nothing that stack, GPUs or disk do ends it. What ends it - a signal, a mistake of ours - gives everything
back on the way out: close the deployment.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Final

from rlgov.errors import HardwareError, RlgovError
from rlgov.governor.facts import Facts
from rlgov.governor.journal import NoJournal
from rlgov.governor.records import CommandKind, Mode
from rlgov.governor.rivals import NoStackClaim
from rlgov.journal import GOVERNOR_MODE, Header, Interval

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from rlgov.clock import Clock
    from rlgov.deployments.live import LiveDeployment
    from rlgov.governor.core import Core
    from rlgov.governor.journal import Journal
    from rlgov.governor.records import Command, Tick
    from rlgov.governor.rivals import StackClaim
    from rlgov.hardware.clocks import ClockControl
    from rlgov.hardware.events import EventSource, XidEvent
    from rlgov.records import Window

_RETRY_S: Final = 2.0


def no_orders() -> tuple[Command, ...]:
    """Nobody gives any."""
    return ()


class Governor:
    """Runs a core over a live deployment.

    Args:
        deployment: What is governed; not started yet. Close it when the loop has ended.
        core: Decides.
        clock: Dates ticks.
        clocks: Of the deployment, for leases and to arm them again.
        events: Faults of its GPUs.
        journal: Keeps windows and decisions.
        versions: Software by name, for the journal.
        orders: What operators asked for since the last call; does not wait.
        alive: Called once an interval, and while waiting for the deployment: for a watchdog.
        claim: Keeps other governors from acting on the same stack.
    """

    def __init__(  # noqa: PLR0913  # the parts of a loop, each replaceable by a stand-in
        self,
        deployment: LiveDeployment,
        core: Core,
        clock: Clock,
        *,
        clocks: ClockControl,
        events: EventSource,
        journal: Journal | None = None,
        versions: dict[str, str] | None = None,
        policy_digest: str = "",
        orders: Callable[[], tuple[Command, ...]] = no_orders,
        alive: Callable[[], None] = lambda: None,
        claim: StackClaim | None = None,
    ) -> None:
        self._deployment = deployment
        self._core = core
        self._clock = clock
        self._clocks = clocks
        self._events = events
        self._journal: Journal = NoJournal() if journal is None else journal
        self._versions = dict(versions or {})
        self._policy_digest = policy_digest
        self._orders = orders
        self._alive = alive
        self._claim: StackClaim = NoStackClaim() if claim is None else claim
        self._episode: tuple[int, Mode] | None = None
        self._rearm_problem = ""
        self.waiting_because = ""
        """Why the deployment has not been seen yet; empty once it was."""

    def run(self) -> Iterator[Tick]:
        """Ticks, for as long as the deployment's workload lasts: without one, for ever."""
        window = self._start()
        while True:
            for command in self._orders():
                self._obey(command)
            facts = self._facts()
            began_s = self._clock.monotonic_s()
            tick = self._core.tick(window, facts)
            tick = replace(tick, decision_duration_s=self._clock.monotonic_s() - began_s)
            self._keep(tick)
            if tick.acting != self._deployment.acting:
                self._deployment.set_acting(tick.acting)
            self._alive()
            yield tick
            if self._deployment.finished:
                return
            fastest = self._deployment.limits.fastest
            window = self._deployment.advance(fastest if tick.decision is None else tick.decision.applied)

    def _start(self) -> Window:
        """The first window; a deployment that does not answer is waited for."""
        while True:
            self._alive()
            try:
                window = self._deployment.start(0)
            except RlgovError as error:
                self.waiting_because = str(error)
                self._clock.sleep_s(_RETRY_S)
            else:
                self.waiting_because = ""
                return window

    def _obey(self, command: Command) -> None:
        if command.kind is CommandKind.REARM:
            rearm = getattr(self._clocks, "rearm", None)
            if rearm is not None:
                try:
                    rearm()
                except HardwareError as error:
                    self._deployment.status.clock_failed(error)
            self._deployment.status.clock_error = None
            self._deployment.status.clock_failures_in_a_row = 0
        self._core.obey(command)

    def _facts(self) -> Facts:
        deployment = self._deployment
        status, state = deployment.status, deployment.state
        active = None
        if state is not None:
            active = next((engine for engine in state.engines if engine.phase == "active"), None)
        return Facts(
            now_s=self._clock.monotonic_s(),
            wall_s=self._clock.wall_s(),
            acting=deployment.acting,
            check=deployment.check,
            clock_error=status.clock_error,
            clock_failures_in_a_row=status.clock_failures_in_a_row,
            rival=self._rival(),
            failures=dict(status.failures),
            unread_because=status.unread_because,
            blind_because=deployment.blind_because,
            stack_conditions={} if state is None else dict(state.conditions),
            tp_refused=dict(status.tp_refused),
            engine=None if active is None else (active.tp_degree, f"{active.engine_id}/{active.pid}"),
            cap_holder="none" if active is None else active.cap_by,
            faults=self._faults(),
            lost_gpus=deployment.lost_gpus,
            lease_left_s=getattr(self._clocks, "lease_left_s", None),
            overruns=status.overruns,
            journal_dropped=self._journal.dropped,
            journal_problem=self._journal.problem,
        )

    def _rival(self) -> str:
        """Who else acts on this stack; looked for only where this governor would."""
        if self._core.mode is Mode.ACTIVE:
            return self._claim.take()
        if not self._deployment.acting:  # not before everything was given back
            self._claim.give_up()
        return ""

    def _faults(self) -> tuple[XidEvent, ...]:
        try:
            return self._events.poll()
        except HardwareError as error:
            self._deployment.status.failed("events", error)
            return ()

    def _keep(self, tick: Tick) -> None:
        episode = (self._core.episode, tick.mode)
        if episode != self._episode:
            self._episode = episode
            versions = self._versions | {GOVERNOR_MODE: str(tick.mode), "governor.episode": str(episode[0])}
            self._journal.begin(Header(self._deployment.limits, 0, self._policy_digest, versions))
        window = tick.window
        for request in self._deployment.take(window.start_s + window.duration_s):
            self._journal.write(request)
        digest = "" if tick.decision is None else self._core.observation_digest
        self._journal.write(Interval(window, tick.decision, digest))
