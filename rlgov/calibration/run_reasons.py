"""Which parameters a characterisation can tell at all, and in which words it is said that it cannot."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import numpy as np

from rlgov.calibration.predict import ALL_REDUCE

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from rlgov.calibration.runs import Observations
    from rlgov.simulation.profile import Profile

    Counts = NDArray[np.int64]

CLOCK_TIME: Final = (
    "layer_overhead_clock_share", "sequence_overhead_clock_share", "kv_clock_share", "memory_knee",
)  # fmt: skip
COMMUNICATION: Final = ("all_reduce_latency_s", ALL_REDUCE)
PREFILL: Final = ("prefill_mfu", "attention_mfu", "prompt_overhead_s")
TIME: Final = (
    "weight_efficiency", "kv_efficiency", "gemm_mfu", *PREFILL, "layer_overhead_s", "sequence_overhead_s",
    *CLOCK_TIME, "host_floor_s", *COMMUNICATION,
)  # fmt: skip
"""What decides how long an iteration takes."""

CLOCK_POWER: Final = ("voltage_knee", "voltage_at_max", "memory_clocked_share", "clocked_w", "idle_low_w")
POWER: Final = (
    "constant_w", "weight_j_per_byte", "kv_j_per_byte", "flop_j", "idle_high_w", *CLOCK_POWER,
)  # fmt: skip
"""What decides what it draws."""

_SAME_CLOCK: Final = 1.02
_UNTOUCHED: Final = 0.98  # of the prior's deviation: the points do not depend on the parameter
_WHERE: Final = {
    "host_floor_s": "no iteration was short enough to wait for the host",
    "memory_knee": "no clock was low enough to slow down memory",
    "idle_low_w": "no point was idle for long enough at a low clock",
    "idle_high_w": "no point was idle for long enough",
    "all_reduce_latency_s": "its share of an iteration is too small",
}


def not_asked(base: Profile, observed: Observations, points: Counts) -> dict[str, str]:
    """Parameters that no fit of these points can find, by how the points were chosen, with the reason."""
    means = observed.means.take(points)
    reasons: dict[str, str] = {}
    powered = np.intersect1d(points, observed.with_power)
    for names, chosen, what in ((CLOCK_TIME, points, "point"), (CLOCK_POWER, powered, "point with power")):
        clock = _one_clock(observed, chosen)
        if clock is not None:
            why = f"every {what} ran at {clock:g} MHz: nothing tells what another clock changes"
            reasons |= dict.fromkeys(names, why)
    degrees = {base.deployment.tp_degrees[j] for j in means.tp.tolist()}
    if len(degrees) == 1:
        (only,) = degrees
        why = f"every point ran at TP {only}: communication has no counterpart"
        reasons |= dict.fromkeys(COMMUNICATION, why)
    if not base.all_reduce:
        reasons |= dict.fromkeys(COMMUNICATION, "the profile has no TP degree above 1")
    if not (means.prefill_tokens > 0).any():
        reasons |= dict.fromkeys(PREFILL, "no point prefilled a prompt")
    if not len(powered):
        reasons |= dict.fromkeys(POWER, "no point has a power: the run had no meter")
    return reasons | _by_kind(base)


def _by_kind(base: Profile) -> dict[str, str]:
    """Parameters that no points would move, by what they are."""
    reasons = {}
    for name, known in base.parameters.items():
        if name not in {*TIME, *POWER}:
            reasons[name] = "a characterisation holds configurations and does not time how they change"
        elif known.low == known.high == known.value == 0.0:
            reasons[name] = "zero by assumption"
        elif known.kind == "measured":
            reasons[name] = "measured otherwise"
    return reasons


def _one_clock(observed: Observations, points: Counts) -> float | None:
    """The clock that all points were locked to, if there is one: throttling alone makes no sweep."""
    if not len(points):
        return None
    locked = observed.settings.get("clock")
    clocks = observed.means.clock_mhz[points] if locked is None else locked[points]
    return float(clocks.max()) if clocks.max() < _SAME_CLOCK * clocks.min() else None


def reason(name: str, deviation: float, alone: float, partner: str, narrowed: float) -> str:
    """Why a parameter keeps its prior.

    Args:
        name: of the parameter.
        deviation: standard deviation after the measurements, of that before.
        alone: the same, were everything else known.
        partner: what it cannot be told from.
        narrowed: what ``deviation`` had to get down to.
    """
    if alone > _UNTOUCHED:
        return _WHERE.get(name, "these points do not depend on it")
    if alone > narrowed:
        why = _WHERE.get(name, "these points hardly depend on it")
        return f"{why} (its uncertainty is still {deviation:.0%} of the prior's)"
    return f"cannot be told from {partner} (its uncertainty is still {deviation:.0%} of the prior's)"
