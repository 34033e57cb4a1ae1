"""The compiled simulator: vLLM V1 scheduling with O(1) work an iteration and jumps over decode stretches.

What is modelled, and how it compares with the engine, is told in :mod:`rlgov.simulation.naive`, the
plain form that touches every request in every iteration and is the oracle of this one.

Two ideas make it fast. Every sequence decoded in an iteration waits the same time for its token, so a
request needs only the *iteration* in which it finishes, kept in a heap; the summed context grows by
the number of decoding sequences. And where nothing can happen but decoding, iteration time is
arithmetic in the iteration number, so a whole stretch, up to the next finish, admissible arrival,
clock change or window end, is one closed form. Times are integers, so both agree exactly.
"""

from __future__ import annotations

import math

import numpy as np
from numba import njit

from rlgov.records import Column
from rlgov.simulation.layout import (
    BLOCK_TOKENS,
    D_COMM_S,
    D_COMPUTE_J,
    D_COMPUTE_S,
    D_MEMORY_J,
    D_MEMORY_S,
    DECODING,
    DRAINING,
    E_CONTEXT,
    E_DECODING,
    E_END,
    E_FLY_CLOCK,
    E_FLY_CONTEXT,
    E_FLY_DECODES,
    E_FLY_END,
    E_FLY_FIRST,
    E_FLY_FULL,
    E_FLY_PAIRS,
    E_FLY_TOKENS,
    E_FLYING,
    E_FREE,
    E_GONE,
    E_HEAD,
    E_HEAP,
    E_ITEMS,
    E_ITERATION,
    E_KEYS,
    E_NEXT,
    E_NOW,
    E_PARTIAL,
    E_PHASES,
    E_PREEMPTED,
    E_READY,
    E_RUNNING,
    E_STACK,
    E_START,
    E_STATUS,
    E_TAIL,
    E_TP,
    F_BUSY_GPU_PS,
    F_CLOCK,
    F_CLOCK_DELAY_S,
    F_ENERGY,
    F_GPUS,
    F_POWER,
    F_RUNNING,
    F_TDP_W,
    F_TOKENS,
    F_TOTAL_ENERGY,
    FINISHED,
    K_BUSY,
    K_COMPUTE,
    K_ENERGY,
    K_IDLE,
    K_MEMORY,
    K_MEMORY_ENERGY,
    K_MHZ,
    NEVER,
    OFF,
    PREFILLING,
    R_AFTER,
    R_ARRIVAL,
    R_BEFORE,
    R_DONE,
    R_FINISH,
    R_FIRST,
    R_GENERATED,
    R_HIT,
    R_JOINED,
    R_MISSED,
    R_OUTPUT,
    R_PROMPT,
    R_STATE,
    R_TARGET,
    REJECTED,
    S_ACTIVE,
    S_ARRIVED,
    S_ASKED_CLOCK,
    S_CAP,
    S_CLOCK,
    S_CLOCK_DUE,
    S_DEADLINE,
    S_ITERATIONS,
    S_NOW,
    S_OLDEST,
    S_OVERDUE,
    S_REJECTED,
    S_REQUESTS,
    S_SERVED,
    S_SWITCHES,
    S_SWITCHING,
    S_TOKENS_DUE,
    S_TPOT,
    S_TTFT,
    SAMPLES,
    SERVING,
    STARTING,
    U_ATTENTION_J,
    U_ATTENTION_S,
    U_BLOCKS,
    U_HOST_S,
    U_KV_COMPUTE_J,
    U_KV_COMPUTE_S,
    U_KV_MEMORY_J,
    U_KV_MEMORY_S,
    U_PREFILL_COMM_S,
    U_PREFILL_COMPUTE_J,
    U_PREFILL_COMPUTE_S,
    U_PREFILL_MEMORY_J,
    U_PREFILL_MEMORY_S,
    U_PROMPT_S,
    U_STARTUP_S,
    U_STARTUP_W,
    U_TP,
    U_WARMUP_S,
    U_WARMUP_W,
    W_ARRIVALS,
    W_BUSY,
    W_DECODE_PS,
    W_DECODED,
    W_MISSES,
    W_OUTPUT,
    W_PREEMPTIONS,
    W_PREFILL,
    W_PROMPT,
    W_SERVED,
    W_THROTTLED,
    W_TPOTS,
    W_TTFTS,
    WAITING,
    Physics,
)

_PS = 1e12  # picoseconds in a second, as a float
_FEW = 48
_PHASE = BLOCK_TOKENS - 1  # x & _PHASE is x modulo 16, also below 0
_COLUMNS = tuple(int(c) for c in Column)
(
    C_START,
    C_DURATION,
    C_ARRIVALS,
    C_PROMPT,
    C_OUTPUT,
    C_PREFILL,
    C_SERVED,
    C_MISSES,
    C_OVERDUE,
    C_PREEMPTIONS,
    C_RUNNING,
    C_WAITING,
    C_WAITING_TOKENS,
    C_OLDEST,
    C_RUNNING_MEAN,
    C_BUSY,
    C_KV,
    C_TTFT50,
    C_TTFT99,
    C_TPOT50,
    C_TPOT99,
    C_ITL,
    C_ENERGY,
    C_MEASURED,
    C_THROTTLED,
    C_CLOCK,
    C_CAP,
    C_TP,
    C_SWITCHING,
    C_AGE,
    C_BLIND,
    C_TP_REFUSED,
) = _COLUMNS


# --------------------------------------------------------------------------- physics of one iteration


@njit(cache=True, inline="always")
def _ps(seconds):
    return np.int64(seconds * _PS + 0.5)


