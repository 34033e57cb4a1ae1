"""From a profile to the kernel's tables: time and energy of one iteration.

The form is in :mod:`rlgov.simulation.tables`. Where decode was measured (``profile.decode_rows``) the
tables reproduce it at the highest clock: physics gives the shape between the rows and the split into
memory, compute and communication, which decides what a lower clock does; a correction per batch size,
interpolated in log(batch), closes the gap. TP degrees without rows borrow the correction of the
nearest measured degree.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING

import numpy as np

from rlgov.errors import ProfileError
from rlgov.simulation.tables import PhysicsTables

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    from rlgov.simulation.profile import DecodeRow, Gpu, Model, Profile

    Floats = NDArray[np.float64]

_LEAST_CORRECTION = 0.05  # a correction never removes more than this leaves of the physics


@dataclass(frozen=True, slots=True)
class ParameterDraw:
    """Values that replace the nominal ones of a profile's parameters, by name."""

    values: Mapping[str, float] = field(default_factory=lambda: MappingProxyType({}))


NOMINAL = ParameterDraw()


def draw_parameters(profile: Profile, rng: np.random.Generator) -> ParameterDraw:
    """Draw every prior and fitted parameter uniformly from its range; measured values stay."""
    return ParameterDraw(
        MappingProxyType(
            {
                name: float(rng.uniform(p.low, p.high))
                for name, p in profile.parameters.items()
                if p.kind != "measured" and p.high > p.low
            }
        )
    )


@dataclass(frozen=True, slots=True)
class DecodeWork:
    """Decode iterations of D sequences in one TP group, their context excluded, at the highest clock."""

    memory_s: Floats
    compute_s: Floats
    comm_s: Floats
    memory_j: Floats
    compute_j: Floats

    @property
    def total_s(self) -> Floats:
        """Time of the iteration above any host floor."""
        return self.memory_s + self.compute_s + self.comm_s

    @property
    def total_j(self) -> Floats:
        """Energy of the work, without what the group draws anyway."""
        return self.memory_j + self.compute_j


