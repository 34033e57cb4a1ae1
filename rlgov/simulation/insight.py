"""What follows from a profile: latencies of a lone request, and what a lower clock costs and saves."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from rlgov.simulation.physics import (
    build_tables,
    effective_clock_index,
    iteration_energy_j,
    iteration_time_s,
)
from rlgov.simulation.profile import KV_BLOCK_TOKENS

if TYPE_CHECKING:
    from rlgov.simulation.profile import Profile
    from rlgov.simulation.tables import PhysicsTables

LOW_CLOCK_SHARE = 0.8  # the founding paper's 1.6 against 2.0 GHz
CONTEXT_TOKENS = 1000.0  # per sequence, in comparisons


@dataclass(frozen=True, slots=True)
class Alone:
    """A request that has the engine to itself, at the highest clock that TDP allows."""

    tp_degree: int
    prompt_tokens: int
    ttft_s: float
    tpot_s: float


@dataclass(frozen=True, slots=True)
class ClockComparison:
    """Decoding at about 80 % of the highest clock, relative to the highest."""

    tp_degree: int
    batch: int
    high_mhz: int
    low_mhz: int
    throughput_ratio: float
    energy_ratio: float  # per token


def isolated_latencies(profile: Profile, prompt_tokens: int) -> list[Alone]:
    """Latencies of a lone request by TP degree, in the profile's order."""
    tables = build_tables(profile, max_batch=1)
    budget = tables.max_num_batched_tokens
    found = []
    for j, tp in enumerate(tables.tp_degrees.tolist()):
        ttft_s, done = 0.0, 0
        while done < prompt_tokens:
            chunk = min(budget, prompt_tokens - done)
            pairs = chunk * done + chunk * (chunk + 1) / 2
            ttft_s += _iteration(tables, j, -1, (0, 0.0, float(chunk), pairs))[0]
            done += chunk
        tpot_s, _ = _iteration(tables, j, -1, (1, float(prompt_tokens), 0.0, 0.0))
        found.append(Alone(int(tp), prompt_tokens, ttft_s, tpot_s))
    return found


def compare_clocks(profile: Profile) -> list[ClockComparison]:
    """Decode-only iterations at the highest clock and at about 80 % of it, for every TP degree and batch cap.

    Batches that the KV cache cannot hold at 1,000 tokens a sequence are left out.
    """
    tables = build_tables(profile)
    clocks = tables.grid_clocks_mhz.tolist()
    wanted = LOW_CLOCK_SHARE * clocks[-1]
    low = min(range(len(clocks)), key=lambda k: abs(clocks[k] - wanted))
    found = []
    for j, tp in enumerate(tables.tp_degrees.tolist()):
        for batch in profile.deployment.batch_caps:
            if batch * CONTEXT_TOKENS > float(tables.kv_blocks[j]) * KV_BLOCK_TOKENS:
                continue
            work = (batch, batch * CONTEXT_TOKENS, 0.0, 0.0)
            fast_s, fast_j = _iteration(tables, j, -1, work)
            slow_s, slow_j = _iteration(tables, j, low, work)
            found.append(
                ClockComparison(int(tp), batch, clocks[-1], clocks[low], fast_s / slow_s, slow_j / fast_j)
            )
    return found


def _iteration(
    tables: PhysicsTables, j: int, k: int, work: tuple[int, float, float, float]
) -> tuple[float, float]:
    """Seconds and joules of an iteration at an asked clock, TDP applied."""
    asked = k % len(tables.grid_clocks_mhz)
    held = effective_clock_index(tables, j, asked, *work)
    return iteration_time_s(tables, j, held, *work), iteration_energy_j(tables, j, held, *work)
