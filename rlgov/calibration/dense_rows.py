"""The published rows that the profiles of dense bf16 models are fitted to, as arrays by configuration."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np

from rlgov.calibration.published import ALL_REDUCE_FILE, PREFILL_FILE, read_ml_energy, read_table
from rlgov.calibration.work import PROMPT_TOKENS
from rlgov.simulation.profile import Gpu, Model

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from numpy.typing import NDArray

    Floats = NDArray[np.float64]

H100 = Gpu(
    name="H100 SXM 80GB",
    tdp_w=700.0,
    hbm_bytes=85.5e9,
    hbm_bytes_per_s=3.35e12,
    peak_bf16_flop_per_s=989e12,
    sm_clock_min_mhz=210,
    sm_clock_max_mhz=1980,
    sm_clock_step_mhz=15,
    source="NVIDIA H100 datasheet; memory as nvidia-smi reports it (81559 MiB)",
)


def _model(  # one line a model below
    name: str, layers: int, hidden: int, heads: int, kv_heads: int, head_dim: int, parameters: float,
    lookup_parameters: float = 0.0,
) -> Model:  # fmt: skip
    return Model(
        name=name,
        layers=layers,
        hidden=hidden,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        parameters=parameters,
        lookup_parameters=lookup_parameters,
        bytes_per_weight=2.0,
        bytes_per_kv_value=2.0,
        source="config.json of the model on Hugging Face; parameters from its card",
    )


# The dense bf16 models that ML.ENERGY measured on H100. A tied embedding counts as a matrix.
MODELS = {
    m.name: m
    for m in (
        _model("Qwen/Qwen3-8B", 36, 4096, 32, 8, 128, 8.191e9, 151936 * 4096.0),
        _model("Qwen/Qwen3-14B", 40, 5120, 40, 8, 128, 14.768e9, 151936 * 5120.0),
        _model("Qwen/Qwen3-32B", 64, 5120, 64, 8, 128, 32.762e9, 151936 * 5120.0),
        _model("google/gemma-3-12b-it", 48, 3840, 16, 8, 256, 11.77e9),
        _model("google/gemma-3-27b-it", 62, 5376, 32, 16, 128, 27.0e9),
        _model("meta-llama/Llama-3.3-70B-Instruct", 80, 8192, 64, 8, 128, 70.55e9, 128256 * 8192.0),
    )
}

CHAT: Final = "lm-arena-chat"
REASONING: Final = "gpqa"
_MOST_PREFILLS = 0.6  # per iteration; above it the median gap between tokens is no pure decode
_MOST_REASONING_BATCH = 33.0  # larger runs end before their contexts are stationary
_LARGE_MESSAGE_BYTES = 8e6  # below, latency and protocol steps hide the bandwidth
_DIGITS = 4


def rounded(value: float) -> float:
    """To the digits that a profile carries."""
    return float(f"{value:.{_DIGITS}g}")


@dataclass(frozen=True, slots=True)
class Rows:
    """Rows of one (model, TP degree, task) of ML.ENERGY."""

    gpu: Gpu
    model: Model
    tp: int
    task: str
    batch: Floats
    context_tokens: Floats  # mean per sequence
    decode_s: Floats  # one iteration that only decodes
    mean_s: Floats  # mean iteration, prefills included
    prefills: Floats  # arrivals per iteration
    power_w: Floats  # per GPU, mean

    @property
    def contexts(self) -> Floats:
        """Context tokens of all sequences."""
        return self.batch * self.context_tokens


def read_rows(
    data: Path, gpu: Gpu = H100, table_gpu: str = "H100", models: Mapping[str, Model] = MODELS,
    tasks: tuple[str, ...] = (CHAT, REASONING),
) -> list[Rows]:  # fmt: skip
    """The ML.ENERGY rows of bf16 models that the fits use.

    Args:
        data: folder of the published tables.
        gpu: the card.
        table_gpu: as the table names it.
        models: which to read.
        tasks: which to read.

    Raises:
        CalibrationError: The table is missing or damaged.
    """
    frame = read_ml_energy(data)
    frame = frame[(frame["gpu"] == table_gpu) & (frame["precision"] == "bfloat16")]
    rows = []
    for name, model in models.items():
        for task in tasks:
            chosen = frame[(frame["model"] == name) & (frame["task"] == task)]
            for tp in sorted(chosen["tp"].unique()):
                group = chosen[chosen["tp"] == tp].sort_values("avg_batch_size")
                batch = group["avg_batch_size"].to_numpy(np.float64)
                prefills = batch / group["avg_output_len"].to_numpy(np.float64)
                keep = prefills < _MOST_PREFILLS
                if task == REASONING:
                    keep &= batch < _MOST_REASONING_BATCH
                mean_s = batch / group["output_tok_s"].to_numpy(np.float64)
                median_s = group["median_itl_ms"].to_numpy(np.float64) * 1e-3
                # Where contexts are long and prefills rare, the mean is the better estimate.
                decode_s = mean_s if task == REASONING else median_s
                context = PROMPT_TOKENS[task] + group["mean_ctx_from_output"].to_numpy(np.float64)
                power_w = group["avg_power_w_per_gpu"].to_numpy(np.float64)
                columns = (batch, context, decode_s, np.maximum(mean_s, decode_s), prefills, power_w)
                rows.append(Rows(gpu, model, int(tp), task, *(c[keep] for c in columns)))
    return rows


def read_all_reduce(data: Path) -> dict[int, float]:
    """Large-message all-reduce bandwidth of a DGX H100, bytes/s by TP degree."""
    frame = read_table(data, ALL_REDUCE_FILE, ("size_bytes", "allreduce_ms", "num_workers"), ("node",))
    frame = frame[frame["node"] == "h100_dgx"]
    bandwidths = {}
    for tp in (2, 4, 8):
        group = frame[frame["num_workers"] == tp]
        size = group["size_bytes"].to_numpy(np.float64)
        seconds = group["allreduce_ms"].to_numpy(np.float64) * 1e-3
        large = size > _LARGE_MESSAGE_BYTES
        slope = np.polyfit(size[large], seconds[large], 1)[0]
        bandwidths[tp] = rounded(1.0 / float(slope))
    return bandwidths


@dataclass(frozen=True, slots=True)
class Sweep:
    """The prefill power sweep; power per GPU."""

    x: Floats
    prompt_tokens: Floats
    tp: Floats
    power_w: Floats


def read_sweep(data: Path) -> Sweep:
    """Prefill power by clock, prompt length and TP degree."""
    frame = read_table(data, PREFILL_FILE, ("tp", "prompt_tokens", "sm_mhz", "power_w_total"))
    tp = frame["tp"].to_numpy(np.float64)
    return Sweep(
        x=frame["sm_mhz"].to_numpy(np.float64) / H100.sm_clock_max_mhz,
        prompt_tokens=frame["prompt_tokens"].to_numpy(np.float64),
        tp=tp,
        power_w=frame["power_w_total"].to_numpy(np.float64) / tp,
    )
