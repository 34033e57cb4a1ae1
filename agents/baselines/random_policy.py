"""A uniformly random choice among what the mask allows: the floor any learning must leave behind."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from rlgov.records import Configuration, Limits


class RandomPolicy:
    """Every axis uniform over its allowed choices; each ``start`` repeats the same stream."""

    name = "random"
    guarded = True

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._rng = np.random.default_rng(seed)
        self._sizes = (1, 1, 1)

    def start_configuration(self, limits: Limits) -> Configuration:
        """The fastest."""
        return limits.fastest

    def start(self, limits: Limits, n: int) -> None:  # noqa: ARG002 - the mask brings n
        """Rewind the random stream."""
        self._rng = np.random.default_rng(self._seed)
        self._sizes = limits.axis_sizes

    def decide(
        self,
        observation: NDArray[np.float32],  # noqa: ARG002 - the seam's
        rows: NDArray[np.float64],  # noqa: ARG002 - the seam's
        mask: NDArray[np.bool_],
    ) -> NDArray[np.int64]:
        """The highest of one uniform draw per allowed choice; index 0 where an axis allows none."""
        draws = np.where(mask, self._rng.random(mask.shape), -1.0)
        edges = np.cumsum((0, *self._sizes))
        parts = [draws[:, a:b].argmax(axis=1) for a, b in pairwise(edges)]
        return np.stack(parts, axis=1).astype(np.int64)
