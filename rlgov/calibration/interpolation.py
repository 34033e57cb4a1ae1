"""How well a batch size is predicted from its neighbours: measured over physics, linear in log(batch).

This is how a profile with measured rows fills in the batch sizes between them
(:func:`rlgov.simulation.physics.corrected_decode`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Floats = NDArray[np.float64]

LEAST_BATCHES = 6  # of a curve: with fewer, the neighbours of a batch are too far apart to speak for it


def leave_batches_out(
    curves: NDArray[np.str_], batch: Floats, measured: Floats, physics: Floats
) -> dict[str, float]:
    """Mean absolute relative error of the interior batches of each curve with enough of them."""
    errors = {}
    for name in sorted(set(curves.tolist())):
        rows = np.flatnonzero(curves == name)
        rows = rows[np.argsort(batch[rows], kind="stable")]
        if len(rows) < LEAST_BATCHES:
            continue
        at, ratio = np.log(batch[rows]), np.log(measured[rows] / physics[rows])
        out = []
        for i in range(1, len(rows) - 1):
            keep = np.arange(len(rows)) != i
            out.append(abs(float(np.expm1(np.interp(at[i], at[keep], ratio[keep]) - ratio[i]))))
        errors[name] = float(np.mean(out))
    return errors
