"""A profile: one (GPU, model) pair as YAML, every number with its source.

A profile holds what a datasheet or model card states (``gpu``, ``model``), what the operator decided
(``deployment``), what was measured (``decode_rows``, ``all_reduce``) and what was fitted or assumed
(``parameters``, each with a range). ``rlgov.simulation.physics`` turns it into the kernel's tables.
"""

from __future__ import annotations

from importlib import resources
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

import yaml
from pydantic import Field, ValidationError, model_validator

from rlgov.errors import ConfigError, ProfileError
from rlgov.records import Limits, ServiceLevel
from rlgov.simulation.model import Arithmetic, Experts, LatentAttention, Model, WeightGroup, Window
from rlgov.simulation.part import Count, GrownPart, NonNegative, Part, Positive

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = [
    "KV_BLOCK_TOKENS",
    "AllReduce",
    "DecodeRow",
    "DeploymentShape",
    "Experts",
    "Gpu",
    "LatentAttention",
    "Model",
    "Objective",
    "Parameter",
    "Parameters",
    "Profile",
    "WeightGroup",
    "Window",
    "load_profile",
    "parse_profile",
    "profile_names",
]

KV_BLOCK_TOKENS = 16
_FOLDER = "profiles"


class Parameter(Part):
    """A number with its range and where it comes from.

    ``fitted`` and ``measured`` values come from the data named in ``source``; a ``prior`` is an
    assumption, and training randomises over its range.
    """

    value: float
    low: float
    high: float
    kind: Literal["measured", "fitted", "prior"]
    source: str
    error: str | None = None

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if not self.low <= self.value <= self.high:
            msg = f"value {self.value} lies outside its range {self.low}..{self.high}"
            raise ValueError(msg)
        return self


class Gpu(GrownPart):
    """Datasheet of one card."""

    name: str
    tdp_w: Positive
    hbm_bytes: Positive
    hbm_bytes_per_s: Positive
    peak_bf16_flop_per_s: Positive
    sm_clock_min_mhz: Count
    sm_clock_max_mhz: Count
    sm_clock_step_mhz: Count
    source: str
    peak_fp8_flop_per_s: Positive | None = None
    peak_fp4_flop_per_s: Positive | None = None

    @model_validator(mode="after")
    def _grid(self) -> Self:
        if (self.sm_clock_max_mhz - self.sm_clock_min_mhz) % self.sm_clock_step_mhz:
            msg = "sm_clock_max_mhz is not a whole number of sm_clock_step_mhz above sm_clock_min_mhz"
            raise ValueError(msg)
        return self

    @property
    def grid_clocks_mhz(self) -> tuple[int, ...]:
        """The supported SM clocks, ascending."""
        return tuple(range(self.sm_clock_min_mhz, self.sm_clock_max_mhz + 1, self.sm_clock_step_mhz))

    def peak_flop_per_s(self, arithmetic: Arithmetic) -> float:
        """Of dense matrices in that format, or in the next wider one that the card has units for."""
        offered = {
            "fp8": (self.peak_fp8_flop_per_s,),
            "fp4": (self.peak_fp4_flop_per_s, self.peak_fp8_flop_per_s),
        }
        return next((peak for peak in offered.get(arithmetic, ()) if peak), self.peak_bf16_flop_per_s)


class Objective(Part):
    """Default latency objectives of the profile."""

    ttft_s: Positive
    tpot_s: Positive
    source: str


class DeploymentShape(Part):
    """What the operator decided; every axis fastest first."""

    allotted_gpus: Count
    tp_degrees: tuple[Count, ...]
    sm_clocks_mhz: tuple[Count, ...]
    batch_caps: tuple[Count, ...]
    max_num_batched_tokens: Count
    gpu_memory_utilization: Annotated[float, Field(gt=0, le=1)]
    reserved_bytes_per_gpu: NonNegative  # activations, CUDA graphs, communication buffers
    interval_s: Positive
    service_level: Objective

    @model_validator(mode="after")
    def _descending(self) -> Self:
        for name in ("tp_degrees", "sm_clocks_mhz", "batch_caps"):
            axis: tuple[int, ...] = getattr(self, name)
            if not axis or any(a <= b for a, b in pairwise(axis)):
                msg = f"{name} must be distinct and descending (fastest first), got {axis}"
                raise ValueError(msg)
        if self.tp_degrees[0] > self.allotted_gpus:
            msg = f"TP degree {self.tp_degrees[0]} needs more than the {self.allotted_gpus} allotted GPUs"
            raise ValueError(msg)
        return self


