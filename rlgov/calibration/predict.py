"""What a profile's tables say of mean iterations: the simulator's own form, over arrays."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

import numpy as np

from rlgov.simulation.physics import ParameterDraw, build_tables

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

    from rlgov.calibration.runs import Mean, Observations
    from rlgov.simulation.profile import Profile
    from rlgov.simulation.tables import PhysicsTables

    Floats = NDArray[np.float64]
    Counts = NDArray[np.int64]

ALL_REDUCE: Final = "all_reduce_bandwidth"
"""No parameter of a profile: what its table of all-reduce bandwidths is multiplied by."""


def tables_of(profile: Profile, values: Mapping[str, float], most_decodes: float) -> PhysicsTables:
    """The profile's tables with some parameters replaced, for batches of up to so many decodes."""
    own = {name: value for name, value in values.items() if name != ALL_REDUCE}
    profile = with_bandwidth(profile, values.get(ALL_REDUCE, 1.0))
    return build_tables(profile, max_batch=int(np.ceil(most_decodes)) + 1, draw=ParameterDraw(own))


def with_bandwidth(profile: Profile, factor: float, note: str = "") -> Profile:
    """The profile with all-reduce bandwidths multiplied by a factor."""
    if factor == 1.0:
        return profile
    rows = (
        row.model_copy(update={"bytes_per_s": row.bytes_per_s * factor, "source": row.source + note})
        for row in profile.all_reduce
    )
    return profile.model_copy(update={"all_reduce": tuple(rows)})


@dataclass(frozen=True, slots=True, eq=False)
class Knots:
    """Batch sizes of TP degrees at which measurements may correct the physics of decode.

    Corrections are multipliers, interpolated in log(batch), constant outside, and taken from the nearest
    degree that has any: as the tables do with a profile's measured rows.
    """

    tp: Counts  # (n,) index of the TP degree, ascending
    batch: Floats  # (n,) ascending within a degree

    def __len__(self) -> int:
        return len(self.batch)

    def shares(self, mean: Mean, degrees: Counts) -> Floats:
        """How much each knot (column) counts at each mean iteration (row)."""
        found = np.zeros((len(mean), len(self)))
        have = sorted(set(self.tp.tolist()))
        log_batch = np.log(np.maximum(mean.decodes, 1.0))
        for j in sorted(set(mean.tp.tolist())) if have else ():
            nearest = min(have, key=lambda k: self._distance(degrees, j, k))
            mine, knots = np.flatnonzero(mean.tp == j), np.flatnonzero(self.tp == nearest)
            at = np.log(self.batch[knots])
            for i, knot in enumerate(knots.tolist()):
                alone = np.zeros(len(knots))
                alone[i] = 1.0
                found[mine, knot] = np.interp(log_batch[mine], at, alone)
        return found

    @staticmethod
    def _distance(degrees: Counts, j: int, k: int) -> tuple[int, int]:
        return abs(int(degrees[k] - degrees[j])), int(degrees[k])


NO_KNOTS: Final = Knots(np.array([], dtype=np.int64), np.array([]))


def _prompt_s(tables: PhysicsTables) -> Floats:
    """What any prompt adds to an iteration, by TP degree; nothing in tables that do not tell."""
    return np.asarray(getattr(tables, "prompt_s", np.zeros(len(tables.tp_degrees))), dtype=np.float64)


@dataclass(frozen=True, slots=True, eq=False)
class Work:
    """Mean iterations, with what does not depend on parameters worked out once."""

    mean: Mean
    low: Counts = field(init=False)
    share: Floats = field(init=False)

    def __post_init__(self) -> None:
        low = self.mean.decodes.astype(np.int64)
        object.__setattr__(self, "low", low)
        object.__setattr__(self, "share", self.mean.decodes - low)

    def by_batch(self, table: Floats) -> Floats:
        """A table over TP degree and batch at the batches, between whole numbers in proportion."""
        j, low = self.mean.tp, self.low
        return np.asarray(table[j, low] * (1.0 - self.share) + table[j, low + 1] * self.share)

    def by_clock(self, tables: PhysicsTables, values: Floats) -> Floats:
        """A table over the clock grid at the clocks."""
        grid = tables.grid_clocks_mhz.astype(np.float64)
        return np.asarray(np.interp(self.mean.clock_mhz, grid, values))

    def step_s(self, tables: PhysicsTables, correction: Floats | float = 1.0) -> Floats:
        """Duration of each mean iteration at its clock; decode work multiplied by a correction."""
        t, j, mean = tables, self.mean.tp, self.mean
        memory = correction * self.by_batch(t.decode_memory_s) + t.kv_memory_s[j] * mean.context_tokens
        memory = memory + t.prefill_memory_s[j] * mean.prefill_tokens
        compute = correction * self.by_batch(t.decode_compute_s) + t.kv_compute_s[j] * mean.context_tokens
        compute = compute + t.prefill_compute_s[j] * mean.prefill_tokens
        compute = compute + t.attention_compute_s[j] * mean.pairs
        comm = correction * self.by_batch(t.decode_comm_s) + t.prefill_comm_s[j] * mean.prefill_tokens
        work = memory * self.by_clock(t, t.memory_scale) + compute * self.by_clock(t, t.compute_scale)
        return np.asarray(np.maximum(t.host_s[j], work) + comm + mean.prompts * _prompt_s(t)[j])

    def power_w(
        self, tables: PhysicsTables, observed: Observations, correction: Floats | float = 1.0
    ) -> Floats:
        """Mean power of all measured GPUs at these points, idle time and idle GPUs included.

        Durations are the measured ones: an error of time must not be paid for with one of energy.
        """
        t, j, mean, points = tables, self.mean.tp, self.mean, self.mean.point
        memory_j = correction * self.by_batch(t.decode_memory_j) + t.kv_memory_j[j] * mean.context_tokens
        memory_j = memory_j + t.prefill_memory_j[j] * mean.prefill_tokens
        compute_j = correction * self.by_batch(t.decode_compute_j) + t.kv_compute_j[j] * mean.context_tokens
        compute_j = compute_j + t.prefill_compute_j[j] * mean.prefill_tokens
        compute_j = compute_j + t.attention_compute_j[j] * mean.pairs
        work_j = memory_j * self.by_clock(t, t.memory_energy_scale)
        work_j = work_j + compute_j * self.by_clock(t, t.compute_energy_scale)
        busy_w = np.empty(len(mean))
        for index in set(j.tolist()):
            mine = j == index
            busy_w[mine] = self.by_clock(t, t.busy_w[index])[mine]
        idle_w = self.by_clock(t, t.idle_w)
        gpus = t.tp_degrees[j].astype(np.float64)
        busy = observed.busy_share[points]
        iterating = np.minimum(busy_w + work_j / mean.step_s, t.tdp_w * gpus)
        unused = np.maximum(observed.measured_gpus[points] - gpus, 0.0)
        return np.asarray(busy * iterating + (1.0 - busy) * idle_w * gpus + unused * idle_w)
