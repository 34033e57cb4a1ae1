"""What the simulation kernel reads of a profile: the border between physics and scheduling.

For an engine of TP degree ``tp`` (axis j of the arrays, in the order of ``tp_degrees``) whose GPUs run
at clock-grid index k, one iteration that decodes D sequences with C context tokens in total and
prefills P prompt tokens that attend to A (query, key) pairs takes

    memory_s  = decode_memory_s[j, D] + kv_memory_s[j] C + prefill_memory_s[j] P
    compute_s = decode_compute_s[j, D] + kv_compute_s[j] C + prefill_compute_s[j] P + attention_compute_s[j] A
    comm_s    = decode_comm_s[j, D] + prefill_comm_s[j] P
    t = max(host_s[j], memory_s memory_scale[k] + compute_s compute_scale[k]) + comm_s
        + (prompt_s[j] where P > 0)

and the whole TP group spends

    E = busy_w[j, k] t
        + memory_energy_scale[k] (decode_memory_j[j, D] + kv_memory_j[j] C + prefill_memory_j[j] P)
        + compute_energy_scale[k] (decode_compute_j[j, D] + kv_compute_j[j] C + prefill_compute_j[j] P
                                   + attention_compute_j[j] A).

While memory is read, the chip around it burns ``f V^2``, so part c of that energy falls with the clock
although the reading takes as long. Energy is linear in work, so power E / t follows utilisation as
measured (``P0 + a u_mem + b u_comp``).
Where E / t exceeds TDP times tp, the iteration runs at the highest lower grid clock that fits.
A GPU that does nothing draws ``idle_w[k]``; D = 0 rows are iterations without decodes.
Form: calibration of the ML.ENERGY, MuxServe and clock-sweep measurements; see simulation/physics.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


@dataclass(frozen=True, slots=True, eq=False)
class PhysicsTables:
    """Arrays of float64 unless said otherwise. J TP degrees, K grid clocks, D = 0..max_batch."""

    tp_degrees: NDArray[np.int64]  # (J,) descending
    allotted_gpus: int
    grid_clocks_mhz: NDArray[np.int64]  # (K,) ascending, the card's supported clocks
    tdp_w: float  # per GPU
    # time at the highest clock, seconds
    decode_memory_s: NDArray[np.float64]  # (J, D)
    decode_compute_s: NDArray[np.float64]  # (J, D)
    decode_comm_s: NDArray[np.float64]  # (J, D)
    kv_memory_s: NDArray[np.float64]  # (J,) per context token
    kv_compute_s: NDArray[np.float64]  # (J,)
    prefill_memory_s: NDArray[np.float64]  # (J,) per prompt token
    prefill_compute_s: NDArray[np.float64]  # (J,)
    prefill_comm_s: NDArray[np.float64]  # (J,)
    attention_compute_s: NDArray[np.float64]  # (J,) per (query, key) pair
    host_s: NDArray[np.float64]  # (J,) floor of one iteration
    prompt_s: NDArray[np.float64]  # (J,) more where an iteration computes any prompt tokens
    # energy of the TP group's work, joules, at the highest clock
    decode_memory_j: NDArray[np.float64]  # (J, D)
    decode_compute_j: NDArray[np.float64]  # (J, D)
    kv_memory_j: NDArray[np.float64]  # (J,)
    kv_compute_j: NDArray[np.float64]  # (J,)
    prefill_memory_j: NDArray[np.float64]  # (J,)
    prefill_compute_j: NDArray[np.float64]  # (J,)
    attention_compute_j: NDArray[np.float64]  # (J,)
    # clock dependence
    memory_scale: NDArray[np.float64]  # (K,) 1 / min(1, x / 0.43)
    compute_scale: NDArray[np.float64]  # (K,) 1 / x
    compute_energy_scale: NDArray[np.float64]  # (K,) V(x)^2 / V(1)^2
    memory_energy_scale: NDArray[np.float64]  # (K,) 1 - c + c x V(x)^2 / V(1)^2 memory_scale
    busy_w: NDArray[np.float64]  # (J, K) group power of an iterating engine before its work
    idle_w: NDArray[np.float64]  # (K,) one GPU with nothing to do
    # engine
    kv_blocks: NDArray[np.int64]  # (J,) blocks of 16 tokens
    startup_s: NDArray[np.float64]  # (J,) process start until healthy
    startup_w: NDArray[np.float64]  # (J,) group power meanwhile
    warmup_s: NDArray[np.float64]  # (J,) first completion, before traffic moves
    warmup_w: NDArray[np.float64]  # (J,)
    clock_delay_s: float  # from asking until the SM clock has changed
    max_num_batched_tokens: int
