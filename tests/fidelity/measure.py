"""Drive the real engine: the calibration first, then every cell of the comparison, several times."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable
from dataclasses import asdict

import numpy as np

from rlgov.workload.load_result import LoadResult
from tests.fakes.tiny_model import Shape
from tests.fidelity.analyse import calibrate, rates_per_s
from tests.fidelity.engine import RealEngine, Run
from tests.fidelity.iterations import read_iterations
from tests.fidelity.measured import CellRun, Disturbance, HoldRun, Measured, Request
from tests.fidelity.plan import Plan, fixed_trace

CONTROL_S = 1.0
Say = Callable[[str], None]


def measure(engine: RealEngine, plan: Plan, shape: Shape, say: Say) -> Measured:
    """Everything that is compared later."""
    measured = Measured(
        machine={
            "processor": _processor(),
            "cores": str(os.cpu_count()),
            "system": platform.platform(),
            "apart": engine.apart,
            "load at the beginning": f"{os.getloadavg()[0]:.1f}",
        },
        plan=plan,
        shape=asdict(shape),
        kv_capacity_tokens=engine.kv_capacity_tokens,
        holds=_calibration(engine, plan, say),
        cells=[],
    )
    control_s = lone_decode_s(engine)
    rates = rates_per_s(calibrate(measured), plan)
    order = np.random.default_rng([plan.seed, 1])
    for repeat in range(plan.repeats):
        # In another order each time, so that what drifts does not fall on the same cells.
        for number in order.permutation(len(rates)).tolist():
            place = rates[number]
            for attempt in range(plan.retries + 1):
                cell = _cell(engine, plan, number, place, repeat, control_s)
                why = "; ".join(cell.disturbance.reasons())
                verdict = why or "undisturbed"
                say(f"{cell.trace().name}, {cell.rate_per_s:.1f}/s, repeat {repeat + 1}: {verdict}")
                if not why or attempt == plan.retries:
                    break
            measured.cells.append(cell)
    return measured


def lone_decode_s(engine: RealEngine) -> float:
    """Median time of an iteration that decodes one sequence: what tells whether the machine is as it was."""
    trace = fixed_trace("control", np.full(64, 40), np.full(64, 48))
    rows = read_iterations(engine.hold(trace, 1, CONTROL_S, 0).rows)
    return float(np.median(rows.wall_s[(rows.decodes == 1) & (rows.prefill_tokens == 0)]))


def _calibration(engine: RealEngine, plan: Plan, say: Say) -> list[HoldRun]:
    found = []
    for concurrency in plan.concurrencies():
        for attempt in range(plan.retries + 1):
            run = engine.hold(
                plan.calibration(concurrency), concurrency, plan.hold_s, plan.seed + concurrency
            )
            disturbance = Disturbance(run.others, 1.0, 0.0)
            if not disturbance.reasons() or attempt == plan.retries:
                break
        why = "; ".join(disturbance.reasons()) or "undisturbed"
        say(f"calibration: {concurrency} at a time, {len(run.rows)} iterations, {why}")
        rows = [tuple(row) for row in run.rows.tolist()]
        found.append(HoldRun(concurrency, rows, _requests(run.result), disturbance))
    return found


def _cell(
    engine: RealEngine,
    plan: Plan,
    number: int,
    place: tuple[int, float, float],
    repeat: int,
    control_s: float,
) -> CellRun:
    before_s = lone_decode_s(engine)
    batch_cap, load, rate_per_s = place
    run = engine.replay(plan.trace(rate_per_s, number), batch_cap, plan.seed + 1000 + number)
    after_s = lone_decode_s(engine)
    # The worse of the two.
    control = max(before_s / control_s, after_s / control_s, key=lambda ratio: abs(ratio - 1.0))
    late_s = run.result.summary.lateness_s.p99 or 0.0
    return CellRun(
        batch_cap=batch_cap,
        load=load,
        rate_per_s=rate_per_s,
        repeat=repeat,
        requests=_requests(run.result),
        busy_share=_busy_share(run),
        running_peak=int(run.rows[:, 2].max()),
        disturbance=Disturbance(run.others, control, late_s),
    )


def _busy_share(run: Run) -> float:
    rows = run.rows
    return float(rows[1:, 1].sum() / max(rows[-1, 0] - rows[0, 0], 1e-9))


def _requests(result: LoadResult) -> list[Request]:
    at_s = result.started_s
    return [
        Request(
            at_s + row.intended_s,
            at_s + (row.first_token_s or np.nan),
            at_s + (row.finished_s or np.nan),
            row.prompt_tokens_asked,
            row.output_tokens_asked,
        )
        for row in result.requests
    ]


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:  # noqa: PTH123  # /proc
            return next(line.partition(":")[2].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or "unknown"
