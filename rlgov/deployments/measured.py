"""Windows from what a serving stack and a meter measured: the live counterpart of the simulator's.

Every field means what it means in simulation; :mod:`rlgov.deployments.tally` counts the requests, and a test
holds both to the same numbers on the same requests. A window ends when the gateway was read
(``Traffic.now_s``); whatever was read with it, within milliseconds, counts as read then.

A window is blind when its numbers cannot be trusted: the stack or its active engine was not read, a sample
is no newer than the last one, the engine restarted, requests were forgotten by the gateway, or a meter that
is there gave no energy. What happened to requests meanwhile is not lost: it is counted in the first window
that is not blind, whose rates are then too high rather than too low. Energy stays with its own window.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING, Final, NamedTuple

from rlgov.deployments.blind import blind_window
from rlgov.deployments.metering import Metered, metered_between
from rlgov.deployments.tally import Counts, Pending, RequestTally, quantile_s
from rlgov.engine.telemetry.deltas import EngineDelta, difference
from rlgov.engine.telemetry.page import is_of_engine
from rlgov.errors import DeploymentError
from rlgov.records import ServiceLevel

if TYPE_CHECKING:
    from rlgov.engine.samples import EngineInfo, EngineSample, StackInterval, StackState
    from rlgov.hardware.meter import MeterReading
    from rlgov.journal import Request
    from rlgov.records import Configuration, Limits, Window

ACTIVE: Final = "active"
_WORKING: Final = frozenset({ACTIVE, "draining"})  # phases in which an engine holds requests


class _Engines(NamedTuple):
    """The engines of one interval, put together."""

    deltas: list[EngineDelta]
    samples: list[EngineSample]  # of those that hold requests
    active: EngineSample | None
    running: int
    trouble: str


class MeasuredWindows:
    """Turns readings of a stack and a meter into windows; keeps what one needs from the one before.

    ``tp_refused`` is left at 0: what may be asked for is the deployment's to say.
    """

    def __init__(self) -> None:
        self._tally = RequestTally(ServiceLevel(1.0, 1.0))
        self._origin_s = 0.0
        self._end_s = 0.0
        self._interval: StackInterval | None = None  # the last one that was read
        self._samples: dict[str, EngineSample] = {}  # the last of each engine, by its name in the stack
        self._meter: MeterReading | None = None
        self._pending = Pending()
        self._tokens_at_arrival = True  # until a request comes whose prompt length is not known at once
        self._blind_because = ""

    @property
    def blind_because(self) -> str:
        """Why the last window was blind; empty when it was not."""
        return self._blind_because

    @property
    def open_requests(self) -> int:
        """Requests that had not finished when the gateway was last read."""
        return self._pending.open

    @property
    def unrecorded(self) -> int:
        """Requests that ended and cannot be recorded: not served, of unknown length, or from before."""
        return self._tally.unrecorded

    def start(self, interval: StackInterval, reading: MeterReading, limits: Limits) -> None:
        """An episode begins: time 0 is when the gateway was read.

        What is open by then arrived before: it waits, runs and is served, but is no arrival.
        """
        self._tally = RequestTally(limits.service_level)
        self._pending = self._tally.begin(interval.traffic)
        self._origin_s = self._end_s = interval.traffic.now_s
        self._samples = {}
        self._tokens_at_arrival = True
        self._blind_because = ""
        self._meter = reading
        self._remember(interval)

    def next(
        self,
        interval: StackInterval,
        reading: MeterReading,
        configuration: Configuration,
        *,
        handed_s: float | None = None,
    ) -> Window:
        """The window from the last readings to these.

        Args:
            interval: What the stack said, read with the cursor of the last interval.
            reading: The meter, read together with it.
            configuration: Asked for, as of the end of the window.
            handed_s: When the window is handed over, for its age; by default when the gateway was read.

        Raises:
            DeploymentError: Before :meth:`start`, or the gateway was read at the same time as before.
        """
        before = self._last()
        begin_s = self._advance(interval.traffic.now_s)
        metered = self._metered(reading)
        trouble = self._trouble(before, interval)
        self._pending = self._tally.observe(interval.traffic)
        engines = self._engines(interval)
        self._remember(interval)
        trouble = trouble or engines.trouble
        if not trouble and reading.gpus and metered.energy_j is None:
            trouble = "the meter gave no energy for this interval"
        self._blind_because = trouble
        if trouble:
            self._tally.forget_latencies()
        handed_s = self._end_s if handed_s is None else handed_s
        window = self._blind(begin_s, metered, configuration, handed_s)
        return window if trouble else self._seen(window, interval, engines, handed_s)

    def unread(
        self, at_s: float, reading: MeterReading, configuration: Configuration, *, why: str = ""
    ) -> Window:
        """The blind window up to ``at_s``, when the stack could not be read.

        Raises:
            DeploymentError: Before :meth:`start`, or ``at_s`` is not after the last window's end.
        """
        self._last()
        begin_s = self._advance(at_s)
        self._blind_because = why or "the stack could not be read"
        return self._blind(begin_s, self._metered(reading), configuration, at_s)

    def take(self, until_s: float = math.inf) -> list[Request]:
        """Served requests that arrived before ``until_s`` of the windows' axis and were not taken yet."""
        return self._tally.take_finished(self._origin_s, until_s)

    # ------------------------------------------------------------------ from one window to the next

    def _last(self) -> StackInterval:
        if self._interval is None:
            raise DeploymentError("windows are asked for before the episode has begun: call start() first")
        return self._interval

    def _advance(self, end_s: float) -> float:
        begin_s = self._end_s
        if not end_s > begin_s:
            raise DeploymentError(
                f"a window cannot end at {end_s} s when it began at {begin_s} s of the monotonic clock; "
                "read the stack later, and give every part the same clock"
            )
        self._end_s = end_s
        return begin_s

    def _metered(self, reading: MeterReading) -> Metered:
        metered = metered_between(self._meter, reading)
        self._meter = reading
        return metered

    def _remember(self, interval: StackInterval) -> None:
        known = {info.engine_id for info in interval.state.engines}
        self._samples = {name: sample for name, sample in self._samples.items() if name in known}
        for info in interval.state.engines:
            sample = _sample_of(info, interval)
            if sample is not None:
                self._samples[info.engine_id] = sample
        self._interval = interval

    # ------------------------------------------------------------------ what is wrong

    @staticmethod
    def _trouble(before: StackInterval, interval: StackInterval) -> str:
        if interval.traffic.cursor < before.traffic.cursor:
            return "the gateway restarted: it counts requests anew"
        if interval.traffic.dropped:
            return f"the gateway forgot {interval.traffic.dropped} requests before they were asked for"
        return ""

    # ------------------------------------------------------------------ engines

    def _engines(self, interval: StackInterval) -> _Engines:
        last = self._last()
        deltas: list[EngineDelta] = []
        samples: list[EngineSample] = []
        active: EngineSample | None = None
        running = 0
        trouble = ""
        for info in interval.state.engines:
            if info.phase not in _WORKING:
                continue
            sample = _sample_of(info, interval)
            if sample is None:
                # a draining engine may be gone any moment, and the gateway knows what it still holds
                running += self._pending.by_engine.get(info.engine_id, 0)
                if info.phase == ACTIVE:
                    why = interval.unread.get(info.engine_id, "no sample")
                    trouble = trouble or f"engine {info.engine_id} could not be read: {why}"
                continue
            samples.append(sample)
            running += sample.running
            if info.phase == ACTIVE:
                active = sample
            before = self._samples.get(info.engine_id)
            if before is None:
                if not _switch_explains(last.state, interval.state):
                    trouble = trouble or f"engine {info.engine_id} was not there before: a restart"
                continue
            delta = difference(before, sample)
            if delta.reset and (info.phase == ACTIVE or sample.at_s > before.at_s):
                trouble = trouble or f"engine {info.engine_id}: {delta.reset}"
            elif not delta.reset:
                deltas.append(delta)
        return _Engines(deltas, samples, active, running, trouble)

    # ------------------------------------------------------------------ windows

    def _blind(self, begin_s: float, metered: Metered, asked: Configuration, handed_s: float) -> Window:
        last = self._last()
        return replace(
            blind_window(
                begin_s - self._origin_s,
                self._end_s - begin_s,
                metered,
                asked,
                age_s=max(handed_s - last.traffic.now_s, 0.0),
            ),
            tp_degree=float(last.state.tp_degree),
            switching=float(last.state.switching),
        )

    def _seen(self, blind: Window, interval: StackInterval, engines: _Engines, handed_s: float) -> Window:
        counts = self._tally.take_counts()
        pending = self._pending
        deltas = engines.deltas
        gaps = sum(delta.token_gaps or 0.0 for delta in deltas)
        gap_s = sum(delta.token_gap_s or 0.0 for delta in deltas)
        oldest_s = min([interval.traffic.now_s, *(sample.at_s for sample in engines.samples)])
        return replace(
            blind,
            arrivals=float(counts.arrivals),
            prompt_tokens=self._prompt_tokens(counts, deltas),
            output_tokens=float(sum(delta.generated_tokens for delta in deltas)),
            prefill_tokens=float(sum(delta.prefill_tokens for delta in deltas)),
            served=float(counts.served),
            misses=float(counts.misses),
            overdue=float(pending.overdue),
            preemptions=float(sum(delta.preemptions for delta in deltas)),
            running=float(engines.running),
            # Also what is on its way between gateway and engine; never below what the gateway holds.
            waiting=float(max(pending.open - engines.running, pending.held)),
            waiting_tokens=_waiting_tokens(pending, engines),
            oldest_wait_s=pending.oldest_wait_s,
            running_mean=_running_mean(engines),
            busy_fraction=_busy_fraction(engines),
            kv_usage=0.0 if engines.active is None else engines.active.kv_usage,
            ttft_p50_s=quantile_s(counts.ttft_ps, 0.5),
            ttft_p99_s=quantile_s(counts.ttft_ps, 0.99),
            tpot_p50_s=quantile_s(counts.tpot_ps, 0.5),
            tpot_p99_s=quantile_s(counts.tpot_ps, 0.99),
            itl_mean_s=gap_s / gaps if gaps > 0 else None,
            age_s=max(handed_s - oldest_s, 0.0),
            blind=0.0,
        )

    def _prompt_tokens(self, counts: Counts, deltas: list[EngineDelta]) -> float:
        """Of the requests that arrived; as the engine saw them once lengths are not known on arrival."""
        if counts.lengths_unknown:
            self._tokens_at_arrival = False
        if self._tokens_at_arrival:
            return float(counts.prompt_tokens)
        return float(sum(delta.prompt_tokens for delta in deltas))


def _sample_of(info: EngineInfo, interval: StackInterval) -> EngineSample | None:
    return next((s for s in interval.engines if is_of_engine(s.engine_id, info.engine_id)), None)


def _switch_explains(before: StackState, after: StackState) -> bool:
    """Whether a TP switch is why an engine is new."""
    return (
        before.switching
        or after.switching
        or before.tp_degree != after.tp_degree
        or before.last_switch != after.last_switch
    )


def _waiting_tokens(pending: Pending, engines: _Engines) -> float:
    told = [sample.waiting_tokens for sample in engines.samples if sample.waiting_tokens is not None]
    if len(told) < len(engines.samples) or not told:
        return float(pending.untouched_tokens)
    return float(sum(told) + pending.held_tokens)


def _running_mean(engines: _Engines) -> float:
    means = [delta.running_mean for delta in engines.deltas]
    told = [mean for mean in means if mean is not None]
    return float(sum(told)) if len(told) == len(means) and told else float(engines.running)


def _busy_fraction(engines: _Engines) -> float:
    told = [share for delta in engines.deltas if (share := delta.busy_fraction) is not None]
    return min(float(sum(told)), 1.0) if told else float(engines.running > 0)
