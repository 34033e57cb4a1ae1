"""Readings of a serving stack made of plain values, and a request log seen as a gateway would show it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from rlgov.engine.samples import (
    EngineInfo,
    EngineSample,
    Outcome,
    RequestRecord,
    StackInterval,
    StackState,
    Traffic,
)
from rlgov.hardware.meter import GpuReading, MeterReading
from rlgov.simulation.batch import RequestLog

NO_METER = MeterReading(0.0, ())


def info(engine_id: str = "a", phase: str = "active", tp_degree: int = 4) -> EngineInfo:
    return EngineInfo(engine_id, tp_degree, (), phase, "http://127.0.0.1:1", 1, "0.32.0", "plugin")


def sample(at_s: float, engine_id: str = "a", **values: Any) -> EngineSample:
    """All counters 0 unless they are given."""
    blank = EngineSample(
        at_s=at_s,
        source="plugin",
        engine_id=engine_id,
        running=0,
        waiting=0,
        kv_usage=0.0,
        generated_tokens=0.0,
        prompt_tokens=0.0,
        prefill_tokens=0.0,
        preemptions=0.0,
        finished=0.0,
        token_gaps=0.0,
        token_gap_s=0.0,
        busy_s=0.0,
        running_s=0.0,
        waiting_tokens=0.0,
    )
    return replace(blank, **values)


def state(now_s: float, *engines: EngineInfo, **values: Any) -> StackState:
    """Serving at TP 4 with one active engine ``a`` unless said otherwise."""
    blank = StackState(
        now_s=now_s,
        tp_degree=4,
        batch_cap=256,
        switching=False,
        ready=True,
        held=0,
        tp_refused={},
        engines=engines or (info(),),
    )
    return replace(blank, **values)


def interval(
    now_s: float,
    traffic: Traffic | None = None,
    *,
    samples: Sequence[EngineSample] | None = None,
    now: StackState | None = None,
    unread: dict[str, str] | None = None,
) -> StackInterval:
    """Nothing happens unless said otherwise."""
    return StackInterval(
        state=now or state(now_s),
        traffic=traffic or Traffic(now_s, 0, (), ()),
        engines=(sample(now_s),) if samples is None else tuple(samples),
        unread=unread or {},
    )


def request(arrival_s: float, name: str = "r", **values: Any) -> RequestRecord:
    """Open, dispatched on arrival, 100 prompt tokens."""
    blank = RequestRecord(
        name, arrival_s, Outcome.OPEN, dispatched_s=arrival_s, prompt_tokens=100, engine_id="a"
    )
    return replace(blank, **values)


def meter(at_s: float, *gpus: GpuReading) -> MeterReading:
    return MeterReading(at_s, gpus)


class LoggedGateway:
    """Shows a request log, finished or still growing, as a gateway does: only what has happened by then."""

    def __init__(self, origin_s: float = 0.0) -> None:
        self._origin_s = origin_s
        self._told: set[int] = set()

    def traffic(self, log: RequestLog, at_s: float, refused_at_s: dict[int, float]) -> Traffic:
        """What is open at ``at_s`` of the log's axis and what closed since the last call."""
        opened, closed = [], []
        for i, arrival_s in enumerate(log.arrival_s):
            if arrival_s > at_s or i in self._told:
                continue
            record = self._record(log, i, at_s, refused_at_s.get(i, math.inf))
            if record.outcome is Outcome.OPEN:
                opened.append(record)
            else:
                self._told.add(i)
                closed.append(record)
        return Traffic(self._origin_s + at_s, len(self._told), tuple(opened), tuple(closed))

    def _record(self, log: RequestLog, i: int, at_s: float, refused_at_s: float) -> RequestRecord:
        arrival_s, first_s, finish_s = (
            float(times[i]) for times in (log.arrival_s, log.first_token_s, log.finish_s)
        )
        outcome = Outcome.OPEN
        if finish_s <= at_s:
            outcome = Outcome.SERVED
        elif refused_at_s <= at_s:
            outcome = Outcome.REJECTED
        done = outcome is Outcome.SERVED
        return RequestRecord(
            request_id=str(i),
            arrival_s=self._origin_s + arrival_s,
            outcome=outcome,
            dispatched_s=self._origin_s + arrival_s,
            first_token_s=self._origin_s + first_s if first_s <= at_s else None,
            last_token_s=self._origin_s + finish_s if done else None,
            finished_s=self._origin_s + finish_s if done else None,
            prompt_tokens=int(log.prompt_tokens[i]),
            output_tokens=int(log.output_tokens[i]) if done else None,
            engine_id="a",
        )