@dataclass(frozen=True, slots=True)
class Physics:
    """Time and energy of one model on one card under given parameters (``profile.Parameters`` by name)."""

    gpu: Gpu
    model: Model
    p: Mapping[str, float]
    all_reduce_bytes_per_s: Mapping[int, float]  # by TP degree

    def voltage_squared(self, x: Floats) -> Floats:
        """V(x)^2 relative to the highest clock."""
        slope = (self.p["voltage_at_max"] - 1.0) / (1.0 - self.p["voltage_knee"])
        voltage = np.maximum(1.0, 1.0 + slope * (x - self.p["voltage_knee"]))
        return (voltage / self.p["voltage_at_max"]) ** 2

    def memory_scale(self, x: Floats) -> Floats:
        """Slow-down of memory at a clock fraction."""
        return 1.0 / np.minimum(1.0, x / self.p["memory_knee"])

    def memory_energy_scale(self, x: Floats) -> Floats:
        """Energy of a byte read, relative to the highest clock."""
        share = self.p["memory_clocked_share"]
        return 1.0 - share + share * x * self.voltage_squared(x) * self.memory_scale(x)

    def busy_w(self, tp: int, x: Floats) -> Floats:
        """Power of an iterating TP group before its work."""
        return tp * (self.p["constant_w"] + self.p["clocked_w"] * x * self.voltage_squared(x))

    def idle_w(self, x: Floats) -> Floats:
        """Power of one GPU with nothing to do."""
        low_w, high_w = self.p["idle_low_w"], self.p["idle_high_w"]
        return low_w + (high_w - low_w) * x * self.voltage_squared(x)

    def comm_s(self, tp: int) -> float:
        """All-reduce time per token: two a layer, bf16 activations."""
        if tp == 1:
            return 0.0
        return 2.0 * self.model.layers * self.model.hidden * 2.0 / self.all_reduce_bytes_per_s[tp]

    def kv_s(self, tp: int) -> float:
        """Time to read the KV of one context token."""
        return self._kv_bytes_s(self.model.kv_bytes_per_token, tp)

    def kv_j(self, tp: int = 1) -> float:
        """Energy to read it."""
        return self.model.kv_bytes_per_token * self.model.kv_copies(tp) * self.p["kv_j_per_byte"]

    def _kv_bytes_s(self, one_copy_bytes: float, tp: int) -> float:
        read_bytes = one_copy_bytes * self.model.kv_copies(tp)
        return read_bytes / (tp * self.gpu.hbm_bytes_per_s * self.p["kv_efficiency"])

    def prefill_s(self, tp: int) -> float:
        """Arithmetic time per prompt token."""
        peak_flop_per_s = tp * self.gpu.peak_flop_per_s(self.model.arithmetic)
        return 2.0 * self.model.active_parameters / (peak_flop_per_s * self.p["prefill_mfu"])

    def prefill_expert_bytes(self, batch: float, chunk_tokens: int) -> float:
        """Expert weights that a prefill reads per prompt token beside ``batch`` decodes.

        A prefill touches every expert, also those that no decode beside it chose. The tables are linear
        in prompt tokens, so this spreads the reading over a full chunk; 0 for a dense model.
        """
        if self.model.experts is None:
            return 0.0
        untouched = 1.0 - float(self.model.experts.coverage(np.array([batch]))[0])
        return self.model.expert_bytes * untouched / chunk_tokens

    def flop_j(self) -> float:
        """Energy of one FLOP of a matrix multiplication.

        The fitted value is of bf16. Matrix units that do twice as much in a narrower format draw about
        as much power.
        """
        narrow = self.gpu.peak_bf16_flop_per_s / self.gpu.peak_flop_per_s(self.model.arithmetic)
        return self.p["flop_j"] * narrow

    def attention_s(self, tp: int) -> float:
        """Arithmetic time per (query, key) pair of a prefill."""
        peak_flop_per_s = tp * self.gpu.peak_bf16_flop_per_s
        return self.model.attention_flop_per_pair / (peak_flop_per_s * self.p["attention_mfu"])

    def decode(self, tp: int, batch: Floats) -> DecodeWork:
        """Decode by physics alone. ``batch`` 0 stands for an iteration that only prefills."""
        gpu, model, p = self.gpu, self.model, self.p
        weight_bytes = model.weights_read_bytes(batch)
        flop = 2.0 * model.active_parameters * batch
        read_s = weight_bytes / (tp * gpu.hbm_bytes_per_s * p["weight_efficiency"])
        multiply_s = flop / (tp * gpu.peak_flop_per_s(model.arithmetic) * p["gemm_mfu"])
        # Kernels overlap loads with arithmetic: a 2-norm, split so that the two parts add up to it and
        # its derivative by the clock is the compute part.
        gemm_s = np.hypot(read_s, multiply_s)
        layers_s = model.layers * p["layer_overhead_s"]
        sequences_s = batch * p["sequence_overhead_s"]
        layer_share, sequence_share = p["layer_overhead_clock_share"], p["sequence_overhead_clock_share"]
        latency_s = 2.0 * model.layers * p["all_reduce_latency_s"] if tp > 1 else 0.0
        fixed_s = layers_s * (1.0 - layer_share) + sequences_s * (1.0 - sequence_share)
        window_j = batch * (model.window_kv_bytes * model.kv_copies(tp) * p["kv_j_per_byte"])
        window_s = batch * self._kv_bytes_s(model.window_kv_bytes, tp)
        return DecodeWork(
            memory_s=read_s**2 / gemm_s + fixed_s + window_s,
            compute_s=multiply_s**2 / gemm_s + layers_s * layer_share + sequences_s * sequence_share,
            comm_s=latency_s + batch * self.comm_s(tp),
            memory_j=weight_bytes * p["weight_j_per_byte"] + window_j,
            compute_j=flop * self.flop_j(),
        )


def profile_physics(profile: Profile, draw: ParameterDraw = NOMINAL) -> Physics:
    """The physics of a profile, without what its measured rows add."""
    known = dict(profile.parameters.items())
    unknown = set(draw.values) - set(known)
    if unknown:
        msg = f"the draw names parameters that profile {profile.name} lacks: {sorted(unknown)}"
        raise ProfileError(msg)
    values = {name: draw.values.get(name, parameter.value) for name, parameter in known.items()}
    bandwidths = {row.tp_degree: row.bytes_per_s for row in profile.all_reduce}
    return Physics(profile.gpu, profile.model, MappingProxyType(values), MappingProxyType(bandwidths))


