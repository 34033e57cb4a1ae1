"""From the rows of the plugin's ring to iterations with what they computed and how long they took."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Self

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

COLUMNS = ("t_s", "step_s", "running", "waiting", "prefill_tokens", "decode_tokens", "context_tokens")
IDLE_S = 0.002
"""A longer gap between two iterations means that there was nothing to do."""


@dataclass(frozen=True, slots=True, eq=False)
class Iterations:
    """One row an iteration.

    ``wall_s`` runs from the end of the last iteration to the end of this one, as long as there was something
    to do: what the scheduler does in between is part of an iteration's time.
    """

    end_s: Floats
    step_s: Floats
    wall_s: Floats
    decodes: Floats
    prefill_tokens: Floats
    context_tokens: Floats  # of decodes; NaN where prompts were computed beside them
    pairs: Floats  # (query, key) pairs of the prompts; NaN where chunks of prompts hide how many

    def __len__(self) -> int:
        return len(self.wall_s)

    def take(self, chosen: NDArray[np.bool_]) -> Self:
        """The chosen rows."""
        return type(self)(**{f.name: getattr(self, f.name)[chosen] for f in fields(self)})

    @classmethod
    def joined(cls, parts: Sequence[Self]) -> Self:
        """All rows of several runs."""
        return cls(**{f.name: np.concatenate([getattr(p, f.name) for p in parts]) for f in fields(cls)})


def read_iterations(
    rows: NDArray[np.float64], prompt_tokens: int | None = None, budget_tokens: int | None = None
) -> Iterations:
    """Make sense of rows of the ring, in the order of :data:`COLUMNS`, of one run that began idle.

    Args:
        rows: shape (n, 7).
        prompt_tokens: length of every prompt of the run, if all were alike. Then the contexts of decodes and
            the pairs of prompts are known in iterations that computed whole prompts, too.
        budget_tokens: the engine's limit of tokens an iteration; with it, a long prompt that was computed
            alone and in chunks is understood as well.
    """
    t, step, _, _, prefill, decodes, context = rows.T
    gap = np.diff(t, prepend=t[0] - step[0] if len(t) else 0.0) - step
    usual = float(np.median(gap[gap < IDLE_S])) if (gap < IDLE_S).any() else 0.0
    wall = step + np.where(gap < IDLE_S, gap, usual)
    pairs = np.where(prefill == 0, 0.0, np.nan)
    # The row counts the computed tokens, too; a decode attends to what was there before it.
    before = np.where(prefill == 0, context - decodes, np.nan)
    if prompt_tokens is not None:
        whole, count = _whole_prompts(prefill, prompt_tokens)
        pairs[whole] = count[whole] * _pairs(0, prompt_tokens)
        before[whole] = context[whole] - decodes[whole] - prefill[whole]
        if budget_tokens is not None and prompt_tokens > budget_tokens:
            for i in np.flatnonzero((prefill > 0) & (decodes == 0)):
                done = int(context[i] - prefill[i])
                if done % budget_tokens == 0 and prefill[i] == min(budget_tokens, prompt_tokens - done):
                    pairs[i], before[i] = _pairs(done, int(prefill[i])), 0.0
    return Iterations(t, step, wall, decodes, prefill, before, pairs)


def _pairs(done: int, tokens: int) -> float:
    return tokens * done + tokens * (tokens + 1) / 2.0


def _whole_prompts(prefill: Floats, prompt_tokens: int) -> tuple[NDArray[np.bool_], Floats]:
    """Iterations that computed a number of whole prompts, none begun before them."""
    done = np.cumsum(prefill)
    whole = (prefill > 0) & (prefill % prompt_tokens == 0) & ((done - prefill) % prompt_tokens == 0)
    return whole, prefill / prompt_tokens
