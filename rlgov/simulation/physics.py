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
    from collections.abc import Mapping

    from numpy.typing import NDArray

    from rlgov.simulation.profile import Profile

    Floats = NDArray[np.float64]

_DIGITS = 12  # significant digits kept: hides last-bit differences between numpy builds
_LEAST_CORRECTION = 0.05  # a correction never removes more than this leaves of the physics


@dataclass(frozen=True, slots=True)
class ParameterDraw:
    """Values that replace the nominal ones of a profile's parameters, by name."""

    values: Mapping[str, float] = field(default_factory=lambda: MappingProxyType({}))


NOMINAL = ParameterDraw()


def draw_parameters(profile: Profile, rng: np.random.Generator) -> ParameterDraw:
    """Draw every prior uniformly from its range; fitted and measured values stay."""
    return ParameterDraw(
        MappingProxyType(
            {
                name: float(rng.uniform(p.low, p.high))
                for name, p in profile.parameters.items()
                if p.kind == "prior" and p.high > p.low
            }
        )
    )


@dataclass(frozen=True, slots=True)
class _Work:
    """Time and energy of decode iterations of D sequences (one TP degree), context excluded."""

    memory_s: Floats
    compute_s: Floats
    comm_s: Floats
    memory_j: Floats
    compute_j: Floats

    @property
    def total_s(self) -> Floats:
        return self.memory_s + self.compute_s + self.comm_s