@njit(cache=True)
def _time_and_energy(ph, j, k, decodes, context, tokens, pairs):
    """Picoseconds and joules of one iteration at grid clock k, TDP aside (rlgov.simulation.tables)."""
    ms = ph.clock[k, K_MEMORY]
    cs = ph.clock[k, K_COMPUTE]
    work = _ps(ph.decode[j, D_MEMORY_S, decodes] * ms + ph.decode[j, D_COMPUTE_S, decodes] * cs)
    work += _ps(ph.unit[j, U_KV_MEMORY_S] * ms + ph.unit[j, U_KV_COMPUTE_S] * cs) * context
    comm = _ps(ph.decode[j, D_COMM_S, decodes])
    memory = ph.decode[j, D_MEMORY_J, decodes] + ph.unit[j, U_KV_MEMORY_J] * context
    compute = ph.decode[j, D_COMPUTE_J, decodes] + ph.unit[j, U_KV_COMPUTE_J] * context
    if tokens > 0:
        work += _ps(ph.unit[j, U_PREFILL_MEMORY_S] * ms + ph.unit[j, U_PREFILL_COMPUTE_S] * cs) * tokens
        work += _ps(ph.unit[j, U_ATTENTION_S] * cs * pairs)
        comm += _ps(ph.unit[j, U_PREFILL_COMM_S]) * tokens + _ps(ph.unit[j, U_PROMPT_S])
        memory += ph.unit[j, U_PREFILL_MEMORY_J] * tokens
        compute += ph.unit[j, U_PREFILL_COMPUTE_J] * tokens + ph.unit[j, U_ATTENTION_J] * pairs
    duration = max(_ps(ph.unit[j, U_HOST_S]), work) + comm
    energy = (
        ph.clock[k, K_BUSY + j] * (duration / _PS)
        + ph.clock[k, K_MEMORY_ENERGY] * memory
        + ph.clock[k, K_ENERGY] * compute
    )
    return duration, energy


@njit(cache=True)
def iteration(ph, fl, j, k, decodes, context, tokens, pairs, guess=0):
    """Duration, energy and clock of one iteration: the highest grid clock up to k that TDP allows.

    ``guess`` is where the search begins, for speed alone: power rises with the clock, so there is one
    answer. An engine's throttled iterations tend to end near each other.
    """
    limit_w = fl[F_TDP_W] * ph.unit[j, U_TP]
    duration, energy = _time_and_energy(ph, j, k, decodes, context, tokens, pairs)
    if energy <= limit_w * (duration / _PS) or k == 0:
        return duration, energy, k
    low, high = 0, k  # power fits at low (or nothing lower exists), not at high
    low_duration, low_energy = np.int64(-1), 0.0
    middle = guess if 0 < guess < k else k // 2
    stride = 1
    found_low = False
    found_high = False
    while high - low > 1:
        duration, energy = _time_and_energy(ph, j, middle, decodes, context, tokens, pairs)
        if energy <= limit_w * (duration / _PS):
            low, low_duration, low_energy = middle, duration, energy
            found_low = True
        else:
            high = middle
            found_high = True
        if found_low and found_high:
            middle = (low + high) // 2
        else:  # walk away from the guess in doubling strides until both sides are known
            middle = min(low + stride, high - 1) if found_low else max(high - stride, low + 1)
            stride *= 2
    if low_duration < 0:
        low_duration, low_energy = _time_and_energy(ph, j, low, decodes, context, tokens, pairs)
    return low_duration, low_energy, low


# --------------------------------------------------------------------------- heap of finish iterations


@njit(cache=True)
def _heap_push(en, e, size, key, item):
    at = size
    while at > 0:
        parent = (at - 1) >> 1
        if en[e, E_KEYS + 3 * parent] <= key:
            break
        en[e, E_KEYS + 3 * at] = en[e, E_KEYS + 3 * parent]
        en[e, E_ITEMS + 3 * at] = en[e, E_ITEMS + 3 * parent]
        at = parent
    en[e, E_KEYS + 3 * at] = key
    en[e, E_ITEMS + 3 * at] = item


@njit(cache=True)
def _heap_sink(en, e, size, at):
    key = en[e, E_KEYS + 3 * at]
    item = en[e, E_ITEMS + 3 * at]
    while True:
        child = 2 * at + 1
        if child >= size:
            break
        if child + 1 < size and en[e, E_KEYS + 3 * child + 3] < en[e, E_KEYS + 3 * child]:
            child += 1
        if en[e, E_KEYS + 3 * child] >= key:
            break
        en[e, E_KEYS + 3 * at] = en[e, E_KEYS + 3 * child]
        en[e, E_ITEMS + 3 * at] = en[e, E_ITEMS + 3 * child]
        at = child
    en[e, E_KEYS + 3 * at] = key
    en[e, E_ITEMS + 3 * at] = item


@njit(cache=True)
def _heap_pop(en, e, size):
    item = en[e, E_ITEMS]
    en[e, E_KEYS] = en[e, E_KEYS + 3 * (size - 1)]
    en[e, E_ITEMS] = en[e, E_ITEMS + 3 * (size - 1)]
    _heap_sink(en, e, size - 1, 0)
    return item


