"""What is measured: the model, the engine's limits, the calibration, and the traffic that is compared.

Calibration and comparison share nothing: the one has uniform lengths in closed loops, the other lognormal
ones at Poisson arrivals, and each has seeds of its own.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from rlgov.workload.trace import Trace

MAX_MODEL_LEN = 1024
VOCABULARY = 320
CALIBRATION_REQUESTS = 2000


def fixed_trace(name: str, prompt_tokens: NDArray[np.int64], output_tokens: NDArray[np.int64]) -> Trace:
    """Requests for a closed loop, which does not look at their times."""
    count = len(prompt_tokens)
    hits = np.zeros(count, dtype=np.int64)
    return Trace(name, np.linspace(0.0, 1.0, count), prompt_tokens, output_tokens, hits, 1.0)


@dataclass(frozen=True, slots=True)
class Lengths:
    """Lognormal lengths, clipped."""

    median: float
    sigma: float
    least: int
    most: int

    def draw(self, rng: np.random.Generator, count: int) -> NDArray[np.int64]:
        drawn = np.exp(rng.normal(np.log(self.median), self.sigma, count))
        return np.clip(np.rint(drawn), self.least, self.most).astype(np.int64)


@dataclass(frozen=True, slots=True)
class Plan:
    """One fidelity measurement.

    ``loads`` are shares of the rate that the calibrated simulator says an engine could just serve under that
    batch cap: each cap has rates of its own, and each of them can be held.
    """

    batch_caps: tuple[int, ...] = (8, 4, 2)
    loads: tuple[float, ...] = (0.3, 0.5, 0.7)
    max_num_batched_tokens: int = 512
    prompts: Lengths = Lengths(96.0, 0.8, 8, 400)
    outputs: Lengths = Lengths(32.0, 0.7, 4, 160)
    duration_s: float = 40.0
    repeats: int = 3
    hold_s: float = 10.0
    retries: int = 1
    seed: int = 20260

    def concurrencies(self) -> tuple[int, ...]:
        """The calibration: closed loops of so many requests under way, up to the largest cap."""
        largest = self.batch_caps[0]
        return tuple(sorted({*(n for n in (1, 2, 3, 4, 6, 8, 12, 16, 24, 32) if n <= largest), largest}))

    def calibration(self, concurrency: int) -> Trace:
        """Requests of one closed loop: every length up to the longest is as likely as any other."""
        rng = np.random.default_rng([self.seed, 0, concurrency])
        return fixed_trace(
            f"calibration-{concurrency}",
            rng.integers(self.prompts.least, self.prompts.most + 1, CALIBRATION_REQUESTS),
            rng.integers(self.outputs.least, self.outputs.most // 2 + 1, CALIBRATION_REQUESTS),
        )

    def trace(self, rate_per_s: float, cell: int) -> Trace:
        """Poisson arrivals with drawn lengths; each cell has numbers of its own."""
        rng = np.random.default_rng([self.seed, 1, cell])
        count = max(int(rng.poisson(rate_per_s * self.duration_s)), 1)
        return Trace(
            f"fidelity-{cell}",
            np.sort(rng.uniform(0.0, self.duration_s, count)),
            self.prompts.draw(rng, count),
            self.outputs.draw(rng, count),
            np.zeros(count, dtype=np.int64),
            self.duration_s,
        )
