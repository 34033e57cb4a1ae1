"""A model's shape from its Hugging Face ``config.json``; parameters are counted, not read off a name."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from rlgov.errors import ProfileError
from rlgov.simulation.families import FAMILIES, Family
from rlgov.simulation.model import Experts, LatentAttention, Model, Window
from rlgov.simulation.quantisation import read_widths, stored_groups

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from rlgov.simulation.quantisation import Widths

_GATED = 3  # matrices of a gated feed-forward part: gate, up, down


@dataclass(frozen=True, slots=True)
class Count:
    """Parameters of a model by what is stored or quantised alike."""

    embedding: float
    output: float  # 0 where the input embedding serves as output
    attention: float
    dense: float  # feed-forward parts that every token uses, shared experts included
    experts: float  # routed
    kept: float  # routers, norms and biases: never quantised

    @property
    def total(self) -> float:
        """All of them."""
        return self.embedding + self.output + self.attention + self.dense + self.experts + self.kept


class Fields:
    """A configuration's fields; what is missing is gathered and reported at once."""

    def __init__(self, raw: Mapping[str, Any], defaults: Mapping[str, Any], origin: str) -> None:
        self._raw = {**defaults, **{name: value for name, value in raw.items() if value is not None}}
        self._origin = origin
        self._missing: list[str] = []

    def number(self, *names: str, default: int | None = None) -> int:
        """The whole number under the first of ``names`` that is there; 1 stands in for a missing one."""
        for name in names:
            if name in self._raw:
                value = self._raw[name]
                if isinstance(value, bool) or not isinstance(value, int) or value < 0:
                    msg = f"{self._origin}: {name} must be a whole number of at least 0, got {value!r}"
                    raise ProfileError(msg)
                if value or default is not None:
                    return value
                msg = f"{self._origin}: {name} must be above 0"
                raise ProfileError(msg)
        if default is None:
            self._missing.append(" or ".join(names))
            return 1
        return default

    def get(self, name: str) -> Any:  # noqa: ANN401  # whatever JSON holds
        """A field of any kind, None where it is absent or null."""
        return self._raw.get(name)

    def check(self) -> None:
        """Raise for all that was missing so far."""
        if self._missing:
            there = ", ".join(sorted(self._raw)) or "nothing"
            missing = ", ".join(dict.fromkeys(self._missing))
            msg = (
                f"{self._origin} lacks {missing}: add what is missing, or give the config.json that lies "
                f"beside the model's weights (it has: {there})"
            )
            raise ProfileError(msg)


def read_model(path: Path, *, name: str | None = None, dtype: str = "auto", kv_dtype: str = "auto") -> Model:
    """Read a ``config.json``, or the one in a model's folder.

    Args:
        path: The file or folder.
        name: What to call the model; the file's own ``_name_or_path`` or the folder's name if not given.
        dtype: Width of the weights: ``auto`` (as the file says), ``bfloat16``, ``float16`` or ``fp8``, which
            quantises while loading, as vLLM does.
        kv_dtype: Width of cached keys and values: ``auto`` (as the weights' activations) or ``fp8``.

    Raises:
        ProfileError: It cannot be read, is of an unknown family, or lacks fields; all of them are named.
    """
    file = path / "config.json" if path.is_dir() else path
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        msg = f"cannot read {file}: {error.strerror}; give a model's config.json or the folder it lies in"
        raise ProfileError(msg) from error
    except ValueError as error:
        msg = f"{file} is not JSON ({error}); give a model's config.json"
        raise ProfileError(msg) from error
    if not isinstance(raw, dict):
        msg = f"{file} must hold a JSON object, got {type(raw).__name__}; give a model's config.json"
        raise ProfileError(msg)
    chosen = name or raw.get("_name_or_path") or file.resolve().parent.name
    return parse_model(raw, origin=str(file), name=str(chosen), dtype=dtype, kv_dtype=kv_dtype)