@njit(cache=True)
def _heap_remove(en, e, size, item):
    """Rare (preemption), so it searches and rebuilds."""
    for at in range(size):
        if en[e, E_ITEMS + 3 * at] == item:
            en[e, E_KEYS + 3 * at] = en[e, E_KEYS + 3 * (size - 1)]
            en[e, E_ITEMS + 3 * at] = en[e, E_ITEMS + 3 * (size - 1)]
            break
    for at in range((size - 1) // 2, -1, -1):
        if at < size - 1:
            _heap_sink(en, e, size - 1, at)


# --------------------------------------------------------------------------- running list


@njit(cache=True, inline="always")
def _blocks(tokens):
    return (tokens + BLOCK_TOKENS - 1) // BLOCK_TOKENS


@njit(cache=True)
def _append(rq, en, e, r):
    tail = en[e, E_TAIL]
    rq[r, R_BEFORE] = tail
    rq[r, R_AFTER] = -1
    if tail >= 0:
        rq[tail, R_AFTER] = r
    else:
        en[e, E_HEAD] = r
    en[e, E_TAIL] = r
    en[e, E_RUNNING] += 1


@njit(cache=True)
def _unlink(rq, en, e, r):
    before = rq[r, R_BEFORE]
    after = rq[r, R_AFTER]
    if before >= 0:
        rq[before, R_AFTER] = after
    else:
        en[e, E_HEAD] = after
    if after >= 0:
        rq[after, R_BEFORE] = before
    else:
        en[e, E_TAIL] = before
    en[e, E_RUNNING] -= 1


@njit(cache=True)
def _preempt_tail(rq, en, st, e):
    """Recompute later: the last admitted request loses its blocks and waits in front."""
    r = en[e, E_TAIL]
    if rq[r, R_STATE] == DECODING:
        context = rq[r, R_TARGET] + en[e, E_ITERATION] - rq[r, R_JOINED]
        en[e, E_FREE] += _blocks(context)
        en[e, E_DECODING] -= 1
        en[e, E_CONTEXT] -= context
        en[e, E_PHASES + ((rq[r, R_JOINED] - rq[r, R_TARGET]) & _PHASE)] -= 1
        _heap_remove(en, e, en[e, E_HEAP], r)
        en[e, E_HEAP] -= 1
        generated = rq[r, R_GENERATED] + en[e, E_ITERATION] - rq[r, R_JOINED]
        rq[r, R_GENERATED] = generated
        rq[r, R_TARGET] = rq[r, R_PROMPT] + generated
        st[S_TOKENS_DUE] += rq[r, R_TARGET] - rq[r, R_HIT]
    else:
        en[e, E_FREE] += _blocks(rq[r, R_DONE])
        st[S_TOKENS_DUE] += rq[r, R_DONE] - rq[r, R_HIT]
        en[e, E_PARTIAL] = -1
    rq[r, R_DONE] = rq[r, R_HIT]
    rq[r, R_STATE] = WAITING
    _unlink(rq, en, e, r)
    en[e, E_STACK + 3 * en[e, E_PREEMPTED]] = r
    en[e, E_PREEMPTED] += 1
    st[W_PREEMPTIONS] += 1
    return r


@njit(cache=True)
def _finish(rq, st, sm, r, now):
    rq[r, R_STATE] = FINISHED
    rq[r, R_GENERATED] = rq[r, R_OUTPUT]
    rq[r, R_FINISH] = now
    st[S_SERVED] += 1
    st[W_SERVED] += 1
    gaps = rq[r, R_OUTPUT] - 1
    if gaps > 0:
        elapsed = now - rq[r, R_FIRST]
        if st[W_TPOTS] < SAMPLES:
            sm[1, st[W_TPOTS]] = elapsed // gaps
            st[W_TPOTS] += 1
        if elapsed > st[S_TPOT] * gaps and rq[r, R_MISSED] == 0:
            rq[r, R_MISSED] = 1
            st[W_MISSES] += 1


@njit(cache=True)
def _finish_due(rq, en, st, sm, e, now):
    """Retire every decoding request whose last token the present iteration gave."""
    while en[e, E_HEAP] > 0 and en[e, E_KEYS] == en[e, E_ITERATION]:
        r = _heap_pop(en, e, en[e, E_HEAP])
        en[e, E_HEAP] -= 1
        context = rq[r, R_TARGET] + en[e, E_ITERATION] - rq[r, R_JOINED]
        en[e, E_DECODING] -= 1
        en[e, E_CONTEXT] -= context
        en[e, E_FREE] += _blocks(context)
        en[e, E_PHASES + ((rq[r, R_JOINED] - rq[r, R_TARGET]) & _PHASE)] -= 1
        _unlink(rq, en, e, r)
        _finish(rq, st, sm, r, now)


# --------------------------------------------------------------------------- one engine


@njit(cache=True)
def _complete(rq, en, st, sm, e, now):
    """The iteration in flight ends: tokens out, prompts done, finishes."""
    decodes = en[e, E_FLY_DECODES]
    en[e, E_ITERATION] += 1
    st[S_ITERATIONS] += 1
    en[e, E_CONTEXT] += decodes
    st[W_OUTPUT] += decodes
    st[W_DECODED] += decodes
    st[W_DECODE_PS] += decodes * en[e, E_FLY_FULL]
    st[W_PREFILL] += en[e, E_FLY_TOKENS]
    st[S_TOKENS_DUE] -= en[e, E_FLY_TOKENS]
    en[e, E_FLYING] = 0
    if decodes > 0:
        _finish_due(rq, en, st, sm, e, now)
    r = en[e, E_FLY_FIRST]
    en[e, E_PARTIAL] = -1
    while r >= 0:
        after = rq[r, R_AFTER]
        if rq[r, R_DONE] < rq[r, R_TARGET]:
            en[e, E_PARTIAL] = r  # only the last one can be: it used up the token budget
        else:
            st[W_OUTPUT] += 1
            generated = rq[r, R_GENERATED] + 1
            rq[r, R_GENERATED] = generated
            if rq[r, R_FIRST] < 0:
                rq[r, R_FIRST] = now
                if rq[r, R_MISSED] == 1:
                    st[S_OVERDUE] -= 1
                if st[W_TTFTS] < SAMPLES:
                    sm[0, st[W_TTFTS]] = now - rq[r, R_ARRIVAL]
                    st[W_TTFTS] += 1
            if generated == rq[r, R_OUTPUT]:
                en[e, E_FREE] += _blocks(rq[r, R_TARGET])
                _unlink(rq, en, e, r)
                _finish(rq, st, sm, r, now)
            else:
                rq[r, R_STATE] = DECODING
                rq[r, R_JOINED] = en[e, E_ITERATION]
                en[e, E_DECODING] += 1
                en[e, E_CONTEXT] += rq[r, R_TARGET]
                en[e, E_PHASES + ((en[e, E_ITERATION] - rq[r, R_TARGET]) & _PHASE)] += 1
                key = en[e, E_ITERATION] + rq[r, R_OUTPUT] - generated
                _heap_push(en, e, en[e, E_HEAP], key, r)
                en[e, E_HEAP] += 1
        r = after


@njit(cache=True)
def _continue_partial(rq, en, st, e, budget):
    """Next chunk of a prompt under way. Returns its tokens and pairs, or (-1, 0) if it was preempted."""
    r = en[e, E_PARTIAL]
    done = rq[r, R_DONE]
    chunk = min(rq[r, R_TARGET] - done, budget)
    blocks = _blocks(done + chunk) - _blocks(done)
    if blocks > en[e, E_FREE]:  # it is the tail itself: nothing later can be preempted for it
        _preempt_tail(rq, en, st, e)
        return -1, 0
    en[e, E_FREE] -= blocks
    rq[r, R_DONE] = done + chunk
    return chunk, chunk * done + chunk * (chunk + 1) // 2


@njit(cache=True)
def _run_running_short_of_blocks(rq, en, st, e):
    """Give decoding requests their next block in order of admission, preempting from the tail."""
    phase = en[e, E_ITERATION] & _PHASE
    r = en[e, E_HEAD]
    while r >= 0 and rq[r, R_STATE] == DECODING:
        after = rq[r, R_AFTER]
        if (rq[r, R_JOINED] - rq[r, R_TARGET]) & _PHASE == phase:
            while en[e, E_FREE] < 1:
                if _preempt_tail(rq, en, st, e) == r:
                    return
            en[e, E_FREE] -= 1
            after = rq[r, R_AFTER]  # its successor may have been preempted
        r = after


@njit(cache=True)
def _next_waiting(rq, en, e, now):
    """The request vLLM would look at first: the earliest admitted preempted one, else by arrival."""
    if en[e, E_PREEMPTED] > 0:
        return en[e, E_STACK + 3 * (en[e, E_PREEMPTED] - 1)]
    at = en[e, E_NEXT]
    if at < en[e, E_END] and rq[at, R_ARRIVAL] <= now:
        return at
    return -1


@njit(cache=True)
def _take_waiting(en, e):
    if en[e, E_PREEMPTED] > 0:
        en[e, E_PREEMPTED] -= 1
    else:
        en[e, E_NEXT] += 1


@njit(cache=True)
def _stretch(rq, en, st, fl, sm, ph, e, until, blocked, jump):
    """Run decode-only iterations that end by ``until`` in closed form; returns whether any ran.

    ``blocked``: nothing can be admitted until a request finishes, so arrivals need not stop it.
    """
    j = en[e, E_TP]
    decodes = en[e, E_DECODING]
    context = en[e, E_CONTEXT]
    now = en[e, E_NOW]
    k = st[S_CLOCK]
    count = en[e, E_KEYS] - en[e, E_ITERATION]
    if not jump or count <= 1:
        return False
    step = _ps(
        ph.unit[j, U_KV_MEMORY_S] * ph.clock[k, K_MEMORY]
        + ph.unit[j, U_KV_COMPUTE_S] * ph.clock[k, K_COMPUTE]
    )
    step *= decodes
    base = _ps(
        ph.decode[j, D_MEMORY_S, decodes] * ph.clock[k, K_MEMORY]
        + ph.decode[j, D_COMPUTE_S, decodes] * ph.clock[k, K_COMPUTE]
    )
    work = base + (step // decodes) * context
    host = _ps(ph.unit[j, U_HOST_S])
    comm = _ps(ph.decode[j, D_COMM_S, decodes])
    if work < host:  # host-bound: constant time up to the kink
        first = host + comm
        if step > 0:
            count = min(count, (host - work) // step + 1)
        step = np.int64(0)
    else:
        first = work + comm
    span = until - now
    stop_at_arrival = np.int64(-1)
    if not blocked:
        at = en[e, E_NEXT]
        if at < en[e, E_END] and rq[at, R_ARRIVAL] - now <= span:
            stop_at_arrival = rq[at, R_ARRIVAL] - now
    # iterations that end within span: n first + step n (n - 1) / 2 <= span
    goal = span if stop_at_arrival < 0 else stop_at_arrival - 1
    if count * first + step * (count * (count - 1) // 2) > goal:
        if step == 0:
            n = goal // first
        else:
            half = first - 0.5 * step
            n = np.int64((math.sqrt(half * half + 2.0 * step * goal) - half) / step)
            n = max(n, 0)
            while n * first + step * (n * (n - 1) // 2) > goal:
                n -= 1
            while (n + 1) * first + step * ((n + 1) * n // 2) <= goal:
                n += 1
        if stop_at_arrival >= 0:  # one more: the first boundary at or after the arrival
            n += 1
            if n * first + step * (n * (n - 1) // 2) > span:
                n -= 1
        count = min(count, n)
    if count < 1:
        return False
    # KV blocks: every request needs one each 16 iterations
    phase = en[e, E_ITERATION] & _PHASE
    need = (count // BLOCK_TOKENS) * decodes
    for extra in range(count & _PHASE):
        need += en[e, E_PHASES + ((phase + extra) & _PHASE)]
    if need > en[e, E_FREE]:
        need = np.int64(0)
        n = np.int64(0)
        while n < count:
            more = en[e, E_PHASES + ((phase + n) & _PHASE)]
            if need + more > en[e, E_FREE]:
                break
            need += more
            n += 1
        count = n
        if count < 1:
            return False
    # power is a Moebius function of the iteration number: unthrottled at both ends, so in between
    limit_w = fl[F_TDP_W] * ph.unit[j, U_TP]
    for at_context in (context, context + (count - 1) * decodes):
        duration, energy = _time_and_energy(ph, j, k, decodes, at_context, 0, 0)
        if energy > limit_w * (duration / _PS):
            return False
    total = count * first + step * (count * (count - 1) // 2)
    contexts = count * context + decodes * (count * (count - 1) // 2)
    fl[F_ENERGY] += (
        ph.clock[k, K_BUSY + j] * (total / _PS)
        + ph.clock[k, K_MEMORY_ENERGY]
        * (count * ph.decode[j, D_MEMORY_J, decodes] + contexts * ph.unit[j, U_KV_MEMORY_J])
        + ph.clock[k, K_ENERGY]
        * (count * ph.decode[j, D_COMPUTE_J, decodes] + contexts * ph.unit[j, U_KV_COMPUTE_J])
    )
    fl[F_BUSY_GPU_PS] += total * ph.unit[j, U_TP]
    fl[F_RUNNING] += np.float64(total) * en[e, E_RUNNING]
    st[W_BUSY] += total
    st[W_OUTPUT] += count * decodes
    st[W_DECODED] += count * decodes
    st[W_DECODE_PS] += decodes * total
    st[S_ITERATIONS] += count
    en[e, E_ITERATION] += count
    en[e, E_CONTEXT] += count * decodes
    en[e, E_FREE] -= need
    en[e, E_NOW] = now + total
    _finish_due(rq, en, st, sm, e, en[e, E_NOW])
    return True


@njit(cache=True)
def _schedule(rq, en, st, fl, sm, ph, e, until, jump):
    """Form the next iteration at the engine's time. Returns False if there is nothing to run."""
    now = en[e, E_NOW]
    j = en[e, E_TP]
    total_blocks = np.int64(ph.unit[j, U_BLOCKS])
    budget = np.int64(fl[F_TOKENS])
    need = en[e, E_PHASES + (en[e, E_ITERATION] & _PHASE)]
    preempted = False
    tokens = np.int64(0)
    pairs = np.int64(0)
    first = np.int64(-1)
    short = need > en[e, E_FREE]
    if short:
        _run_running_short_of_blocks(rq, en, st, e)
        preempted = True
    else:
        en[e, E_FREE] -= need  # given back below if the stretch is jumped
    budget -= en[e, E_DECODING]
    if en[e, E_PARTIAL] >= 0:
        partial = en[e, E_PARTIAL]
        chunk, chunk_pairs = _continue_partial(rq, en, st, e, budget)
        if chunk < 0:
            preempted = True
        else:
            first = partial
            tokens += chunk
            pairs += chunk_pairs
            budget -= chunk
    blocked = False
    if not preempted:
        while True:
            r = _next_waiting(rq, en, e, now)
            if r < 0:
                break
            if _blocks(rq[r, R_PROMPT] + rq[r, R_OUTPUT]) > total_blocks:
                _take_waiting(en, e)  # longer than the whole cache: the engine refuses it
                rq[r, R_STATE] = REJECTED
                if rq[r, R_MISSED] == 0:
                    rq[r, R_MISSED] = 1
                    st[W_MISSES] += 1
                else:  # it waited beyond its deadline, and was counted then
                    st[S_OVERDUE] -= 1
                st[S_REJECTED] += 1
                st[S_TOKENS_DUE] -= rq[r, R_TARGET] - rq[r, R_HIT]
                continue
            if en[e, E_RUNNING] >= st[S_CAP]:
                blocked = True
                break
            if budget <= 0:
                break
            done = rq[r, R_DONE]
            # vLLM admits a request only when its whole known sequence fits
            if _blocks(rq[r, R_TARGET]) > en[e, E_FREE]:
                blocked = True
                break
            chunk = min(rq[r, R_TARGET] - done, budget)
            en[e, E_FREE] -= _blocks(done + chunk)
            _take_waiting(en, e)
            rq[r, R_STATE] = PREFILLING
            rq[r, R_DONE] = done + chunk
            _append(rq, en, e, r)
            if first < 0:
                first = r
            tokens += chunk
            pairs += chunk * done + chunk * (chunk + 1) // 2
            budget -= chunk
    decodes = en[e, E_DECODING]
    if tokens == 0:
        if decodes == 0:
            return preempted  # what was preempted alone is admitted again at once
        if not preempted:
            en[e, E_FREE] += need
            blocked = blocked or en[e, E_RUNNING] >= st[S_CAP]
            if _stretch(rq, en, st, fl, sm, ph, e, until, blocked, jump):
                return True
            en[e, E_FREE] -= need
    duration, energy, clock = iteration(
        ph, fl, j, st[S_CLOCK], decodes, en[e, E_CONTEXT], tokens, pairs, en[e, E_FLY_CLOCK]
    )
    en[e, E_FLYING] = 1
    en[e, E_FLY_END] = now + duration
    en[e, E_FLY_FULL] = duration
    en[e, E_FLY_DECODES] = decodes
    en[e, E_FLY_CONTEXT] = en[e, E_CONTEXT]
    en[e, E_FLY_TOKENS] = tokens
    en[e, E_FLY_PAIRS] = pairs
    en[e, E_FLY_FIRST] = first
    en[e, E_FLY_CLOCK] = clock
    fl[F_POWER + e] = energy / (duration / _PS)
    return True


@njit(cache=True)
def _fly(en, st, fl, ph, e, to):
    """Let the iteration in flight go on to time ``to``: energy, busy time, clock."""
    span = to - en[e, E_NOW]
    en[e, E_NOW] = to
    st[W_BUSY] += span
    fl[F_ENERGY] += fl[F_POWER + e] * (span / _PS)
    fl[F_BUSY_GPU_PS] += span * ph.unit[en[e, E_TP], U_TP]
    fl[F_RUNNING] += np.float64(span) * en[e, E_RUNNING]
    below = ph.clock[st[S_CLOCK], K_MHZ] - ph.clock[en[e, E_FLY_CLOCK], K_MHZ]
    if below > 0:
        fl[F_CLOCK] -= np.float64(span) * below
        st[W_THROTTLED] += span


@njit(cache=True)
def _run_engine(rq, en, st, fl, sm, ph, e, until, jump):
    """Run engine ``e`` up to time ``until``; a draining engine stops when it is empty."""
    while True:
        if en[e, E_FLYING] == 1:
            if en[e, E_FLY_END] > until:
                _fly(en, st, fl, ph, e, until)
                return
            _fly(en, st, fl, ph, e, en[e, E_FLY_END])
            _complete(rq, en, st, sm, e, en[e, E_NOW])
        if en[e, E_NOW] >= until:
            return
        if not _schedule(rq, en, st, fl, sm, ph, e, until, jump):
            at = en[e, E_NEXT]
            if at < en[e, E_END]:
                en[e, E_NOW] = min(rq[at, R_ARRIVAL], until)
            elif en[e, E_STATUS] == DRAINING:
                en[e, E_STATUS] = OFF
                en[e, E_GONE] = en[e, E_NOW]
                return
            else:
                en[e, E_NOW] = until


@njit(cache=True)
def _retime(en, st, fl, ph, e):
    """The clock has changed under an iteration in flight: the rest of its work runs at the new one."""
    if en[e, E_FLYING] == 0:
        return
    now = en[e, E_NOW]
    duration, energy, clock = iteration(
        ph,
        fl,
        en[e, E_TP],
        st[S_CLOCK],
        en[e, E_FLY_DECODES],
        en[e, E_FLY_CONTEXT],
        en[e, E_FLY_TOKENS],
        en[e, E_FLY_PAIRS],
    )
    rest = (en[e, E_FLY_END] - now) / en[e, E_FLY_FULL]
    en[e, E_FLY_END] = now + np.int64(rest * duration + 0.5)
    en[e, E_FLY_FULL] = duration
    en[e, E_FLY_CLOCK] = clock
    fl[F_POWER + e] = energy / (duration / _PS)


@njit(cache=True)
def _take_due_clock(en, st, fl, ph):
    """Let the asked clock take effect once its delay is over."""
    if st[S_CLOCK_DUE] <= st[S_NOW]:
        st[S_CLOCK] = st[S_ASKED_CLOCK]
        st[S_CLOCK_DUE] = NEVER
        for e in range(2):
            _retime(en, st, fl, ph, e)


# --------------------------------------------------------------------------- TP switch


@njit(cache=True)
def _first_arrival_after(rq, st, low, time):
    high = st[S_REQUESTS]
    while low < high:
        middle = (low + high) // 2
        if rq[middle, R_ARRIVAL] <= time:
            low = middle + 1
        else:
            high = middle
    return low


@njit(cache=True)
def _reset_engine(en, ph, e, j, status, first, end, now):
    en[e, :] = 0
    en[e, E_STATUS] = status
    en[e, E_TP] = j
    en[e, E_NEXT] = first
    en[e, E_END] = end
    en[e, E_NOW] = now
    en[e, E_HEAD] = -1
    en[e, E_TAIL] = -1
    en[e, E_PARTIAL] = -1
    en[e, E_FREE] = np.int64(ph.unit[j, U_BLOCKS])
    en[e, E_START] = NEVER
    en[e, E_READY] = NEVER


@njit(cache=True)
def _set_start(en, ph, e, start):
    j = en[e, E_TP]
    en[e, E_START] = start
    en[e, E_READY] = start + _ps(ph.unit[j, U_STARTUP_S]) + _ps(ph.unit[j, U_WARMUP_S])


@njit(cache=True)
def _begin_switch(rq, en, st, fl, ph, j):
    old = st[S_ACTIVE]
    new = 1 - old
    now = st[S_NOW]
    st[S_SWITCHING] = 1
    st[S_SWITCHES] += 1
    side_by_side = ph.unit[en[old, E_TP], U_TP] + ph.unit[j, U_TP] <= np.int64(fl[F_GPUS])
    _reset_engine(en, ph, new, j, STARTING, st[S_REQUESTS], st[S_REQUESTS], now)
    if side_by_side:
        _set_start(en, ph, new, now)
    else:  # hold what arrives from now on; the new engine starts on the GPUs the old one leaves
        split = _first_arrival_after(rq, st, en[old, E_NEXT], now)
        en[old, E_END] = split
        en[old, E_STATUS] = DRAINING
        en[new, E_NEXT] = split
        st[S_ACTIVE] = new


@njit(cache=True)
def _starting_energy(en, fl, ph, e, begin, to):
    """Start-up and warm-up energy of a starting engine within [begin, to)."""
    if en[e, E_START] >= to:
        return
    j = en[e, E_TP]
    warm = en[e, E_START] + _ps(ph.unit[j, U_STARTUP_S])
    up = max(min(warm, to) - max(en[e, E_START], begin), 0)
    warming = max(min(en[e, E_READY], to) - max(warm, begin), 0)
    fl[F_ENERGY] += (ph.unit[j, U_STARTUP_W] * up + ph.unit[j, U_WARMUP_W] * warming) / _PS
    fl[F_BUSY_GPU_PS] += np.float64(up + warming) * ph.unit[en[e, E_TP], U_TP]


@njit(cache=True)
def _run_segment(rq, en, st, fl, sm, ph, to, jump):
    """Everything up to ``to``, during which neither clock nor cap changes."""
    begin = st[S_NOW]
    busy_before = fl[F_BUSY_GPU_PS]
    if st[S_SWITCHING] == 1:
        active = st[S_ACTIVE]
        other = 1 - active
        if en[other, E_STATUS] == STARTING:  # side by side, not yet ready; ready is a boundary
            _starting_energy(en, fl, ph, other, begin, to)
            _run_engine(rq, en, st, fl, sm, ph, active, to, jump)
            if en[other, E_READY] <= to:
                split = _first_arrival_after(rq, st, en[active, E_NEXT], to)
                en[active, E_END] = split
                en[active, E_STATUS] = DRAINING
                en[other, E_STATUS] = SERVING
                en[other, E_NEXT] = split
                en[other, E_END] = st[S_REQUESTS]
                en[other, E_NOW] = to
                st[S_ACTIVE] = other
        else:
            if en[other, E_STATUS] == DRAINING:
                _run_engine(rq, en, st, fl, sm, ph, other, to, jump)
            gone = en[other, E_STATUS] == OFF
            if en[active, E_STATUS] == STARTING and gone:
                if en[active, E_START] == NEVER:
                    _set_start(en, ph, active, en[other, E_GONE])
                _starting_energy(en, fl, ph, active, begin, to)
                if en[active, E_READY] <= to:
                    en[active, E_STATUS] = SERVING
                    en[active, E_END] = st[S_REQUESTS]
                    en[active, E_NOW] = en[active, E_READY]
            if en[active, E_STATUS] == SERVING:
                _run_engine(rq, en, st, fl, sm, ph, active, to, jump)
                if gone:
                    st[S_SWITCHING] = 0
    else:
        _run_engine(rq, en, st, fl, sm, ph, st[S_ACTIVE], to, jump)
    span = np.float64(to - begin)
    idle = fl[F_GPUS] * span - (fl[F_BUSY_GPU_PS] - busy_before)
    fl[F_ENERGY] += ph.clock[st[S_CLOCK], K_IDLE] * (idle / _PS)
    fl[F_CLOCK] += span * ph.clock[st[S_CLOCK], K_MHZ]
    st[S_NOW] = to


# --------------------------------------------------------------------------- one window


@njit(cache=True)
def _quantiles(samples, n):
    """Median and 99th percentile of the first n values, interpolated linearly; NaN without values."""
    if n == 0:
        return np.nan, np.nan
    if n == 1:
        return samples[0] / _PS, samples[0] / _PS
    if n <= _FEW:  # in place: most windows have a handful, for which np.sort's allocation costs more
        part = samples
        for at in range(1, n):
            value = samples[at]
            to = at
            while to > 0 and samples[to - 1] > value:
                samples[to] = samples[to - 1]
                to -= 1
            samples[to] = value
    else:
        part = np.sort(samples[:n])
    at = 0.5 * (n - 1)
    low = int(at)
    p50 = part[low] + (at - low) * (part[min(low + 1, n - 1)] - part[low])
    at = 0.99 * (n - 1)
    low = int(at)
    p99 = part[low] + (at - low) * (part[min(low + 1, n - 1)] - part[low])
    return p50 / _PS, p99 / _PS


@njit(cache=True)
def _look_at_arrivals_and_deadlines(rq, st):
    now = st[S_NOW]
    n = st[S_REQUESTS]
    while st[S_ARRIVED] < n and rq[st[S_ARRIVED], R_ARRIVAL] <= now:
        r = st[S_ARRIVED]
        st[W_ARRIVALS] += 1
        st[W_PROMPT] += rq[r, R_PROMPT]
        st[S_ARRIVED] += 1
    limit = st[S_TTFT]
    while st[S_DEADLINE] < st[S_ARRIVED]:
        r = st[S_DEADLINE]
        deadline = rq[r, R_ARRIVAL] + limit
        if deadline > now:
            break
        if rq[r, R_FIRST] < 0 or rq[r, R_FIRST] > deadline:
            if rq[r, R_MISSED] == 0:
                rq[r, R_MISSED] = 1
                st[W_MISSES] += 1
            if rq[r, R_FIRST] < 0 and rq[r, R_STATE] != REJECTED:
                st[S_OVERDUE] += 1
        st[S_DEADLINE] += 1
    while st[S_OLDEST] < st[S_ARRIVED]:
        r = st[S_OLDEST]
        if rq[r, R_FIRST] < 0 and rq[r, R_STATE] != REJECTED:
            break
        st[S_OLDEST] += 1


@njit(cache=True)
def _count_due_tokens(rq, st, upto):
    """Tokens of requests that have arrived by ``upto`` enter the backlog."""
    at = st[S_ARRIVED]
    while at < st[S_REQUESTS] and rq[at, R_ARRIVAL] <= upto:
        st[S_TOKENS_DUE] += rq[at, R_TARGET] - rq[at, R_HIT]
        at += 1


@njit(cache=True)
def _window_row(rq, en, st, fl, sm, ph, begin, row):
    now = st[S_NOW]
    span = np.float64(now - begin)
    active = st[S_ACTIVE]
    running = np.int64(0)
    waiting = st[S_ARRIVED] - st[S_SERVED] - st[S_REJECTED]
    for e in range(2):
        if en[e, E_STATUS] != OFF:
            running += en[e, E_RUNNING]
    waiting -= running
    blocks = np.int64(ph.unit[en[active, E_TP], U_BLOCKS])
    row[C_START] = begin / _PS
    row[C_DURATION] = span / _PS
    row[C_ARRIVALS] = st[W_ARRIVALS]
    row[C_PROMPT] = st[W_PROMPT]
    row[C_OUTPUT] = st[W_OUTPUT]
    row[C_PREFILL] = st[W_PREFILL]
    row[C_SERVED] = st[W_SERVED]
    row[C_MISSES] = st[W_MISSES]
    row[C_OVERDUE] = st[S_OVERDUE]
    row[C_PREEMPTIONS] = st[W_PREEMPTIONS]
    row[C_RUNNING] = running
    row[C_WAITING] = waiting
    row[C_WAITING_TOKENS] = st[S_TOKENS_DUE]
    oldest = st[S_OLDEST]
    row[C_OLDEST] = (now - rq[oldest, R_ARRIVAL]) / _PS if oldest < st[S_ARRIVED] else 0.0
    row[C_RUNNING_MEAN] = fl[F_RUNNING] / span
    row[C_BUSY] = min(st[W_BUSY] / span, 1.0)
    row[C_KV] = 1.0 - en[active, E_FREE] / blocks
    row[C_TTFT50], row[C_TTFT99] = _quantiles(sm[0], st[W_TTFTS])
    row[C_TPOT50], row[C_TPOT99] = _quantiles(sm[1], st[W_TPOTS])
    row[C_ITL] = st[W_DECODE_PS] / st[W_DECODED] / _PS if st[W_DECODED] > 0 else np.nan
    row[C_ENERGY] = fl[F_ENERGY]
    row[C_MEASURED] = fl[F_CLOCK] / span
    row[C_THROTTLED] = min(st[W_THROTTLED] / span, 1.0)
    row[C_CLOCK] = ph.clock[st[S_ASKED_CLOCK], K_MHZ]
    row[C_CAP] = st[S_CAP]
    row[C_TP] = ph.unit[en[active, E_TP], U_TP]
    row[C_SWITCHING] = st[S_SWITCHING]
    row[C_AGE] = 0.0
    row[C_BLIND] = 0.0
    row[C_TP_REFUSED] = 0.0


@njit(cache=True)
def _advance(rq, en, st, fl, sm, ph, clock, cap, j, interval_ps, row, jump):
    begin = st[S_NOW]
    end = begin + interval_ps
    st[W_ARRIVALS : W_TPOTS + 1] = 0
    fl[F_ENERGY] = 0.0
    fl[F_RUNNING] = 0.0
    fl[F_CLOCK] = 0.0
    fl[F_BUSY_GPU_PS] = 0.0
    _take_due_clock(en, st, fl, ph)  # due at this very instant: before another one is asked for
    st[S_CAP] = cap
    if clock != st[S_ASKED_CLOCK]:
        st[S_ASKED_CLOCK] = clock
        st[S_CLOCK_DUE] = begin + _ps(fl[F_CLOCK_DELAY_S])
    if st[S_SWITCHING] == 0 and j != en[st[S_ACTIVE], E_TP]:
        _begin_switch(rq, en, st, fl, ph, j)
    _count_due_tokens(rq, st, end)
    while st[S_NOW] < end:
        to = end
        _take_due_clock(en, st, fl, ph)
        to = min(to, st[S_CLOCK_DUE])
        other = 1 - st[S_ACTIVE]
        if st[S_SWITCHING] == 1 and en[other, E_STATUS] == STARTING:
            to = min(to, en[other, E_READY])
        _run_segment(rq, en, st, fl, sm, ph, to, jump)
    fl[F_TOTAL_ENERGY] += fl[F_ENERGY]
    _look_at_arrivals_and_deadlines(rq, st)
    _window_row(rq, en, st, fl, sm, ph, begin, row)


@njit(cache=True, inline="always")
def _physics_of(ph, i):
    return Physics(ph.decode[i], ph.unit[i], ph.clock[i])


@njit(cache=True)
def advance_one(ba, ph, i, clock, cap, j, interval_ps, row, jump):
    """Hold grid clock ``clock``, batch cap ``cap`` and TP index ``j`` for one interval; fill ``row``.

    A TP degree asked for while a switch is in progress is ignored.
    """
    one = _physics_of(ph, i)
    _advance(
        ba.requests[i],
        ba.engines[i],
        ba.ints[i],
        ba.floats[i],
        ba.samples[i],
        one,
        clock,
        cap,
        j,
        interval_ps,
        row,
        jump,
    )


@njit(cache=True)
def advance_all(ba, ph, clocks, caps, tps, interval_ps, rows, jump):
    """:func:`advance_one` for every simulation; ``clocks``, ``caps``, ``tps`` of shape (N,)."""
    for i in range(rows.shape[0]):
        advance_one(ba, ph, i, clocks[i], caps[i], tps[i], interval_ps, rows[i], jump)


@njit(cache=True)
def advance_windows(ba, ph, i, clocks, caps, tps, interval_ps, rows, jump):
    """:func:`advance_one` for simulation i over ``rows.shape[0]`` windows in a row."""
    for w in range(rows.shape[0]):
        advance_one(ba, ph, i, clocks[w], caps[w], tps[w], interval_ps, rows[w], jump)


@njit(cache=True)
def reset_one(ba, ph, i, n, clock, cap, j, ttft_ps, tpot_ps):
    """Begin anew with the ``n`` requests whose arrival, lengths and hits lie in ``ba.requests[i]``."""
    rq = ba.requests[i]
    for r in range(n):
        rq[r, R_STATE] = WAITING
        rq[r, R_TARGET] = rq[r, R_PROMPT]
        rq[r, R_DONE] = rq[r, R_HIT]
        rq[r, R_GENERATED] = 0
        rq[r, R_FIRST] = -1
        rq[r, R_FINISH] = -1
        rq[r, R_MISSED] = 0
    st = ba.ints[i]
    st[:] = 0
    ba.floats[i, :F_POWER] = 0.0
    st[S_CAP] = cap
    st[S_CLOCK] = clock
    st[S_ASKED_CLOCK] = clock
    st[S_CLOCK_DUE] = NEVER
    st[S_REQUESTS] = n
    st[S_TTFT] = ttft_ps
    st[S_TPOT] = tpot_ps
    one = _physics_of(ph, i)
    _reset_engine(ba.engines[i], one, 1, j, OFF, n, n, 0)
    _reset_engine(ba.engines[i], one, 0, j, SERVING, 0, n, 0)
