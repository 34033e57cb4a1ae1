"""How wide a model's weights are stored, from the ``quantization_config`` of its ``config.json``."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from rlgov.errors import ProfileError
from rlgov.simulation.model import WeightGroup

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from rlgov.simulation.model import Arithmetic
    from rlgov.simulation.model_config import Count

BYTES_16_BIT = 2.0
_SCALE_16_BYTES = 2.0  # a scale in 16 bits
_SCALE_32_BYTES = 4.0
_MX_BLOCK = 32  # weights that share one 8-bit scale
_NV_BLOCK = 16
_METHODS = ("fp8", "fbgemm_fp8", "awq", "gptq", "mxfp4", "compressed-tensors", "modelopt")
_DTYPES = ("auto", "bfloat16", "float16", "fp8")
_KV_DTYPES = ("auto", "bfloat16", "float16", "fp8")


@dataclass(frozen=True, slots=True)
class Widths:
    """Bytes per weight by group, and the number format of the arithmetic."""

    linear_bytes: float = BYTES_16_BIT
    experts_bytes: float = BYTES_16_BIT
    attention_bytes: float = BYTES_16_BIT
    kv_bytes: float = BYTES_16_BIT
    arithmetic: Arithmetic = "bf16"
    note: str = ""


def read_widths(quantised: object, *, origin: str, dtype: str, kv_dtype: str, layers: int) -> Widths:
    """Widths that a ``quantization_config`` states, or that ``dtype`` asks for where there is none.

    Raises:
        ProfileError: An unknown method or dtype, or fields that a method needs are missing.
    """
    if dtype not in _DTYPES or kv_dtype not in _KV_DTYPES:
        msg = f"--dtype must be one of {', '.join(_DTYPES)} and --kv-dtype one of {', '.join(_KV_DTYPES)}"
        raise ProfileError(msg)
    if isinstance(quantised, dict):
        if dtype != "auto":
            msg = (
                f"{origin} has a quantization_config, so its weights are stored as that says and --dtype "
                f"{dtype} does not apply: leave it out, or give the config.json of the model in 16 bits"
            )
            raise ProfileError(msg)
        widths = _Stated(quantised, origin, layers).widths()
    elif dtype == "fp8":
        widths = Widths(1.0, 1.0, 1.0, arithmetic="fp8", note="; quantised to fp8 while loading")
    else:
        widths = Widths()
    return replace(widths, kv_bytes=1.0) if kv_dtype == "fp8" else widths


def stored_groups(count: Count, widths: Widths) -> tuple[WeightGroup, ...]:
    """Dense weights that are stored at another width than the linear layers."""
    if widths.linear_bytes == BYTES_16_BIT:
        return ()
    groups = [("embedding", count.embedding, BYTES_16_BIT, count.output > 0)]
    groups += [("output", count.output, BYTES_16_BIT, False)]
    groups += [("routers, norms and biases", count.kept, BYTES_16_BIT, False)]
    if widths.attention_bytes != widths.linear_bytes:
        groups.append(("attention", count.attention, widths.attention_bytes, False))
    return tuple(
        WeightGroup(name=name, parameters=parameters, bytes_per_weight=width, lookup=lookup)
        for name, parameters, width, lookup in groups
        if parameters
    )


class _Stated:
    """A ``quantization_config`` with what is needed to report on it."""

    def __init__(self, raw: Mapping[str, Any], origin: str, layers: int) -> None:
        self._raw = raw
        self._origin = f"{origin}: quantization_config"
        self._layers = layers

    def widths(self) -> Widths:
        """Widths by the method named."""
        method = str(self._raw.get("quant_method", "")).lower().replace("_", "-")
        if method in {"fp8", "fbgemm-fp8"}:
            found = self._uniform(1.0 + self._block_scale(), "fp8")
        elif method in {"awq", "gptq"}:
            bits, group = self._number(self._raw, "bits"), self._number(self._raw, "group_size")
            found = self._uniform(_grouped(bits, group), "bf16")
        elif method == "mxfp4":
            # Only experts are quantised; the arithmetic widens them.
            found = Widths(experts_bytes=0.5 + 1.0 / _MX_BLOCK)
        elif method == "compressed-tensors":
            found = self._compressed()
        elif method == "modelopt":
            found = self._modelopt()
        else:
            msg = (
                f"{self._origin}.quant_method is {self._raw.get('quant_method')!r}; known are "
                f"{', '.join(_METHODS)}. Or give the config.json of the same model in 16 bits"
            )
            raise ProfileError(msg)
        return replace(found, note=f"; weights {method}")

    def _uniform(self, width: float, arithmetic: Arithmetic) -> Widths:
        attention = BYTES_16_BIT if self._keeps_attention() else width
        return Widths(width, width, attention, arithmetic=arithmetic)

    def _block_scale(self) -> float:
        block = self._raw.get("weight_block_size")
        if isinstance(block, list) and block and all(isinstance(n, int) and n > 0 for n in block):
            size = 1
            for n in block:
                size *= n
            return _SCALE_32_BYTES / size
        return 0.0  # one scale per channel or matrix: nothing to speak of

    def _compressed(self) -> Widths:
        groups = self._raw.get("config_groups")
        first = next(iter(groups.values()), None) if isinstance(groups, dict) else None
        weights = first.get("weights") if isinstance(first, dict) else None
        if not isinstance(weights, dict):
            msg = f"{self._origin} lacks config_groups.*.weights: give the file as it lies beside the weights"
            raise ProfileError(msg)
        bits = self._number(weights, "num_bits")
        group = weights.get("group_size")
        size = group if isinstance(group, int) and group > 0 else 0
        inputs = first.get("input_activations") if isinstance(first, dict) else None
        narrow = isinstance(inputs, dict) and weights.get("type") == "float"
        arithmetic: Arithmetic = "bf16"
        if narrow and isinstance(inputs, dict):
            arithmetic = "fp4" if inputs.get("num_bits") == 4 else "fp8"  # noqa: PLR2004  # bits
        if weights.get("type") == "float" and bits == 4:  # noqa: PLR2004  # bits
            return self._uniform(0.5 + 1.0 / (size or _NV_BLOCK), arithmetic)
        return self._uniform(_grouped(bits, size, zero=not weights.get("symmetric", True)), arithmetic)

    def _modelopt(self) -> Widths:
        algorithm = str(self._raw.get("quant_algo", "")).upper()
        if algorithm.startswith("FP8"):
            return self._uniform(1.0, "fp8")
        if "FP4" in algorithm:
            return self._uniform(0.5 + 1.0 / _NV_BLOCK, "fp4")
        msg = f"{self._origin}.quant_algo is {self._raw.get('quant_algo')!r}; known are FP8 and NVFP4"
        raise ProfileError(msg)

    def _number(self, raw: Mapping[str, Any], name: str) -> int:
        value = raw.get(name)
        if isinstance(value, bool) or not isinstance(value, int):
            msg = f"{self._origin} lacks {name}, a whole number: give the file as it lies beside the weights"
            raise ProfileError(msg)
        return value

    def _keeps_attention(self) -> bool:
        """Whether the list of modules left alone names the attention of (nearly) every layer."""
        left: Sequence[Any] = self._raw.get("modules_to_not_convert") or self._raw.get("ignore") or ()
        names = [name for name in left if isinstance(name, str) and "attn" in name]
        if any("*" in name or name.startswith("re:") for name in names):
            return True
        layers = {part for name in names for part in name.split(".") if part.isdigit()}
        return len(layers) > self._layers / 2


def _grouped(bits: int, group: int, *, zero: bool = True) -> float:
    """Bytes of a weight of ``bits`` with a 16-bit scale, and perhaps a zero point, per ``group`` weights."""
    width = bits / 8.0
    if group <= 0:
        return width
    return width + (_SCALE_16_BYTES + (width if zero else 0.0)) / group
