"""Time of a decode iteration at default clocks, across models: a sum of what each part must take.

    gpu  = |weights read, dense arithmetic|_2 + |experts read, expert arithmetic|_2 + KV read
           + launches x launch_s + expert layers x (expert_layer_s + log2(GPUs) x exchange_s)
           + block-scaled layers x scaled_layer_s + layers of eager attention x eager_layer_s
           + batch x (sequence_s + all-reduce by bandwidth)
    host = host_long_s for reasoning outputs of one GPU + batch x host_sequence_s
    t    = (gpu^3 + host^3)^(1/3)

Experts read are those of the GPU that holds most of the chosen ones, where experts are not equally popular:
their popularity is gamma distributed with shape ``evenness``.

The host takes part on B200 only, where small models leave the GPU waiting for it. Efficiencies of memory and
matrix units are taken from kernel measurements (vidur) and not fitted here; what is fitted is what kernels do
not show.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np

from rlgov.calibration.fitting import Bound, LeftOut, Solution, leave_groups_out, solve
from rlgov.calibration.work import ACCELERATORS, Work, read_work

if TYPE_CHECKING:
    from collections.abc import Mapping

    import pandas as pd
    from numpy.typing import NDArray

    from rlgov.calibration.work import Accelerator

    Floats = NDArray[np.float64]

# vidur, single kernels on H100: 0.87 of the bandwidth, 0.69 of the arithmetic. KV as weights, rounded.
FIXED: Final = {"weight_efficiency": 0.87, "kv_efficiency": 0.9, "mfu": 0.69}
_HOST_POWER = 3.0  # of the norm that joins host and GPU
_DENSE = {"launch_s": Bound(5e-6, 0.0, 2e-5), "sequence_s": Bound(2e-5, 0.0, 2e-4)}
_HOST = {
    "host_sequence_s": Bound(3e-5, 0.0, 2e-4),
    "host_long_s": Bound(0.02, 0.0, 0.06),
}
_EXPERTS = {
    "expert_layer_s": Bound(4e-5, 0.0, 3e-4),
    "exchange_s": Bound(1.5e-5, 0.0, 3e-4),
    "scaled_layer_s": Bound(4e-5, 0.0, 3e-4),
    "eager_layer_s": Bound(5e-5, 0.0, 3e-4),
    "evenness": Bound(1.0, 0.1, 50.0),
}
NONE: Final = dict.fromkeys((*_DENSE, *_HOST, *_EXPERTS), 0.0) | {"evenness": np.inf}
"""Every fitted parameter at nothing."""


def gpu_s(work: Work, card: Accelerator, p: Mapping[str, float]) -> Floats:
    """Time of an iteration on the busiest GPU."""
    bandwidth = card.bytes_per_s * p["weight_efficiency"]
    arithmetic = card.bf16_flop_per_s * p["mfu"]
    dense_s = np.hypot(work.dense_bytes / bandwidth, work.dense_flop * work.batch / arithmetic)
    _, busiest_bytes = work.expert_bytes(p["evenness"])
    expert_s = np.hypot(busiest_bytes / bandwidth, work.expert_flop * work.batch / arithmetic)
    kv_s = work.kv_bytes / (card.bytes_per_s * p["kv_efficiency"])
    layer_s = work.expert_layers * (p["expert_layer_s"] + np.log2(work.gpus) * p["exchange_s"])
    layer_s = layer_s + work.scaled_layers * p["scaled_layer_s"] + work.eager_layers * p["eager_layer_s"]
    fixed_s = work.launches * p["launch_s"] + layer_s
    return np.asarray(dense_s + expert_s + kv_s + fixed_s + work.batch * (p["sequence_s"] + work.exchange_s))


def iteration_s(work: Work, card: Accelerator, p: Mapping[str, float]) -> Floats:
    """Time of an iteration as a client sees it."""
    on_gpu = gpu_s(work, card, p)
    host = p["host_long_s"] * work.long_output + p["host_sequence_s"] * work.batch
    return np.asarray((on_gpu**_HOST_POWER + host**_HOST_POWER) ** (1.0 / _HOST_POWER))


@dataclass(frozen=True, slots=True)
class TimeFit:
    """Rows of one kind on one GPU with their fit, every model left out once."""

    work: Work
    card: Accelerator
    errors: LeftOut  # every model left out once
    by_shape: LeftOut  # every architecture left out once, with all its precisions and finetunes
    fixed: Mapping[str, float]
    bounds: Mapping[str, Bound]

    @property
    def parameters(self) -> dict[str, float]:
        """Fitted to all rows, with what was held."""
        return {**self.fixed, **self.errors.best.values}  # noqa: PD011  # a solution's, no frame's


def fit_time(frame: pd.DataFrame, gpu: str, kind: str, held: Mapping[str, float] | None = None) -> TimeFit:
    """Fit the decode time of one kind of model on one GPU, every model left out once.

    Args:
        frame: ML.ENERGY's table.
        gpu: H100 or B200.
        kind: ``dense``; or ``experts``, whose dense part is that of ``held``.
        held: parameters that are not fitted.

    Returns:
        The fit.
    """
    work, card = read_work(frame, gpu, kind), ACCELERATORS[gpu]
    bounds = dict(_EXPERTS if kind == "experts" else _DENSE)
    if not work.eager_layers.any():
        bounds.pop("eager_layer_s", None)
    if gpu == "B200" and kind == "dense":
        bounds |= _HOST
    fixed = {**FIXED, **NONE, **(held or {})}

    def fit(rows: NDArray[np.int64]) -> Solution:
        chosen = work.take(rows)
        return solve(bounds, lambda p: np.log(iteration_s(chosen, card, {**fixed, **p}) / chosen.median_s))

    def predict(p: Mapping[str, float], rows: NDArray[np.int64]) -> Floats:
        return iteration_s(work.take(rows), card, {**fixed, **p})

    errors, by_shape = (
        leave_groups_out(groups, fit, predict, work.median_s) for groups in (work.model, work.shape)
    )
    return TimeFit(work, card, errors, by_shape, fixed, bounds)