def parse_model(
    raw: Mapping[str, Any], *, origin: str, name: str, dtype: str = "auto", kv_dtype: str = "auto"
) -> Model:
    """The shape that a configuration describes; ``origin`` is named in errors. See :func:`read_model`."""
    text = raw.get("text_config")
    inner = text if isinstance(text, dict) else raw  # models that see or hear keep language one level below
    where = f"{origin} (text_config)" if inner is text else origin
    kind = _kind(raw, inner, origin)
    family = FAMILIES[kind]
    fields = Fields(inner, family.defaults, where)
    count, experts = _count(fields, family)
    shape = {
        "layers": fields.number("num_hidden_layers"),
        "hidden": fields.number("hidden_size"),
        "heads": fields.number("num_attention_heads"),
        "kv_heads": _kv_heads(fields),
        "head_dim": _head_dim(fields),
    }
    latent = _latent(fields) if family.latent else None
    window = _window(fields, family, shape["layers"])
    fields.check()
    quantised = raw.get("quantization_config") or inner.get("quantization_config")
    widths = read_widths(quantised, origin=origin, dtype=dtype, kv_dtype=kv_dtype, layers=shape["layers"])
    tied = inner.get("tie_word_embeddings", raw.get("tie_word_embeddings"))
    is_tied = family.tied_embeddings if tied is None else bool(tied)
    if is_tied:
        count = _tied(count)
    unseen = ", its vision part left out" if "vision_config" in raw else ""
    return _model(name, f"{origin}, model_type {kind}{unseen}", shape, count, experts, widths, latent, window)


def _model(
    name: str,
    source: str,
    shape: Mapping[str, int],
    count: Count,
    experts: tuple[int, int] | None,
    widths: Widths,
    latent: LatentAttention | None,
    window: Window | None,
) -> Model:
    try:
        routed = None
        if experts is not None:
            routed = Experts(
                count=experts[0],
                per_token=experts[1],
                parameters=count.experts,
                bytes_per_weight=widths.experts_bytes,
            )
        return Model(
            name=name,
            **shape,
            parameters=count.total,
            # A tied embedding is also the output matrix, so every token multiplies it.
            lookup_parameters=count.embedding if count.output else 0.0,
            bytes_per_weight=widths.linear_bytes,
            bytes_per_kv_value=widths.kv_bytes,
            source=f"{source}; parameters counted from the shape{widths.note}",
            experts=routed,
            latent_attention=latent,
            window=window,
            other_weights=stored_groups(count, widths),
            arithmetic=widths.arithmetic,
        )
    except ValidationError as error:
        problems = "; ".join(str(item["msg"]) for item in error.errors(include_url=False))
        raise ProfileError(f"{source}: {problems}") from error


def _kind(raw: Mapping[str, Any], inner: Mapping[str, Any], origin: str) -> str:
    outer_kind = raw.get("model_type")
    kind = inner.get("model_type", outer_kind)
    for candidate in (kind, f"{outer_kind}_text"):
        if isinstance(candidate, str) and candidate in FAMILIES:
            return candidate
    if kind is None:
        msg = (
            f"{origin} lacks model_type: give a model's config.json; known are {', '.join(sorted(FAMILIES))}"
        )
    else:
        msg = (
            f"{origin}: model_type {kind!r} is not known here, so its parameters cannot be counted; known "
            f"are {', '.join(sorted(FAMILIES))}. Measure the model instead (`rlgov characterize`)"
        )
    raise ProfileError(msg)


def _kv_heads(fields: Fields) -> int:
    return fields.number("num_key_value_heads", default=fields.number("num_attention_heads"))


def _head_dim(fields: Fields) -> int:
    derived = fields.number("hidden_size") // fields.number("num_attention_heads")
    return fields.number("head_dim", default=derived)


def _latent(fields: Fields) -> LatentAttention:
    return LatentAttention(
        kv_lora_rank=fields.number("kv_lora_rank"),
        qk_rope_head_dim=fields.number("qk_rope_head_dim"),
        qk_nope_head_dim=fields.number("qk_nope_head_dim"),
        v_head_dim=fields.number("v_head_dim"),
    )


def _window(fields: Fields, family: Family, layers: int) -> Window | None:
    tokens = fields.number("sliding_window", default=0)
    if not tokens or fields.get("use_sliding_window") is False or family.window == "none":
        return None
    kinds = fields.get("layer_types")
    if isinstance(kinds, list):
        windowed = sum(kind == "sliding_attention" for kind in kinds)
    elif family.window == "pattern":
        windowed = layers - layers // fields.number("sliding_window_pattern", default=6)
    else:
        windowed = layers if family.window == "all" else (layers + 1) // 2
    return Window(tokens=tokens, layers=windowed) if windowed else None


