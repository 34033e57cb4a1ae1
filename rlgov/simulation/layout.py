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

# Columns of Engines.ints
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
E_INTS = 27

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

# Columns of Batch.floats
F_ENERGY, F_RUNNING, F_CLOCK, F_BUSY_GPU_PS, F_TOTAL_ENERGY = range(5)
S_FLOATS = 5


class Requests(NamedTuple):
    """Per-request arrays of shape (N, R), int64."""

    arrival: NDArray[np.int64]
    prompt: NDArray[np.int64]
    output: NDArray[np.int64]
    hit: NDArray[np.int64]
    state: NDArray[np.int64]
    target: NDArray[np.int64]  # tokens to compute before the next one is sampled
    done: NDArray[np.int64]  # of them computed
    generated: NDArray[np.int64]  # tokens generated when it last began to decode
    joined: NDArray[np.int64]  # iteration count at that time
    before: NDArray[np.int64]  # running list
    after: NDArray[np.int64]
    first: NDArray[np.int64]  # time of the first token, -1 before
    finish: NDArray[np.int64]  # time of the last token, -1 before
    missed: NDArray[np.int64]  # 0, 1


class Engines(NamedTuple):
    """Two engines a simulation: the serving one, and the other one during a TP switch."""

    ints: NDArray[np.int64]  # (N, 2, E_INTS)
    power: NDArray[np.float64]  # (N, 2) of the iteration in flight
    heap_key: NDArray[np.int64]  # (N, 2, H) finish iterations
    heap_request: NDArray[np.int64]  # (N, 2, H)
    phases: NDArray[np.int64]  # (N, 2, 16) decoding requests by the iteration that needs a block
    stack: NDArray[np.int64]  # (N, 2, H) preempted requests, earliest admitted on top


class Physics(NamedTuple):
    """PhysicsTables of every simulation, stacked along a first axis."""

    tp_degrees: NDArray[np.int64]  # (J,)
    grid_mhz: NDArray[np.int64]  # (K,)
    decode_memory_s: NDArray[np.float64]
    decode_compute_s: NDArray[np.float64]
    decode_comm_s: NDArray[np.float64]
    decode_memory_j: NDArray[np.float64]
    decode_compute_j: NDArray[np.float64]
    unit: NDArray[np.float64]  # (N, J, U_COLUMNS) per-token and per-engine figures
    memory_scale: NDArray[np.float64]  # (N, K)
    compute_scale: NDArray[np.float64]
    energy_scale: NDArray[np.float64]
    busy_w: NDArray[np.float64]  # (N, J, K)
    idle_w: NDArray[np.float64]  # (N, K)
    kv_blocks: NDArray[np.int64]  # (N, J)
    whole: NDArray[np.float64]  # (N, G_COLUMNS)


UNIT_FIELDS = (
    "kv_memory_s",
    "kv_compute_s",
    "prefill_memory_s",
    "prefill_compute_s",
    "prefill_comm_s",
    "attention_compute_s",
    "host_s",
    "kv_memory_j",
    "kv_compute_j",
    "prefill_memory_j",
    "prefill_compute_j",
    "attention_compute_j",
    "startup_s",
    "startup_w",
    "warmup_s",
    "warmup_w",
)
(
    U_KV_MEMORY_S,
    U_KV_COMPUTE_S,
    U_PREFILL_MEMORY_S,
    U_PREFILL_COMPUTE_S,
    U_PREFILL_COMM_S,
    U_ATTENTION_S,
    U_HOST_S,
    U_KV_MEMORY_J,
    U_KV_COMPUTE_J,
    U_PREFILL_MEMORY_J,
    U_PREFILL_COMPUTE_J,
    U_ATTENTION_J,
    U_STARTUP_S,
    U_STARTUP_W,
    U_WARMUP_S,
    U_WARMUP_W,
) = range(16)
TABLE_FIELDS = ("decode_memory_s", "decode_compute_s", "decode_comm_s", "decode_memory_j", "decode_compute_j")
G_TDP_W, G_CLOCK_DELAY_S, G_GPUS, G_TOKENS = range(4)


class Batch(NamedTuple):
    """State of N simulations."""

    ints: NDArray[np.int64]  # (N, S_INTS)
    floats: NDArray[np.float64]  # (N, S_FLOATS)
    ttfts: NDArray[np.int64]  # (N, SAMPLES)
    tpots: NDArray[np.int64]  # (N, SAMPLES)


def allocate_requests(n: int, capacity: int) -> Requests:
    """Room for ``capacity`` requests in each of ``n`` simulations."""
    return Requests(*(np.zeros((n, capacity), dtype=np.int64) for _ in Requests._fields))


def allocate_engines(n: int, max_batch: int) -> Engines:
    """Engines that hold up to ``max_batch`` running requests."""
    room = max_batch + 2
    return Engines(
        np.zeros((n, 2, E_INTS), dtype=np.int64),
        np.zeros((n, 2)),
        np.zeros((n, 2, room), dtype=np.int64),
        np.zeros((n, 2, room), dtype=np.int64),
        np.zeros((n, 2, BLOCK_TOKENS), dtype=np.int64),
        np.zeros((n, 2, room), dtype=np.int64),
    )


def allocate_batch(n: int) -> Batch:
    """Counters of ``n`` simulations."""
    return Batch(
        np.zeros((n, S_INTS), dtype=np.int64),
        np.zeros((n, S_FLOATS)),
        np.zeros((n, SAMPLES), dtype=np.int64),
        np.zeros((n, SAMPLES), dtype=np.int64),
    )


def allocate_physics(n: int, tables: PhysicsTables) -> Physics:
    """Physics of ``n`` simulations, of the shape of ``tables``; fill it with :func:`store_physics`."""
    degrees, clocks = tables.busy_w.shape
    decodes = tables.decode_memory_s.shape[1]
    return Physics(
        tables.tp_degrees.copy(),
        tables.grid_clocks_mhz.copy(),
        *(np.zeros((n, degrees, decodes)) for _ in TABLE_FIELDS),
        np.zeros((n, degrees, len(UNIT_FIELDS))),
        *(np.zeros((n, clocks)) for _ in range(3)),
        np.zeros((n, degrees, clocks)),
        np.zeros((n, clocks)),
        np.zeros((n, degrees), dtype=np.int64),
        np.zeros((n, 4)),
    )


def store_physics(physics: Physics, i: int, tables: PhysicsTables) -> None:
    """Give simulation ``i`` the physics of ``tables``."""
    for name in TABLE_FIELDS:
        getattr(physics, name)[i] = getattr(tables, name)
    for column, name in enumerate(UNIT_FIELDS):
        physics.unit[i, :, column] = getattr(tables, name)
    physics.memory_scale[i] = tables.memory_scale
    physics.compute_scale[i] = tables.compute_scale
    physics.energy_scale[i] = tables.compute_energy_scale
    physics.busy_w[i] = tables.busy_w
    physics.idle_w[i] = tables.idle_w
    physics.kv_blocks[i] = tables.kv_blocks
    physics.whole[i] = (
        tables.tdp_w,
        tables.clock_delay_s,
        tables.allotted_gpus,
        tables.max_num_batched_tokens,
    )
