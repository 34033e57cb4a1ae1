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
# Reasoning: thousands of tokens a request, streamed through a parser on the host. On B200 such rows sit on a
# floor of the host, but only those of one GPU; why those alone is not published. gpt-oss speaks a format of
# its own, which another parser reads, and shows no floor.
LONG_OUTPUT_TASKS: Final = ("gpqa",)
OTHER_PARSER: Final = "openai/"


# Started with cudagraph_mode PIECEWISE on H100 (configs/vllm of ml-energy/benchmark): attention is launched
# by the host, layer by layer.
_IN_PIECES: Final = ("H100", "openai/gpt-oss")


def _graph_in_pieces(shape: Shape, card: Accelerator) -> bool:
    gpu, models = _IN_PIECES
    return card.name == gpu and shape.name.startswith(models)


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
    shape: Names  # the same for precisions and finetunes of one architecture
    curve: Names  # one (model, task, parallelism): what a batch size can be left out of
    gpus: Floats
    batch: Floats
    long_output: Floats  # 1 where a host floor of reasoning outputs is to be expected
    # measured
    median_s: Floats
    mean_s: Floats
    power_w: Floats  # per GPU
    # work
    dense_bytes: Floats
    dense_flop: Floats  # of one token, in bf16 time: an fp8 operation counts half
    one_expert_bytes: Floats  # of all layers: what one more expert in each adds
    held_experts: Floats  # of a layer, on one GPU
    chosen_share: Floats  # of the experts, by one token
    apart: Floats  # 1 where the GPUs hold different experts
    unpacked: Floats  # width of an expert's weights for the matrix units, over that in memory
    expert_flop: Floats  # of one token
    kv_bytes: Floats
    launches: Floats
    expert_layers: Floats
    eager_layers: Floats  # whose attention is outside the CUDA graph
    scaled_layers: Floats  # expert layers with block-scaled fp8
    exchange_s: Floats  # of one token: all-reduce or exchange of activations, by bandwidth
    tokens: Floats  # of an iteration on average, prefills included

    def take(self, chosen: NDArray[np.bool_] | NDArray[np.int64]) -> Work:
        """The chosen rows."""
        return Work(**{f.name: getattr(self, f.name)[chosen] for f in fields(self)})

    def __len__(self) -> int:
        return len(self.batch)

    def expert_bytes(self, evenness: float) -> tuple[Floats, Floats]:
        """Bytes of experts that the average and the busiest GPU reads in an iteration.

        Args:
            evenness: of the experts' popularity, which is taken to be gamma distributed with this shape;
                infinite where tokens choose all experts alike.
        """
        chosen = self.batch * self.chosen_share
        if np.isfinite(evenness):
            coverage = 1.0 - (1.0 + chosen / evenness) ** -evenness
        else:
            coverage = 1.0 - (1.0 - self.chosen_share) ** self.batch
        mean = self.held_experts * coverage
        # Iterations wait for the GPU whose experts were chosen most: the expected maximum over the GPUs.
        spread = np.sqrt(2.0 * np.log(self.gpus) * self.held_experts * coverage * (1.0 - coverage))
        busiest = np.minimum(self.held_experts, mean + self.apart * spread)
        return self.one_expert_bytes * mean, self.one_expert_bytes * busiest


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
    # The benchmark splits attention over all GPUs, with experts apart or not, but where the table says dp:
    # there each GPU has all of attention. It tells vLLM a TP of all GPUs and --enable-expert-parallel.
    copies = number("dp")
    kv_copies = max(1.0, gpus / copies / shape.kv_heads)  # heads cannot be split
    dense_bytes = (shape.attention_bytes * copies + shape.dense_bytes) / gpus
    wide = shape.attention_parameters + shape.dense_parameters - shape.narrow_parameters
    ratio = card.bf16_flop_per_s / card.fp8_flop_per_s
    read_tokens = context * shape.context_share(context)
    eager = shape.eager_attention or _graph_in_pieces(shape, card)
    columns: dict[str, object] = {
        "model": shape.name,
        "shape": f"{shape.layers} layers of {shape.hidden}",
        "curve": f"{shape.name} | {task} | {gpus:.0f} GPU, TP {number('tp'):.0f}, EP {number('ep'):.0f}",
        "gpus": gpus,
        "batch": batch,
        "long_output": float(
            task in LONG_OUTPUT_TASKS and gpus == 1 and not shape.name.startswith(OTHER_PARSER)
        ),
        "median_s": number("median_itl_ms") * 1e-3,
        "mean_s": batch / number("output_tok_s"),
        "power_w": number("avg_power_w_per_gpu"),
        "dense_bytes": dense_bytes,
        "dense_flop": 2.0 * (wide + ratio * shape.narrow_parameters) / gpus,
        "kv_bytes": kv_copies * shape.kv_bytes_per_token * read_tokens * batch / gpus,
        "eager_layers": float(shape.layers if eager else 0),
        "launches": float(shape.kernels + (2 * shape.layers if gpus > 1 else 0)),
        "exchange_s": 4.0 * shape.layers * shape.hidden / card.collective_bytes_per_s(int(gpus)),
        "tokens": batch * (1.0 + PROMPT_TOKENS[task] / number("avg_output_len")),
    }
    experts = _expert_columns(shape, gpus, card, expert_parallel=expert_parallel)
    return {**columns, **experts}


_EXPERT_COLUMNS: Final = (
    "one_expert_bytes", "held_experts", "chosen_share", "apart", "unpacked", "expert_flop", "expert_layers",
    "scaled_layers",
)  # fmt: skip


def _expert_columns(
    shape: Shape, gpus: float, card: Accelerator, *, expert_parallel: bool
) -> dict[str, float]:
    e = shape.experts
    if e is None:
        return dict.fromkeys(_EXPERT_COLUMNS, 0.0)
    # Experts apart: a GPU holds some of them whole. Otherwise tensor parallelism splits every one.
    split = 1.0 if expert_parallel else gpus
    native = e.bytes_per_weight >= 1.0 or card.fp4
    fp8 = e.bytes_per_weight == 1.0 or (e.bytes_per_weight < 1.0 and card.fp4)
    ratio = card.bf16_flop_per_s / card.fp8_flop_per_s if fp8 else 1.0
    return {
        "one_expert_bytes": e.parameters * e.bytes_per_weight * e.layers / split,
        "held_experts": e.count / gpus if expert_parallel else float(e.count),
        "chosen_share": e.per_token / e.count,
        "apart": float(expert_parallel and gpus > 1),
        "unpacked": 1.0 if native else 2.0 / e.bytes_per_weight,
        "expert_flop": 2.0 * e.per_token * e.parameters * e.layers * ratio / gpus,
        "expert_layers": float(e.layers),
        "scaled_layers": float(e.layers if shape.block_scaled else 0),
    }
