"""Configurations of published models: parameters counted from the shape against the published counts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rlgov.errors import ProfileError
from rlgov.simulation.families import FAMILIES
from rlgov.simulation.model import Model
from rlgov.simulation.model_config import parse_model, read_model


def _config(  # the fields that every family has
    kind: str, hidden: int, layers: int, heads: int, kv_heads: int, vocabulary: int, **more: object
) -> dict[str, Any]:
    return {
        "model_type": kind,
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocabulary,
        "tie_word_embeddings": False,
        **more,
    }


_QWEN3_MOE = {"head_dim": 128, "num_experts": 128, "num_experts_per_tok": 8, "decoder_sparse_step": 1}
_MLA = {"kv_lora_rank": 512, "qk_rope_head_dim": 64, "qk_nope_head_dim": 128, "v_head_dim": 128}
_GPT_OSS = {
    "head_dim": 64,
    "num_experts_per_tok": 4,
    "intermediate_size": 2880,
    "attention_bias": True,
    "sliding_window": 128,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "Llama-3.1-8B": _config("llama", 4096, 32, 32, 8, 128256, intermediate_size=14336),
    "Llama-3.3-70B": _config("llama", 8192, 80, 64, 8, 128256, intermediate_size=28672),
    "Llama-2-70B": _config("llama", 8192, 80, 64, 8, 32000, intermediate_size=28672),
    "Mistral-7B-v0.3": _config("mistral", 4096, 32, 32, 8, 32768, intermediate_size=14336),
    "Mixtral-8x7B": _config(
        "mixtral", 4096, 32, 32, 8, 32000, intermediate_size=14336, num_local_experts=8, num_experts_per_tok=2
    ),
    "Qwen2.5-0.5B": _config(
        "qwen2", 896, 24, 14, 2, 151936, intermediate_size=4864, tie_word_embeddings=True
    ),
    "Qwen2.5-7B": _config("qwen2", 3584, 28, 28, 4, 152064, intermediate_size=18944),
    "Qwen3-8B": _config("qwen3", 4096, 36, 32, 8, 151936, intermediate_size=12288, head_dim=128),
    "Qwen3-32B": _config("qwen3", 5120, 64, 64, 8, 151936, intermediate_size=25600, head_dim=128),
    "Qwen3-30B-A3B": _config("qwen3_moe", 2048, 48, 32, 4, 151936, moe_intermediate_size=768, **_QWEN3_MOE),
    "Qwen3-235B-A22B": _config(
        "qwen3_moe", 4096, 94, 64, 4, 151936, moe_intermediate_size=1536, **_QWEN3_MOE
    ),
    "Gemma-2-9B": _config(
        "gemma2", 3584, 42, 16, 8, 256000, intermediate_size=14336, head_dim=256, sliding_window=4096,
        tie_word_embeddings=True,
    ),
    "Gemma-3-27B": {
        "model_type": "gemma3",
        "vision_config": {"hidden_size": 1152},
        "text_config": {
            "model_type": "gemma3_text",
            "hidden_size": 5376,
            "intermediate_size": 21504,
            "num_hidden_layers": 62,
            "num_attention_heads": 32,
            "num_key_value_heads": 16,
            "head_dim": 128,
            "sliding_window": 1024,
        },
    },
    "Phi-4": _config("phi3", 5120, 40, 40, 10, 100352, intermediate_size=17920, sliding_window=None),
    "DeepSeek-V2-Lite": _config(
        "deepseek_v2", 2048, 27, 16, 16, 102400, intermediate_size=10944, moe_intermediate_size=1408,
        n_routed_experts=64, n_shared_experts=2, num_experts_per_tok=6, first_k_dense_replace=1,
        moe_layer_freq=1, q_lora_rank=None, topk_method="greedy", **_MLA,
    ),
    "DeepSeek-V3": _config(
        "deepseek_v3", 7168, 61, 128, 128, 129280, intermediate_size=18432, moe_intermediate_size=2048,
        n_routed_experts=256, n_shared_experts=1, num_experts_per_tok=8, first_k_dense_replace=3,
        moe_layer_freq=1, q_lora_rank=1536, topk_method="noaux_tc", **_MLA,
        quantization_config={"quant_method": "fp8", "weight_block_size": [128, 128]},
    ),
    "gpt-oss-20b": _config(
        "gpt_oss", 2880, 24, 64, 8, 201088, num_local_experts=32, **_GPT_OSS,
        quantization_config={"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]},
    ),
    "gpt-oss-120b": _config(
        "gpt_oss", 2880, 36, 64, 8, 201088, num_local_experts=128, **_GPT_OSS,
        quantization_config={"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]},
    ),
    "Llama-4-Scout": {
        "model_type": "llama4",
        "text_config": _config(
            "llama4_text", 5120, 48, 40, 8, 202048, intermediate_size=8192, intermediate_size_mlp=16384,
            num_local_experts=16, num_experts_per_tok=1, interleave_moe_layer_step=1, head_dim=128,
        ),
    },
}  # fmt: skip

# Published counts (of the weights' index where it is exact, of the model card where it is rounded), and how
# far a count of the shape may be off: rounding, or what a card counts in or out.
PUBLISHED = {
    "Llama-3.1-8B": (8_030_261_248, 0),
    "Llama-3.3-70B": (70_553_706_496, 0),
    "Llama-2-70B": (68_976_648_192, 0),
    "Mistral-7B-v0.3": (7_248_023_552, 0),
    "Mixtral-8x7B": (46_702_792_704, 0),
    "Qwen2.5-0.5B": (494_032_768, 0),
    "Qwen2.5-7B": (7_615_616_512, 0),
    "Qwen3-8B": (8_190_735_360, 0),
    "Qwen3-32B": (32_762_123_264, 0),
    "Qwen3-30B-A3B": (30_532_122_624, 0),
    "Qwen3-235B-A22B": (235_093_634_560, 0),
    "Gemma-2-9B": (9_241_705_984, 0),
    "Gemma-3-27B": (27.0e9, 0.002),
    "Phi-4": (14_659_507_200, 0),
    "DeepSeek-V2-Lite": (15_706_484_224, 0),
    "DeepSeek-V3": (671e9, 0.001),
    "gpt-oss-20b": (20_914_757_184, 0),
    "gpt-oss-120b": (116_829_156_672, 0),
    "Llama-4-Scout": (107.8e9, 0.002),  # of the 109e9 of the card, without vision
}
ACTIVE = {  # billions a token, of the model cards; those without the input embedding and those with it
    "Mixtral-8x7B": (12.9, 0.02),
    "Qwen3-30B-A3B": (3.3, 0.1),
    "Qwen3-235B-A22B": (22, 0.04),
    "DeepSeek-V3": (37, 0.03),
    "gpt-oss-20b": (3.6, 0.02),
    "gpt-oss-120b": (5.1, 0.02),
}


def _model(name: str, **changes: object) -> Model:
    return parse_model(CONFIGS[name] | changes, origin=f"{name}.json", name=name)


@pytest.mark.parametrize("name", CONFIGS)
def test_the_shape_gives_the_published_number_of_parameters(name: str) -> None:
    published, tolerance = PUBLISHED[name]
    assert _model(name).parameters == pytest.approx(published, rel=tolerance or 1e-12)


@pytest.mark.parametrize("name", ACTIVE)
def test_a_token_uses_the_published_number_of_parameters(name: str) -> None:
    billions, tolerance = ACTIVE[name]
    assert _model(name).active_parameters == pytest.approx(billions * 1e9, rel=tolerance)


def test_the_cache_of_published_models() -> None:
    assert _model("Llama-3.3-70B").kv_bytes_per_token == 320 * 1024
    assert _model("DeepSeek-V3").kv_bytes_per_token == 61 * 576 * 2
    oss = _model("gpt-oss-120b")
    assert oss.window is not None
    assert (oss.window.tokens, oss.window.layers, oss.full_layers) == (128, 18, 18)
    gemma = _model("Gemma-3-27B")
    assert gemma.window is not None
    assert gemma.window.layers == 52
    assert _model("Phi-4").window is None


def test_a_tied_embedding_is_read_as_a_matrix_and_an_untied_one_is_not() -> None:
    assert _model("Gemma-3-27B").lookup_parameters == 0
    assert _model("Qwen3-8B").lookup_parameters == 151936 * 4096


def test_experts_of_a_batch_are_touched_as_chance_has_it() -> None:
    experts = _model("Qwen3-30B-A3B").experts
    assert experts is not None
    assert experts.coverage(np.array([1.0, 16.0, 64.0])) == pytest.approx([0.0625, 0.644, 0.984], abs=0.001)


@pytest.mark.parametrize(
    ("quantised", "bytes_per_weight", "arithmetic"),
    [
        ({"quant_method": "fp8"}, 1.0, "fp8"),
        ({"quant_method": "fbgemm_fp8"}, 1.0, "fp8"),
        ({"quant_method": "awq", "bits": 4, "group_size": 128}, 0.5 + 2.5 / 128, "bf16"),
        ({"quant_method": "gptq", "bits": 8, "group_size": -1}, 1.0, "bf16"),
        ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, 0.5625, "fp4"),
        (
            {
                "quant_method": "compressed-tensors",
                "config_groups": {
                    "group_0": {
                        "weights": {"num_bits": 8, "type": "float", "symmetric": True},
                        "input_activations": {"num_bits": 8, "type": "float"},
                    }
                },
            },
            1.0,
            "fp8",
        ),
        (
            {
                "quant_method": "compressed-tensors",
                "config_groups": {
                    "group_0": {
                        "weights": {"num_bits": 4, "type": "int", "symmetric": True, "group_size": 128}
                    }
                },
            },
            0.5 + 2 / 128,
            "bf16",
        ),
    ],
)
def test_quantised_weights_are_narrow_and_embeddings_are_not(
    quantised: dict[str, object], bytes_per_weight: float, arithmetic: str
) -> None:
    model = _model("Llama-3.1-8B", quantization_config=quantised)
    plain = _model("Llama-3.1-8B")
    kept = 2 * 128256 * 4096 + (2 * 32 + 1) * 4096  # embedding, output and norms
    assert model.bytes_per_weight == pytest.approx(bytes_per_weight)
    assert model.arithmetic == arithmetic
    assert model.parameters == plain.parameters
    expected = (model.parameters - kept) * bytes_per_weight + kept * 2
    assert model.weight_bytes == pytest.approx(expected)


def test_published_sizes_of_quantised_models() -> None:
    # The files of gpt-oss-120b and -20b are 65.2 and 13.8 GB, those of DeepSeek-V3 688 GB with a
    # multi-token head of about 14 GB, which is not served by default.
    assert _model("gpt-oss-120b").weight_bytes == pytest.approx(65.2e9, rel=0.01)
    assert _model("gpt-oss-20b").weight_bytes == pytest.approx(13.8e9, rel=0.01)
    assert _model("DeepSeek-V3").weight_bytes == pytest.approx(674e9, rel=0.01)


def test_attention_that_quantisation_leaves_alone_stays_wide() -> None:
    left = [f"model.layers.{layer}.self_attn.{m}_proj" for layer in range(32) for m in "qkvo"]
    some = _model("Llama-3.1-8B", quantization_config={"quant_method": "fp8"})
    most = _model("Llama-3.1-8B", quantization_config={"quant_method": "fp8", "modules_to_not_convert": left})
    attention = 32 * 4096 * (2 * 4096 + 2 * 1024)
    assert most.weight_bytes - some.weight_bytes == pytest.approx(attention)


def test_weights_and_cache_in_fp8_by_the_command_line() -> None:
    raw = CONFIGS["Qwen3-8B"]
    model = parse_model(raw, origin="x", name="x", dtype="fp8", kv_dtype="fp8")
    assert model.bytes_per_weight == 1.0
    assert model.kv_bytes_per_token == _model("Qwen3-8B").kv_bytes_per_token / 2
    with pytest.raises(ProfileError, match="--dtype fp8 does not apply"):
        parse_model(CONFIGS["DeepSeek-V3"], origin="x", name="x", dtype="fp8")
    with pytest.raises(ProfileError, match="--dtype must be one of"):
        parse_model(raw, origin="x", name="x", dtype="int3")


@pytest.mark.parametrize("name", CONFIGS)
def test_every_missing_field_is_named_with_the_file(name: str) -> None:
    raw = dict(CONFIGS[name])
    inner = raw.get("text_config", raw)
    emptied = {"model_type": inner["model_type"]}
    broken = raw | {"text_config": emptied} if inner is not raw else emptied
    with pytest.raises(ProfileError, match=r"mine\.json") as caught:
        parse_model(broken, origin="mine.json", name="x")
    for field in ("hidden_size", "num_hidden_layers"):
        assert field in str(caught.value)
    if inner.get("num_experts") or inner.get("n_routed_experts"):
        assert "moe_intermediate_size" in str(caught.value)


@pytest.mark.parametrize(
    ("raw", "named"),
    [
        ({}, "lacks model_type"),
        ({"model_type": "mamba"}, "llama"),
        (CONFIGS["Qwen3-8B"] | {"hidden_size": "wide"}, "hidden_size must be a whole number"),
        (CONFIGS["Qwen3-8B"] | {"num_hidden_layers": 0}, "num_hidden_layers must be above 0"),
        (CONFIGS["Qwen3-8B"] | {"num_attention_heads": 0}, "num_attention_heads must be above 0"),
        (CONFIGS["Qwen3-8B"] | {"quantization_config": {"quant_method": "bitsandbytes"}}, "awq"),
        (CONFIGS["Qwen3-8B"] | {"quantization_config": {"quant_method": "awq", "bits": 4}}, "group_size"),
        (
            CONFIGS["Qwen3-8B"] | {"quantization_config": {"quant_method": "compressed-tensors"}},
            "config_groups",
        ),
        (CONFIGS["Qwen3-30B-A3B"] | {"num_experts_per_tok": 200}, "per_token 200"),
    ],
)
def test_a_wrong_configuration_is_refused_by_file_and_field(raw: dict[str, Any], named: str) -> None:
    with pytest.raises(ProfileError, match=r"mine\.json") as caught:
        parse_model(raw, origin="mine.json", name="x")
    assert named in str(caught.value)


def test_a_configuration_is_read_from_a_file_or_its_folder(tmp_path: Path) -> None:
    folder = tmp_path / "Qwen3-8B"
    folder.mkdir()
    file = folder / "config.json"
    file.write_text(json.dumps(CONFIGS["Qwen3-8B"]), encoding="utf-8")
    assert read_model(folder) == read_model(file)
    assert read_model(file).name == "Qwen3-8B"
    assert read_model(file, name="mine").name == "mine"


@pytest.mark.parametrize("text", ["[]", "{", ""])
def test_a_file_that_is_no_configuration_is_refused(tmp_path: Path, text: str) -> None:
    file = tmp_path / "config.json"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(ProfileError, match=r"config\.json"):
        read_model(file)
    with pytest.raises(ProfileError, match=r"cannot read"):
        read_model(tmp_path / "absent")


def test_every_family_says_where_its_experts_are() -> None:
    for kind, family in FAMILIES.items():
        assert ("moe" in kind) <= (family.experts != "none"), kind
