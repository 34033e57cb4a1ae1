"""Fit the parameters of a card's profiles to published rows of dense bf16 models.

Three least-squares fits with few physical parameters, shared by all dense bf16 models of a card:

1. matrix multiplication: ``vidur_linear.csv``, the arithmetic efficiency of single kernels;
2. decode time: ``ml_energy_llm.csv``, pure-decode iterations at the default clock;
3. power: ``ml_energy_llm.csv`` (default clock) and, on H100, ``prefill_power_h100.csv`` (clock x prompt
   length) together, with the TDP plateau.

Ranges of fitted parameters are those over the fits that leave out one model.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

import numpy as np
from scipy.optimize import least_squares

from rlgov.calibration.dense_priors import PRIORS
from rlgov.calibration.dense_rows import (
    CHAT,
    H100,
    MODELS,
    REASONING,
    Rows,
    Sweep,
    read_all_reduce,
    read_rows,
    read_sweep,
    rounded,
)
from rlgov.calibration.published import LINEAR_FILE, read_table
from rlgov.calibration.work import PROMPT_TOKENS
from rlgov.simulation.physics import Physics, corrected_decode
from rlgov.simulation.profile import DecodeRow, Gpu, Model

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from numpy.typing import NDArray

    Floats = NDArray[np.float64]

_PLATEAU_SHARE = 695.0 / 700.0  # of TDP: where the prefill sweep saturates

ML_ENERGY: Final = "ML.ENERGY benchmark v3 (Chung et al.)"
SWEEP: Final = "H100 prefill power over clock and prompt length in a public vLLM fork"

TIME_BOUNDS = {  # start, lower, upper
    "weight_efficiency": (0.9, 0.85, 0.93),
    "kv_efficiency": (0.9, 0.6, 0.98),
    "layer_overhead_s": (6e-5, 1e-5, 1.2e-4),
    "sequence_overhead_s": (6e-5, 0.0, 2e-4),
}
_POWER_BOUNDS = {
    "constant_w": (100.0, 70.0, 125.0),
    "weight_j_per_byte": (1.2e-10, 1e-11, 4e-10),
    "kv_j_per_byte": (1.5e-10, 1e-11, 4e-10),
    "flop_j": (1.5e-12, 3e-13, 3e-12),
}
_GAP_BOUNDS = {"gap_2": (50.0, 0.0, 1000.0), "gap_4": (150.0, 0.0, 2000.0)}  # prompt tokens' worth of time


@dataclass(frozen=True, slots=True)
class Setup:
    """Which card, which rows, and what its priors are."""

    gpu: Gpu
    table_gpu: str
    models: Mapping[str, Model]
    priors: Mapping[str, float]
    tasks: tuple[str, ...] = (CHAT, REASONING)
    sweep: bool = True  # whether the prefill sweep is of this card
    kernels: bool = True  # whether kernels are fitted, too; otherwise gemm_mfu is a prior
    all_reduce: Mapping[int, float] | None = None  # measured on a DGX H100 where None
    power_bounds: Mapping[str, tuple[float, float, float]] = field(default_factory=lambda: _POWER_BOUNDS)

    @property
    def source(self) -> str:
        """Of the rows."""
        return f"{ML_ENERGY}, {self.table_gpu}, dense bf16"


H100_SETUP: Final = Setup(H100, "H100", MODELS, {name: prior[0] for name, prior in PRIORS.items()})


@dataclass(frozen=True, slots=True)
class Fit:
    """Values with the range over leave-one-out fits, and the errors of a fit."""

    best: Mapping[str, float]
    low: Mapping[str, float]
    high: Mapping[str, float]
    error: str


@dataclass(frozen=True, slots=True)
class Report:
    """What the fits came to, in numbers that tests can judge. Errors are mean absolute, relative."""

    kernel_error: float
    time_error: float
    time_error_left_out: Mapping[str, float]  # by model
    power_error: float
    sweep_error: float | None  # None where there is no sweep of this card
    power_error_left_out: Mapping[str, float]
    batch_error_left_out_s: Mapping[str, float]  # by profile and TP degree
    batch_error_left_out_w: Mapping[str, float]


def fit_kernels(data: Path) -> tuple[float, float]:
    """Arithmetic efficiency of matrix multiplication on H100, and the mean relative error of its fit."""
    frame = read_table(
        data, LINEAR_FILE, ("num_tokens", "n_embd", "n_head", "n_kv_head", "tp"), ("gpu", "model")
    )
    frame = frame[frame["gpu"] == "H100"]
    parts = ["attn_pre_proj_ms", "attn_post_proj_ms", "mlp_up_proj_ms", "mlp_down_proj_ms"]
    seconds = frame[parts].sum(axis=1).to_numpy(np.float64) * 1e-3
    tokens = frame["num_tokens"].to_numpy(np.float64)
    hidden = frame["n_embd"].to_numpy(np.float64)
    kv_share = frame["n_kv_head"].to_numpy(np.float64) / frame["n_head"].to_numpy(np.float64)
    inner = frame["n_expanded_embd"].to_numpy(np.float64)
    gated = np.where(frame["model"].str.contains("phi"), 2.0, 3.0)  # phi-2's MLP has no gate
    weights = hidden * (hidden * (2.0 + 2.0 * kv_share) + gated * inner) / frame["tp"].to_numpy(np.float64)

    def model(p: Floats) -> Floats:
        read_s = 2.0 * weights / (H100.hbm_bytes_per_s * p[0])
        multiply_s = 2.0 * weights * tokens / (H100.peak_bf16_flop_per_s * p[1])
        return np.asarray(np.hypot(read_s, multiply_s) + p[2], dtype=np.float64)

    def residual(p: Floats) -> Floats:
        return np.asarray(np.log(model(p) / seconds), dtype=np.float64)

    result = least_squares(
        residual,
        [0.85, 0.65, 2e-5],
        bounds=([0.5, 0.3, 0.0], [1.0, 1.0, 1e-4]),
        x_scale=[1.0, 1.0, 1e-5],
    )
    return rounded(float(result.x[1])), float(np.mean(np.abs(model(result.x) / seconds - 1.0)))


def decode_s(rows: Rows, p: Mapping[str, float], all_reduce: Mapping[int, float]) -> Floats:
    """Predicted pure-decode iteration time of the rows."""
    physics = Physics(rows.gpu, rows.model, p, all_reduce)
    return physics.decode(rows.tp, rows.batch).total_s + physics.kv_s(rows.tp) * rows.contexts


def prefill_j(rows: Rows, physics: Physics) -> float:
    """Energy that one prefill adds to an iteration of the TP group."""
    tokens = PROMPT_TOKENS[rows.task]
    flop = 2.0 * rows.model.matrix_parameters * tokens
    busy_w = float(physics.busy_w(rows.tp, np.ones(1))[0])
    return flop * physics.p["flop_j"] + busy_w * physics.prefill_s(rows.tp) * tokens


def mean_power_w(rows: Rows, p: Mapping[str, float], all_reduce: Mapping[int, float]) -> Floats:
    """Predicted mean power per GPU of the rows at saturation: decodes with prefills mixed in."""
    physics = Physics(rows.gpu, rows.model, p, all_reduce)
    work = physics.decode(rows.tp, rows.batch)
    decode_j = physics.busy_w(rows.tp, np.ones(1)) * rows.decode_s + work.total_j
    decode_j = decode_j + physics.kv_j() * rows.contexts
    mixed_j = np.minimum(decode_j + prefill_j(rows, physics), _most_mixed_j(rows))
    iteration_j = (1.0 - rows.prefills) * decode_j + rows.prefills * mixed_j
    return np.asarray(iteration_j / rows.mean_s / rows.tp, dtype=np.float64)


def decode_power_w(rows: Rows, p: Mapping[str, float], all_reduce: Mapping[int, float]) -> Floats:
    """Measured power per GPU with the modelled share of prefills taken out: inverse of the above."""
    physics = Physics(rows.gpu, rows.model, p, all_reduce)
    mean_j = rows.power_w * rows.tp * rows.mean_s
    added_j, most_j = prefill_j(rows, physics), _most_mixed_j(rows)
    plain_j = mean_j - rows.prefills * added_j
    capped_j = (mean_j - rows.prefills * most_j) / (1.0 - rows.prefills)
    chosen_j = np.where(plain_j + added_j <= most_j, plain_j, capped_j)
    return np.asarray(chosen_j / rows.decode_s / rows.tp, dtype=np.float64)


def _most_mixed_j(rows: Rows) -> Floats:
    longer_s = np.where(rows.prefills > 0, (rows.mean_s - rows.decode_s) / rows.prefills, 0.0)
    return np.asarray(
        rows.gpu.tdp_w * _PLATEAU_SHARE * rows.tp * (rows.decode_s + longer_s), dtype=np.float64
    )


def sweep_power_w(sweep: Sweep, p: Mapping[str, float], all_reduce: Mapping[int, float]) -> Floats:
    """Predicted power per GPU. The sweep's model is unknown; its size cancels but for the all-reduce.

    Time counts in units of one prompt token's arithmetic at the highest clock: an iteration of n tokens
    takes n / x for arithmetic, n c for the all-reduce (as for Qwen3-32B), a constant for reading the
    weights, and a gap per TP degree.
    """
    physics = Physics(H100, MODELS["Qwen/Qwen3-32B"], p, all_reduce)
    flop_per_s = H100.peak_bf16_flop_per_s * p["prefill_mfu"]
    read = flop_per_s / (H100.hbm_bytes_per_s * p["weight_efficiency"])
    gap = np.where(sweep.tp == min(sweep.tp), p["gap_2"], p["gap_4"])
    comm = np.array([physics.comm_s(tp) / physics.prefill_s(tp) for tp in sweep.tp.astype(int).tolist()])
    duration = sweep.prompt_tokens * (1.0 / sweep.x + comm) + read * physics.memory_scale(sweep.x) + gap
    # Two bytes and two FLOP a weight: reading the weights once is as many bytes as FLOP of one token.
    memory_w = flop_per_s * p["weight_j_per_byte"] / duration * physics.memory_energy_scale(sweep.x)
    arithmetic = sweep.prompt_tokens * flop_per_s * p["flop_j"] * physics.voltage_squared(sweep.x)
    power_w = physics.busy_w(1, sweep.x) + memory_w + arithmetic / duration
    return np.asarray(np.minimum(power_w, H100.tdp_w * _PLATEAU_SHARE), dtype=np.float64)


def _solve(
    bounds: Mapping[str, tuple[float, float, float]], residual: Callable[[Mapping[str, float]], Floats]
) -> dict[str, float]:
    names = list(bounds)
    start, low, high = (np.array([bounds[n][i] for n in names]) for i in range(3))
    scale = high - low

    def scaled(z: Floats) -> Floats:
        return residual(dict(zip(names, (low + z * scale).tolist(), strict=True)))

    result = least_squares(
        scaled,
        (start - low) / scale,
        bounds=(np.zeros(len(names)), np.ones(len(names))),
    )
    return dict(zip(names, (low + result.x * scale).tolist(), strict=True))


def _relative(predicted: Floats, measured: Floats) -> float:
    return float(np.mean(np.abs(predicted / measured - 1.0)))


def _spread(best: Mapping[str, float], fits: list[dict[str, float]], error: str) -> Fit:
    values = {name: rounded(value) for name, value in best.items()}
    low = {n: min(v, *(rounded(f[n]) for f in fits)) for n, v in values.items()}
    high = {n: max(v, *(rounded(f[n]) for f in fits)) for n, v in values.items()}
    return Fit(values, low, high, error)


@dataclass(frozen=True, slots=True)
class Calibration:
    """Everything fitted for one card."""

    setup: Setup
    rows: list[Rows]
    gemm_mfu: Fit
    time: Fit
    power: Fit
    all_reduce: Mapping[int, float]
    report: Report

    @property
    def parameters(self) -> dict[str, float]:
        """All parameters by name, priors included."""
        return {**self.setup.priors, **self.gemm_mfu.best, **self.time.best, **self.power.best}


def calibrate(data: Path, setup: Setup = H100_SETUP) -> Calibration:
    """Run the three fits on the measurements in ``data``, with every leave-one-model-out fit.

    Raises:
        CalibrationError: A table is missing or damaged.
    """
    rows = read_rows(data, setup.gpu, setup.table_gpu, setup.models, setup.tasks)
    sweep = read_sweep(data) if setup.sweep else None
    all_reduce = read_all_reduce(data) if setup.all_reduce is None else setup.all_reduce
    mfu, kernel_error = fit_kernels(data) if setup.kernels else (setup.priors["gemm_mfu"], float("nan"))
    base = dict(setup.priors) | {name: s[0] for name, s in setup.power_bounds.items()}
    base["gemm_mfu"] = mfu
    names = sorted({r.model.name for r in rows})

    def time_fit(chosen: list[Rows]) -> dict[str, float]:
        return _solve(
            TIME_BOUNDS,
            lambda p: np.concatenate(
                [np.log(decode_s(r, {**base, **p}, all_reduce) / r.decode_s) for r in chosen]
            ),
        )

    time_best = time_fit(rows)
    time_left_out = {name: time_fit([r for r in rows if r.model.name != name]) for name in names}
    base |= {name: rounded(value) for name, value in time_best.items()}

    def power_fit(chosen: list[Rows]) -> dict[str, float]:
        def residual(p: Mapping[str, float]) -> Floats:
            q = {**base, **p}
            parts = [np.log(mean_power_w(r, q, all_reduce) / r.power_w) for r in chosen]
            if sweep is not None:
                parts.append(np.log(sweep_power_w(sweep, q, all_reduce) / sweep.power_w))
            return np.concatenate(parts)

        return _solve({**setup.power_bounds, **(_GAP_BOUNDS if setup.sweep else {})}, residual)

    power_best = power_fit(rows)
    power_left_out = {name: power_fit([r for r in rows if r.model.name != name]) for name in names}

    def time_error(p: Mapping[str, float], chosen: list[Rows]) -> float:
        q = {**base, **p}
        return _relative(
            np.concatenate([decode_s(r, q, all_reduce) for r in chosen]),
            np.concatenate([r.decode_s for r in chosen]),
        )

    def power_error(p: Mapping[str, float], chosen: list[Rows]) -> float:
        q = {**base, **p}
        return _relative(
            np.concatenate([mean_power_w(r, q, all_reduce) for r in chosen]),
            np.concatenate([r.power_w for r in chosen]),
        )

    def of(name: str) -> list[Rows]:
        return [r for r in rows if r.model.name == name]

    time_errors = {name: time_error(time_left_out[name], of(name)) for name in names}
    power_errors = {name: power_error(power_left_out[name], of(name)) for name in names}
    sweep_error = None
    if sweep is not None:
        sweep_error = _relative(sweep_power_w(sweep, {**base, **power_best}, all_reduce), sweep.power_w)
    count = sum(len(r.batch) for r in rows)
    time_all, power_all = time_error(time_best, rows), power_error(power_best, rows)
    time_note = _note(time_all, time_errors, count)
    power_note = _note(power_all, power_errors, count)
    if sweep is not None:
        power_note += f"; prefill sweep {sweep_error:.1%} ({len(sweep.x)} rows)"
    power_values = {name: power_best[name] for name in setup.power_bounds}
    final = base | power_values
    by_batch = [(r, *_leave_one_batch_out(r, final, all_reduce)) for r in rows if r.task == CHAT]
    report = Report(
        kernel_error=kernel_error,
        time_error=time_all,
        time_error_left_out=time_errors,
        power_error=power_all,
        sweep_error=sweep_error,
        power_error_left_out=power_errors,
        batch_error_left_out_s={f"{r.model.name} TP{r.tp}": s for r, s, _ in by_batch if np.isfinite(s)},
        batch_error_left_out_w={f"{r.model.name} TP{r.tp}": w for r, s, w in by_batch if np.isfinite(s)},
    )
    return Calibration(
        setup=setup,
        rows=rows,
        gemm_mfu=Fit({"gemm_mfu": mfu}, {"gemm_mfu": mfu}, {"gemm_mfu": mfu}, f"fit {kernel_error:.1%}"),
        time=_spread(time_best, list(time_left_out.values()), time_note),
        power=_spread(
            power_values, [{n: f[n] for n in setup.power_bounds} for f in power_left_out.values()], power_note
        ),
        all_reduce=all_reduce,
        report=report,
    )


def _note(error: float, left_out: Mapping[str, float], count: int) -> str:
    mean = float(np.mean(list(left_out.values())))
    worst = max(left_out.values())
    data = f"{count} rows, {len(left_out)} models"
    return f"fit {error:.1%}, leave-one-model-out mean {mean:.1%}, worst {worst:.1%} ({data})"


def _leave_one_batch_out(
    rows: Rows, p: Mapping[str, float], all_reduce: Mapping[int, float]
) -> tuple[float, float]:
    """Errors of time and power of interior rows, each predicted from the others; NaN without any."""
    physics = Physics(rows.gpu, rows.model, p, all_reduce)
    measured = decode_rows(rows, p, all_reduce)
    time_errors, power_errors = [], []
    for i in range(1, len(measured) - 1):
        row, at = measured[i], np.array([measured[i].batch])
        work = corrected_decode(physics, measured[:i] + measured[i + 1 :], rows.tp, at)
        context_tokens = row.batch * row.context_tokens
        duration_s = float(work.total_s[0]) + physics.kv_s(rows.tp) * context_tokens
        energy_j = float(physics.busy_w(rows.tp, np.ones(1))[0]) * duration_s
        energy_j += float(work.total_j[0]) + physics.kv_j() * context_tokens
        time_errors.append(abs(duration_s / row.iteration_s - 1.0))
        power_errors.append(abs(energy_j / duration_s / rows.tp / row.power_w - 1.0))
    if not time_errors:
        return float("nan"), float("nan")
    return float(np.mean(time_errors)), float(np.mean(power_errors))


def decode_rows(rows: Rows, p: Mapping[str, float], all_reduce: Mapping[int, float]) -> tuple[DecodeRow, ...]:
    """The rows as a profile carries them."""
    label = rows.gpu.name.split()[0]
    source = (
        f"{ML_ENERGY}, {label}, dense bf16, {rows.task}: median gap between tokens; "
        "power less the modelled share of prefills"
    )
    power_w = decode_power_w(rows, p, all_reduce)
    columns = (rows.batch, rows.context_tokens, rows.decode_s, power_w)
    return tuple(
        DecodeRow(
            tp_degree=rows.tp,
            batch=rounded(batch),
            context_tokens=rounded(context),
            iteration_s=rounded(seconds),
            power_w=rounded(watts),
            source=source,
        )
        for batch, context, seconds, watts in zip(*(c.tolist() for c in columns), strict=True)
    )


def fit_sweep_error(data: Path) -> tuple[float, int]:
    """Mean relative error of the prefill power sweep under the H100 profiles' parameters, and its rows."""
    error = calibrate(data).report.sweep_error
    return (float("nan") if error is None else error), len(read_sweep(data).x)
