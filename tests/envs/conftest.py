"""A deterministic toy queue behind the Deployment seam: enough to test what lies above it."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray

from rlgov.records import Configuration, Limits, ServiceLevel, Window

TOY_LIMITS = Limits(
    sm_clocks_mhz=(1980, 1800, 1600, 1400, 1200, 1000),
    batch_caps=(256, 128, 64, 32),
    tp_degrees=(4, 2, 1),
    interval_s=1.0,
    service_level=ServiceLevel(ttft_s=1.0, tpot_s=0.075),
    allotted_gpus=4,
    tdp_w=700.0,
    kv_capacity_tokens=(400_000, 180_000, 60_000),
    switch_s=(5.0, 5.0, 5.0),
    max_num_batched_tokens=8192,
)

CALM = Window(
    start_s=0.0, duration_s=1.0, arrivals=4.0, prompt_tokens=4000.0, output_tokens=800.0,
    prefill_tokens=4000.0, served=4.0, misses=0.0, overdue=0.0, preemptions=0.0, running=20.0,
    waiting=0.0, waiting_tokens=0.0, oldest_wait_s=0.0, running_mean=19.5, busy_fraction=0.9,
    kv_usage=0.1, ttft_p50_s=0.2, ttft_p99_s=0.3, tpot_p50_s=0.02, tpot_p99_s=0.03, itl_mean_s=0.02,
    energy_j=1200.0, measured_clock_mhz=1980.0, throttled_fraction=0.0, sm_clock_mhz=1980.0,
    batch_cap=256.0, tp_degree=4.0, switching=0.0, age_s=0.0,
)  # fmt: skip


class ToyDeployment:
    """Requests queue up, are served at a rate that grows with clock and TP, and burn power as clock squared.

    A TP switch takes three windows. ``start`` with another seed draws other arrivals.
    """

    def __init__(self, windows: int = 40, rate_per_s: float = 5.0, limits: Limits = TOY_LIMITS) -> None:
        self.limits = limits
        self.closed = 0
        self._windows = windows
        self._rate_per_s = rate_per_s
        self._arrivals: NDArray[np.int64] = np.zeros(0, dtype=np.int64)
        self._next = 0
        self._queue = 0.0
        self._switch_left = 0
        self._tp_degree = limits.tp_degrees[0]
        self._target = self._tp_degree

    def start(self, seed: int) -> Window:
        self._arrivals = np.random.default_rng(seed).poisson(self._rate_per_s, self._windows)
        self._next, self._queue, self._switch_left = 0, 0.0, 0
        self._tp_degree = self._target = self.limits.tp_degrees[0]
        return self.advance(self.limits.fastest)

    @property
    def finished(self) -> bool:
        return self._next >= self._windows

    def close(self) -> None:
        self.closed += 1

    def advance(self, configuration: Configuration) -> Window:
        if self._switch_left:
            self._switch_left -= 1
            if not self._switch_left:
                self._tp_degree = self._target
        elif configuration.tp_degree != self._tp_degree:
            self._target, self._switch_left = configuration.tp_degree, 3
        arrivals = float(self._arrivals[self._next])
        clock = configuration.sm_clock_mhz / self.limits.sm_clocks_mhz[0]
        served = min(self._queue + arrivals, round(3 * clock * self._tp_degree))
        self._queue += arrivals - served
        window = Window(
            start_s=float(self._next), duration_s=1.0, arrivals=arrivals, prompt_tokens=900.0 * arrivals,
            output_tokens=200.0 * served, prefill_tokens=900.0 * served, served=served,
            misses=max(self._queue - 5.0, 0.0), overdue=max(self._queue - 8.0, 0.0), preemptions=0.0,
            running=served, waiting=self._queue, waiting_tokens=900.0 * self._queue,
            oldest_wait_s=self._queue / 10.0, running_mean=served, busy_fraction=min(served / 12.0, 1.0),
            kv_usage=min(served / 50.0, 1.0), ttft_p50_s=0.2 / clock if served else None,
            ttft_p99_s=0.4 / clock if served else None, tpot_p50_s=0.02 / clock if served else None,
            tpot_p99_s=0.03 / clock if served else None, itl_mean_s=0.02 / clock if served else None,
            energy_j=4 * 100.0 + 300.0 * self._tp_degree * clock**2, throttled_fraction=0.0,
            measured_clock_mhz=float(configuration.sm_clock_mhz),
            sm_clock_mhz=float(configuration.sm_clock_mhz), batch_cap=float(configuration.batch_cap),
            tp_degree=float(self._tp_degree), switching=float(self._switch_left > 0), age_s=0.0,
        )  # fmt: skip
        self._next += 1
        return window


@pytest.fixture(scope="session")
def limits() -> Limits:
    return TOY_LIMITS


@pytest.fixture(scope="session")
def calm() -> Window:
    """A window of quiet, healthy traffic at the fastest configuration."""
    return CALM


@pytest.fixture(scope="session")
def make_toy() -> Callable[..., ToyDeployment]:
    """Builds toy deployments; see ToyDeployment for its arguments."""
    return ToyDeployment
