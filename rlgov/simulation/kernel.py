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
    E_ITERATION,
    E_NEXT,
    E_NOW,
    E_PARTIAL,
    E_PREEMPTED,
    E_READY,
    E_RUNNING,
    E_START,
    E_STATUS,
    E_TAIL,
    E_TP,
    F_BUSY_GPU_PS,
    F_CLOCK,
    F_ENERGY,
    F_RUNNING,
    F_TOTAL_ENERGY,
    FINISHED,
    G_CLOCK_DELAY_S,
    G_GPUS,
    G_TDP_W,
    G_TOKENS,
    NEVER,
    OFF,
    PREFILLING,
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
    U_STARTUP_S,
    U_STARTUP_W,
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
)

_PS = 1e12  # picoseconds in a second, as a float
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
) = _COLUMNS


# --------------------------------------------------------------------------- physics of one iteration


@njit(cache=True, inline="always")
def _ps(seconds):
    return np.int64(seconds * _PS + 0.5)


@njit(cache=True)
def _time_and_energy(ph, i, j, k, decodes, context, tokens, pairs):
    """Picoseconds and joules of one iteration at grid clock k, TDP aside (rlgov.simulation.tables)."""
    u = ph.unit[i, j]
    ms = ph.memory_scale[i, k]
    cs = ph.compute_scale[i, k]
    es = ph.energy_scale[i, k]
    work = _ps(ph.decode_memory_s[i, j, decodes] * ms + ph.decode_compute_s[i, j, decodes] * cs)
    work += _ps(u[U_KV_MEMORY_S] * ms + u[U_KV_COMPUTE_S] * cs) * context
    comm = _ps(ph.decode_comm_s[i, j, decodes])
    energy = ph.decode_memory_j[i, j, decodes] + u[U_KV_MEMORY_J] * context
    compute = ph.decode_compute_j[i, j, decodes] + u[U_KV_COMPUTE_J] * context
    if tokens > 0:
        work += _ps(u[U_PREFILL_MEMORY_S] * ms + u[U_PREFILL_COMPUTE_S] * cs) * tokens
        work += _ps(u[U_ATTENTION_S] * cs * pairs)
        comm += _ps(u[U_PREFILL_COMM_S]) * tokens
        energy += u[U_PREFILL_MEMORY_J] * tokens
        compute += u[U_PREFILL_COMPUTE_J] * tokens + u[U_ATTENTION_J] * pairs
    duration = max(_ps(u[U_HOST_S]), work) + comm
    energy += es * compute + ph.busy_w[i, j, k] * (duration / _PS)
    return duration, energy


@njit(cache=True)
def iteration(ph, i, j, k, decodes, context, tokens, pairs):
    """Duration, energy and clock of one iteration: the highest grid clock up to k that TDP allows."""
    limit_w = ph.whole[i, G_TDP_W] * ph.tp_degrees[j]
    duration, energy = _time_and_energy(ph, i, j, k, decodes, context, tokens, pairs)
    if energy <= limit_w * (duration / _PS) or k == 0:
        return duration, energy, k
    low, high = 0, k  # power fits at low (or nothing lower exists), not at high
    while high - low > 1:
        middle = (low + high) // 2
        duration, energy = _time_and_energy(ph, i, j, middle, decodes, context, tokens, pairs)
        if energy <= limit_w * (duration / _PS):
            low = middle
        else:
            high = middle
    duration, energy = _time_and_energy(ph, i, j, low, decodes, context, tokens, pairs)
    return duration, energy, low


# --------------------------------------------------------------------------- heap of finish iterations


@njit(cache=True)
def _heap_push(keys, items, size, key, item):
    at = size
    while at > 0:
        parent = (at - 1) >> 1
        if keys[parent] <= key:
            break
        keys[at] = keys[parent]
        items[at] = items[parent]
        at = parent
    keys[at] = key
    items[at] = item


@njit(cache=True)
def _heap_sink(keys, items, size, at):
    key = keys[at]
    item = items[at]
    while True:
        child = 2 * at + 1
        if child >= size:
            break
        if child + 1 < size and keys[child + 1] < keys[child]:
            child += 1
        if keys[child] >= key:
            break
        keys[at] = keys[child]
        items[at] = items[child]
        at = child
    keys[at] = key
    items[at] = item


@njit(cache=True)
def _heap_pop(keys, items, size):
    item = items[0]
    keys[0] = keys[size - 1]
    items[0] = items[size - 1]
    _heap_sink(keys, items, size - 1, 0)
    return item


