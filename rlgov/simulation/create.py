"""A profile by physics alone: a card's data sheet, a model's shape, and the H100's fitted parameters scaled.

Nothing is measured of the pair. Parameters start from a shipped profile that was fitted on an H100:
efficiencies and overheads are taken over, energies scaled so that reading at full bandwidth and
multiplying at full rate draw the same share of the card's TDP as there. All become priors with wide
ranges, and training randomises over them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from pydantic import ValidationError

from rlgov.errors import ProfileError
from rlgov.simulation.insight import isolated_latencies
from rlgov.simulation.profile import (
    KV_BLOCK_TOKENS,
    AllReduce,
    DeploymentShape,
    Objective,
    Parameter,
    Parameters,
    Profile,
    load_profile,
)

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from rlgov.simulation.cards import Card
    from rlgov.simulation.model import Model
    from rlgov.simulation.profile import Gpu

BASE_PROFILE = "h100-qwen3-32b"
BATCH_CAPS = (256, 128, 64, 32, 16, 8)
MAX_NUM_BATCHED_TOKENS = 1024
GPU_MEMORY_UTILIZATION = 0.9
SLOWDOWN_ALLOWED = 5.0  # objectives are so many times the latency of a request that is alone
PROMPT_TOKENS = 4096  # of that request: the 99th percentile of the Azure conversation trace
_RESERVED_SHARE, _MOST_RESERVED_BYTES = 0.05, 4.5e9
_LEAST_CONTEXTS_TOKENS = 8192  # a TP degree is offered only where so much KV fits
_MOST_TP, _DEGREES = 8, 3
_UPPER_CLOCKS, _LOWER_CLOCKS, _CLOCK_BEND = 9, 3, 0.394  # nine clocks down to this share of the highest
_LOAD_BYTES_PER_S, _WAKE_BYTES_PER_S = 2e9, 40e9  # from disk; from host memory

# How far the truth may lie from a fitted value taken over: on the same card, and on another.
_SPREAD_SAME, _SPREAD_OTHER = 1.25, 1.6
_SHARES = frozenset({"weight_efficiency", "kv_efficiency", "gemm_mfu", "prefill_mfu"})
_MOST_SHARE = 0.98
_BY_TDP = frozenset(
    {"constant_w", "clocked_w", "idle_low_w", "idle_high_w", "startup_w", "warmup_w"}
)  # watts, taken over as shares of TDP
_PER_BYTE = frozenset({"weight_j_per_byte", "kv_j_per_byte"})
_BUSY_OVER_IDLE = 1.2  # 1.3 on the H100

# Of the fits to ML.ENERGY's rows of mixtures of experts on H100 (`rlgov calibrate --report`): how unevenly
# experts are chosen, the time of a layer, and what block-scaled fp8 adds to it.
EXPERT_EVENNESS = 0.55
_EXPERT_LAYER_S, _SCALED_LAYER_S = 9.6e-5, 7.3e-5
_LAUNCH_S, _EXCHANGE_S = 5e-6, 1.5e-5  # of a collective; of a layer's exchange, each time the GPUs double
_EXPERT_TIME = {"weight_efficiency": 0.87, "kv_efficiency": 0.9, "sequence_overhead_s": 4.8e-5}
# Power of all models there, dense ones too, follows these. The part that goes with the clock is what is left
# of 372 W at the highest clock: many small kernels keep the SMs busy whatever they read.
_EXPERT_POWER = {"weight_j_per_byte": 4.5e-11, "kv_j_per_byte": 1.13e-10, "flop_j": 8.6e-13}
_EXPERT_BASE_W = 372.0
_EXPERT_SPREAD = 1.4
_EXPERT_SOURCE = "ML.ENERGY rows of mixtures of experts on H100, fit across models"


@dataclass(frozen=True, slots=True)
class Offer:
    """What the operator decides; ``None`` is decided here.

    Attributes:
        name: Of the profile.
        tp_degrees: To offer, the largest first; all GPUs of the largest are allotted.
        ttft_s: Objective for the first token, seconds.
        tpot_s: Objective for each later one, seconds.
    """

    name: str | None = None
    tp_degrees: tuple[int, ...] | None = None
    ttft_s: float | None = None
    tpot_s: float | None = None


def create_profile(card: Card, model: Model, offer: Offer) -> Profile:
    """A profile of a card and a model that nobody measured together.

    Raises:
        ProfileError: The weights do not fit, or an asked TP degree is impossible; with the numbers.
    """
    gpu = card.gpu()
    if model.experts is not None and model.experts.evenness is None:
        uneven = model.experts.model_copy(update={"evenness": EXPERT_EVENNESS})
        model = model.model_copy(update={"experts": uneven})
    degrees = _tp_degrees(card, gpu, model, offer.tp_degrees)
    name = (
        offer.name or f"{card.aliases[0] if card.aliases else gpu.name}-{model.name.split('/')[-1]}".lower()
    )
    given = offer.ttft_s is not None and offer.tpot_s is not None
    objective = Objective(ttft_s=offer.ttft_s or 1.0, tpot_s=offer.tpot_s or 0.1, source="given")
    try:
        profile = Profile(
            schema_version=1,
            name=name.replace(" ", "-"),
            description=f"{gpu.name} with {model.name}, TP {'/'.join(map(str, degrees))}, by physics alone",
            gpu=gpu,
            model=model,
            deployment=DeploymentShape(
                allotted_gpus=degrees[0],
                tp_degrees=degrees,
                sm_clocks_mhz=spread_clocks_mhz(gpu),
                batch_caps=BATCH_CAPS,
                max_num_batched_tokens=MAX_NUM_BATCHED_TOKENS,
                gpu_memory_utilization=GPU_MEMORY_UTILIZATION,
                reserved_bytes_per_gpu=_reserved_bytes(gpu),
                interval_s=1.0,
                service_level=objective,
            ),
            standby="asleep",
            parameters=_parameters(card, gpu, model, degrees),
            decode_rows=(),
            all_reduce=tuple(_all_reduce(card, tp) for tp in degrees if tp > 1),
        )
    except ValidationError as error:
        problems = "; ".join(str(item["msg"]) for item in error.errors(include_url=False))
        raise ProfileError(f"no profile of {gpu.name} with {model.name}: {problems}") from error
    return profile if given else _with_objective(profile, offer)


def spread_clocks_mhz(gpu: Gpu) -> tuple[int, ...]:
    """About twelve supported clocks: close together where serving runs, a few below, and both ends."""
    highest, lowest, step = gpu.sm_clock_max_mhz, gpu.sm_clock_min_mhz, gpu.sm_clock_step_mhz
    bend = max(highest * _CLOCK_BEND, lowest)
    wanted = [
        *np.linspace(highest, bend, _UPPER_CLOCKS).tolist(),
        *np.linspace(bend, lowest, _LOWER_CLOCKS + 1)[1:].tolist(),
    ]
    snapped = {lowest + step * round((clock - lowest) / step) for clock in wanted}
    return tuple(sorted(snapped, reverse=True))


def _reserved_bytes(gpu: Gpu) -> float:
    return round(min(_RESERVED_SHARE * gpu.hbm_bytes, _MOST_RESERVED_BYTES), -8)


def _kv_tokens(gpu: Gpu, model: Model, tp: int) -> int:
    per_gpu = GPU_MEMORY_UTILIZATION * gpu.hbm_bytes - _reserved_bytes(gpu)
    token_bytes = model.kv_bytes_per_token * model.kv_copies(tp)
    blocks = (per_gpu * tp - model.weight_bytes) // (token_bytes * KV_BLOCK_TOKENS)
    return int(blocks) * KV_BLOCK_TOKENS


def _tp_degrees(card: Card, gpu: Gpu, model: Model, asked: Sequence[int] | None) -> tuple[int, ...]:
    known = {1, *card.all_reduce_bytes_per_s}
    if asked:
        degrees = tuple(sorted(set(asked), reverse=True))
        for tp in degrees:
            if tp not in known:
                msg = f"the table has no all-reduce of {tp} {card.name}; use --tp of {sorted(known)}"
                raise ProfileError(msg)
            if model.heads % tp:
                msg = f"TP {tp} does not divide the {model.heads} attention heads of {model.name}"
                raise ProfileError(msg)
            if _kv_tokens(gpu, model, tp) <= 0:
                raise ProfileError(_too_large(gpu, model, tp))
        return degrees
    possible = [tp for tp in sorted(known) if tp <= _MOST_TP and model.heads % tp == 0]
    fitting = [tp for tp in possible if _kv_tokens(gpu, model, tp) >= _LEAST_CONTEXTS_TOKENS]
    if not fitting:
        raise ProfileError(_too_large(gpu, model, possible[-1]))
    return tuple(reversed(fitting[:_DEGREES]))


def _too_large(gpu: Gpu, model: Model, tp: int) -> str:
    memory_gb, reserve_gb = gpu.hbm_bytes / 1e9, _reserved_bytes(gpu) / 1e9
    room_gb = tp * (GPU_MEMORY_UTILIZATION * memory_gb - reserve_gb)
    kv_gb = _LEAST_CONTEXTS_TOKENS * model.kv_bytes_per_token * model.kv_copies(tp) / 1e9
    return (
        f"the weights of {model.name} do not fit {tp} x {gpu.name}: they take "
        f"{model.weight_bytes / 1e9:.1f} GB, and {_LEAST_CONTEXTS_TOKENS} tokens of KV {kv_gb:.1f} GB, but "
        f"{tp} x {memory_gb:.1f} GB leave {room_gb:.1f} GB ({GPU_MEMORY_UTILIZATION:.0%} less "
        f"{reserve_gb:.1f} GB a GPU); use a larger TP degree, a larger GPU or a quantised model"
    )


def _all_reduce(card: Card, tp: int) -> AllReduce:
    figure = card.all_reduce_bytes_per_s[tp]
    return AllReduce(tp_degree=tp, bytes_per_s=figure.value, source=f"{card.link}: {figure.source}")


def _with_objective(profile: Profile, offer: Offer) -> Profile:
    alone = isolated_latencies(profile, PROMPT_TOKENS)[0]  # of the largest TP degree
    objective = Objective(
        ttft_s=offer.ttft_s or _two_digits(SLOWDOWN_ALLOWED * alone.ttft_s),
        tpot_s=offer.tpot_s or _two_digits(SLOWDOWN_ALLOWED * alone.tpot_s),
        source=(
            f"{SLOWDOWN_ALLOWED:g} x isolated latency by physics: a prompt of {PROMPT_TOKENS:,} tokens and a "
            f"lone decode at TP {alone.tp_degree} and the highest clock, unless given"
        ),
    )
    shape = profile.deployment.model_copy(update={"service_level": objective})
    return profile.model_copy(update={"deployment": shape})


def _two_digits(value: float) -> float:
    return float(f"{value:.2g}")


# Parameters ----------------------------------------------------------------------------------------


def _parameters(card: Card, gpu: Gpu, model: Model, degrees: Sequence[int]) -> Parameters:
    base = load_profile(BASE_PROFILE)
    same = gpu.name == base.gpu.name
    found = {name: _carried(name, known, base.gpu, gpu, same=same) for name, known in base.parameters.items()}
    found |= {name: Parameter(kind="prior", **prior.model_dump()) for name, prior in card.priors.items()}
    found |= _above_idle(found)
    if model.experts is not None:
        found |= _of_experts(found, base.gpu, gpu, model, degrees)
    share_bytes = model.weight_bytes / degrees[-1]
    found["wake_s"] = _stretched(
        0.2 + share_bytes / _WAKE_BYTES_PER_S, 0.5, 5.0, "assumed: weights from host memory at 40 GB/s a GPU"
    )
    found["cold_start_s"] = _stretched(
        30.0 + model.weight_bytes / _LOAD_BYTES_PER_S,
        0.5,
        2.0,
        "assumed: weights from disk at 2 GB/s, 30 s besides",
    )
    return Parameters.model_validate(found)


def _of_experts(
    found: Mapping[str, Parameter], base: Gpu, gpu: Gpu, model: Model, degrees: Sequence[int]
) -> dict[str, Parameter]:
    """What a mixture of experts does otherwise than the dense models that the base was fitted to."""
    scaled = model.arithmetic == "fp8"
    doublings = float(np.log2(degrees[0]))
    values = {
        **_EXPERT_TIME,
        "layer_overhead_s": _EXPERT_LAYER_S + (_SCALED_LAYER_S if scaled else 0.0),
        "all_reduce_latency_s": _LAUNCH_S + 0.5 * doublings * _EXCHANGE_S,  # two of them a layer
        **_EXPERT_POWER,
    }
    values = {name: value * _scale(name, base, gpu)[0] for name, value in values.items()}
    values["clocked_w"] = max(_EXPERT_BASE_W * gpu.tdp_w / base.tdp_w - found["constant_w"].value, 1.0)
    return {
        name: Parameter(
            value=_four_digits(value),
            low=_four_digits(value / _EXPERT_SPREAD),
            high=_four_digits(min(value * _EXPERT_SPREAD, _MOST_SHARE if name in _SHARES else np.inf)),
            kind="prior",
            source=f"{_EXPERT_SOURCE}{_scale(name, base, gpu)[1]}",
        )
        for name, value in values.items()
    }


def _above_idle(found: dict[str, Parameter]) -> dict[str, Parameter]:
    """Power of an iterating GPU before its work, raised where the idle power of this card asks for it."""
    constant, clocked = found["constant_w"], found["clocked_w"]
    least_w = _BUSY_OVER_IDLE * found["idle_low_w"].value
    if constant.value < least_w:
        constant = _raised(constant, least_w)
    least_w = _BUSY_OVER_IDLE * found["idle_high_w"].value - constant.value
    if clocked.value < least_w:
        clocked = _raised(clocked, least_w)
    return {"constant_w": constant, "clocked_w": clocked}


def _raised(known: Parameter, least_w: float) -> Parameter:
    value = _four_digits(least_w)
    source = f"{known.source}; raised so that an iterating GPU draws more than an idle one"
    return known.model_copy(update={"value": value, "high": max(known.high, 1.5 * value), "source": source})


def _stretched(value: float, down: float, up: float, source: str) -> Parameter:
    digits = f"{value:.3g}"
    nominal = float(digits)
    return Parameter(value=nominal, low=nominal * down, high=nominal * up, kind="prior", source=source)


def _carried(name: str, known: Parameter, base: Gpu, gpu: Gpu, *, same: bool) -> Parameter:
    """A parameter of the H100 as a prior for this card."""
    scale, how = _scale(name, base, gpu)
    if known.kind == "prior" and scale == 1.0:
        return known.model_copy(update={"kind": "prior", "error": None})
    spread = _SPREAD_SAME if same else _SPREAD_OTHER
    most = _MOST_SHARE if name in _SHARES else float("inf")
    value = known.value * scale
    # Both the plain and the scaled value of another card are thinkable, so the range takes in both.
    low, high = min(known.low, known.low * scale) / spread, max(known.high, known.high * scale) * spread
    origin = f"{base.name} fit ({known.source})" if known.kind == "fitted" else known.source
    return Parameter(
        value=_four_digits(value),
        low=_four_digits(low),
        high=_four_digits(min(high, most)),
        kind="prior",
        source=f"{origin}{how}",
    )


def _scale(name: str, base: Gpu, gpu: Gpu) -> tuple[float, str]:
    tdp = gpu.tdp_w / base.tdp_w
    if gpu.name == base.name:
        return 1.0, ", taken over to another model"
    if name in _BY_TDP:
        return tdp, "; scaled with TDP"
    if name in _PER_BYTE:
        return tdp * base.hbm_bytes_per_s / gpu.hbm_bytes_per_s, "; scaled with TDP per memory bandwidth"
    if name == "flop_j":
        return tdp * base.peak_bf16_flop_per_s / gpu.peak_bf16_flop_per_s, "; scaled with TDP per FLOP/s"
    return 1.0, "; assumed alike on this card"


def _four_digits(value: float) -> float:
    return float(f"{value:.4g}")
