"""How fast the simulator is: compiled, stepped one iteration at a time, and as plain Python."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from types import FunctionType
from typing import Any

import numpy as np

from rlgov.deployments.simulated import SimulatedDeployment
from rlgov.simulation import kernel
from rlgov.simulation.batch import SimulationBatch
from rlgov.simulation.naive import NaiveSimulation
from rlgov.simulation.physics import build_tables
from rlgov.simulation.profile import load_profile
from rlgov.workload.readers import read_trace
from rlgov.workload.synthesis import SPECS, synthesize
from rlgov.workload.trace import Trace
from tests.benchmarks.timing import Figure, median_of, once

PROFILE = "h100-qwen3-32b"
DRAIN_WINDOWS = 60
PLAIN_S = (600.0, 780.0)  # of the trace, for the plain form: under its usual load
BLIS_REQUESTS_PER_S = 1660.0
"""Measured before, on the same trace and the same kind of machine, but in another run: no like-for-like."""
ASKED_RATIO = 500.0


def benchmark_trace() -> Trace:
    """The Azure conversation hour if it lies next to the checkout, else a synthetic one."""
    path = Path(__file__).resolve().parents[3] / "shared" / "data" / "azure_conv_2023.csv"
    if path.is_file():
        return read_trace(path)
    return synthesize(SPECS["conversation"], np.random.default_rng(0))


def interpreted(function: Any) -> Callable[..., Any]:
    """A compiled function and everything it calls as plain Python; constants stay."""
    plain = function.py_func
    names = {name: plain.__globals__[name] for name in plain.__code__.co_names if name in plain.__globals__}
    used = {name: interpreted(value) if hasattr(value, "py_func") else value for name, value in names.items()}
    return FunctionType(plain.__code__, {"__builtins__": __builtins__, **used}, argdefs=plain.__defaults__)


def measure(trace: Trace) -> list[Figure]:
    """Requests and iterations a second, their ratios, and a whole trace through a static setting."""
    profile = load_profile(PROFILE)
    limits, tables = profile.limits(), build_tables(profile)
    fastest = (0, 0, 0)

    def compiled(played: Trace, repeats: int, *, jump: bool) -> tuple[float, float, SimulationBatch]:
        batch = SimulationBatch(limits, 1, tables, capacity=len(played))
        windows = math.ceil(played.duration_s / limits.interval_s) + DRAIN_WINDOWS
        index = np.tile(np.array(fastest, dtype=np.int64), (windows, 1))
        taken = median_of(
            repeats,
            lambda: batch.advance_windows(0, index, jump=jump),
            lambda: batch.load(0, played, tables, limits.service_level, fastest),
        )
        return len(played) / taken.cpu_s, int(batch.iterations[0]) / taken.cpu_s, batch

    jumped, jumped_iterations, _ = compiled(trace, 21, jump=True)
    stepped, stepped_iterations, _ = compiled(trace, 7, jump=False)

    piece = trace.slice(*PLAIN_S)
    settings = [(int(tables.grid_clocks_mhz.size - 1), limits.batch_caps[0], 0)] * (
        math.ceil(piece.duration_s / limits.interval_s) + DRAIN_WINDOWS
    )

    def plain(cost: Callable[..., Any]) -> tuple[float, float, NaiveSimulation]:
        simulation = NaiveSimulation(piece, tables, settings, limits.interval_s, start=settings[0], cost=cost)
        taken = once(simulation.run)
        return len(piece) / taken.cpu_s, simulation.iterations / taken.cpu_s, simulation

    on_piece, _, batch = compiled(piece, 21, jump=True)
    mixed, mixed_iterations, simulation = plain(kernel.iteration)
    pure, pure_iterations, _ = plain(interpreted(kernel.iteration))
    same = np.array_equal(batch.times_ps(0)[1], [request.finish for request in simulation.requests])
    if not same:
        msg = "the compiled and the plain simulator disagree; run the tests of tests/simulation"
        raise RuntimeError(msg)

    deployment = SimulatedDeployment(profile, trace)
    windows = math.ceil(trace.duration_s / limits.interval_s)
    hour = median_of(5, lambda: (deployment.start(0), deployment.hold(limits.fastest, windows)))
    part = f"{PLAIN_S[0]:g}-{PLAIN_S[1]:g} s, {len(piece)} requests"
    return [
        Figure(
            "simulator_requests_per_s",
            jumped,
            "requests/s",
            "compiled, with jumps",
            "the simulator as it is used",
        ),
        Figure(
            "simulator_iterations_per_s", jumped_iterations, "iterations/s", "", "most of them never visited"
        ),
        Figure(
            "stepped_requests_per_s",
            stepped,
            "requests/s",
            "compiled, without jumps",
            "every iteration by itself",
        ),
        Figure("stepped_iterations_per_s", stepped_iterations, "iterations/s", ""),
        Figure("plain_requests_per_s", mixed, "requests/s", "plain form, compiled iteration cost", part),
        Figure("plain_iterations_per_s", mixed_iterations, "iterations/s", ""),
        Figure("python_requests_per_s", pure, "requests/s", "plain form, all of it Python", part),
        Figure("python_iterations_per_s", pure_iterations, "iterations/s", ""),
        Figure("ratio_to_stepped", jumped / stepped, "x", "with jumps : without", "same run, whole trace"),
        Figure("ratio_to_plain", on_piece / mixed, "x", "with jumps : plain form", f"same run, {part}"),
        Figure("ratio_to_python", on_piece / pure, "x", "with jumps : pure Python", f"same run, {part}"),
        Figure(
            "ratio_to_blis",
            jumped / BLIS_REQUESTS_PER_S,
            "x",
            "with jumps : BLIS",
            f"asked: {ASKED_RATIO:g}; BLIS's {BLIS_REQUESTS_PER_S:,.0f} requests/s come from another run",
        ),
        Figure(
            "hour_static_s",
            hour.cpu_s,
            "s",
            "whole trace, static setting, one call",
            f"{len(trace):,} requests in {trace.duration_s:,.0f} s; asked: below 1",
        ),
    ]
