"""The window of an interval in which nothing could be observed; every measured window begins as one."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rlgov.records import Window

if TYPE_CHECKING:
    from rlgov.deployments.metering import Metered
    from rlgov.records import Configuration


def blind_window(
    start_s: float, duration_s: float, metered: Metered, asked: Configuration, *, age_s: float
) -> Window:
    """Zeros that nobody may use, marked blind; what the meter said is there.

    Where nothing measures the clock, the asked one stands for it and hides no difference.
    """
    clock_mhz = metered.sm_clock_mhz
    return Window(
        start_s=start_s,
        duration_s=duration_s,
        arrivals=0.0,
        prompt_tokens=0.0,
        output_tokens=0.0,
        prefill_tokens=0.0,
        served=0.0,
        misses=0.0,
        overdue=0.0,
        preemptions=0.0,
        running=0.0,
        waiting=0.0,
        waiting_tokens=0.0,
        oldest_wait_s=0.0,
        running_mean=0.0,
        busy_fraction=0.0,
        kv_usage=0.0,
        ttft_p50_s=None,
        ttft_p99_s=None,
        tpot_p50_s=None,
        tpot_p99_s=None,
        itl_mean_s=None,
        energy_j=metered.energy_j,
        measured_clock_mhz=float(asked.sm_clock_mhz if clock_mhz is None else clock_mhz),
        throttled_fraction=metered.throttled_fraction,
        sm_clock_mhz=float(asked.sm_clock_mhz),
        batch_cap=float(asked.batch_cap),
        tp_degree=float(asked.tp_degree),
        switching=0.0,
        age_s=age_s,
        blind=1.0,
    )
