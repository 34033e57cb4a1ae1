"""What a profile's tables say of mean iterations: the simulator's own form, over arrays."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from rlgov.simulation.physics import ParameterDraw, build_tables

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

    from rlgov.calibration.runs import Mean, Observations
    from rlgov.simulation.profile import Profile
    from rlgov.simulation.tables import PhysicsTables

    Floats = NDArray[np.float64]


def tables_of(profile: Profile, values: Mapping[str, float], most_decodes: float) -> PhysicsTables:
    """The profile's tables with some parameters replaced, for batches of up to so many decodes."""
    return build_tables(profile, max_batch=int(np.ceil(most_decodes)) + 1, draw=ParameterDraw(dict(values)))


def _by_batch(table: Floats, mean: Mean) -> Floats:
    low = np.minimum(mean.decodes.astype(np.int64), table.shape[1] - 2)
    share = mean.decodes - low
    return np.asarray(table[mean.tp, low] * (1.0 - share) + table[mean.tp, low + 1] * share)


def _by_clock(tables: PhysicsTables, values: Floats, mean: Mean) -> Floats:
    return np.asarray(np.interp(mean.clock_mhz, tables.grid_clocks_mhz.astype(np.float64), values))


def step_s(tables: PhysicsTables, mean: Mean) -> Floats:
    """Duration of each mean iteration at its clock."""
    t, j = tables, mean.tp
    memory = _by_batch(t.decode_memory_s, mean) + t.kv_memory_s[j] * mean.context_tokens
    memory = memory + t.prefill_memory_s[j] * mean.prefill_tokens
    compute = _by_batch(t.decode_compute_s, mean) + t.kv_compute_s[j] * mean.context_tokens
    compute = compute + t.prefill_compute_s[j] * mean.prefill_tokens + t.attention_compute_s[j] * mean.pairs
    comm = _by_batch(t.decode_comm_s, mean) + t.prefill_comm_s[j] * mean.prefill_tokens
    work = memory * _by_clock(t, t.memory_scale, mean) + compute * _by_clock(t, t.compute_scale, mean)
    return np.asarray(np.maximum(t.host_s[j], work) + comm)


def power_w(tables: PhysicsTables, observed: Observations, points: NDArray[np.int64]) -> Floats:
    """Mean power of all measured GPUs at some points, idle time and idle GPUs included.

    Durations are the measured ones: an error of time must not be paid for with one of energy.
    """
    t, mean = tables, observed.means.take(points)
    j = mean.tp
    memory_j = _by_batch(t.decode_memory_j, mean) + t.kv_memory_j[j] * mean.context_tokens
    memory_j = memory_j + t.prefill_memory_j[j] * mean.prefill_tokens
    compute_j = _by_batch(t.decode_compute_j, mean) + t.kv_compute_j[j] * mean.context_tokens
    compute_j = (
        compute_j + t.prefill_compute_j[j] * mean.prefill_tokens + t.attention_compute_j[j] * mean.pairs
    )
    work_j = memory_j * _by_clock(t, t.memory_energy_scale, mean)
    work_j = work_j + compute_j * _by_clock(t, t.compute_energy_scale, mean)
    busy_w = np.empty(len(mean))
    for index in set(j.tolist()):
        mine = j == index
        busy_w[mine] = _by_clock(t, t.busy_w[index], mean.take(mine))
    idle_w = _by_clock(t, t.idle_w, mean)
    gpus = t.tp_degrees[j].astype(np.float64)
    busy = observed.busy_share[points]
    iterating = np.minimum(busy_w + work_j / mean.step_s, t.tdp_w * gpus)
    unused = np.maximum(observed.measured_gpus[points] - gpus, 0.0)
    return np.asarray(busy * iterating + (1.0 - busy) * idle_w * gpus + unused * idle_w)
