"""Power of saturated decode at default clocks, across models: energy of the work over measured time.

    P = base + (weights x weight_j + KV x kv_j + operations x flop_j) / t
        + group_w where several GPUs + (share of waiting) x waiting_w
        + (share of block scaling) x scaling_w,   held below the limit by the card

A GPU waits for the one that holds most of the chosen experts, and for the host where attention is launched
layer by layer. Choices of experts are taken to be alike here: the uneven ones that the fit of time prefers
predict power worse, so they stand for more than unevenness.

Weights that the matrix units cannot take as they are (mxfp4 on H100) count as wide as they are unpacked. The
limit is soft because power is a mean over iterations of which only some reach it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np

from rlgov.calibration.decode_time import FIXED
from rlgov.calibration.fitting import Bound, LeftOut, Solution, leave_groups_out, solve
from rlgov.calibration.work import ACCELERATORS, Work, read_work

if TYPE_CHECKING:
    from collections.abc import Mapping

    import pandas as pd
    from numpy.typing import NDArray

    from rlgov.calibration.work import Accelerator

    Floats = NDArray[np.float64]

LIMIT_SHARE: Final = 0.97  # of TDP: where both cards saturate
_SOFTNESS = 8.0
_SCALED_LAYER_S, _EAGER_LAYER_S = 8e-5, 6e-5  # from the fit of time on H100, rounded
_BOUNDS: Final = {
    "base_w": Bound(250.0, 60.0, 600.0),
    "weight_j": Bound(8e-11, 0.0, 6e-10),
    "kv_j": Bound(1e-10, 0.0, 6e-10),
    "flop_j": Bound(8e-13, 0.0, 4e-12),
}
_GROUP = {"group_w": Bound(0.0, -200.0, 250.0)}
_WAITING = {"waiting_w": Bound(-200.0, -600.0, 0.0)}
_SCALING = {"scaling_w": Bound(200.0, 0.0, 2500.0)}
_EXTRA: Final = {"H100": {**_WAITING, **_SCALING}, "B200": {**_GROUP, **_SCALING}}
_OFF: Final = {"group_w": 0.0, "waiting_w": 0.0, "scaling_w": 0.0}


def power_w(work: Work, card: Accelerator, p: Mapping[str, float]) -> Floats:
    """Mean power per GPU of rows whose iteration time is known."""
    per_s = 1.0 / work.mean_s
    mean_bytes, busiest_bytes = work.expert_bytes(np.inf)
    weights = work.dense_bytes + mean_bytes * work.unpacked
    flop = (work.dense_flop + work.expert_flop) * work.tokens
    waiting_s = (busiest_bytes - mean_bytes) / (FIXED["weight_efficiency"] * card.bytes_per_s)
    waiting = np.minimum((waiting_s + work.eager_layers * _EAGER_LAYER_S) * per_s, 1.0)
    scaling = work.scaled_layers * _SCALED_LAYER_S * per_s
    wanted = p["base_w"] + (weights * p["weight_j"] + work.kv_bytes * p["kv_j"] + flop * p["flop_j"]) * per_s
    wanted = wanted + np.where(work.gpus > 1, p["group_w"], 0.0)
    wanted = np.maximum(wanted + waiting * p["waiting_w"] + scaling * p["scaling_w"], 1.0)
    limit = LIMIT_SHARE * card.tdp_w
    return np.asarray((wanted**-_SOFTNESS + limit**-_SOFTNESS) ** (-1.0 / _SOFTNESS))


@dataclass(frozen=True, slots=True)
class PowerFit:
    """Rows of one GPU with their fit, every model left out once."""

    work: Work
    card: Accelerator
    errors: LeftOut  # every model left out once
    by_shape: LeftOut  # every architecture left out once, with all its precisions and finetunes
    bounds: Mapping[str, Bound]

    @property
    def parameters(self) -> dict[str, float]:
        """Fitted to all rows."""
        return {**_OFF, **self.errors.best.values}  # noqa: PD011  # a solution's, no frame's


def fit_power(frame: pd.DataFrame, gpu: str, kind: str) -> PowerFit:
    """Fit the power of one kind of model (``dense``, ``experts`` or ``all``) on one GPU."""
    work, card = read_work(frame, gpu, kind), ACCELERATORS[gpu]
    bounds = _BOUNDS if kind == "dense" else {**_BOUNDS, **_EXTRA[gpu]}

    def fit(rows: NDArray[np.int64]) -> Solution:
        chosen = work.take(rows)
        return solve(bounds, lambda p: np.log(power_w(chosen, card, {**_OFF, **p}) / chosen.power_w))

    def predict(p: Mapping[str, float], rows: NDArray[np.int64]) -> Floats:
        return power_w(work.take(rows), card, {**_OFF, **p})

    errors, by_shape = (
        leave_groups_out(groups, fit, predict, work.power_w) for groups in (work.model, work.shape)
    )
    return PowerFit(work, card, errors, by_shape, bounds)
