"""How near profiles made by physics alone come to published rows of their card: a statement of errors.

The parameters of the physics come from fits to rows of the same cards, so these are no blind errors.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from rlgov.calibration.published import read_ml_energy
from rlgov.calibration.work import PROMPT_TOKENS
from rlgov.simulation.cards import find_card
from rlgov.simulation.create import EXPERT_EVENNESS, Offer, create_profile
from rlgov.simulation.model_config import parse_model
from rlgov.simulation.physics import profile_physics

QWEN3: dict[str, Any] = {
    "model_type": "qwen3_moe", "head_dim": 128, "vocab_size": 151936, "tie_word_embeddings": False,
    "num_key_value_heads": 4, "num_experts": 128, "num_experts_per_tok": 8, "decoder_sparse_step": 1,
}  # fmt: skip
A3B = QWEN3 | {
    "hidden_size": 2048, "num_hidden_layers": 48, "num_attention_heads": 32, "intermediate_size": 6144,
    "moe_intermediate_size": 768,
}  # fmt: skip
A22B = QWEN3 | {
    "hidden_size": 4096, "num_hidden_layers": 94, "num_attention_heads": 64, "intermediate_size": 12288,
    "moe_intermediate_size": 1536,
}  # fmt: skip
FP8 = {"quantization_config": {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic"}}
LLAMA_70B: dict[str, Any] = {
    "model_type": "llama", "hidden_size": 8192, "num_hidden_layers": 80, "num_attention_heads": 64,
    "num_key_value_heads": 8, "intermediate_size": 28672, "vocab_size": 128256, "tie_word_embeddings": False,
}  # fmt: skip
CONFIGS = {
    "Qwen/Qwen3-Coder-30B-A3B-Instruct": A3B,
    "Qwen/Qwen3-235B-A22B-Instruct-2507": A22B,
    "Qwen/Qwen3-235B-A22B-Instruct-2507-FP8": A22B | FP8,
    "meta-llama/Llama-3.3-70B-Instruct": LLAMA_70B,
}
MOST_SEQUENCES = 512.0  # more keep the host of the benchmark from following


@dataclass(frozen=True)
class Errors:
    """Mean absolute, relative."""

    time: float
    power: float


def _errors(frame: pd.DataFrame, card: str, name: str) -> Errors:
    """Of the iteration time and of the power per GPU over all rows of a model; prefills are not counted.

    The experts of published rows lie on different GPUs, those of a profile are split over all.
    """
    model = parse_model(CONFIGS[name], origin="config.json", name=name)
    gpu = card.upper()
    rows = frame[
        (frame["gpu"] == gpu) & (frame["model"] == name) & (frame["avg_batch_size"] < MOST_SEQUENCES)
    ]
    times, powers = [], []
    for (gpus, task), some in rows.groupby(["num_gpus", "task"]):
        tp = int(str(gpus))
        profile = create_profile(find_card(card), model, Offer(tp_degrees=(tp,)))
        physics = profile_physics(profile)
        batch, itl_ms, tokens_per_s, context, power_w = (
            some[column].to_numpy(np.float64)
            for column in ("avg_batch_size", "median_itl_ms", "output_tok_s", "mean_ctx_from_output",
                           "avg_power_w_per_gpu")
        )  # fmt: skip
        contexts = batch * (context + PROMPT_TOKENS[str(task)])
        work, mean_s = physics.decode(tp, batch), batch / tokens_per_s
        times.append((work.total_s + physics.kv_s(tp) * contexts) / (itl_ms * 1e-3) - 1.0)
        work_j = work.total_j + physics.kv_j(tp) * contexts
        watts = (physics.busy_w(tp, np.ones(1)) + work_j / mean_s) / tp
        powers.append(np.minimum(watts, profile.gpu.tdp_w) / power_w - 1.0)
    return Errors(*(float(np.mean(np.abs(np.concatenate(e)))) for e in (times, powers)))


@pytest.mark.parametrize(
    ("card", "name", "time_error", "power_error"),
    [
        ("h100", "meta-llama/Llama-3.3-70B-Instruct", 0.06, 0.11),
        ("b200", "meta-llama/Llama-3.3-70B-Instruct", 0.06, 0.10),
        ("h100", "Qwen/Qwen3-Coder-30B-A3B-Instruct", 0.05, 0.20),
        ("h100", "Qwen/Qwen3-235B-A22B-Instruct-2507", 0.15, 0.12),
        ("h100", "Qwen/Qwen3-235B-A22B-Instruct-2507-FP8", 0.14, 0.19),
    ],
)
def test_a_profile_by_physics_alone_meets_published_rows_within_the_stated_error(
    shared_dir: Path, card: str, name: str, time_error: float, power_error: float
) -> None:
    found = _errors(read_ml_energy(shared_dir / "data"), card, name)
    assert (found.time < time_error, found.power < power_error) == (True, True), found


def test_a_mixture_of_experts_reads_fewer_of_them_than_equal_choices_would() -> None:
    model = parse_model(A3B, origin="config.json", name="some/model")
    profile = create_profile(find_card("h100"), model, Offer(tp_degrees=(1,)))
    assert model.experts is not None
    assert profile.model.experts is not None
    assert profile.model.experts.evenness == EXPERT_EVENNESS
    tokens = np.array([1.0, 8.0, 64.0, 512.0, 1e6])
    uneven, even = profile.model.experts.coverage(tokens), model.experts.coverage(tokens)
    assert (np.diff(uneven) > 0).all()
    assert (uneven < even).all()
    assert uneven[0] == pytest.approx(8 / 128, rel=0.1)
    assert uneven[-1] > 0.99


def test_evenness_is_written_only_where_it_says_something() -> None:
    model = parse_model(A3B, origin="config.json", name="some/model")
    assert model.experts is not None
    assert "evenness" not in model.model_dump()["experts"]
    profile = create_profile(find_card("h100"), model, Offer(tp_degrees=(1,)))
    assert profile.model_dump()["model"]["experts"]["evenness"] == EXPERT_EVENNESS