class _Physics:
    """The physics of one profile under one draw of its parameters."""

    def __init__(self, profile: Profile, draw: ParameterDraw) -> None:
        self.profile = profile
        known = dict(profile.parameters.items())
        unknown = set(draw.values) - set(known)
        if unknown:
            msg = f"the draw names parameters that profile {profile.name} lacks: {sorted(unknown)}"
            raise ProfileError(msg)
        self.p = {name: draw.values.get(name, parameter.value) for name, parameter in known.items()}
        self.all_reduce_bytes_per_s = {row.tp_degree: row.bytes_per_s for row in profile.all_reduce}

    # clock -----------------------------------------------------------------------------------

    def voltage(self, x: Floats) -> Floats:
        slope = (self.p["voltage_at_max"] - 1.0) / (1.0 - self.p["voltage_knee"])
        return np.maximum(1.0, 1.0 + slope * (x - self.p["voltage_knee"]))

    def voltage_squared(self, x: Floats) -> Floats:
        """V(x)^2 relative to the highest clock."""
        return (self.voltage(x) / self.p["voltage_at_max"]) ** 2

    # iterations ------------------------------------------------------------------------------

    def comm_s_per_token(self, tp: int) -> float:
        if tp == 1:
            return 0.0
        model = self.profile.model
        message_bytes = model.hidden * 2.0  # bf16 activations
        return 2.0 * model.layers * message_bytes / self.all_reduce_bytes_per_s[tp]

    def kv_s(self, tp: int) -> float:
        model, gpu = self.profile.model, self.profile.gpu
        return model.kv_bytes_per_token / (tp * gpu.hbm_bytes_per_s * self.p["kv_efficiency"])

    def decode(self, tp: int, batch: Floats) -> _Work:
        """Uncorrected. ``batch`` 0 is an iteration that only prefills."""
        model, gpu, p = self.profile.model, self.profile.gpu, self.p
        weight_bytes = model.matrix_parameters * model.bytes_per_weight
        flop = 2.0 * model.matrix_parameters * batch
        read_s = weight_bytes / (tp * gpu.hbm_bytes_per_s * p["weight_efficiency"])
        multiply_s = flop / (tp * gpu.peak_bf16_flop_per_s * p["gemm_mfu"])
        # Kernels overlap loads with arithmetic: a 2-norm per matrix multiplication (vidur), split so
        # that both parts add up and the derivative by the clock is right.
        gemm_s = np.hypot(read_s, multiply_s)
        layers_s = model.layers * p["layer_overhead_s"]
        sequences_s = batch * p["sequence_overhead_s"]
        layer_share, sequence_share = p["layer_overhead_clock_share"], p["sequence_overhead_clock_share"]
        latency_s = 2.0 * model.layers * p["all_reduce_latency_s"] if tp > 1 else 0.0
        return _Work(
            memory_s=read_s**2 / gemm_s
            + layers_s * (1.0 - layer_share)
            + sequences_s * (1.0 - sequence_share),
            compute_s=multiply_s**2 / gemm_s + layers_s * layer_share + sequences_s * sequence_share,
            comm_s=latency_s + batch * self.comm_s_per_token(tp),
            memory_j=np.full_like(batch, weight_bytes * p["dram_j_per_byte"]),
            compute_j=weight_bytes * p["onchip_j_per_byte"] + flop * p["flop_j"] + batch * p["sequence_j"],
        )

    def busy_w(self, tp: int, x: Floats) -> Floats:
        return tp * (self.p["constant_w"] + self.p["clocked_w"] * x * self.voltage_squared(x))

    def kv_memory_j(self) -> float:
        return self.profile.model.kv_bytes_per_token * self.p["dram_j_per_byte"]

    def kv_compute_j(self) -> float:
        return self.profile.model.kv_bytes_per_token * self.p["onchip_j_per_byte"]

    # measured rows ---------------------------------------------------------------------------

    def corrected(self, tp: int, batch: Floats) -> _Work:
        """Decode work with the correction that reproduces the measured rows."""
        plain = self.decode(tp, batch)
        nearest = self._nearest_measured(tp)
        if nearest is None:
            return plain
        rows = sorted(
            (r for r in self.profile.decode_rows if r.tp_degree == nearest), key=lambda r: r.batch
        )
        at = np.array([r.batch for r in rows])
        context = at * np.array([r.context_tokens for r in rows])
        measured_s = np.array([r.iteration_s for r in rows])
        reference = self.decode(nearest, at)
        ratio_s = (measured_s - self.kv_s(nearest) * context) / reference.total_s
        ratio_s = np.maximum(ratio_s, _LEAST_CORRECTION)
        # Only the V^2 part of the energy is corrected: DRAM and constant power stay as assumed.
        energy_j = measured_s * nearest * np.array([r.power_w for r in rows])
        rest_j = (
            self.busy_w(nearest, np.ones(1))[0] * measured_s
            + reference.memory_j
            + context * (self.kv_memory_j() + self.kv_compute_j())
        )
        ratio_j = np.maximum((energy_j - rest_j) / reference.compute_j, _LEAST_CORRECTION)
        log_batch = np.log(np.maximum(batch, 1.0))
        time_ratio = np.interp(log_batch, np.log(at), ratio_s)
        energy_ratio = np.interp(log_batch, np.log(at), ratio_j)
        return _Work(
            memory_s=plain.memory_s * time_ratio,
            compute_s=plain.compute_s * time_ratio,
            comm_s=plain.comm_s * time_ratio,
            memory_j=plain.memory_j,
            compute_j=plain.compute_j * energy_ratio,
        )

    def _nearest_measured(self, tp: int) -> int | None:
        measured = sorted({r.tp_degree for r in self.profile.decode_rows}, key=lambda m: (abs(m - tp), m))
        return measured[0] if measured else None