def corrected_decode(physics: Physics, rows: Sequence[DecodeRow], tp: int, batch: Floats) -> DecodeWork:
    """Decode work corrected so that it reproduces the measured rows of this or the nearest TP degree.

    The ratio of measured to physical work is interpolated in log(batch) and constant outside the rows.
    """
    plain = physics.decode(tp, batch)
    if not rows:
        return plain
    nearest = min({r.tp_degree for r in rows}, key=lambda degree: (abs(degree - tp), degree))
    used = sorted((r for r in rows if r.tp_degree == nearest), key=lambda r: r.batch)
    at = np.array([r.batch for r in used])
    context_tokens = at * np.array([r.context_tokens for r in used])
    measured_s = np.array([r.iteration_s for r in used])
    measured_j = measured_s * nearest * np.array([r.power_w for r in used])
    reference = physics.decode(nearest, at)
    busy_w = float(physics.busy_w(nearest, np.ones(1))[0])
    work_s = measured_s - physics.kv_s(nearest) * context_tokens
    work_j = measured_j - busy_w * measured_s - physics.kv_j(nearest) * context_tokens
    ratio_s = np.maximum(work_s / reference.total_s, _LEAST_CORRECTION)
    ratio_j = np.maximum(work_j / reference.total_j, _LEAST_CORRECTION)
    log_batch, log_at = np.log(np.maximum(batch, 1.0)), np.log(at)
    time_ratio = np.interp(log_batch, log_at, ratio_s)
    energy_ratio = np.interp(log_batch, log_at, ratio_j)
    return DecodeWork(
        memory_s=plain.memory_s * time_ratio,
        compute_s=plain.compute_s * time_ratio,
        comm_s=plain.comm_s * time_ratio,
        memory_j=plain.memory_j * energy_ratio,
        compute_j=plain.compute_j * energy_ratio,
    )


def build_tables(
    profile: Profile, *, max_batch: int | None = None, draw: ParameterDraw | None = None
) -> PhysicsTables:
    """The kernel's tables for a profile.

    Args:
        profile: what to build from.
        max_batch: largest number of decoding sequences; the profile's largest batch cap if None.
        draw: parameter values instead of the nominal ones.

    Returns:
        Tables with every array non-negative and the power of any iteration increasing in the clock.
    """
    physics = profile_physics(profile, NOMINAL if draw is None else draw)
    p, shape, tps = physics.p, profile.deployment, profile.deployment.tp_degrees
    batch = np.arange((shape.batch_caps[0] if max_batch is None else max_batch) + 1, dtype=np.float64)
    grid = np.array(profile.gpu.grid_clocks_mhz, dtype=np.int64)
    x = grid / float(profile.gpu.sm_clock_max_mhz)
    work = [corrected_decode(physics, profile.decode_rows, tp, batch) for tp in tps]
    each, gpus = np.ones(len(tps)), np.array(tps, dtype=np.float64)
    kv_s = np.array([physics.kv_s(tp) for tp in tps])
    prefill_j = 2.0 * profile.model.active_parameters * physics.flop_j()
    usual_batch = float(np.median(shape.batch_caps))
    expert_bytes = physics.prefill_expert_bytes(usual_batch, shape.max_num_batched_tokens)
    expert_s = expert_bytes / (gpus * profile.gpu.hbm_bytes_per_s * p["weight_efficiency"])
    startup_s = p["wake_s"] if profile.standby == "asleep" else p["cold_start_s"]
    return PhysicsTables(
        tp_degrees=np.array(tps, dtype=np.int64),
        allotted_gpus=shape.allotted_gpus,
        grid_clocks_mhz=grid,
        tdp_w=profile.gpu.tdp_w,
        decode_memory_s=_rounded(np.stack([w.memory_s for w in work])),
        decode_compute_s=_rounded(np.stack([w.compute_s for w in work])),
        decode_comm_s=_rounded(np.stack([w.comm_s for w in work])),
        kv_memory_s=_rounded(kv_s * (1.0 - p["kv_clock_share"])),
        kv_compute_s=_rounded(kv_s * p["kv_clock_share"]),
        prefill_memory_s=_rounded(expert_s),
        prefill_compute_s=_rounded(np.array([physics.prefill_s(tp) for tp in tps])),
        prefill_comm_s=_rounded(np.array([physics.comm_s(tp) for tp in tps])),
        attention_compute_s=_rounded(np.array([physics.attention_s(tp) for tp in tps])),
        host_s=_rounded(p["host_floor_s"] * each),
        prompt_s=_rounded(p["prompt_overhead_s"] * each),
        decode_memory_j=_rounded(np.stack([w.memory_j for w in work])),
        decode_compute_j=_rounded(np.stack([w.compute_j for w in work])),
        kv_memory_j=_rounded(np.array([physics.kv_j(tp) for tp in tps])),
        kv_compute_j=0.0 * each,
        prefill_memory_j=_rounded(expert_bytes * p["weight_j_per_byte"] * each),
        prefill_compute_j=_rounded(prefill_j * each),
        attention_compute_j=_rounded(profile.model.attention_flop_per_pair * p["flop_j"] * each),
        memory_scale=_rounded(physics.memory_scale(x)),
        compute_scale=_rounded(1.0 / x),
        compute_energy_scale=_rounded(physics.voltage_squared(x)),
        memory_energy_scale=_rounded(physics.memory_energy_scale(x)),
        busy_w=_rounded(np.stack([physics.busy_w(tp, x) for tp in tps])),
        idle_w=_rounded(physics.idle_w(x)),
        kv_blocks=np.array([profile.kv_capacity_blocks(tp) for tp in tps], dtype=np.int64),
        startup_s=_rounded(startup_s * each),
        startup_w=_rounded(p["startup_w"] * gpus),
        warmup_s=_rounded(p["warmup_s"] * each),
        warmup_w=_rounded(p["warmup_w"] * gpus),
        clock_delay_s=float(_rounded(np.array([p["clock_delay_s"]]))[0]),
        max_num_batched_tokens=shape.max_num_batched_tokens,
    )


