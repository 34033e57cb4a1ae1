"""Shapes of the models in the published tables: facts of their config.json on Hugging Face.

What an iteration reads and multiplies follows from these numbers; nothing here is fitted.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

_BF16 = 2.0
_FP8 = 1.0
_MXFP4 = 4.25 / 8.0  # 4 bits and one 8-bit scale for 32 weights


@dataclass(frozen=True, slots=True)
class Experts:
    """Routed experts; shared ones are dense weights."""

    count: int
    per_token: int
    parameters: float  # of one expert
    bytes_per_weight: float
    layers: int  # that have experts


@dataclass(frozen=True, slots=True)
class Shape:
    """What one iteration has to do for this model."""

    name: str
    layers: int
    hidden: int
    kv_bytes_per_token: float  # of all layers
    kv_heads: int  # a latent cache counts as one
    attention_parameters: float
    attention_bytes: float
    dense_parameters: float  # all other weights that every token multiplies, output head included
    dense_bytes: float
    kernels: int  # launches of an iteration outside mixture-of-experts blocks, without collectives
    narrow_parameters: float = 0.0  # of the dense ones, multiplied in fp8
    experts: Experts | None = None
    block_scaled: bool = False  # fp8 whose inputs are quantised anew before each matrix of an expert layer
    eager_attention: bool = False  # chunked local attention, which vLLM keeps out of CUDA graphs
    window_tokens: float = field(default=float("inf"))
    window_share: float = 0.0  # of layers that look back only so far

    def context_share(self, context_tokens: float) -> float:
        """Share of the context that the average layer reads."""
        seen = min(1.0, self.window_tokens / context_tokens)
        return 1.0 - self.window_share + self.window_share * seen


# Launches of one layer, counted in vLLM's model code. Llama: 2 norms, QKV, rotary embedding, cache write,
# attention, output, gate-up, activation, down. Qwen3 adds norms of Q and K; Gemma 3 also two output norms.
# FBGEMM fp8 adds a quantisation before three of the matrices. The last four are the MLP.
_LLAMA, _QWEN3, _GEMMA3, _MLP, _FBGEMM = 10, 12, 14, 4, 3


def _dense(
    name: str, layers: int, hidden: int, kv_width: int, parameters: float, lookup: float, kernels: int
) -> Shape:
    return Shape(
        name=name,
        layers=layers,
        hidden=hidden,
        kv_bytes_per_token=2.0 * layers * kv_width * _BF16,
        kv_heads=kv_width // 128,
        attention_parameters=0.0,  # of dense models all weights are split alike, so they count as one
        attention_bytes=0.0,
        dense_parameters=parameters - lookup,
        dense_bytes=(parameters - lookup) * _BF16,
        kernels=kernels * layers,
    )


def _llama_405b_fp8() -> Shape:
    # Only the MLPs of layers 1..124 are fp8; attention and the first and last layer stay bf16
    # (The Llama 3 Herd of Models, section 6.2).
    layers, hidden, inner, kv_width, vocabulary = 126, 16384, 53248, 1024, 128256
    narrow = 3.0 * hidden * inner * (layers - 2)
    matrices = layers * (2.0 * hidden * hidden + 2.0 * hidden * kv_width + 3.0 * hidden * inner)
    matrices += vocabulary * hidden
    return Shape(
        name="meta-llama/Llama-3.1-405B-Instruct-FP8",
        layers=layers,
        hidden=hidden,
        kv_bytes_per_token=2.0 * layers * kv_width * _BF16,
        kv_heads=kv_width // 128,
        attention_parameters=0.0,
        attention_bytes=0.0,
        dense_parameters=matrices,
        dense_bytes=(matrices - narrow) * _BF16 + narrow * _FP8,
        kernels=(_LLAMA + _FBGEMM) * layers,
        narrow_parameters=narrow,
    )


def _mixture(  # noqa: PLR0913  # one line a model below
    name: str, *, layers: int, hidden: int, query_width: int, kv_width: int, vocabulary: int, experts: int,
    per_token: int, inner: int, kernels: int, moe_layers: int | None = None, shared_inner: int = 0,
    dense_inner: int = 0, weight_bytes: float = _BF16, expert_bytes: float | None = None,
    attention_parameters: float | None = None, cached_width: int | None = None, window: float | None = None,
    window_share: float = 0.0, block_scaled: bool = False, head_width: int = 128,
    eager_attention: bool = False,
) -> Shape:  # fmt: skip
    with_experts = layers if moe_layers is None else moe_layers
    attention = attention_parameters or layers * hidden * (2.0 * query_width + 2.0 * kv_width)
    dense = with_experts * (3.0 * hidden * shared_inner + hidden * experts)
    dense += (layers - with_experts) * 3.0 * hidden * dense_inner + vocabulary * hidden
    width = expert_bytes if expert_bytes is not None else weight_bytes
    cached = 2 * kv_width if cached_width is None else cached_width
    return Shape(
        name=name,
        layers=layers,
        hidden=hidden,
        kv_bytes_per_token=layers * cached * _BF16,
        kv_heads=1 if cached_width is not None else kv_width // head_width,
        attention_parameters=attention,
        attention_bytes=attention * weight_bytes,
        dense_parameters=dense,
        dense_bytes=dense * weight_bytes,
        kernels=kernels * layers + _MLP * (layers - with_experts),
        narrow_parameters=attention + dense if weight_bytes == _FP8 else 0.0,
        experts=Experts(experts, per_token, 3.0 * hidden * inner, width, with_experts),
        block_scaled=block_scaled,
        eager_attention=eager_attention,
        window_tokens=float("inf") if window is None else window,
        window_share=window_share,
    )


def _qwen3_moe(name: str, layers: int, hidden: int, heads: int, kv_heads: int, experts: int, inner: int,
               *, fp8: bool = False) -> Shape:  # fmt: skip
    return _mixture(
        name, layers=layers, hidden=hidden, query_width=heads * 128, kv_width=kv_heads * 128,
        vocabulary=151936, experts=experts, per_token=8, inner=inner, kernels=_QWEN3 - _MLP,
        weight_bytes=_FP8 if fp8 else _BF16, block_scaled=fp8,
    )  # fmt: skip


def _gpt_oss(name: str, layers: int, experts: int) -> Shape:
    return _mixture(
        name, layers=layers, hidden=2880, query_width=4096, kv_width=512, vocabulary=201088, experts=experts,
        per_token=4, inner=2880, kernels=_LLAMA - _MLP, expert_bytes=_MXFP4, window=128.0, window_share=0.5,
        head_width=64,
    )  # fmt: skip


def _llama4(name: str, experts: int, moe_layers: int, dense_inner: int, *, fp8: bool = False) -> Shape:
    return _mixture(
        name, layers=48, hidden=5120, query_width=5120, kv_width=1024, vocabulary=202048, experts=experts,
        per_token=1, inner=8192, kernels=_LLAMA - _MLP, moe_layers=moe_layers, shared_inner=8192,
        dense_inner=dense_inner, expert_bytes=_FP8 if fp8 else _BF16, block_scaled=fp8,
        eager_attention=True,
    )  # fmt: skip


def _deepseek(name: str) -> Shape:
    # Low-rank Q, the compressed KV with its rotary part, its expansion, and the output.
    attention = 7168 * 1536 + 1536 * 128 * 192 + 7168 * 576 + 512 * 128 * 256 + 128 * 128 * 7168
    return _mixture(
        name, layers=61, hidden=7168, query_width=0, kv_width=0, vocabulary=129280, experts=256, per_token=8,
        inner=2048, kernels=_QWEN3 - _MLP, moe_layers=58, shared_inner=2048, dense_inner=18432,
        weight_bytes=_FP8, cached_width=512 + 64, block_scaled=True, attention_parameters=61.0 * attention,
    )  # fmt: skip


_LLAMA_70B = (80, 8192, 1024, 70.55e9, 128256 * 8192.0, _LLAMA)

SHAPES: Final[dict[str, Shape]] = {
    shape.name: shape
    for shape in (
        _dense("Qwen/Qwen3-8B", 36, 4096, 1024, 8.191e9, 151936 * 4096.0, _QWEN3),
        _dense("Qwen/Qwen3-14B", 40, 5120, 1024, 14.768e9, 151936 * 5120.0, _QWEN3),
        _dense("Qwen/Qwen3-32B", 64, 5120, 1024, 32.762e9, 151936 * 5120.0, _QWEN3),
        _dense("Qwen/Qwen3-4B-Thinking-2507", 36, 2560, 1024, 4.022e9, 0.0, _QWEN3),  # tied head
        _dense("mistralai/Codestral-22B-v0.1", 56, 6144, 1024, 22.25e9, 32768 * 6144.0, _LLAMA),
        _dense("meta-llama/Llama-3.1-405B-Instruct", 126, 16384, 1024, 405.85e9, 128256 * 16384.0, _LLAMA),
        _dense("google/gemma-3-12b-it", 48, 3840, 2048, 11.77e9, 0.0, _GEMMA3),  # tied head
        _dense("google/gemma-3-27b-it", 62, 5376, 2048, 27.0e9, 0.0, _GEMMA3),
        _dense("meta-llama/Llama-3.1-8B-Instruct", 32, 4096, 1024, 8.03e9, 128256 * 4096.0, _LLAMA),
        _dense("meta-llama/Llama-3.1-70B-Instruct", *_LLAMA_70B),
        _dense("meta-llama/Llama-3.3-70B-Instruct", *_LLAMA_70B),
        _llama_405b_fp8(),
        *(
            _qwen3_moe(f"Qwen/Qwen3-{name}", 48, 2048, 32, 4, 128, 768)
            for name in ("30B-A3B-Instruct-2507", "30B-A3B-Thinking-2507", "Coder-30B-A3B-Instruct")
        ),
        *(
            _qwen3_moe(
                f"Qwen/Qwen3-235B-A22B-{kind}-2507{suffix}", 94, 4096, 64, 4, 128, 1536, fp8=bool(suffix)
            )
            for kind in ("Instruct", "Thinking")
            for suffix in ("", "-FP8")
        ),
        *(
            _qwen3_moe(
                f"Qwen/Qwen3-Coder-480B-A35B-Instruct{suffix}", 62, 6144, 96, 8, 160, 2560, fp8=bool(suffix)
            )
            for suffix in ("", "-FP8")
        ),
        _llama4("meta-llama/Llama-4-Scout-17B-16E-Instruct", 16, 48, 0),
        _llama4("meta-llama/Llama-4-Maverick-17B-128E-Instruct", 128, 24, 16384),
        _llama4("meta-llama/Llama-4-Maverick-17B-128E-Instruct-FP8", 128, 24, 16384, fp8=True),
        _gpt_oss("openai/gpt-oss-120b", 36, 128),
        _gpt_oss("openai/gpt-oss-20b", 24, 32),
        *(_deepseek(f"deepseek-ai/DeepSeek-{name}") for name in ("V3.1", "R1", "R1-0528")),
    )
}  # fmt: skip
"""By the name the tables use."""
