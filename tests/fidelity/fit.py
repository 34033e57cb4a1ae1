"""A profile of a CPU engine, from the iterations of its calibration."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from scipy.optimize import nnls

from rlgov.errors import CalibrationError
from tests.fidelity.iterations import Floats, Iterations

STALL = 1.6  # times what the fit says: another program had the core
FAR = 2.5  # times the median, whatever the context
ROUNDS = 3
LEAST_BATCHES = 2
LEAST_ROWS = 20
NOTHING = 1e-13  # seconds; a time of 0 would be an efficiency without end


@dataclass(frozen=True, slots=True)
class IterationFit:
    """How long an iteration takes.

    ``wall_s = alone_s[D] + context_s C + prompt_s P + pair_s A``, and ``prompts_s`` more where P > 0.

    D sequences decode with C tokens of context in total, beside P prompt tokens with A (query, key) pairs.
    """

    batches: tuple[int, ...]
    alone_s: tuple[float, ...]  # at the batches
    context_tokens: tuple[float, ...]  # mean per sequence, at the batches
    context_s: float
    prompts_s: float
    prompt_s: float
    pair_s: float
    base_s: float  # alone_s by a straight line: at no decode ...
    sequence_s: float  # ... and per decode
    rows: int
    stalled: int  # rows left out
    error: float  # mean absolute, relative, of the rows
    bias: float  # mean, relative

    def predict_s(self, rows: Iterations) -> Floats:
        """Time of each of these iterations."""
        # As the simulator's tables have it: the line's shape, corrected at the batches, in log(batch).
        at = np.array(self.batches, dtype=np.float64)
        ratio = np.array(self.alone_s) / (self.base_s + self.sequence_s * at)
        log_batch = np.log(np.maximum(rows.decodes, 1.0))
        alone = (self.base_s + self.sequence_s * rows.decodes) * np.interp(log_batch, np.log(at), ratio)
        return np.asarray(
            alone
            + self.context_s * rows.context_tokens
            + self.prompts_s * (rows.prefill_tokens > 0)
            + self.prompt_s * rows.prefill_tokens
            + self.pair_s * rows.pairs
        )


def fit_iterations(rows: Iterations) -> IterationFit:
    """Fit times of iterations; rows of unknown composition and stalled ones are left out.

    Raises:
        CalibrationError: Too few iterations decoded alone, or computed prompts.
    """
    known = rows.take(np.isfinite(rows.context_tokens) & np.isfinite(rows.pairs))
    used = known
    fit = _fit(known)
    for _ in range(ROUNDS):
        used = known.take(known.wall_s <= STALL * fit.predict_s(known))
        fit = _fit(used)
    relative = fit.predict_s(used) / used.wall_s - 1.0
    return replace(
        fit,
        rows=len(used),
        stalled=len(known) - len(used),
        error=float(np.abs(relative).mean()),
        bias=float(fit.predict_s(used).sum() / used.wall_s.sum() - 1.0),
    )


def _fit(rows: Iterations) -> IterationFit:
    decode = _near_median(rows.take((rows.prefill_tokens == 0) & (rows.decodes >= 1)))
    sizes = [b for b in np.unique(decode.decodes) if (decode.decodes == b).sum() >= LEAST_ROWS]
    if len(sizes) < LEAST_BATCHES:
        msg = f"{len(sizes)} batch sizes have {LEAST_ROWS} iterations; at least {LEAST_BATCHES} are needed"
        raise CalibrationError(msg)
    decode = decode.take(np.isin(decode.decodes, sizes))
    kind = np.searchsorted(sizes, decode.decodes)
    counts = np.bincount(kind).astype(np.float64)
    mean_wall = np.bincount(kind, decode.wall_s) / counts
    mean_context = np.bincount(kind, decode.context_tokens) / counts
    context = decode.context_tokens - mean_context[kind]
    # Relative errors count, so that large batches do not decide alone.
    weight = 1.0 / mean_wall[kind] ** 2
    shared = (weight * context * (decode.wall_s - mean_wall[kind])).sum() / (weight * context**2).sum()
    context_s = max(float(shared), NOTHING)
    alone = mean_wall - context_s * mean_context
    batches = np.array(sizes)
    shape = np.stack([np.ones_like(batches), batches], axis=1)
    line, _ = nnls(shape / alone[:, None], np.ones_like(batches))
    fit = IterationFit(
        batches=tuple(int(b) for b in sizes),
        alone_s=tuple(alone.tolist()),
        context_tokens=tuple((mean_context / batches).tolist()),
        context_s=context_s,
        prompts_s=0.0,
        prompt_s=0.0,
        pair_s=0.0,
        base_s=float(line[0]),
        sequence_s=float(line[1]),
        rows=len(rows),
        stalled=0,
        error=0.0,
        bias=0.0,
    )
    prefill = rows.take(rows.prefill_tokens > 0)
    if len(prefill) < LEAST_ROWS:
        msg = f"the calibration has {len(prefill)} iterations with prompts; at least {LEAST_ROWS} are needed"
        raise CalibrationError(msg)
    rest = prefill.wall_s - fit.predict_s(prefill)
    work = np.stack([np.ones(len(prefill)), prefill.prefill_tokens, prefill.pairs], axis=1)
    scale = 1.0 / prefill.wall_s
    (prompts_s, prompt_s, pair_s), _ = nnls(work * scale[:, None], rest * scale)
    return replace(fit, prompts_s=float(prompts_s), prompt_s=float(prompt_s), pair_s=float(pair_s))


def _near_median(rows: Iterations) -> Iterations:
    """Without decode iterations far above the median of their batch: stalls, before anything is fitted."""
    keep = np.ones(len(rows), dtype=np.bool_)
    for batch in np.unique(rows.decodes):
        mine = rows.decodes == batch
        keep[mine] = rows.wall_s[mine] <= FAR * np.median(rows.wall_s[mine])
    return rows.take(keep)
