"""From what was measured to a profile, and to how far its simulation is from the rest of the measurement."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from rlgov.errors import CalibrationError
from rlgov.simulation.profile import Profile
from tests.fakes.tiny_model import Shape
from tests.fidelity.compare import Comparison, Latencies, Verdict, compare, judge
from tests.fidelity.fit import IterationFit, fit_iterations
from tests.fidelity.iterations import Iterations
from tests.fidelity.measured import CellRun, Measured, frontends
from tests.fidelity.plan import Plan
from tests.fidelity.profile import cpu_profile
from tests.fidelity.simulate import Frontend, capacity_per_s, simulate

CAPACITY_REQUESTS_CELL = 9999  # a trace of its own, so that no cell's is used


@dataclass(frozen=True, slots=True)
class Calibration:
    """What the calibration half gave."""

    fit: IterationFit
    frontend: Frontend
    profile: Profile


@dataclass(frozen=True, slots=True, eq=False)
class Cell:
    """One cell, measured and simulated."""

    runs: list[CellRun]
    measured: list[Latencies]
    simulated: Latencies


@dataclass(frozen=True, slots=True, eq=False)
class Analysis:
    """The result."""

    calibration: Calibration
    cells: list[Cell]
    comparisons: list[Comparison]
    verdicts: list[Verdict]


def calibrate(measured: Measured) -> Calibration:
    """Fit iterations and the frontend's constants to the calibration alone."""
    plan = measured.plan
    fit = fit_iterations(Iterations.joined([run.iterations(plan) for run in measured.holds]))
    outside = np.concatenate([frontends(run, plan) for run in measured.holds if run.concurrency == 1])
    if not len(outside):
        msg = "the calibration has no request that was alone, so the time outside the engine is unknown"
        raise CalibrationError(msg)
    frontend = Frontend(*np.median(outside, axis=0).tolist())
    profile = cpu_profile(fit, Shape(**measured.shape), plan, measured.kv_capacity_tokens)
    return Calibration(fit, frontend, profile)


def rates_per_s(calibration: Calibration, plan: Plan) -> list[tuple[int, float, float]]:
    """Batch cap, load and rate of each cell."""
    lengths = plan.trace(2000.0 / plan.duration_s, CAPACITY_REQUESTS_CELL)
    return [
        (cap, load, load * capacity_per_s(calibration.profile, lengths, cap))
        for cap in plan.batch_caps
        for load in plan.loads
    ]


def analyse(measured: Measured) -> Analysis:
    """Fit, simulate every cell, compare."""
    calibration = calibrate(measured)
    cells, comparisons = [], []
    for place in dict.fromkeys((run.batch_cap, run.load, run.rate_per_s) for run in measured.cells):
        runs = [r for r in measured.cells if (r.batch_cap, r.load, r.rate_per_s) == place]
        latencies = [run.latencies() for run in runs]
        simulated = simulate(calibration.profile, runs[0].trace(), place[0], calibration.frontend)
        cells.append(Cell(runs, latencies, simulated))
        comparisons += compare(place, latencies, simulated)
    return Analysis(calibration, cells, comparisons, judge(comparisons))