def _rounded(values: Floats) -> Floats:
    """Round the last 8 of 52 mantissa bits away, about 14 digits kept.

    Builds of numpy differ in the last bit of powers and exponentials; results must not.
    """
    bits = np.ascontiguousarray(values, dtype=np.float64).view(np.int64)
    return ((bits + 0x80) & ~np.int64(0xFF)).view(np.float64).reshape(np.shape(values))


# Reference forms in plain Python: the tests' oracle, and the baselines' predictor. ---------------


def iteration_time_s(  # the six numbers that define an iteration
    tables: PhysicsTables,
    j: int,
    k: int,
    decodes: int,
    context_tokens: float,
    prefill_tokens: float,
    pairs: float,
) -> float:
    """Duration of one iteration of the engine at TP index ``j`` and grid clock ``k``.

    Args:
        tables: physics.
        j: index of the TP degree.
        k: index of the clock grid; TDP is not looked at.
        decodes: sequences that decode one token.
        context_tokens: tokens they attend to, in total.
        prefill_tokens: prompt tokens computed.
        pairs: (query, key) pairs of the prefill.
    """
    t = tables
    memory_s = (
        t.decode_memory_s[j, decodes]
        + t.kv_memory_s[j] * context_tokens
        + t.prefill_memory_s[j] * prefill_tokens
    )
    compute_s = (
        t.decode_compute_s[j, decodes]
        + t.kv_compute_s[j] * context_tokens
        + t.prefill_compute_s[j] * prefill_tokens
        + t.attention_compute_s[j] * pairs
    )
    comm_s = t.decode_comm_s[j, decodes] + t.prefill_comm_s[j] * prefill_tokens
    work_s = memory_s * t.memory_scale[k] + compute_s * t.compute_scale[k]
    prompt_s = t.prompt_s[j] if prefill_tokens > 0 else 0.0
    return float(max(t.host_s[j], work_s) + comm_s + prompt_s)


def iteration_energy_j(
    tables: PhysicsTables,
    j: int,
    k: int,
    decodes: int,
    context_tokens: float,
    prefill_tokens: float,
    pairs: float,
) -> float:
    """Energy of the TP group in that iteration; arguments as in :func:`iteration_time_s`."""
    t = tables
    memory_j = (
        t.decode_memory_j[j, decodes]
        + t.kv_memory_j[j] * context_tokens
        + t.prefill_memory_j[j] * prefill_tokens
    )
    compute_j = (
        t.decode_compute_j[j, decodes]
        + t.kv_compute_j[j] * context_tokens
        + t.prefill_compute_j[j] * prefill_tokens
        + t.attention_compute_j[j] * pairs
    )
    duration_s = iteration_time_s(t, j, k, decodes, context_tokens, prefill_tokens, pairs)
    return float(
        t.busy_w[j, k] * duration_s
        + t.memory_energy_scale[k] * memory_j
        + t.compute_energy_scale[k] * compute_j
    )


def effective_clock_index(
    tables: PhysicsTables,
    j: int,
    k: int,
    decodes: int,
    context_tokens: float,
    prefill_tokens: float,
    pairs: float,
) -> int:
    """The highest grid index up to ``k`` at which the iteration stays within TDP; 0 if none does."""
    limit_w = tables.tdp_w * float(tables.tp_degrees[j])
    work = (decodes, context_tokens, prefill_tokens, pairs)

    def fits(index: int) -> bool:
        energy_j = iteration_energy_j(tables, j, index, *work)
        return energy_j <= limit_w * iteration_time_s(tables, j, index, *work)

    if fits(k):
        return k
    low, high = 0, k  # power rises with the clock: see build_tables
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
