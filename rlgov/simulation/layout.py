"""Memory layout of N simulations: arrays the compiled kernel works on, and the names of their columns.

Time is int64 picoseconds (one hour is 3.6e15, the range ends at 2,500 hours): sums of iteration times
are then exact in any order, so stepping and jumping agree to the last bit, on every machine.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from rlgov.simulation.tables import PhysicsTables

PS_PER_S = 10**12
BLOCK_TOKENS = 16  # vLLM's default KV block
NEVER = np.int64(2**62)
SAMPLES = 4096  # latency samples kept a window, per kind; a window rarely sees 100

# Request states
WAITING, PREFILLING, DECODING, FINISHED, REJECTED = range(5)
# Engine states
OFF, STARTING, SERVING, DRAINING = range(4)

# Columns of Batch.engines
(
    E_STATUS,
    E_TP,  # index into the TP degrees
    E_NEXT,  # next arrival this engine will look at
    E_END,  # arrivals from here on belong to another engine
    E_NOW,
    E_RUNNING,
    E_HEAD,  # running list, in order of admission
    E_TAIL,
    E_DECODING,
    E_CONTEXT,  # summed context tokens of decoding requests
    E_ITERATION,  # iterations completed
    E_FREE,  # KV blocks
    E_PARTIAL,  # request whose prompt is computed in chunks, or -1
    E_PREEMPTED,  # height of the stack of preempted requests
    E_FLYING,  # 1 while an iteration is in flight
    E_FLY_END,
    E_FLY_FULL,  # its whole duration at the clock it runs at
    E_FLY_DECODES,
    E_FLY_CONTEXT,
    E_FLY_TOKENS,
    E_FLY_PAIRS,
    E_FLY_FIRST,  # first request of the running list that prefills in it, or -1
    E_FLY_CLOCK,  # grid index after throttling
    E_HEAP,  # size of the heap of finish iterations
    E_START,  # when the start-up begins; NEVER while the GPUs are not free
    E_READY,  # when it takes traffic
    E_GONE,  # when it had drained
) = range(27)
E_PHASES = 27  # 16 counts: decoding requests by the iteration, modulo 16, that needs a block
# then, interleaved: heap of finish iterations with its requests, stack of preempted requests
E_KEYS, E_ITEMS, E_STACK = (E_PHASES + BLOCK_TOKENS + x for x in range(3))

# Columns of Batch.ints
(
    S_NOW,
    S_CAP,
    S_CLOCK,  # grid index in force
    S_ASKED_CLOCK,  # grid index asked for
    S_CLOCK_DUE,  # when the asked clock takes effect, or NEVER
    S_ACTIVE,  # engine that takes new requests
    S_SWITCHING,
    S_REQUESTS,
    S_ARRIVED,  # arrivals seen
    S_DEADLINE,  # next request whose TTFT deadline has not been looked at
    S_OLDEST,  # oldest request without a first token
    S_TTFT,
    S_TPOT,
    S_TOKENS_DUE,  # prompt tokens that still have to be computed
    S_OVERDUE,
    S_SERVED,  # since the start
    S_REJECTED,
    S_ITERATIONS,
    S_SWITCHES,
    # of the present window
    W_ARRIVALS,
    W_PROMPT,
    W_OUTPUT,
    W_PREFILL,
    W_SERVED,
    W_MISSES,
    W_PREEMPTIONS,
    W_BUSY,
    W_DECODED,
    W_DECODE_PS,  # token-weighted sum of iteration times
    W_THROTTLED,
    W_TTFTS,  # number of samples
    W_TPOTS,
) = range(32)
S_INTS = 32

# Columns of Batch.floats: sums of the present window, power of the two engines' iterations, constants
(
    F_ENERGY,
    F_RUNNING,
    F_CLOCK,
    F_BUSY_GPU_PS,
    F_TOTAL_ENERGY,
    F_POWER,
    F_POWER_OTHER,
    F_TDP_W,
    F_CLOCK_DELAY_S,
    F_GPUS,
    F_TOKENS,
) = range(11)
S_FLOATS = 11

# Columns of Batch.requests
(
    R_ARRIVAL,
    R_PROMPT,
    R_OUTPUT,
    R_HIT,
    R_STATE,
    R_TARGET,  # tokens to compute before the next one is sampled
    R_DONE,  # of them computed
    R_GENERATED,  # tokens generated when it last began to decode
    R_JOINED,  # iteration count at that time
    R_BEFORE,  # running list
    R_AFTER,
    R_FIRST,  # time of the first token, -1 before
    R_FINISH,  # time of the last token, -1 before
    R_MISSED,
) = range(14)
R_INTS = 14

# Physics.decode tables, Physics.unit columns and Physics.clock columns
DECODE_FIELDS = (
    "decode_memory_s",
    "decode_compute_s",
    "decode_comm_s",
    "decode_memory_j",
    "decode_compute_j",
)
D_MEMORY_S, D_COMPUTE_S, D_COMM_S, D_MEMORY_J, D_COMPUTE_J = range(5)
UNIT_FIELDS = (
    "kv_memory_s",
    "kv_compute_s",
    "prefill_memory_s",
    "prefill_compute_s",
    "prefill_comm_s",
    "attention_compute_s",
    "host_s",
    "prompt_s",
    "kv_memory_j",
    "kv_compute_j",
    "prefill_memory_j",
    "prefill_compute_j",
    "attention_compute_j",
    "startup_s",
    "startup_w",
    "warmup_s",
    "warmup_w",
    "kv_blocks",
    "tp_degrees",
)
(
    U_KV_MEMORY_S,
    U_KV_COMPUTE_S,
    U_PREFILL_MEMORY_S,
    U_PREFILL_COMPUTE_S,
    U_PREFILL_COMM_S,
    U_ATTENTION_S,
    U_HOST_S,
    U_PROMPT_S,
    U_KV_MEMORY_J,
    U_KV_COMPUTE_J,
    U_PREFILL_MEMORY_J,
    U_PREFILL_COMPUTE_J,
    U_ATTENTION_J,
    U_STARTUP_S,
    U_STARTUP_W,
    U_WARMUP_S,
    U_WARMUP_W,
    U_BLOCKS,
    U_TP,
) = range(19)
CLOCK_FIELDS = (
    "grid_clocks_mhz",
    "memory_scale",
    "compute_scale",
    "memory_energy_scale",
    "compute_energy_scale",
    "idle_w",
)
K_MHZ, K_MEMORY, K_COMPUTE, K_MEMORY_ENERGY, K_ENERGY, K_IDLE, K_BUSY = range(
    7
)  # then busy power, one column a TP degree


class Batch(NamedTuple):
    """State of N simulations. Few, wide arrays: an argument of a compiled call costs time per array."""

    requests: NDArray[np.int64]  # (N, R, R_INTS)
    engines: NDArray[np.int64]  # (N, 2, ...): the serving engine, and the other one of a TP switch
    ints: NDArray[np.int64]  # (N, S_INTS)
    floats: NDArray[np.float64]  # (N, S_FLOATS)
    samples: NDArray[np.int64]  # (N, 2, SAMPLES) TTFTs and TPOTs of the present window


class Physics(NamedTuple):
    """PhysicsTables of N simulations; of one, without the first axis, inside the kernel."""

    decode: NDArray[np.float64]  # (N, J, 5, D)
    unit: NDArray[np.float64]  # (N, J, columns)
    clock: NDArray[np.float64]  # (N, K, columns)


def allocate_requests(n: int, capacity: int) -> NDArray[np.int64]:
    """Room for ``capacity`` requests in each of ``n`` simulations."""
    return np.zeros((n, capacity, R_INTS), dtype=np.int64)


def allocate_batch(n: int, capacity: int, max_batch: int) -> Batch:
    """State of ``n`` simulations with up to ``capacity`` requests, ``max_batch`` of them running."""
    return Batch(
        allocate_requests(n, capacity),
        np.zeros((n, 2, E_KEYS + 3 * (max_batch + 2)), dtype=np.int64),
        np.zeros((n, S_INTS), dtype=np.int64),
        np.zeros((n, S_FLOATS)),
        np.zeros((n, 2, SAMPLES), dtype=np.int64),
    )


def allocate_physics(n: int, tables: PhysicsTables) -> Physics:
    """Physics of ``n`` simulations, of the shape of ``tables``; fill it with :func:`store_physics`."""
    degrees, clocks = tables.busy_w.shape
    decodes = tables.decode_memory_s.shape[1]
    return Physics(
        np.zeros((n, degrees, len(DECODE_FIELDS), decodes)),
        np.zeros((n, degrees, len(UNIT_FIELDS))),
        np.zeros((n, clocks, K_BUSY + degrees)),
    )


def store_physics(physics: Physics, i: int, tables: PhysicsTables) -> None:
    """Give simulation ``i`` the physics of ``tables``."""
    for column, name in enumerate(DECODE_FIELDS):
        physics.decode[i, :, column] = getattr(tables, name)
    for column, name in enumerate(UNIT_FIELDS):
        physics.unit[i, :, column] = getattr(tables, name)
    for column, name in enumerate(CLOCK_FIELDS):
        physics.clock[i, :, column] = getattr(tables, name)
    physics.clock[i, :, K_BUSY:] = tables.busy_w.T


def store_constants(batch: Batch, i: int, tables: PhysicsTables) -> None:
    """Give simulation ``i`` the figures of ``tables`` that hold for the whole deployment."""
    batch.floats[i, F_TDP_W] = tables.tdp_w
    batch.floats[i, F_CLOCK_DELAY_S] = tables.clock_delay_s
    batch.floats[i, F_GPUS] = tables.allotted_gpus
    batch.floats[i, F_TOKENS] = tables.max_num_batched_tokens
