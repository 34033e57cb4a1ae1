"""From the rows of the plugin's ring to iterations with what they computed and how long they took."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from itertools import combinations
from typing import Self

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

COLUMNS = ("t_s", "step_s", "running", "waiting", "prefill_tokens", "decode_tokens", "context_tokens")
NEAR = 8
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
    context_tokens: Floats  # of decodes; NaN as below
    pairs: Floats  # (query, key) pairs of the prompts; NaN where it is unclear which were computed

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
    rows: NDArray[np.float64], prompts: Sequence[int] = (), budget_tokens: int = 0
) -> Iterations:
    """Make sense of rows of the ring, in the order of :data:`COLUMNS`, of one run that began idle.

    Args:
        rows: shape (n, 7).
        prompts: lengths of all prompts of the run, in the order in which they were sent. The scheduler takes
            first who comes first, so they tell which prompts an iteration computed, and what of them.
        budget_tokens: the engine's limit of tokens an iteration.
    """
    t, step, _, _, prefill, decodes, context = rows.T
    gap = np.diff(t, prepend=t[0] - step[0] if len(t) else 0.0) - step
    usual = float(np.median(gap[gap < IDLE_S])) if (gap < IDLE_S).any() else 0.0
    wall = step + np.where(gap < IDLE_S, gap, usual)
    line = _Line(list(prompts), budget_tokens)
    parts = [line.take(int(p), int(d)) if p else (0.0, 0.0) for p, d in zip(prefill, decodes, strict=True)]
    pairs, earlier = np.array(parts).reshape(-1, 2).T
    # The row counts the computed tokens, too; a decode attends to what was there before it.
    before = context - decodes - prefill - earlier
    return Iterations(t, step, wall, decodes, prefill, before, pairs)


class _Line:
    """Prompts that wait to be computed."""

    def __init__(self, prompts: list[int], budget_tokens: int) -> None:
        self._prompts = prompts
        self._budget_tokens = budget_tokens
        self._done = 0  # tokens of the first one

    def take(self, tokens: int, decodes: int) -> tuple[float, float]:
        """Compute so many: their pairs, and tokens of their prompts computed before; NaN if unclear."""
        count, done, pairs, earlier, left = 0, self._done, 0.0, 0.0, tokens
        while left and count < len(self._prompts):
            now = min(self._prompts[count] - done, left)
            pairs += now * done + now * (now + 1) / 2.0
            earlier += done
            left -= now
            done += now
            if done == self._prompts[count]:
                count, done = count + 1, 0
        # Only the limit breaks a prompt off.
        if not left and (not done or tokens + decodes >= self._budget_tokens):
            del self._prompts[:count]
            self._done = done
            return pairs, earlier
        return self._swapped(tokens)

    def _swapped(self, tokens: int) -> tuple[float, float]:
        """Requests sent at almost the same moment may have overtaken each other."""
        if not self._done:
            near = range(min(len(self._prompts), NEAR))
            for size in range(1, len(near) + 1):
                for some in combinations(near, size):
                    lengths = [self._prompts[i] for i in some]
                    if sum(lengths) == tokens:
                        for i in reversed(some):
                            del self._prompts[i]
                        return sum(n * (n + 1) / 2.0 for n in lengths), 0.0
        self._prompts.clear()  # lost for the rest of the run
        return float("nan"), float("nan")
