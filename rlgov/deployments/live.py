"""A live serving stack as a deployment: paced, moved under leases, and given back as it was found."""

from __future__ import annotations

import atexit
import math
import signal
import threading
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, NoReturn, TypeVar

from rlgov.deployments.live_hands import Hands
from rlgov.deployments.live_limits import refused_bits
from rlgov.deployments.live_parts import LiveSettings, LiveStatus, OwnTraffic
from rlgov.deployments.pacing import Pacer
from rlgov.errors import DeploymentError, RlgovError
from rlgov.hardware.clocks import ClockCheck
from rlgov.records import Configuration

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from types import FrameType, TracebackType
    from typing import Self

    from rlgov.clock import Clock
    from rlgov.deployments.live_limits import LiveLimits
    from rlgov.deployments.live_parts import Stack, WindowSource, Workload
    from rlgov.engine.samples import StackInterval, StackState
    from rlgov.hardware.clocks import ClockControl
    from rlgov.hardware.meter import Meter
    from rlgov.journal import Request
    from rlgov.records import Limits, Window

T = TypeVar("T")

_LOST = "GPU_IS_LOST"  # as NVML names it
_ATTEMPTS = 3  # of what begins and ends an episode: against a hiccup, and an impatient Ctrl-C


class LiveDeployment:
    """Governs a running serving stack, in real time.

    An episode **starts** at a known configuration: the SM clock locked at the profile's highest (not merely
    released: then every window is held in the same way, and can be verified), the largest batch cap, and the
    start TP degree, which is switched to and waited for if need be.

    Each **interval** renews the lease of the batch cap, locks the clock when it changes, asks for a TP switch
    when the degree differs (a switch runs by itself for many windows, and nothing more is asked of it
    meanwhile), waits for the end of the interval, and reads stack and meter. What cannot be read gives a
    blind window; an action that fails is counted, tried again in the next interval, and shows in the window,
    which tells the configuration in force.

    Where it is not **acting** (see :meth:`set_acting`), nothing is moved and windows come all the same: an
    episode then starts with the stack as it is.

    **Closing** gives everything back: the largest batch cap, the clocks as they were found. That happens by
    ``close``, at the end of a ``with`` block, and at the interpreter's exit; see also
    :func:`exit_on_sigterm`. The stack itself goes on serving, at the TP degree it has then.

    Args:
        stack: The serving stack.
        offered: What it offers; see :func:`rlgov.deployments.live_limits.live_limits`.
        windows: Composes the windows.
        meter: Reads energy and clocks of the allotted GPUs.
        clocks: Sets their SM clock.
        clock: Paces the intervals.
        workload: Traffic to play in every episode.
        start: Configuration of the first window, by default the fastest.
        cursor: Requests closed up to this cursor are not asked for again.
        settings: How it is held.
        acting: Whether it moves anything, to begin with.
        closers: Called last when the deployment is closed.
    """

    def __init__(  # noqa: PLR0913  # the parts of a deployment, each replaceable by a stand-in
        self,
        stack: Stack,
        offered: LiveLimits,
        windows: WindowSource,
        meter: Meter,
        clocks: ClockControl,
        clock: Clock,
        *,
        workload: Workload | None = None,
        start: Configuration | None = None,
        cursor: int = 0,
        settings: LiveSettings = LiveSettings(),  # noqa: B008  # frozen
        acting: bool = True,
        closers: tuple[Callable[[], None], ...] = (),
    ) -> None:
        self._stack = stack
        self._limits = offered.limits
        self._never = dict(offered.never)
        self._windows = windows
        self._meter = meter
        self._clocks = clocks
        self._clock = clock
        self._workload: Workload = OwnTraffic() if workload is None else workload
        self._settings = settings
        self._pacer = Pacer(clock, self._limits.interval_s)
        self._start = self._start_configuration(start)
        self._state: StackState | None = None  # None: no episode, or the stack did not answer
        self._cursor = cursor
        self._started = False
        self._end_s = 0.0  # of the last window, monotonic
        self._in_force = self._start
        self._moved = False  # something has to be given back
        self.status = LiveStatus(tp_refused=dict(self._never))
        self._hands = Hands(stack, clocks, self._limits, settings, self.status, acting=acting)
        self._to_close: list[Callable[[], None]] = [
            self._workload.stop,
            self._hands.open_cap,
            clocks.restore,
            stack.close,
            *closers,
        ]
        self.check = ClockCheck(None, ())
        """The lock against the measured clocks, at the end of the last window."""
        self.lost_gpus: tuple[str, ...] = ()
        """GPUs that fell off the bus, as of the last window, as far as reading them tells."""

    # ------------------------------------------------------------------ the deployment protocol

    @property
    def limits(self) -> Limits:
        """What may be asked for."""
        return self._limits

    @property
    def metered(self) -> bool:
        """Whether windows hold energy. Without it there is nothing to optimise."""
        return self._meter.present

    @property
    def end_s(self) -> float:
        """When the last window ended, on the monotonic clock."""
        return self._end_s

    @property
    def acting(self) -> bool:
        """Whether configurations are carried out."""
        return self._hands.acting

    @property
    def state(self) -> StackState | None:
        """The stack as of the last window; None when it did not answer."""
        return self._state

    @property
    def blind_because(self) -> str:
        """Why the last window was blind; empty when it was not."""
        return self._windows.blind_because

    def set_acting(self, acting: bool) -> None:  # noqa: FBT001  # a switch
        """Begin to carry configurations out, or stop: then all is given back at once, but the TP degree.

        Never raises: what could not be given back is in :attr:`status`, and tried again in every interval.
        """
        if acting:
            self._govern()
        self._hands.set_acting(acting)

    @property
    def finished(self) -> bool:
        """Whether an attached workload has ended; without one, never."""
        return self._workload.finished

    def start(self, seed: int) -> Window:
        """Bring the stack to the start configuration and report the first interval there.

        Raises:
            DeploymentError: The stack does not answer, or did not get ready in time.
            HardwareError: The clocks cannot be locked.
        """
        if not self._to_close:
            msg = "start() after close(): open the deployment anew"
            raise DeploymentError(msg)
        self._workload.stop()
        if self._hands.acting:
            self._govern()
            if self._clocks.present:
                self._hands.lock(self._start.sm_clock_mhz)
            self._reach_start()
        else:
            self._state = self._patiently(self._stack.state)
        self._end_s = -math.inf
        reading, interval = self._patiently(lambda: (self._meter.read(), self._interval()))
        self._windows.start(interval, reading, self._limits)
        self._started = True
        self.status.blind_in_a_row = 0
        self._pacer.start()
        self._workload.start(seed)
        self._pacer.wait()
        return self._observe()

    def advance(self, configuration: Configuration) -> Window:
        """Carry ``configuration`` out, wait for the end of the interval, and report what happened.

        A setting between two offered ones counts as the faster of them. Never raises for what the stack or
        the GPUs fail to do: see :attr:`status`.
        """
        if not (self._to_close and self._started):
            msg = "advance() before start(): call start() first"
            raise DeploymentError(msg)
        self._state = self._hands.act(configuration, self._state, self.check)
        self._pacer.wait()
        return self._observe()

    def close(self) -> None:
        """Give everything back; safe to call twice.

        Each part is tried several times, and no failure or interruption (Ctrl-C) of one keeps another from
        being given back; they are raised afterwards. What failed is tried again by the next call.

        Raises:
            HardwareError: The clocks could not be restored; the message says what to do by hand.
        """
        self._started = False
        interruption: BaseException | None = None
        failure: RlgovError | None = None
        for step in tuple(self._to_close):
            failed: RlgovError | None = None
            for _ in range(_ATTEMPTS):
                try:
                    step()
                except RlgovError as error:
                    failed = error
                except BaseException as error:  # noqa: BLE001  # the rest must be given back first
                    interruption = interruption or error
                else:
                    self._to_close.remove(step)
                    failed = None
                    break
            failure = failure or failed
        if not self._to_close:
            atexit.unregister(self.close)
        if interruption is not None:
            raise interruption
        if failure is not None:
            raise failure

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    # ------------------------------------------------------------------ arrivals, for recordings

    def take(self, until_s: float) -> Iterable[Request]:
        """Requests that were served, arrived before ``until_s`` and were not taken yet."""
        return self._windows.take(until_s)

    def restart(self) -> None:
        """Nothing to do: ``start`` has begun the new episode's time."""

    # ------------------------------------------------------------------ parts of an interval

    def _govern(self) -> None:
        if not self._moved:
            self._moved = True
            atexit.register(self.close)

    def _start_configuration(self, start: Configuration | None) -> Configuration:
        offered = [tp for tp in self._limits.tp_degrees if tp not in self._never]
        if start is None:
            return replace(self._limits.fastest, tp_degree=offered[0])
        self._limits.index(start)
        if start.tp_degree in self._never:
            msg = f"cannot start at TP degree {start.tp_degree}: {self._never[start.tp_degree]}"
            raise DeploymentError(msg)
        return start

    def _reach_start(self) -> None:
        deadline_s = self._clock.monotonic_s() + self._settings.ready_timeout_s
        asked = False
        while True:
            state = self._patiently(self._stack.state)
            self._state = state
            self.status.tp_refused = self._never | state.tp_refused
            there = state.tp_degree == self._start.tp_degree or self._start.tp_degree in state.tp_refused
            done = state.ready and not state.switching
            tp = None if asked or there or not done else self._start.tp_degree
            move = partial(self._hands.move, batch_cap=self._start.batch_cap, tp_degree=tp)
            state = self._patiently(partial(move, lease_s=self._lease_s(self._settings.poll_s)))
            asked = asked or tp is not None
            if done and (there or (asked and tp is None)):
                self._check_degree(state)
                return
            if self._clock.monotonic_s() >= deadline_s:
                msg = (
                    f"the stack did not get ready at TP degree {self._start.tp_degree} within "
                    f"{self._settings.ready_timeout_s:g} s (ready: {state.ready}, switching: "
                    f"{state.switching}, conditions: {state.conditions or 'none'}); look at its log"
                )
                raise DeploymentError(msg)
            self._clock.sleep_s(self._settings.poll_s)

    def _patiently(self, call: Callable[[], T]) -> T:
        """At an episode's start one call that fails is no reason to give the episode up."""
        for _ in range(_ATTEMPTS - 1):
            try:
                return call()
            except RlgovError as error:
                self.status.last_problem = str(error)
                self._clock.sleep_s(self._settings.poll_s)
        return call()

    def _check_degree(self, state: StackState) -> None:
        if state.tp_degree not in self._limits.tp_degrees:
            reason = state.tp_refused.get(self._start.tp_degree, "the switch failed")
            msg = (
                f"the stack stays at TP degree {state.tp_degree}, which the profile does not offer "
                f"(TP {self._start.tp_degree}: {reason}); restart the stack at a degree of the profile"
            )
            raise DeploymentError(msg)

    def _lease_s(self, interval_s: float) -> float:
        return self._settings.lease_intervals * max(interval_s, self._limits.interval_s)

    def _observe(self) -> Window:
        status, clock = self.status, self._clock
        reading = self._meter.read()
        self.lost_gpus = tuple(gpu.uuid for gpu in reading.gpus if _LOST in gpu.note)
        check = self.check = self._hands.check()
        status.unverified_clocks += not check.verified
        clock_mhz = check.asked_mhz or self._limits.sm_clocks_mhz[0]
        self._in_force = replace(self._in_force, sm_clock_mhz=clock_mhz)
        try:
            interval = self._interval()
        except RlgovError as error:
            self._state = None
            status.unread_because = str(error)
            self._end_s = clock.monotonic_s()
            window = self._windows.unread(self._end_s, reading, self._in_force, why=str(error))
        else:
            status.unread_because = ""
            state = interval.state
            self._in_force = Configuration(clock_mhz, state.batch_cap, state.tp_degree)
            window = self._windows.next(interval, reading, self._in_force, handed_s=clock.monotonic_s())
        self._count(window)
        return replace(window, tp_refused=refused_bits(self._limits, status.tp_refused))

    def _interval(self) -> StackInterval:
        """Read the stack. Raises DeploymentError for an answer that is no newer than the last one."""
        interval = self._stack.interval(self._cursor)
        now_s = interval.traffic.now_s
        if not now_s > self._end_s:
            msg = (
                f"the stack's answer is of {now_s} s of the monotonic clock, the last window ended at "
                f"{self._end_s} s; it hangs, or runs on another machine"
            )
            raise DeploymentError(msg)
        self._end_s = now_s
        self._state = interval.state
        self._cursor = interval.traffic.cursor
        self.status.tp_refused = self._never | interval.state.tp_refused
        return interval

    def _count(self, window: Window) -> None:
        status = self.status
        status.windows += 1
        status.overruns = self._pacer.overruns
        status.unfinished_requests = self._windows.open_requests
        status.unrecorded_requests = self._windows.unrecorded
        if window.blind:
            status.blind_windows += 1
            status.blind_in_a_row += 1
            status.last_problem = self._windows.blind_because
        else:
            status.blind_in_a_row = 0


@contextmanager
def exit_on_sigterm() -> Iterator[None]:
    """Within the block SIGTERM ends the program by SystemExit, so that what is open gets closed."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def leave(number: int, _frame: FrameType | None) -> NoReturn:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
