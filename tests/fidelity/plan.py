"""What is measured: the model, the engine's limits, the calibration, and the traffic that is compared.

Calibration and comparison share nothing: the one holds fixed lengths in closed loops, the other draws lengths
and arrivals, with seeds of its own.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from rlgov.workload.trace import Trace

MAX_MODEL_LEN = 1024
VOCABULARY = 320


@dataclass(frozen=True, slots=True)
class Hold:
    """A closed loop: so many requests under way, all alike."""

    concurrency: int
    prompt_tokens: int
    output_tokens: int


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
    prompts: Lengths = Lengths(96.0, 0.8, 8, 700)
    outputs: Lengths = Lengths(32.0, 0.7, 4, 160)
    duration_s: float = 40.0
    repeats: int = 3
    hold_s: float = 3.0
    retries: int = 2
    seed: int = 20260

    def holds(self) -> tuple[Hold, ...]:
        """The calibration: batch sizes up to the largest cap, prompts and answers short to long."""
        largest = self.batch_caps[0]
        sizes = sorted({1, 2, 3, *(n for n in (4, 6, 8, 12, 16, 24, 32) if n <= largest), largest})
        usual = [Hold(size, *lengths) for size in sizes for lengths in ((40, 48), (130, 28), (300, 20))]
        return (*usual, Hold(1, 650, 100), Hold(largest, 650, 100))

    def trace(self, rate_per_s: float, cell: int) -> Trace:
        """Poisson arrivals with drawn lengths; each cell has numbers of its own."""
        rng = np.random.default_rng([self.seed, cell])
        count = max(int(rng.poisson(rate_per_s * self.duration_s)), 1)
        return Trace(
            f"fidelity-{cell}",
            np.sort(rng.uniform(0.0, self.duration_s, count)),
            self.prompts.draw(rng, count),
            self.outputs.draw(rng, count),
            np.zeros(count, dtype=np.int64),
            self.duration_s,
        )