def build_tables(
    profile: Profile, *, max_batch: int | None = None, draw: ParameterDraw | None = None
) -> PhysicsTables:
    """The kernel's tables for a profile.

    Args:
        profile: what to build from.
        max_batch: largest number of decoding sequences; the profile's largest batch cap if None.
        draw: parameter values instead of the nominal ones.

    Returns:
        Tables with every array non-negative and power increasing in the clock.
    """
    physics = _Physics(profile, NOMINAL if draw is None else draw)
    p, gpu, model, shape = physics.p, profile.gpu, profile.model, profile.deployment
    tps = shape.tp_degrees
    batch = np.arange((shape.batch_caps[0] if max_batch is None else max_batch) + 1, dtype=np.float64)
    grid = np.array(gpu.grid_clocks_mhz, dtype=np.int64)
    x = grid / float(gpu.sm_clock_max_mhz)
    work = [physics.corrected(tp, batch) for tp in tps]
    flop_s = [1.0 / (tp * gpu.peak_bf16_flop_per_s) for tp in tps]
    ones = np.ones(len(tps))
    kv_s = np.array([physics.kv_s(tp) for tp in tps])
    voltage_squared = physics.voltage_squared(x)
    return PhysicsTables(
        tp_degrees=np.array(tps, dtype=np.int64),
        allotted_gpus=shape.allotted_gpus,
        grid_clocks_mhz=grid,
        tdp_w=gpu.tdp_w,
        decode_memory_s=_rounded(np.stack([w.memory_s for w in work])),
        decode_compute_s=_rounded(np.stack([w.compute_s for w in work])),
        decode_comm_s=_rounded(np.stack([w.comm_s for w in work])),
        kv_memory_s=_rounded(kv_s * (1.0 - p["kv_clock_share"])),
        kv_compute_s=_rounded(kv_s * p["kv_clock_share"]),
        prefill_memory_s=0.0 * ones,
        prefill_compute_s=_rounded(
            np.array([2.0 * model.matrix_parameters * s / p["prefill_mfu"] for s in flop_s])
        ),
        prefill_comm_s=_rounded(np.array([physics.comm_s_per_token(tp) for tp in tps])),
        attention_compute_s=_rounded(
            np.array([model.attention_flop_per_pair * s / p["attention_mfu"] for s in flop_s])
        ),
        host_s=_rounded(p["host_floor_s"] * ones),
        decode_memory_j=_rounded(np.stack([w.memory_j for w in work])),
        decode_compute_j=_rounded(np.stack([w.compute_j for w in work])),
        kv_memory_j=_rounded(physics.kv_memory_j() * ones),
        kv_compute_j=_rounded(physics.kv_compute_j() * ones),
        prefill_memory_j=0.0 * ones,
        prefill_compute_j=_rounded(2.0 * model.matrix_parameters * p["flop_j"] * ones),
        attention_compute_j=_rounded(model.attention_flop_per_pair * p["flop_j"] * ones),
        memory_scale=_rounded(1.0 / np.minimum(1.0, x / p["memory_knee"])),
        compute_scale=_rounded(1.0 / x),
        compute_energy_scale=_rounded(voltage_squared),
        busy_w=_rounded(np.stack([physics.busy_w(tp, x) for tp in tps])),
        idle_w=_rounded(p["idle_low_w"] + (p["idle_high_w"] - p["idle_low_w"]) * x * voltage_squared),
        kv_blocks=np.array([profile.kv_capacity_blocks(tp) for tp in tps], dtype=np.int64),
        startup_s=_rounded((p["wake_s"] if profile.standby == "asleep" else p["cold_start_s"]) * ones),
        startup_w=_rounded(p["startup_w"] * np.array(tps)),
        warmup_s=_rounded(p["warmup_s"] * ones),
        warmup_w=_rounded(p["warmup_w"] * np.array(tps)),
        clock_delay_s=float(f"{p['clock_delay_s']:.{_DIGITS}g}"),
        max_num_batched_tokens=shape.max_num_batched_tokens,
    )


def _rounded(values: Floats) -> Floats:
    flat = [float(f"{v:.{_DIGITS}g}") for v in np.ravel(values).tolist()]
    return np.array(flat, dtype=np.float64).reshape(np.shape(values))


# Reference forms in plain Python: the tests' oracle, and the baselines' predictor. ---------------


def iteration_time_s(  # the six numbers that define an iteration
    tables: PhysicsTables, j: int, k: int, decodes: int, context_tokens: float, prefill_tokens: float,
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
    return float(max(t.host_s[j], work_s) + comm_s)


def iteration_energy_j(
    tables: PhysicsTables, j: int, k: int, decodes: int, context_tokens: float, prefill_tokens: float,
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
    return float(t.busy_w[j, k] * duration_s + memory_j + t.compute_energy_scale[k] * compute_j)


def effective_clock_index(
    tables: PhysicsTables, j: int, k: int, decodes: int, context_tokens: float, prefill_tokens: float,
    pairs: float,
) -> int:
    """The highest grid index up to ``k`` at which the iteration stays within TDP; 0 if none does."""
    limit_w = tables.tdp_w * float(tables.tp_degrees[j])
    work = (decodes, context_tokens, prefill_tokens, pairs)
    for index in range(k, 0, -1):
        if iteration_energy_j(tables, j, index, *work) <= limit_w * iteration_time_s(tables, j, index, *work):
            return index
    return 0
