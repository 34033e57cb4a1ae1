"""What the iterations of a published row had to do: bytes, operations and launches, by physics alone."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from rlgov.calibration.published import check_columns
from rlgov.calibration.shapes import SHAPES
from rlgov.errors import CalibrationError

if TYPE_CHECKING:
    import pandas as pd
    from numpy.typing import NDArray

    from rlgov.calibration.shapes import Shape

    Floats = NDArray[np.float64]
    Names = NDArray[np.str_]

# ML.ENERGY does not publish prompt lengths; these are assumed.
PROMPT_TOKENS: Final = {"lm-arena-chat": 250.0, "gpqa": 300.0, "sourcegraph-fim": 1500.0}
# Reasoning: thousands of tokens a request, streamed through a parser on the host. gpt-oss speaks a format of
# its own, which another parser reads.
LONG_OUTPUT_TASKS: Final = ("gpqa",)
OTHER_PARSER: Final = "openai/"


@dataclass(frozen=True, slots=True)
class Accelerator:
    """Datasheet of one GPU, as far as these fits need it."""

    name: str
    bytes_per_s: float
    bf16_flop_per_s: float
    fp8_flop_per_s: float
    tdp_w: float
    fp4: bool  # multiplies 4-bit weights as they are
    all_reduce_bytes_per_s: tuple[tuple[int, float], ...]

    def collective_bytes_per_s(self, gpus: int) -> float:
        """Bandwidth of an all-reduce over so many GPUs; infinite for one."""
        return dict(self.all_reduce_bytes_per_s).get(gpus, float("inf"))


ACCELERATORS: Final = {
    # vidur all_reduce.csv, h100_dgx; B200's links are twice as fast.
    "H100": Accelerator(
        "H100", 3.35e12, 989e12, 1979e12, 700.0, fp4=False,
        all_reduce_bytes_per_s=((2, 278e9), (4, 289e9), (8, 195e9)),
    ),
    "B200": Accelerator(
        "B200", 8.0e12, 2250e12, 4500e12, 1000.0, fp4=True,
        all_reduce_bytes_per_s=((2, 556e9), (4, 578e9), (8, 390e9)),
    ),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Work:
    """Columns over rows; bytes and FLOP are those of the busiest GPU unless said otherwise."""

    model: Names
    curve: Names  # one (model, task, parallelism): what a batch size can be left out of
    gpus: Floats
    batch: Floats
    long_output: Floats  # 1 where outputs are reasoning
    # measured
    median_s: Floats
    mean_s: Floats
    power_w: Floats  # per GPU
    # work
    dense_bytes: Floats
    dense_flop: Floats  # of one token, in bf16 time: an fp8 operation counts half
    expert_bytes: Floats
    mean_expert_bytes: Floats  # of the average GPU
    unpacked_bytes: Floats  # mean_expert_bytes as the matrix units take them
    expert_flop: Floats  # of one token
    kv_bytes: Floats
    launches: Floats
    expert_layers: Floats
    scaled_layers: Floats  # expert layers with block-scaled fp8
    exchange_s: Floats  # of one token: all-reduce or exchange of activations, by bandwidth
    tokens: Floats  # of an iteration on average, prefills included

    def take(self, chosen: NDArray[np.bool_] | NDArray[np.int64]) -> Work:
        """The chosen rows."""
        return Work(**{f.name: getattr(self, f.name)[chosen] for f in fields(self)})

    def __len__(self) -> int:
        return len(self.batch)


def read_work(frame: pd.DataFrame, gpu: str, kind: str = "all") -> Work:
    """The rows of one GPU.

    Args:
        frame: ML.ENERGY's table.
        gpu: as the table and :data:`ACCELERATORS` name it.
        kind: ``dense``, ``experts`` or ``all``.

    Returns:
        Rows of models whose shape is known, sorted by curve and batch. Hybrids with state-space layers have
        no shape here and are left out.

    Raises:
        CalibrationError: The GPU is not known, or no row is left.
    """
    if gpu not in ACCELERATORS:
        msg = f"there is no datasheet of the GPU {gpu!r}; known are {', '.join(ACCELERATORS)}"
        raise CalibrationError(msg)
    known = frame[(frame["gpu"] == gpu) & frame["model"].isin(SHAPES)]
    if kind != "all":
        mixture = known["model"].map(lambda name: SHAPES[name].experts is not None)
        known = known[mixture == (kind == "experts")]
    if known.empty:
        listed = ", ".join(SHAPES)
        msg = f"no row of the published table is of a {kind} model on {gpu}; known models: {listed}"
        raise CalibrationError(msg)
    known = known.sort_values(["model", "task", "num_gpus", "tp", "ep", "avg_batch_size"])
    check_columns(known, ("avg_batch_size", "output_tok_s"), (), "published rows")
    rows = [_row(row, SHAPES[str(row["model"])], ACCELERATORS[gpu]) for _, row in known.iterrows()]
    columns = {name: np.array([row[name] for row in rows]) for name in rows[0]}
    return Work(**columns)


def _row(row: pd.Series[Any], shape: Shape, card: Accelerator) -> dict[str, object]:
    def number(name: str) -> float:
        return float(str(row[name]))

    task, gpus, batch = str(row["task"]), number("num_gpus"), number("avg_batch_size")
    expert_parallel = number("ep") > 1
    context = PROMPT_TOKENS[task] + number("mean_ctx_from_output")
    # With expert parallelism, attention is data-parallel: each GPU reads all of its weights.
    copies = gpus if expert_parallel else 1.0
    dense_bytes = (shape.attention_bytes * copies + shape.dense_bytes) / gpus
    wide = shape.attention_parameters + shape.dense_parameters - shape.narrow_parameters
    ratio = card.bf16_flop_per_s / card.fp8_flop_per_s
    columns: dict[str, object] = {
        "model": shape.name,
        "curve": f"{shape.name} | {task} | {gpus:.0f} GPU, TP {number('tp'):.0f}, EP {number('ep'):.0f}",
        "gpus": gpus,
        "batch": batch,
        "long_output": float(task in LONG_OUTPUT_TASKS and not shape.name.startswith(OTHER_PARSER)),
        "median_s": number("median_itl_ms") * 1e-3,
        "mean_s": batch / number("output_tok_s"),
        "power_w": number("avg_power_w_per_gpu"),
        "dense_bytes": dense_bytes,
        "dense_flop": 2.0 * (wide + ratio * shape.narrow_parameters) / gpus,
        "kv_bytes": shape.kv_bytes_per_token * context * shape.context_share(context) * batch / gpus,
        "launches": float(shape.kernels + (2 * shape.layers if gpus > 1 else 0)),
        "exchange_s": 4.0 * shape.layers * shape.hidden / card.collective_bytes_per_s(int(gpus)),
        "tokens": batch * (1.0 + PROMPT_TOKENS[task] / number("avg_output_len")),
    }
    return columns | _expert_columns(shape, batch, gpus, card, expert_parallel=expert_parallel)


def _expert_columns(
    shape: Shape, batch: float, gpus: float, card: Accelerator, *, expert_parallel: bool
) -> dict[str, object]:
    e = shape.experts
    if e is None:
        names = (
            "expert_bytes", "mean_expert_bytes", "unpacked_bytes", "expert_flop", "expert_layers",
            "scaled_layers",
        )  # fmt: skip
        return dict.fromkeys(names, 0.0)
    coverage = 1.0 - (1.0 - e.per_token / e.count) ** batch
    held = e.count / gpus if expert_parallel else e.count
    mean = held * coverage
    busiest = mean
    if expert_parallel:
        # Iterations wait for the GPU whose experts were chosen most: the expected maximum over the GPUs.
        spread = np.sqrt(held * coverage * (1.0 - coverage))
        busiest = min(held, mean + float(np.sqrt(2.0 * np.log(gpus)) * spread))
    split = 1.0 if expert_parallel else gpus  # tensor parallelism splits every expert
    one = e.parameters * e.bytes_per_weight * e.layers / split
    native = e.bytes_per_weight >= 1.0 or card.fp4
    fp8 = e.bytes_per_weight == 1.0 or (e.bytes_per_weight < 1.0 and card.fp4)
    ratio = card.bf16_flop_per_s / card.fp8_flop_per_s if fp8 else 1.0
    return {
        "expert_bytes": one * busiest,
        "mean_expert_bytes": one * mean,
        "unpacked_bytes": one * mean * (1.0 if native else 2.0 / e.bytes_per_weight),
        "expert_flop": 2.0 * e.per_token * e.parameters * e.layers * ratio / gpus,
        "expert_layers": float(e.layers),
        "scaled_layers": float(e.layers if shape.block_scaled else 0),
    }