_NO_PROMPT_OVERHEAD = Parameter(
    value=0.0, low=0.0, high=0.0, kind="prior", source="not told apart: no more than the prompt tokens take"
)


class Parameters(GrownPart):
    """Everything fitted or assumed. Powers are per GPU at the highest clock."""

    # time
    weight_efficiency: Parameter  # share of the datasheet's bandwidth reached on weights
    kv_efficiency: Parameter  # the same on KV
    gemm_mfu: Parameter  # of decode's matrix multiplications
    prefill_mfu: Parameter
    attention_mfu: Parameter  # of prefill attention
    layer_overhead_s: Parameter  # per layer and iteration
    sequence_overhead_s: Parameter  # per decoding sequence and iteration
    layer_overhead_clock_share: Parameter  # share of it that scales with 1/clock
    sequence_overhead_clock_share: Parameter
    kv_clock_share: Parameter
    memory_knee: Parameter  # clock fraction below which bandwidth falls with the clock
    host_floor_s: Parameter
    all_reduce_latency_s: Parameter  # one-shot all-reduce in a CUDA graph
    # power
    voltage_knee: Parameter  # clock fraction at which the voltage starts to rise
    voltage_at_max: Parameter  # V(f_max) / V(below the knee)
    constant_w: Parameter  # clock-independent, while iterating
    clocked_w: Parameter  # f V^2, while iterating, whatever the work
    weight_j_per_byte: Parameter
    kv_j_per_byte: Parameter
    memory_clocked_share: Parameter  # share of both that goes with f V^2; the rest is DRAM
    flop_j: Parameter  # V^2
    idle_low_w: Parameter  # loaded but without work, at the lowest clock
    idle_high_w: Parameter  # the same at the highest
    # actuation
    clock_delay_s: Parameter
    wake_s: Parameter  # from sleep (weights in host memory) to healthy
    cold_start_s: Parameter
    warmup_s: Parameter
    startup_w: Parameter  # per GPU, while an engine wakes or starts
    warmup_w: Parameter  # per GPU
    # time; came later
    prompt_overhead_s: Parameter = _NO_PROMPT_OVERHEAD  # host, per iteration that computes prompt tokens

    def items(self) -> Iterator[tuple[str, Parameter]]:
        """Name and parameter, in the order of declaration."""
        for name in type(self).model_fields:
            yield name, getattr(self, name)


class DecodeRow(Part):
    """Measured pure decode at the default (highest) clock and one batch size."""

    tp_degree: Count
    batch: Positive  # achieved, mean
    context_tokens: Positive  # mean per sequence
    iteration_s: Positive
    power_w: Positive  # per GPU, of decode iterations
    source: str


class AllReduce(Part):
    """Bandwidth of an all-reduce over a TP group: message bytes / (time - latency)."""

    tp_degree: Count
    bytes_per_s: Positive
    source: str