def _count(fields: Fields, family: Family) -> tuple[Count, tuple[int, int] | None]:
    layers, hidden = fields.number("num_hidden_layers"), fields.number("hidden_size")
    vocabulary = fields.number("vocab_size")
    attention, kept = _latent_attention(fields) if family.latent else _attention(fields, family)
    kept += family.layer_norms * hidden
    dense, routed, router, choice = _feed_forward(fields, family)
    return Count(
        embedding=float(vocabulary * hidden),
        output=float(vocabulary * hidden),
        attention=float(layers * attention),
        dense=dense,
        experts=routed,
        kept=float(layers * kept + hidden) + router,
    ), choice


def _attention(fields: Fields, family: Family) -> tuple[int, int]:
    """Matrices of one layer, and what is beside them."""
    hidden, heads = fields.number("hidden_size"), fields.number("num_attention_heads")
    width = _head_dim(fields)
    queries, keys = heads * width, _kv_heads(fields) * width
    beside = 2 * width if family.query_key_norm else 0
    if family.qkv_bias or fields.get("attention_bias") is True:
        beside += queries + 2 * keys
    if family.experts == "gpt-oss":
        beside += hidden + heads  # bias of the output, and a sink per head
    return hidden * (queries + 2 * keys) + queries * hidden, beside


def _latent_attention(fields: Fields) -> tuple[int, int]:
    hidden, heads = fields.number("hidden_size"), fields.number("num_attention_heads")
    latent = _latent(fields)
    query = heads * (latent.qk_nope_head_dim + latent.qk_rope_head_dim)
    rank = fields.number("q_lora_rank", default=0)
    queries = hidden * rank + rank * query if rank else hidden * query
    down = hidden * (latent.kv_lora_rank + latent.qk_rope_head_dim)
    up = latent.kv_lora_rank * heads * (latent.qk_nope_head_dim + latent.v_head_dim)
    return queries + down + up + heads * latent.v_head_dim * hidden, rank + latent.kv_lora_rank


def _feed_forward(fields: Fields, family: Family) -> tuple[float, float, float, tuple[int, int] | None]:
    """Parameters that all tokens use, of routed experts, of routers; and the choice (experts, per token)."""
    layers, hidden = fields.number("num_hidden_layers"), fields.number("hidden_size")
    if family.experts == "none":
        return float(layers * _GATED * hidden * fields.number("intermediate_size")), 0.0, 0.0, None
    if family.experts in {"mixtral", "gpt-oss", "llama4"}:
        count, size = fields.number("num_local_experts"), fields.number("intermediate_size")
    else:
        count = fields.number("n_routed_experts" if family.experts == "deepseek" else "num_experts")
        size = fields.number("moe_intermediate_size")
    choice = (count, fields.number("num_experts_per_tok", "experts_per_token"))
    sparse, dense_size, shared_size = _layout(fields, family, layers)
    expert, router = _GATED * hidden * size, hidden * count
    if family.experts == "gpt-oss":
        expert, router = expert + 2 * size + hidden, router + count  # with biases
    elif family.experts == "deepseek" and fields.get("topk_method") == "noaux_tc":
        router += count  # a correction per expert
    elif family.experts == "qwen" and shared_size:
        router += hidden  # the shared expert has a gate of its own
    dense = (layers - sparse) * _GATED * hidden * dense_size + sparse * _GATED * hidden * shared_size
    return float(dense), float(sparse * count * expert), float(sparse * router), choice


def _layout(fields: Fields, family: Family, layers: int) -> tuple[int, int, int]:
    """Layers with experts, size of the other layers' feed-forward part, and of the shared experts."""
    if family.experts == "deepseek":
        first = fields.number("first_k_dense_replace", default=0)
        step = fields.number("moe_layer_freq", default=1)
        sparse = sum(layer >= first and layer % max(step, 1) == 0 for layer in range(layers))
        shared = fields.number("n_shared_experts", default=0) * fields.number("moe_intermediate_size")
        return sparse, fields.number("intermediate_size"), shared
    if family.experts == "qwen":
        step = fields.number("decoder_sparse_step", default=1)
        without = fields.get("mlp_only_layers") or []
        sparse = sum(layer not in without and (layer + 1) % max(step, 1) == 0 for layer in range(layers))
        size = fields.number("intermediate_size") if sparse < layers else 0
        return sparse, size, fields.number("shared_expert_intermediate_size", default=0)
    if family.experts == "llama4":
        sparse = layers // max(fields.number("interleave_moe_layer_step"), 1)
        size = fields.number("intermediate_size_mlp") if sparse < layers else 0
        return sparse, size, fields.number("intermediate_size")
    return layers, 0, 0


def _tied(count: Count) -> Count:
    return Count(count.embedding, 0.0, count.attention, count.dense, count.experts, count.kept)
