"""Clock by bands of KV-cache use (B1): the rule of the JonnyKong/vllm fork, every second.

Its own bands were [0, 0.3): 1125, [0.3, 0.7): 1440, [0.7, 1]: 1740 MHz on an A40 (1740 MHz at most);
the defaults keep the bands and the clocks' share of the highest.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from rlgov.agents.baselines.clock_rule import ClockRule
from rlgov.agents.baselines.space import (
    Family,
    Real,
    clock_index,
    clocks_dimension,
    fixed_dimensions,
    offered_clock,
)
from rlgov.errors import ConfigError
from rlgov.records import Column

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from rlgov.agents.baselines.space import Dimension, Parameters, PolicyContext, Value
    from rlgov.records import Configuration, Limits

PUBLISHED_FRACTIONS = (1125 / 1740, 1440 / 1740, 1.0)


class KvThresholdPolicy(ClockRule):
    """``clocks_mhz[i]`` while KV use lies between ``thresholds[i - 1]`` and ``thresholds[i]``."""

    def __init__(
        self,
        thresholds: Sequence[float],
        clocks_mhz: Sequence[int],
        *,
        batch_cap: int | None = None,
        tp_degree: int | None = None,
        guarded: bool = False,
    ) -> None:
        """One clock more than thresholds; both are sorted, a higher use never gets a lower clock."""
        if len(clocks_mhz) != len(thresholds) + 1:
            wanted = len(thresholds) + 1
            msg = f"kv-threshold: {wanted - 1} thresholds need {wanted} clocks, got {len(clocks_mhz)}"
            raise ConfigError(msg)
        super().__init__("kv-threshold", batch_cap=batch_cap, tp_degree=tp_degree, guarded=guarded)
        self._thresholds = np.sort(np.asarray(thresholds, dtype=np.float64))
        self._clocks_mhz = sorted(clocks_mhz)
        self._indices: NDArray[np.int64] = np.zeros(0, dtype=np.int64)

    def _begin(self, limits: Limits, n: int) -> None:  # noqa: ARG002 - stateless
        self._indices = np.array([clock_index(limits, mhz) for mhz in self._clocks_mhz], dtype=np.int64)

    def _clock(self, rows: NDArray[np.float64], blind: NDArray[np.bool_]) -> NDArray[np.int64]:  # noqa: ARG002
        # NaN sorts above every threshold: an unknown use gets the top band
        band = np.searchsorted(self._thresholds, rows[:, Column.KV_USAGE], side="right")
        return self._indices[np.asarray(band, dtype=np.int64)]


def _space(limits: Limits) -> tuple[Dimension, ...]:
    # KV use is small against HBM of 80 GB at low load, so the bands are searched by ratio
    return (
        Real("threshold_1", 0.005, 0.9, log_scale=True),
        Real("threshold_2", 0.005, 0.9, log_scale=True),
        clocks_dimension("clock_1_mhz", limits),
        clocks_dimension("clock_2_mhz", limits),
        clocks_dimension("clock_3_mhz", limits),
        *fixed_dimensions(limits),
    )


def _defaults(limits: Limits) -> dict[str, Value]:
    low, middle, high = (offered_clock(limits, fraction) for fraction in PUBLISHED_FRACTIONS)
    return {
        "threshold_1": 0.3,
        "threshold_2": 0.7,
        "clock_1_mhz": low,
        "clock_2_mhz": middle,
        "clock_3_mhz": high,
        "batch_cap": limits.batch_caps[0],
        "tp_degree": limits.tp_degrees[0],
        "guarded": False,
    }


def _build(parameters: Parameters, context: PolicyContext) -> KvThresholdPolicy:
    chosen = FAMILY.complete(parameters, context.limits)
    return KvThresholdPolicy(
        [float(chosen[f"threshold_{i}"] or 0.0) for i in (1, 2)],
        [int(chosen[f"clock_{i}_mhz"] or 0) for i in (1, 2, 3)],
        batch_cap=int(chosen["batch_cap"] or 0),
        tp_degree=int(chosen["tp_degree"] or 0),
        guarded=bool(chosen["guarded"]),
    )


def _near_static(limits: Limits, configuration: Configuration) -> dict[str, Value]:
    return {
        **_defaults(limits),
        "clock_1_mhz": configuration.sm_clock_mhz,
        "clock_2_mhz": configuration.sm_clock_mhz,
        "batch_cap": configuration.batch_cap,
        "tp_degree": configuration.tp_degree,
    }


FAMILY = Family(
    "kv-threshold",
    _space,
    _defaults,
    _build,
    _near_static,
    rising=(("threshold_1", "threshold_2"), ("clock_1_mhz", "clock_2_mhz", "clock_3_mhz")),
)