@njit(cache=True)
def _heap_remove(keys, items, size, item):
    """Rare (preemption), so it searches and rebuilds."""
    for at in range(size):
        if items[at] == item:
            keys[at] = keys[size - 1]
            items[at] = items[size - 1]
            break
    for at in range((size - 1) // 2, -1, -1):
        if at < size - 1:
            _heap_sink(keys, items, size - 1, at)


# --------------------------------------------------------------------------- running list


@njit(cache=True, inline="always")
def _blocks(tokens):
    return (tokens + BLOCK_TOKENS - 1) // BLOCK_TOKENS


@njit(cache=True)
def _append(rq, ei, i, r):
    tail = ei[E_TAIL]
    rq.before[i, r] = tail
    rq.after[i, r] = -1
    if tail >= 0:
        rq.after[i, tail] = r
    else:
        ei[E_HEAD] = r
    ei[E_TAIL] = r
    ei[E_RUNNING] += 1


@njit(cache=True)
def _unlink(rq, ei, i, r):
    before = rq.before[i, r]
    after = rq.after[i, r]
    if before >= 0:
        rq.after[i, before] = after
    else:
        ei[E_HEAD] = after
    if after >= 0:
        rq.before[i, after] = before
    else:
        ei[E_TAIL] = before
    ei[E_RUNNING] -= 1


@njit(cache=True)
def _preempt_tail(rq, en, ba, i, e):
    """Recompute later: the last admitted request loses its blocks and waits in front."""
    ei = en.ints[i, e]
    r = ei[E_TAIL]
    if rq.state[i, r] == DECODING:
        context = rq.target[i, r] + ei[E_ITERATION] - rq.joined[i, r]
        ei[E_FREE] += _blocks(context)
        ei[E_DECODING] -= 1
        ei[E_CONTEXT] -= context
        en.phases[i, e, (rq.joined[i, r] - rq.target[i, r]) % BLOCK_TOKENS] -= 1
        _heap_remove(en.heap_key[i, e], en.heap_request[i, e], ei[E_HEAP], r)
        ei[E_HEAP] -= 1
        generated = rq.generated[i, r] + ei[E_ITERATION] - rq.joined[i, r]
        rq.generated[i, r] = generated
        rq.target[i, r] = rq.prompt[i, r] + generated
        ba.ints[i, S_TOKENS_DUE] += rq.target[i, r] - rq.hit[i, r]
    else:
        ei[E_FREE] += _blocks(rq.done[i, r])
        ba.ints[i, S_TOKENS_DUE] += rq.done[i, r] - rq.hit[i, r]
        ei[E_PARTIAL] = -1
    rq.done[i, r] = rq.hit[i, r]
    rq.state[i, r] = WAITING
    _unlink(rq, ei, i, r)
    en.stack[i, e, ei[E_PREEMPTED]] = r
    ei[E_PREEMPTED] += 1
    ba.ints[i, W_PREEMPTIONS] += 1
    return r


@njit(cache=True)
def _finish(rq, ba, i, r, now):
    rq.state[i, r] = FINISHED
    rq.generated[i, r] = rq.output[i, r]
    rq.finish[i, r] = now
    si = ba.ints[i]
    si[S_SERVED] += 1
    si[W_SERVED] += 1
    gaps = rq.output[i, r] - 1
    if gaps > 0:
        elapsed = now - rq.first[i, r]
        if si[W_TPOTS] < SAMPLES:
            ba.tpots[i, si[W_TPOTS]] = elapsed // gaps
            si[W_TPOTS] += 1
        if elapsed > si[S_TPOT] * gaps and rq.missed[i, r] == 0:
            rq.missed[i, r] = 1
            si[W_MISSES] += 1


@njit(cache=True)
def _finish_due(rq, en, ba, i, e, now):
    """Retire every decoding request whose last token the present iteration gave."""
    ei = en.ints[i, e]
    keys = en.heap_key[i, e]
    while ei[E_HEAP] > 0 and keys[0] == ei[E_ITERATION]:
        r = _heap_pop(keys, en.heap_request[i, e], ei[E_HEAP])
        ei[E_HEAP] -= 1
        context = rq.target[i, r] + ei[E_ITERATION] - rq.joined[i, r]
        ei[E_DECODING] -= 1
        ei[E_CONTEXT] -= context
        ei[E_FREE] += _blocks(context)
        en.phases[i, e, (rq.joined[i, r] - rq.target[i, r]) % BLOCK_TOKENS] -= 1
        _unlink(rq, ei, i, r)
        _finish(rq, ba, i, r, now)


# --------------------------------------------------------------------------- one engine


@njit(cache=True)
def _complete(rq, en, ba, i, e, now):
    """The iteration in flight ends: tokens out, prompts done, finishes."""
    ei = en.ints[i, e]
    si = ba.ints[i]
    decodes = ei[E_FLY_DECODES]
    ei[E_ITERATION] += 1
    si[S_ITERATIONS] += 1
    ei[E_CONTEXT] += decodes
    si[W_OUTPUT] += decodes
    si[W_DECODED] += decodes
    si[W_DECODE_PS] += decodes * ei[E_FLY_FULL]
    si[W_PREFILL] += ei[E_FLY_TOKENS]
    si[S_TOKENS_DUE] -= ei[E_FLY_TOKENS]
    ei[E_FLYING] = 0
    if decodes > 0:
        _finish_due(rq, en, ba, i, e, now)
    r = ei[E_FLY_FIRST]
    ei[E_PARTIAL] = -1
    while r >= 0:
        after = rq.after[i, r]
        if rq.done[i, r] < rq.target[i, r]:
            ei[E_PARTIAL] = r  # only the last one can be: it used up the token budget
        else:
            si[W_OUTPUT] += 1
            generated = rq.generated[i, r] + 1
            rq.generated[i, r] = generated
            if rq.first[i, r] < 0:
                rq.first[i, r] = now
                if rq.missed[i, r] == 1:
                    si[S_OVERDUE] -= 1
                if si[W_TTFTS] < SAMPLES:
                    ba.ttfts[i, si[W_TTFTS]] = now - rq.arrival[i, r]
                    si[W_TTFTS] += 1
            if generated == rq.output[i, r]:
                ei[E_FREE] += _blocks(rq.target[i, r])
                _unlink(rq, ei, i, r)
                _finish(rq, ba, i, r, now)
            else:
                rq.state[i, r] = DECODING
                rq.joined[i, r] = ei[E_ITERATION]
                ei[E_DECODING] += 1
                ei[E_CONTEXT] += rq.target[i, r]
                en.phases[i, e, (ei[E_ITERATION] - rq.target[i, r]) % BLOCK_TOKENS] += 1
                key = ei[E_ITERATION] + rq.output[i, r] - generated
                _heap_push(en.heap_key[i, e], en.heap_request[i, e], ei[E_HEAP], key, r)
                ei[E_HEAP] += 1
        r = after


@njit(cache=True)
def _continue_partial(rq, en, ba, i, e, budget):
    """Next chunk of a prompt under way. Returns its tokens and pairs, or (-1, 0) if it was preempted."""
    ei = en.ints[i, e]
    r = ei[E_PARTIAL]
    done = rq.done[i, r]
    chunk = min(rq.target[i, r] - done, budget)
    blocks = _blocks(done + chunk) - _blocks(done)
    if blocks > ei[E_FREE]:  # it is the tail itself: nothing later can be preempted for it
        _preempt_tail(rq, en, ba, i, e)
        return -1, 0
    ei[E_FREE] -= blocks
    rq.done[i, r] = done + chunk
    return chunk, chunk * done + chunk * (chunk + 1) // 2


@njit(cache=True)
def _run_running_short_of_blocks(rq, en, ba, i, e):
    """Give decoding requests their next block in order of admission, preempting from the tail."""
    ei = en.ints[i, e]
    phase = ei[E_ITERATION] % BLOCK_TOKENS
    r = ei[E_HEAD]
    while r >= 0 and rq.state[i, r] == DECODING:
        after = rq.after[i, r]
        if (rq.joined[i, r] - rq.target[i, r]) % BLOCK_TOKENS == phase:
            while ei[E_FREE] < 1:
                if _preempt_tail(rq, en, ba, i, e) == r:
                    return
            ei[E_FREE] -= 1
            after = rq.after[i, r]  # its successor may have been preempted
        r = after


@njit(cache=True)
def _next_waiting(rq, en, i, e, now):
    """The request vLLM would look at first: the earliest admitted preempted one, else by arrival."""
    ei = en.ints[i, e]
    if ei[E_PREEMPTED] > 0:
        return en.stack[i, e, ei[E_PREEMPTED] - 1]
    at = ei[E_NEXT]
    if at < ei[E_END] and rq.arrival[i, at] <= now:
        return at
    return -1


@njit(cache=True)
def _take_waiting(en, i, e):
    ei = en.ints[i, e]
    if ei[E_PREEMPTED] > 0:
        ei[E_PREEMPTED] -= 1
    else:
        ei[E_NEXT] += 1


@njit(cache=True)
def _stretch(rq, en, ba, ph, i, e, until, blocked, jump):
    """Run decode-only iterations that end by ``until`` in closed form; returns whether any ran.

    ``blocked``: nothing can be admitted until a request finishes, so arrivals need not stop it.
    """
    ei = en.ints[i, e]
    si = ba.ints[i]
    j = ei[E_TP]
    decodes = ei[E_DECODING]
    context = ei[E_CONTEXT]
    now = ei[E_NOW]
    k = si[S_CLOCK]
    count = en.heap_key[i, e, 0] - ei[E_ITERATION]
    if not jump or count < 2:
        return False
    u = ph.unit[i, j]
    step = _ps(u[U_KV_MEMORY_S] * ph.memory_scale[i, k] + u[U_KV_COMPUTE_S] * ph.compute_scale[i, k])
    step *= decodes
    base = _ps(
        ph.decode_memory_s[i, j, decodes] * ph.memory_scale[i, k]
        + ph.decode_compute_s[i, j, decodes] * ph.compute_scale[i, k]
    )
    work = base + (step // decodes) * context
    host = _ps(u[U_HOST_S])
    comm = _ps(ph.decode_comm_s[i, j, decodes])
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
        at = ei[E_NEXT]
        if at < ei[E_END] and rq.arrival[i, at] - now <= span:
            stop_at_arrival = rq.arrival[i, at] - now
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
    phase = ei[E_ITERATION] % BLOCK_TOKENS
    need = (count // BLOCK_TOKENS) * decodes
    for extra in range(count % BLOCK_TOKENS):
        need += en.phases[i, e, (phase + extra) % BLOCK_TOKENS]
    if need > ei[E_FREE]:
        need = np.int64(0)
        n = np.int64(0)
        while n < count:
            more = en.phases[i, e, (phase + n) % BLOCK_TOKENS]
            if need + more > ei[E_FREE]:
                break
            need += more
            n += 1
        count = n
        if count < 1:
            return False
    # power is a Moebius function of the iteration number: unthrottled at both ends, so in between
    limit_w = ph.whole[i, G_TDP_W] * ph.tp_degrees[j]
    for at_context in (context, context + (count - 1) * decodes):
        duration, energy = _time_and_energy(ph, i, j, k, decodes, at_context, 0, 0)
        if energy > limit_w * (duration / _PS):
            return False
    total = count * first + step * (count * (count - 1) // 2)
    contexts = count * context + decodes * (count * (count - 1) // 2)
    sf = ba.floats[i]
    sf[F_ENERGY] += (
        ph.busy_w[i, j, k] * (total / _PS)
        + count * (ph.decode_memory_j[i, j, decodes] + ph.energy_scale[i, k] * ph.decode_compute_j[i, j, decodes])
        + contexts * (u[U_KV_MEMORY_J] + ph.energy_scale[i, k] * u[U_KV_COMPUTE_J])
    )
    sf[F_BUSY_GPU_PS] += total * ph.tp_degrees[j]
    sf[F_RUNNING] += np.float64(total) * ei[E_RUNNING]
    si[W_BUSY] += total
    si[W_OUTPUT] += count * decodes
    si[W_DECODED] += count * decodes
    si[W_DECODE_PS] += decodes * total
    si[S_ITERATIONS] += count
    ei[E_ITERATION] += count
    ei[E_CONTEXT] += count * decodes
    ei[E_FREE] -= need
    ei[E_NOW] = now + total
    _finish_due(rq, en, ba, i, e, ei[E_NOW])
    return True


@njit(cache=True)
def _schedule(rq, en, ba, ph, i, e, until, jump):
    """Form the next iteration at the engine's time. Returns False if there is nothing to run."""
    ei = en.ints[i, e]
    si = ba.ints[i]
    now = ei[E_NOW]
    j = ei[E_TP]
    total_blocks = ph.kv_blocks[i, j]
    budget = np.int64(ph.whole[i, G_TOKENS])
    need = en.phases[i, e, ei[E_ITERATION] % BLOCK_TOKENS]
    preempted = False
    tokens = np.int64(0)
    pairs = np.int64(0)
    first = np.int64(-1)
    short = need > ei[E_FREE]
    if short:
        _run_running_short_of_blocks(rq, en, ba, i, e)
        preempted = True
    else:
        ei[E_FREE] -= need  # given back below if the stretch is jumped
    budget -= ei[E_DECODING]
    if ei[E_PARTIAL] >= 0:
        partial = ei[E_PARTIAL]
        chunk, chunk_pairs = _continue_partial(rq, en, ba, i, e, budget)
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
            r = _next_waiting(rq, en, i, e, now)
            if r < 0:
                break
            if _blocks(rq.prompt[i, r] + rq.output[i, r]) > total_blocks:
                _take_waiting(en, i, e)  # longer than the whole cache: the engine refuses it
                rq.state[i, r] = REJECTED
                rq.missed[i, r] = 1
                si[W_MISSES] += 1
                si[S_REJECTED] += 1
                si[S_TOKENS_DUE] -= rq.target[i, r] - rq.hit[i, r]
                continue
            if ei[E_RUNNING] >= si[S_CAP]:
                blocked = True
                break
            if budget <= 0:
                break
            done = rq.done[i, r]
            # vLLM admits a request only when its whole known sequence fits
            if _blocks(rq.target[i, r]) > ei[E_FREE]:
                blocked = True
                break
            chunk = min(rq.target[i, r] - done, budget)
            ei[E_FREE] -= _blocks(done + chunk)
            _take_waiting(en, i, e)
            rq.state[i, r] = PREFILLING
            rq.done[i, r] = done + chunk
            _append(rq, ei, i, r)
            if first < 0:
                first = r
            tokens += chunk
            pairs += chunk * done + chunk * (chunk + 1) // 2
            budget -= chunk
    decodes = ei[E_DECODING]
    if tokens == 0:
        if decodes == 0:
            return preempted  # what was preempted alone is admitted again at once
        if not preempted:
            ei[E_FREE] += need
            blocked = blocked or ei[E_RUNNING] >= si[S_CAP]
            if _stretch(rq, en, ba, ph, i, e, until, blocked, jump):
                return True
            ei[E_FREE] -= need
    duration, energy, clock = iteration(ph, i, j, si[S_CLOCK], decodes, ei[E_CONTEXT], tokens, pairs)
    ei[E_FLYING] = 1
    ei[E_FLY_END] = now + duration
    ei[E_FLY_FULL] = duration
    ei[E_FLY_DECODES] = decodes
    ei[E_FLY_CONTEXT] = ei[E_CONTEXT]
    ei[E_FLY_TOKENS] = tokens
    ei[E_FLY_PAIRS] = pairs
    ei[E_FLY_FIRST] = first
    ei[E_FLY_CLOCK] = clock
    en.power[i, e] = energy / (duration / _PS)
    return True


@njit(cache=True)
def _fly(en, ba, ph, i, e, to):
    """Let the iteration in flight go on to time ``to``: energy, busy time, clock."""
    ei = en.ints[i, e]
    si = ba.ints[i]
    sf = ba.floats[i]
    span = to - ei[E_NOW]
    ei[E_NOW] = to
    si[W_BUSY] += span
    sf[F_ENERGY] += en.power[i, e] * (span / _PS)
    sf[F_BUSY_GPU_PS] += span * ph.tp_degrees[ei[E_TP]]
    sf[F_RUNNING] += np.float64(span) * ei[E_RUNNING]
    below = ph.grid_mhz[si[S_CLOCK]] - ph.grid_mhz[ei[E_FLY_CLOCK]]
    if below > 0:
        sf[F_CLOCK] -= np.float64(span) * below
        si[W_THROTTLED] += span


@njit(cache=True)
def _run_engine(rq, en, ba, ph, i, e, until, jump):
    """Run engine ``e`` up to time ``until``; a draining engine stops when it is empty."""
    ei = en.ints[i, e]
    while True:
        if ei[E_FLYING] == 1:
            if ei[E_FLY_END] > until:
                _fly(en, ba, ph, i, e, until)
                return
            _fly(en, ba, ph, i, e, ei[E_FLY_END])
            _complete(rq, en, ba, i, e, ei[E_NOW])
        if ei[E_NOW] >= until:
            return
        if not _schedule(rq, en, ba, ph, i, e, until, jump):
            at = ei[E_NEXT]
            if at < ei[E_END]:
                ei[E_NOW] = min(rq.arrival[i, at], until)
            elif ei[E_STATUS] == DRAINING:
                ei[E_STATUS] = OFF
                ei[E_GONE] = ei[E_NOW]
                return
            else:
                ei[E_NOW] = until


@njit(cache=True)
def _retime(en, ba, ph, i, e):
    """The clock has changed under an iteration in flight: the rest of its work runs at the new one."""
    ei = en.ints[i, e]
    if ei[E_FLYING] == 0:
        return
    now = ei[E_NOW]
    duration, energy, clock = iteration(
        ph,
        i,
        ei[E_TP],
        ba.ints[i, S_CLOCK],
        ei[E_FLY_DECODES],
        ei[E_FLY_CONTEXT],
        ei[E_FLY_TOKENS],
        ei[E_FLY_PAIRS],
    )
    rest = (ei[E_FLY_END] - now) / ei[E_FLY_FULL]
    ei[E_FLY_END] = now + np.int64(rest * duration + 0.5)
    ei[E_FLY_FULL] = duration
    ei[E_FLY_CLOCK] = clock
    en.power[i, e] = energy / (duration / _PS)


# --------------------------------------------------------------------------- TP switch


@njit(cache=True)
def _first_arrival_after(rq, ba, i, low, time):
    high = ba.ints[i, S_REQUESTS]
    while low < high:
        middle = (low + high) // 2
        if rq.arrival[i, middle] <= time:
            low = middle + 1
        else:
            high = middle
    return low


@njit(cache=True)
def _reset_engine(en, ph, i, e, j, status, first, end, now):
    ei = en.ints[i, e]
    ei[:] = 0
    en.phases[i, e, :] = 0
    ei[E_STATUS] = status
    ei[E_TP] = j
    ei[E_NEXT] = first
    ei[E_END] = end
    ei[E_NOW] = now
    ei[E_HEAD] = -1
    ei[E_TAIL] = -1
    ei[E_PARTIAL] = -1
    ei[E_FREE] = ph.kv_blocks[i, j]
    ei[E_START] = NEVER
    ei[E_READY] = NEVER


@njit(cache=True)
def _set_start(en, ph, i, e, start):
    ei = en.ints[i, e]
    u = ph.unit[i, ei[E_TP]]
    ei[E_START] = start
    ei[E_READY] = start + _ps(u[U_STARTUP_S]) + _ps(u[U_WARMUP_S])


@njit(cache=True)
def _begin_switch(rq, en, ba, ph, i, j):
    si = ba.ints[i]
    old = si[S_ACTIVE]
    new = 1 - old
    now = si[S_NOW]
    si[S_SWITCHING] = 1
    si[S_SWITCHES] += 1
    eo = en.ints[i, old]
    side_by_side = ph.tp_degrees[eo[E_TP]] + ph.tp_degrees[j] <= np.int64(ph.whole[i, G_GPUS])
    _reset_engine(en, ph, i, new, j, STARTING, si[S_REQUESTS], si[S_REQUESTS], now)
    if side_by_side:
        _set_start(en, ph, i, new, now)
    else:  # hold what arrives from now on; the new engine starts on the GPUs the old one leaves
        split = _first_arrival_after(rq, ba, i, eo[E_NEXT], now)
        eo[E_END] = split
        eo[E_STATUS] = DRAINING
        en.ints[i, new, E_NEXT] = split
        si[S_ACTIVE] = new


@njit(cache=True)
def _starting_energy(en, ba, ph, i, e, begin, to):
    """Start-up and warm-up energy of a starting engine within [begin, to)."""
    ei = en.ints[i, e]
    if ei[E_START] >= to:
        return
    u = ph.unit[i, ei[E_TP]]
    warm = ei[E_START] + _ps(u[U_STARTUP_S])
    up = max(min(warm, to) - max(ei[E_START], begin), 0)
    warming = max(min(ei[E_READY], to) - max(warm, begin), 0)
    ba.floats[i, F_ENERGY] += (u[U_STARTUP_W] * up + u[U_WARMUP_W] * warming) / _PS
    ba.floats[i, F_BUSY_GPU_PS] += np.float64(up + warming) * ph.tp_degrees[ei[E_TP]]


@njit(cache=True)
def _run_segment(rq, en, ba, ph, i, to, jump):
    """Everything up to ``to``, during which neither clock nor cap changes."""
    si = ba.ints[i]
    sf = ba.floats[i]
    begin = si[S_NOW]
    busy_before = sf[F_BUSY_GPU_PS]
    if si[S_SWITCHING] == 1:
        active = si[S_ACTIVE]
        other = 1 - active
        if en.ints[i, other, E_STATUS] == STARTING:  # side by side, not yet ready; ready is a boundary
            _starting_energy(en, ba, ph, i, other, begin, to)
            _run_engine(rq, en, ba, ph, i, active, to, jump)
            if en.ints[i, other, E_READY] <= to:
                split = _first_arrival_after(rq, ba, i, en.ints[i, active, E_NEXT], to)
                en.ints[i, active, E_END] = split
                en.ints[i, active, E_STATUS] = DRAINING
                en.ints[i, other, E_STATUS] = SERVING
                en.ints[i, other, E_NEXT] = split
                en.ints[i, other, E_END] = si[S_REQUESTS]
                en.ints[i, other, E_NOW] = to
                si[S_ACTIVE] = other
        else:
            if en.ints[i, other, E_STATUS] == DRAINING:
                _run_engine(rq, en, ba, ph, i, other, to, jump)
            gone = en.ints[i, other, E_STATUS] == OFF
            ea = en.ints[i, active]
            if ea[E_STATUS] == STARTING and gone:
                if ea[E_START] == NEVER:
                    _set_start(en, ph, i, active, en.ints[i, other, E_GONE])
                _starting_energy(en, ba, ph, i, active, begin, to)
                if ea[E_READY] <= to:
                    ea[E_STATUS] = SERVING
                    ea[E_END] = si[S_REQUESTS]
                    ea[E_NOW] = ea[E_READY]
            if ea[E_STATUS] == SERVING:
                _run_engine(rq, en, ba, ph, i, active, to, jump)
                if gone:
                    si[S_SWITCHING] = 0
    else:
        _run_engine(rq, en, ba, ph, i, si[S_ACTIVE], to, jump)
    span = np.float64(to - begin)
    idle = ph.whole[i, G_GPUS] * span - (sf[F_BUSY_GPU_PS] - busy_before)
    sf[F_ENERGY] += ph.idle_w[i, si[S_CLOCK]] * (idle / _PS)
    sf[F_CLOCK] += span * ph.grid_mhz[si[S_CLOCK]]
    si[S_NOW] = to


# --------------------------------------------------------------------------- one window


@njit(cache=True)
def _quantiles(samples, n):
    """Median and 99th percentile of the first n values, interpolated linearly; NaN without values."""
    if n == 0:
        return np.nan, np.nan
    if n == 1:
        return samples[0] / _PS, samples[0] / _PS
    part = np.sort(samples[:n])
    at = 0.5 * (n - 1)
    low = int(at)
    p50 = part[low] + (at - low) * (part[min(low + 1, n - 1)] - part[low])
    at = 0.99 * (n - 1)
    low = int(at)
    p99 = part[low] + (at - low) * (part[min(low + 1, n - 1)] - part[low])
    return p50 / _PS, p99 / _PS


@njit(cache=True)
def _look_at_arrivals_and_deadlines(rq, ba, i):
    si = ba.ints[i]
    now = si[S_NOW]
    n = si[S_REQUESTS]
    while si[S_ARRIVED] < n and rq.arrival[i, si[S_ARRIVED]] <= now:
        r = si[S_ARRIVED]
        si[W_ARRIVALS] += 1
        si[W_PROMPT] += rq.prompt[i, r]
        si[S_ARRIVED] += 1
    limit = si[S_TTFT]
    while si[S_DEADLINE] < si[S_ARRIVED]:
        r = si[S_DEADLINE]
        deadline = rq.arrival[i, r] + limit
        if deadline > now:
            break
        if rq.first[i, r] < 0 or rq.first[i, r] > deadline:
            if rq.missed[i, r] == 0:
                rq.missed[i, r] = 1
                si[W_MISSES] += 1
            if rq.first[i, r] < 0 and rq.state[i, r] != REJECTED:
                si[S_OVERDUE] += 1
        si[S_DEADLINE] += 1
    while si[S_OLDEST] < si[S_ARRIVED]:
        r = si[S_OLDEST]
        if rq.first[i, r] < 0 and rq.state[i, r] != REJECTED:
            break
        si[S_OLDEST] += 1


@njit(cache=True)
def _count_due_tokens(rq, ba, i, upto):
    """Tokens of requests that have arrived by ``upto`` enter the backlog."""
    si = ba.ints[i]
    at = si[S_ARRIVED]
    while at < si[S_REQUESTS] and rq.arrival[i, at] <= upto:
        si[S_TOKENS_DUE] += rq.target[i, at] - rq.hit[i, at]
        at += 1


@njit(cache=True)
def _window_row(rq, en, ba, ph, i, begin, row):
    si = ba.ints[i]
    sf = ba.floats[i]
    now = si[S_NOW]
    span = np.float64(now - begin)
    active = si[S_ACTIVE]
    running = np.int64(0)
    waiting = si[S_ARRIVED] - si[S_SERVED] - si[S_REJECTED]
    for e in range(2):
        if en.ints[i, e, E_STATUS] != OFF:
            running += en.ints[i, e, E_RUNNING]
    waiting -= running
    blocks = ph.kv_blocks[i, en.ints[i, active, E_TP]]
    row[C_START] = begin / _PS
    row[C_DURATION] = span / _PS
    row[C_ARRIVALS] = si[W_ARRIVALS]
    row[C_PROMPT] = si[W_PROMPT]
    row[C_OUTPUT] = si[W_OUTPUT]
    row[C_PREFILL] = si[W_PREFILL]
    row[C_SERVED] = si[W_SERVED]
    row[C_MISSES] = si[W_MISSES]
    row[C_OVERDUE] = si[S_OVERDUE]
    row[C_PREEMPTIONS] = si[W_PREEMPTIONS]
    row[C_RUNNING] = running
    row[C_WAITING] = waiting
    row[C_WAITING_TOKENS] = si[S_TOKENS_DUE]
    oldest = si[S_OLDEST]
    row[C_OLDEST] = (now - rq.arrival[i, oldest]) / _PS if oldest < si[S_ARRIVED] else 0.0
    row[C_RUNNING_MEAN] = sf[F_RUNNING] / span
    row[C_BUSY] = min(si[W_BUSY] / span, 1.0)
    row[C_KV] = 1.0 - en.ints[i, active, E_FREE] / blocks
    row[C_TTFT50], row[C_TTFT99] = _quantiles(ba.ttfts[i], si[W_TTFTS])
    row[C_TPOT50], row[C_TPOT99] = _quantiles(ba.tpots[i], si[W_TPOTS])
    row[C_ITL] = si[W_DECODE_PS] / si[W_DECODED] / _PS if si[W_DECODED] > 0 else np.nan
    row[C_ENERGY] = sf[F_ENERGY]
    row[C_MEASURED] = sf[F_CLOCK] / span
    row[C_THROTTLED] = min(si[W_THROTTLED] / span, 1.0)
    row[C_CLOCK] = ph.grid_mhz[si[S_ASKED_CLOCK]]
    row[C_CAP] = si[S_CAP]
    row[C_TP] = ph.tp_degrees[en.ints[i, active, E_TP]]
    row[C_SWITCHING] = si[S_SWITCHING]
    row[C_AGE] = 0.0
    row[C_BLIND] = 0.0


@njit(cache=True)
def advance_one(rq, en, ba, ph, i, clock, cap, j, interval_ps, row, jump):
    """Hold grid clock ``clock``, batch cap ``cap`` and TP index ``j`` for one interval; fill ``row``.

    A TP degree asked for while a switch is in progress is ignored.
    """
    si = ba.ints[i]
    sf = ba.floats[i]
    begin = si[S_NOW]
    end = begin + interval_ps
    si[W_ARRIVALS : W_TPOTS + 1] = 0
    sf[F_ENERGY] = 0.0
    sf[F_RUNNING] = 0.0
    sf[F_CLOCK] = 0.0
    sf[F_BUSY_GPU_PS] = 0.0
    si[S_CAP] = cap
    if clock != si[S_ASKED_CLOCK]:
        si[S_ASKED_CLOCK] = clock
        si[S_CLOCK_DUE] = begin + _ps(ph.whole[i, G_CLOCK_DELAY_S])
    if si[S_SWITCHING] == 0 and j != en.ints[i, si[S_ACTIVE], E_TP]:
        _begin_switch(rq, en, ba, ph, i, j)
    _count_due_tokens(rq, ba, i, end)
    while si[S_NOW] < end:
        to = end
        if si[S_CLOCK_DUE] <= si[S_NOW]:
            si[S_CLOCK] = si[S_ASKED_CLOCK]
            si[S_CLOCK_DUE] = NEVER
            for e in range(2):
                _retime(en, ba, ph, i, e)
        to = min(to, si[S_CLOCK_DUE])
        other = 1 - si[S_ACTIVE]
        if si[S_SWITCHING] == 1 and en.ints[i, other, E_STATUS] == STARTING:
            ready = en.ints[i, other, E_READY]
            if ready > si[S_NOW]:
                to = min(to, ready)
        _run_segment(rq, en, ba, ph, i, to, jump)
    sf[F_TOTAL_ENERGY] += sf[F_ENERGY]
    _look_at_arrivals_and_deadlines(rq, ba, i)
    _window_row(rq, en, ba, ph, i, begin, row)


@njit(cache=True)
def advance_all(rq, en, ba, ph, clocks, caps, tps, interval_ps, rows, jump):
    """:func:`advance_one` for every simulation; ``clocks``, ``caps``, ``tps`` of shape (N,)."""
    for i in range(rows.shape[0]):
        advance_one(rq, en, ba, ph, i, clocks[i], caps[i], tps[i], interval_ps, rows[i], jump)


@njit(cache=True)
def reset_one(rq, en, ba, ph, i, n, clock, cap, j, ttft_ps, tpot_ps):
    """Begin anew with the ``n`` requests whose arrival, lengths and hits lie in ``rq``."""
    for r in range(n):
        rq.state[i, r] = WAITING
        rq.target[i, r] = rq.prompt[i, r]
        rq.done[i, r] = rq.hit[i, r]
        rq.generated[i, r] = 0
        rq.first[i, r] = -1
        rq.finish[i, r] = -1
        rq.missed[i, r] = 0
    si = ba.ints[i]
    si[:] = 0
    ba.floats[i, :] = 0.0
    si[S_CAP] = cap
    si[S_CLOCK] = clock
    si[S_ASKED_CLOCK] = clock
    si[S_CLOCK_DUE] = NEVER
    si[S_REQUESTS] = n
    si[S_TTFT] = ttft_ps
    si[S_TPOT] = tpot_ps
    _reset_engine(en, ph, i, 1, j, OFF, n, n, 0)
    _reset_engine(en, ph, i, 0, j, SERVING, 0, n, 0)
