"""Physics in round numbers: small enough for the plain simulator, sharp enough to provoke every event."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from rlgov.records import Limits, ServiceLevel
from rlgov.simulation.layout import BLOCK_TOKENS
from rlgov.simulation.tables import PhysicsTables

GRID_CLOCKS_MHZ = (500, 1000, 1250, 2000)
TP_DEGREES = (4, 2, 1)
MAX_BATCH = 16


def toy_tables(
    *,
    kv_blocks: tuple[int, ...] = (400, 180, 60),
    clock_delay_s: float = 0.03,
    startup_s: float = 0.4,
    warmup_s: float = 0.1,
    tdp_w: float = 700.0,
    host_s: float = 0.004,
    budget_tokens: int = 64,
) -> PhysicsTables:
    """Iterations of some 5 ms, in tenths of a millisecond, so that events often fall on one instant.

    A decode draws about 350 W per GPU at the highest clock and a prefill 500: ``tdp_w`` decides what is
    throttled. With ``host_s`` of 8 ms the small batches are bound by the host.
    """
    tp = np.array(TP_DEGREES, dtype=np.int64)
    gpus = tp.astype(np.float64)
    share = 1.0 / gpus
    several = (gpus > 1).astype(np.float64)  # whether engines of this degree communicate
    decodes = np.arange(MAX_BATCH + 1, dtype=np.float64)
    x = np.array(GRID_CLOCKS_MHZ, dtype=np.float64) / GRID_CLOCKS_MHZ[-1]
    ones = np.ones(len(tp))
    voltage = np.maximum(0.7, x) ** 2
    memory_scale = 1.0 / np.minimum(1.0, x / 0.5)
    return PhysicsTables(
        tp_degrees=tp,
        allotted_gpus=4,
        grid_clocks_mhz=np.array(GRID_CLOCKS_MHZ, dtype=np.int64),
        tdp_w=tdp_w,
        decode_memory_s=np.outer(share, np.where(decodes > 0, 0.012, 0.0)),
        decode_compute_s=np.outer(share, 0.0004 * decodes),
        decode_comm_s=np.outer(several, np.where(decodes > 0, 0.0005, 0.0)),
        kv_memory_s=2e-6 * share,
        kv_compute_s=1e-6 * share,
        prefill_memory_s=4e-6 * share,
        prefill_compute_s=2e-4 * share,
        prefill_comm_s=1e-6 * several,
        attention_compute_s=2e-8 * share,
        prompt_s=3e-4 * ones,
        host_s=host_s * ones,
        decode_memory_j=np.outer(ones, np.where(decodes > 0, 1.5, 0.0)),
        decode_compute_j=np.outer(ones, 0.05 * decodes),
        kv_memory_j=2e-4 * ones,
        kv_compute_j=1e-4 * ones,
        prefill_memory_j=1e-3 * ones,
        prefill_compute_j=0.06 * ones,
        attention_compute_j=2e-6 * ones,
        memory_scale=memory_scale,
        compute_scale=1.0 / x,
        compute_energy_scale=voltage,
        memory_energy_scale=0.6 + 0.4 * x * voltage * memory_scale,
        busy_w=np.outer(tp, 90.0 + 130.0 * x * voltage),
        idle_w=60.0 + 40.0 * x,
        kv_blocks=np.array(kv_blocks, dtype=np.int64),
        startup_s=startup_s * ones,
        startup_w=150.0 * gpus,
        warmup_s=warmup_s * ones,
        warmup_w=250.0 * gpus,
        clock_delay_s=clock_delay_s,
        max_num_batched_tokens=budget_tokens,
    )


@pytest.fixture(scope="session")
def make_tables() -> Callable[..., PhysicsTables]:
    """Builds toy physics; see toy_tables for its arguments."""
    return toy_tables


@pytest.fixture(scope="session")
def make_limits() -> Callable[[PhysicsTables], Limits]:
    """Limits that go with toy physics: intervals of 0.1 s, an SLO of 0.5 s and 30 ms."""

    def limits(tables: PhysicsTables) -> Limits:
        return Limits(
            sm_clocks_mhz=tuple(reversed(tables.grid_clocks_mhz.tolist())),
            batch_caps=(16, 8, 3, 1),
            tp_degrees=tuple(tables.tp_degrees.tolist()),
            interval_s=0.1,
            service_level=ServiceLevel(ttft_s=0.5, tpot_s=0.03),
            allotted_gpus=tables.allotted_gpus,
            tdp_w=tables.tdp_w,
            kv_capacity_tokens=tuple((tables.kv_blocks * BLOCK_TOKENS).tolist()),
            switch_s=tuple((tables.startup_s + tables.warmup_s).tolist()),
            max_num_batched_tokens=tables.max_num_batched_tokens,
        )

    return limits
