"""Llama 2 70B on A100: time across LLaMA models from MuxServe, the model itself from Splitwise.

Both are serving stacks of 2023 and 2024, eager launches and all: per-layer overheads are twice those of
today's vLLM. The description of the profile says so.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import numpy as np

from rlgov.calibration.dense_rows import rounded
from rlgov.calibration.fitting import Bound, LeftOut, Solution, leave_groups_out, solve
from rlgov.calibration.published import MUXSERVE_FILE, SPLITWISE_FILE, check_columns, read_table
from rlgov.simulation.cards import find_card
from rlgov.simulation.create import Offer, create_profile
from rlgov.simulation.physics import Physics
from rlgov.simulation.profile import DecodeRow, Model, Parameter, Parameters, Profile

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from numpy.typing import NDArray

    Floats = NDArray[np.float64]

NAME: Final = "a100-llama-2-70b"
_PROMPT_TOKENS = 512  # of the rows taken
_BOUNDS = {
    "layer_overhead_s": Bound(1.5e-4, 2e-5, 4e-4),
    "all_reduce_latency_s": Bound(3e-5, 0.0, 1.2e-4),
    "sequence_overhead_s": Bound(2e-5, 0.0, 2e-4),
}
_POWER = {"constant_w": Bound(110.0, 60.0, 200.0), "weight_j_per_byte": Bound(1.3e-10, 1e-11, 4e-10)}
_LLAMA: Final = {  # layers, hidden, heads, parameters of the first LLaMA models
    "llama-7b": (32, 4096, 32, 6.74e9),
    "llama-30b": (60, 6656, 52, 32.5e9),
    "llama-65b": (80, 8192, 64, 65.2e9),
}


def _llama(name: str) -> Model:
    layers, hidden, heads, parameters = _LLAMA[name]
    return Model(
        name=name,
        layers=layers,
        hidden=hidden,
        heads=heads,
        kv_heads=heads,
        head_dim=128,
        parameters=parameters,
        lookup_parameters=32000.0 * hidden,
        bytes_per_weight=2.0,
        bytes_per_kv_value=2.0,
        source="LLaMA paper",
    )


def fit_muxserve_time(data: Path, base: Profile) -> LeftOut:
    """Decode time of LLaMA 7B to 65B at all SMs, every model left out once."""
    frame = read_table(
        data, MUXSERVE_FILE, ("tp", "sm_percent", "batch", "seq_len", "decode_iter_ms"), ("model",)
    )
    rows = frame[(frame["sm_percent"] == 100) & (frame["decode_iter_ms"] > 0) & frame["model"].isin(_LLAMA)]  # noqa: PLR2004  # all of them
    names = rows["model"].to_numpy(str)
    tp, batch, context = (rows[c].to_numpy(np.float64) for c in ("tp", "batch", "seq_len"))
    seconds = rows["decode_iter_ms"].to_numpy(np.float64) * 1e-3
    held = {name: p.value for name, p in base.parameters.items()}
    card = find_card("a100")
    links = {degree: figure.value for degree, figure in card.all_reduce_bytes_per_s.items()}

    def predict(p: Mapping[str, float], chosen: NDArray[np.int64]) -> Floats:
        out = np.empty(len(chosen))
        for name in _LLAMA:
            physics = Physics(base.gpu, _llama(name), {**held, **p}, links)
            for degree in (1, 2, 4, 8):
                mine = (names[chosen] == name) & (tp[chosen] == degree)
                if mine.any():
                    rows_ = chosen[mine]
                    work = physics.decode(degree, batch[rows_])
                    out[mine] = work.total_s + physics.kv_s(degree) * batch[rows_] * context[rows_]
        return out

    def fit(chosen: NDArray[np.int64]) -> Solution:
        return solve(_BOUNDS, lambda p: np.log(predict(p, chosen) / seconds[chosen]))

    return leave_groups_out(names, fit, predict, seconds)


def fit_a100(data: Path, model: Model) -> Profile:
    """The profile of Llama 2 70B on A100 80 GB.

    Raises:
        CalibrationError: A table is missing or damaged.
    """
    base = create_profile(find_card("a100"), model, Offer(name=NAME, tp_degrees=(8, 4)))
    time = fit_muxserve_time(data, base)
    worst = max(time.by_group.values())
    error = (
        f"fit {time.in_sample:.1%}, leave-one-model-out mean {time.over_groups:.1%}, worst {worst:.1%} "
        f"({len(time.inside)} rows, {len(time.by_group)} models)"
    )
    known = dict(base.parameters.items())
    for name, value in time.best.values.items():
        found = [value, *(f.values[name] for f in time.fits.values())]
        known[name] = _parameter(value, min(found), max(found), "MuxServe, LLaMA 7-65B on A100 80 GB", error)
    known |= _fit_power(data, base)
    changes = {
        "parameters": Parameters.model_validate(known),
        "decode_rows": _decode_rows(data, base),
        "description": (
            f"{base.gpu.name} with {model.name}, TP 8/4, fitted to serving stacks of 2023 and 2024"
        ),
    }
    return Profile.model_validate(base.model_copy(update=changes).model_dump())


def _parameter(value: float, low: float, high: float, source: str, error: str) -> Parameter:
    value = rounded(value)
    return Parameter(value=value, low=min(value, rounded(low)), high=max(value, rounded(high)), kind="fitted",
                     source=source, error=error)  # fmt: skip


def _splitwise(data: Path) -> dict[str, Floats]:
    frame = read_table(data, SPLITWISE_FILE, ("tp", "batch_size", "decode_iter_ms"), ("model", "hardware"))
    rows = frame[
        (frame["model"] == "llama2-70b")
        & (frame["hardware"] == "a100-80gb")
        & (frame["prompt_tokens"] == _PROMPT_TOKENS)
        & frame["avg_power_frac_tdp"].notna()
    ]
    check_columns(rows, ("avg_power_frac_tdp", "output_tokens"), (), f"{SPLITWISE_FILE}, llama2-70b on A100")
    rows = rows.sort_values(["tp", "batch_size"])
    names = ("tp", "batch_size", "decode_iter_ms", "output_tokens", "avg_power_frac_tdp")
    return {name: rows[name].to_numpy(np.float64) for name in names}


def _fit_power(data: Path, base: Profile) -> dict[str, Parameter]:
    rows = _splitwise(data)
    watts = rows["avg_power_frac_tdp"] * base.gpu.tdp_w
    read = base.model.dense_read_bytes / rows["tp"] / (rows["decode_iter_ms"] * 1e-3)
    clocked_w = base.parameters.clocked_w.value

    def predict(p: Mapping[str, float], chosen: NDArray[np.int64]) -> Floats:
        return np.asarray(p["constant_w"] + clocked_w + p["weight_j_per_byte"] * read[chosen])

    def fit(chosen: NDArray[np.int64]) -> Solution:
        return solve(_POWER, lambda p: np.log(predict(p, chosen) / watts[chosen]))

    groups = np.array([f"TP {tp:.0f}" for tp in rows["tp"]])
    errors = leave_groups_out(groups, fit, predict, watts)
    text = f"fit {errors.in_sample:.1%}, leave-one-TP-out mean {errors.over_groups:.1%} ({len(watts)} rows)"
    source = "Splitwise, Llama 2 70B on A100 80 GB: mean power of runs, their prefill included"
    found = {}
    for name, value in errors.best.values.items():
        values = [value, *(f.values[name] for f in errors.fits.values())]
        found[name] = _parameter(value, min(values), max(values), source, text)
    return found


def _decode_rows(data: Path, base: Profile) -> tuple[DecodeRow, ...]:
    rows = _splitwise(data)
    source = (
        "Splitwise, Llama 2 70B on A100 80 GB, vLLM of 2023; power is the mean of the run, prefill included"
    )
    columns = (rows[name].tolist() for name in rows)
    return tuple(
        DecodeRow(
            tp_degree=int(tp),
            batch=batch,
            context_tokens=_PROMPT_TOKENS + outputs / 2.0,
            iteration_s=rounded(milliseconds * 1e-3),
            power_w=rounded(share * base.gpu.tdp_w),
            source=source,
        )
        for tp, batch, milliseconds, outputs, share in zip(*columns, strict=True)
        if tp in base.deployment.tp_degrees
    )