class Profile(Part):
    """One (GPU, model) pair."""

    schema_version: Literal[1]
    name: str
    description: str
    gpu: Gpu
    model: Model
    deployment: DeploymentShape
    standby: Literal["asleep", "cold"]  # where engines of other TP degrees wait
    parameters: Parameters
    decode_rows: tuple[DecodeRow, ...]
    all_reduce: tuple[AllReduce, ...]

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        grid = set(self.gpu.grid_clocks_mhz)
        off = [c for c in self.deployment.sm_clocks_mhz if c not in grid]
        if off:
            msg = f"deployment.sm_clocks_mhz {off} are not supported clocks of the {self.gpu.name}"
            raise ValueError(msg)
        known = {a.tp_degree for a in self.all_reduce}
        for tp in self.deployment.tp_degrees:
            if tp > 1 and tp not in known:
                msg = f"all_reduce has no row for TP degree {tp}"
                raise ValueError(msg)
            if self.kv_capacity_blocks(tp) <= 0:
                msg = f"the weights of {self.model.name} do not fit {tp} GPU(s) of the {self.gpu.name}"
                raise ValueError(msg)
        return self

    def kv_capacity_blocks(self, tp_degree: int) -> int:
        """KV blocks of an engine: what the memory share leaves after weights and reserve."""
        shape = self.deployment
        per_gpu = shape.gpu_memory_utilization * self.gpu.hbm_bytes - shape.reserved_bytes_per_gpu
        free_bytes = per_gpu * tp_degree - self.model.weight_bytes
        block_bytes = self.model.kv_bytes_per_token * self.model.kv_copies(tp_degree) * KV_BLOCK_TOKENS
        return int(free_bytes // block_bytes)

    @property
    def startup_s(self) -> float:
        """From asking for a standby engine until it is healthy."""
        chosen = self.parameters.wake_s if self.standby == "asleep" else self.parameters.cold_start_s
        return chosen.value

    def limits(self) -> Limits:
        """What a deployment of this profile allows."""
        shape = self.deployment
        return Limits(
            sm_clocks_mhz=shape.sm_clocks_mhz,
            batch_caps=shape.batch_caps,
            tp_degrees=shape.tp_degrees,
            interval_s=shape.interval_s,
            service_level=ServiceLevel(shape.service_level.ttft_s, shape.service_level.tpot_s),
            allotted_gpus=shape.allotted_gpus,
            tdp_w=self.gpu.tdp_w,
            kv_capacity_tokens=tuple(
                self.kv_capacity_blocks(tp) * KV_BLOCK_TOKENS for tp in shape.tp_degrees
            ),
            switch_s=tuple(self.startup_s + self.parameters.warmup_s.value for _ in shape.tp_degrees),
            max_num_batched_tokens=shape.max_num_batched_tokens,
        )

    def to_yaml(self) -> str:
        """The profile as YAML; :func:`parse_profile` reads it back unchanged."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, width=110, allow_unicode=True)


def profile_names() -> list[str]:
    """Names of the shipped profiles."""
    folder = resources.files("rlgov.simulation") / _FOLDER
    return sorted(p.name.removesuffix(".yaml") for p in folder.iterdir() if p.name.endswith(".yaml"))


def load_profile(name_or_path: str | Path) -> Profile:
    """Load a shipped profile by name, or any profile by the path of its YAML file."""
    path = Path(name_or_path)
    if path.suffix in {".yaml", ".yml"}:
        try:
            text = path.read_text(encoding="utf-8")
        except OSError as error:
            msg = f"cannot read profile {path}: {error.strerror}; give a file or one of {profile_names()}"
            raise ProfileError(msg) from error
        return parse_profile(text, origin=str(path))
    if str(name_or_path) not in profile_names():
        msg = f"no profile {name_or_path!s}; shipped are {profile_names()}, or give the path of a .yaml file"
        raise ProfileError(msg)
    resource = resources.files("rlgov.simulation") / _FOLDER / f"{name_or_path}.yaml"
    return parse_profile(resource.read_text(encoding="utf-8"), origin=f"profiles/{name_or_path}.yaml")


def parse_profile(text: str, *, origin: str) -> Profile:
    """Check YAML text; ``origin`` is named in errors."""
    try:
        raw: Any = yaml.safe_load(text)
    except yaml.YAMLError as error:
        msg = f"{origin} is not valid YAML: {error}"
        raise ProfileError(msg) from error
    if not isinstance(raw, dict):
        msg = f"{origin} must hold a mapping of profile fields, got {type(raw).__name__}"
        raise ProfileError(msg)
    try:
        profile = Profile.model_validate(raw)
        profile.limits()
    except ValidationError as error:
        raise ProfileError(f"{origin}: {_explain(error)}") from error
    except ConfigError as error:
        raise ProfileError(f"{origin}: {error}") from error
    return profile


def _explain(error: ValidationError) -> str:
    lines = []
    for item in error.errors(include_url=False):
        field = ".".join(str(part) for part in item["loc"]) or "profile"
        if item["type"] == "extra_forbidden":
            lines.append(f"unknown field {field}; remove it or correct its spelling")
        elif item["type"] == "missing":
            lines.append(f"missing field {field}; add it")
        else:
            lines.append(f"field {field}: {item['msg']}")
    return "; ".join(lines)
