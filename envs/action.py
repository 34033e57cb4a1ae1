"""What a policy may do: an index per axis into the deployment's limits, 0 being the fastest."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from rlgov.records import Column, Configuration

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

    from rlgov.records import Limits

CLOCK, CAP, TP = range(3)
"""Axes of an action, in order."""


_CONFIGURATION_COLUMNS = np.array([Column.SM_CLOCK_MHZ, Column.BATCH_CAP, Column.TP_DEGREE], dtype=np.intp)


class ActionTable:
    """Indices to settings and back, vectorised.

    Attributes:
        limits: The limits the table was made from.
        nvec: Number of settings per axis, int64 of shape (3,).
        size: Length of a flat action mask, ``sum(nvec)``.
        offsets: Where each axis begins in a flat mask, plus ``size``.
        sm_clocks_mhz, batch_caps, tp_degrees: The settings of each axis as int64 arrays.
    """

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.sm_clocks_mhz = np.array(limits.sm_clocks_mhz, dtype=np.int64)
        self.batch_caps = np.array(limits.batch_caps, dtype=np.int64)
        self.tp_degrees = np.array(limits.tp_degrees, dtype=np.int64)
        self.nvec: NDArray[np.int64] = np.array(limits.axis_sizes, dtype=np.int64)
        self.size = int(self.nvec.sum())
        self.offsets = (0, *np.cumsum(self.nvec).tolist())
        # Axes padded to one length with -inf: no value lies below it, so padding never counts.
        self._grid = np.full((3, int(self.nvec.max())), -np.inf)
        for axis, values in enumerate((self.sm_clocks_mhz, self.batch_caps, self.tp_degrees)):
            self._grid[axis, : len(values)] = values
        self._last = self.nvec - 1

    def values(self, index: NDArray[np.int64]) -> NDArray[np.float64]:
        """Settings (MHz, requests, GPUs) of shape (n, 3) for indices of shape (n, 3)."""
        return np.take_along_axis(self._grid, index.T, axis=1).T

    def configurations(self, index: NDArray[np.int64]) -> list[Configuration]:
        """One :class:`Configuration` per row of indices."""
        return [self.limits.configuration((clock, cap, tp)) for clock, cap, tp in index.tolist()]

    def indices(self, configurations: list[Configuration]) -> NDArray[np.int64]:
        """Inverse of :meth:`configurations`. Raises ConfigError for a setting that is not offered."""
        return np.array([self.limits.index(c) for c in configurations], dtype=np.int64).reshape(-1, 3)

    def in_force(self, rows: NDArray[np.float64]) -> NDArray[np.int64]:
        """Indices of the configuration in force at the end of each window row, shape (n, 3).

        A value between two settings counts as the lower one; NaN counts as the fastest.
        """
        values = rows.take(_CONFIGURATION_COLUMNS, axis=1)
        index: NDArray[np.int64] = (self._grid > values[:, :, None]).sum(axis=2, dtype=np.int64)
        return np.minimum(index, self._last)

    def sanitised(self, asked: ArrayLike) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """Indices that are in range, and which of them were not.

        Whatever is no index of its axis (negative, too large, NaN) becomes 0, the fastest: garbage
        never slows serving.
        """
        values = np.asarray(asked)
        if values.dtype != np.int64:
            values = values.astype(np.float64)
            values = np.where(np.isfinite(values), np.clip(values, -1.0, 1e9), -1.0).astype(np.int64)
        outside = (values < 0) | (values > self._last)
        if outside.any():
            values = np.where(outside, 0, values)
        return values, outside
