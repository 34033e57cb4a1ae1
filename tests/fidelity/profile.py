"""The fitted iteration times as a profile, which the simulator takes like any other."""

from __future__ import annotations

from typing import Any

from rlgov.simulation.profile import KV_BLOCK_TOKENS, Model, Profile, load_profile
from tests.fakes.tiny_model import Shape
from tests.fidelity.fit import IterationFit
from tests.fidelity.plan import Plan

PEAK_FLOP_PER_S = 1e12
BYTES_PER_S = 1e11
"""Of the nominal CPU. Only the times that follow from them and the fitted efficiencies have a meaning."""

NOMINAL_W = 100.0
CLOCK_MHZ = 1000
LEAST_S = 1e-13  # a time of 0 would be an efficiency without end
_NOTHING = ("layer_overhead_clock_share", "sequence_overhead_clock_share", "kv_clock_share", "host_floor_s",
            "all_reduce_latency_s", "clock_delay_s", "wake_s", "cold_start_s", "warmup_s")  # fmt: skip


def model_of(shape: Shape) -> Model:
    """The tiny Llama as a profile describes a model."""
    head_dim = shape.hidden // shape.heads
    attention = shape.hidden * head_dim * (2 * shape.heads + 2 * shape.kv_heads)
    layer = attention + 3 * shape.hidden * shape.intermediate
    table = float(shape.hidden * shape.vocabulary)
    return Model(
        name="tiny",
        layers=shape.layers,
        hidden=shape.hidden,
        heads=shape.heads,
        kv_heads=shape.kv_heads,
        head_dim=head_dim,
        parameters=shape.layers * layer + 2 * table,
        lookup_parameters=table,
        bytes_per_weight=2.0,
        bytes_per_kv_value=2.0,
        source="tests/fakes/tiny_model.py",
    )


def cpu_profile(fit: IterationFit, shape: Shape, plan: Plan, kv_capacity_tokens: int) -> Profile:
    """A profile whose iterations take what was fitted. Its energy means nothing: there was no meter."""
    model = model_of(shape)
    raw = load_profile("h100-qwen3-8b").model_dump(mode="json")
    kv_bytes = model.kv_bytes_per_token * (kv_capacity_tokens // KV_BLOCK_TOKENS) * KV_BLOCK_TOKENS
    raw |= {
        "name": "cpu-tiny",
        "description": "the tiny model on this machine's CPU; no power was measured, so energy means nothing",
        "gpu": {
            "name": "CPU",
            "tdp_w": 10.0 * NOMINAL_W,
            "hbm_bytes": model.weight_bytes + kv_bytes + model.kv_bytes_per_token,
            "hbm_bytes_per_s": BYTES_PER_S,
            "peak_bf16_flop_per_s": PEAK_FLOP_PER_S,
            "sm_clock_min_mhz": CLOCK_MHZ,
            "sm_clock_max_mhz": CLOCK_MHZ,
            "sm_clock_step_mhz": 1,
            "source": "nominal figures",
        },
        "model": model.model_dump(mode="json"),
        "all_reduce": [],
        "standby": "cold",
        "decode_rows": [
            {
                "tp_degree": 1,
                "batch": batch,
                "context_tokens": context,
                "iteration_s": alone_s + fit.context_s * batch * context,
                "power_w": NOMINAL_W,
                "source": "calibration of the fidelity measurement; its power is nominal",
            }
            for batch, alone_s, context in zip(fit.batches, fit.alone_s, fit.context_tokens, strict=True)
        ],
    }
    raw["deployment"] |= {
        "allotted_gpus": 1,
        "tp_degrees": [1],
        "sm_clocks_mhz": [CLOCK_MHZ],
        "batch_caps": plan.batch_caps,
        "max_num_batched_tokens": plan.max_num_batched_tokens,
        "gpu_memory_utilization": 1.0,
        "reserved_bytes_per_gpu": 0.0,
        "interval_s": 1.0,
    }
    raw["parameters"] |= _parameters(fit, model)
    return Profile.model_validate(raw)


def _parameters(fit: IterationFit, model: Model) -> dict[str, Any]:
    token_flop = 2.0 * model.active_parameters
    prefill_mfu = token_flop / (PEAK_FLOP_PER_S * max(fit.prompt_s, LEAST_S))
    # Decode of D sequences is one straight line in D here: reading and multiplying are not told apart on a
    # CPU, so the weights are read for nothing, and the line is the overheads of layers and sequences.
    values = {
        "weight_efficiency": model.dense_read_bytes / (BYTES_PER_S * LEAST_S),
        "gemm_mfu": token_flop / (PEAK_FLOP_PER_S * LEAST_S),
        "kv_efficiency": model.kv_bytes_per_token / (BYTES_PER_S * max(fit.context_s, LEAST_S)),
        "prefill_mfu": prefill_mfu,
        "attention_mfu": model.attention_flop_per_pair / (PEAK_FLOP_PER_S * max(fit.pair_s, LEAST_S)),
        "layer_overhead_s": fit.base_s / model.layers,
        "sequence_overhead_s": fit.sequence_s,
        "prompt_overhead_s": fit.prompts_s,
        **dict.fromkeys(_NOTHING, 0.0),
    }
    source = f"{fit.rows} iterations of a vLLM on the CPU"
    return {
        name: {"value": v, "low": v, "high": v, "kind": "measured", "source": source, "error": None}
        for name, v in values.items()
    }
