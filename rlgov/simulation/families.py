"""Model families: what their ``config.json`` leaves unsaid, and where they put experts and windows.

Facts about architectures, as their published weights show them: which matrices have a bias, how many
norms a layer has, which layers hold experts. Values of ``defaults`` are those that the family's own
configuration class takes where a file is silent.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from collections.abc import Mapping

NO_DEFAULTS: Mapping[str, Any] = MappingProxyType({})

ExpertForm = Literal["none", "mixtral", "qwen", "deepseek", "gpt-oss", "llama4"]
WindowForm = Literal["none", "all", "alternate", "pattern"]


@dataclass(frozen=True, slots=True)
class Family:
    """How to read the configuration of one ``model_type``."""

    qkv_bias: bool = False
    query_key_norm: bool = False  # one norm per head dimension on queries and one on keys
    layer_norms: int = 2  # of the hidden size, per layer
    tied_embeddings: bool = False  # where the file is silent
    experts: ExpertForm = "none"
    window: WindowForm = "none"
    latent: bool = False
    defaults: Mapping[str, Any] = field(default_factory=lambda: NO_DEFAULTS)


_LLAMA = Family()
_GEMMA_3 = MappingProxyType(
    {
        "vocab_size": 262208,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "sliding_window": 1024,
        "sliding_window_pattern": 6,
    }
)
_QWEN_3 = MappingProxyType({"head_dim": 128})

FAMILIES: Mapping[str, Family] = MappingProxyType(
    {
        "llama": _LLAMA,
        "mistral": Family(window="all"),
        "ministral": Family(window="alternate"),
        "phi3": Family(window="all"),  # Phi-3, Phi-3.5 and Phi-4
        "qwen2": Family(qkv_bias=True),
        "qwen2_vl_text": Family(qkv_bias=True),
        "qwen2_5_vl_text": Family(qkv_bias=True),
        "qwen3": Family(query_key_norm=True, defaults=_QWEN_3),
        "qwen3_vl_text": Family(query_key_norm=True, defaults=_QWEN_3),
        "gemma": Family(tied_embeddings=True),
        "gemma2": Family(layer_norms=4, tied_embeddings=True, window="alternate"),
        "gemma3_text": Family(
            query_key_norm=True, layer_norms=4, tied_embeddings=True, window="pattern", defaults=_GEMMA_3
        ),
        "mixtral": Family(experts="mixtral", window="all"),
        "qwen2_moe": Family(qkv_bias=True, experts="qwen"),
        "qwen3_moe": Family(query_key_norm=True, experts="qwen"),
        "qwen3_vl_moe_text": Family(query_key_norm=True, experts="qwen"),
        "deepseek_v2": Family(experts="deepseek", latent=True),
        "deepseek_v3": Family(experts="deepseek", latent=True),
        "kimi_k2": Family(experts="deepseek", latent=True),
        "gpt_oss": Family(qkv_bias=True, experts="gpt-oss", window="alternate"),
        "llama4_text": Family(experts="llama4", defaults=MappingProxyType({"interleave_moe_layer_step": 1})),
    }
)
