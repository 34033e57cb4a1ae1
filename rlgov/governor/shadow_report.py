"""What a governed run saved, or would have saved had it acted, from its journal and a profile.

Two ways, because each can be wrong in another manner:

* **by tables**: every window is scaled by itself. Its measured energy, times what the profile's tables expect
  at one configuration over what they expect at another, under the load of that window;
* **by simulation**: the recorded requests go through the simulator three times, with the configurations that
  were in force, with those decided, and with the fastest. Queues and what a slow window leaves to the next
  are in it, and so are the latencies. It needs the requests, which a journal of an attached vLLM lacks.

How far both can be trusted is said beside them: the error the profile states, and how the same tables and
the same simulation fare against what this very run measured at the configurations in force.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from rich.table import Table

from rlgov.agents import statistics
from rlgov.errors import ConfigError
from rlgov.governor.shadow_simulation import (
    Estimate,
    ReplayedSaving,
    SimulatedSaving,
    replay_policy,
    simulate_run,
)
from rlgov.simulation.forecast import UNSCALED, Forecast, Scales, stated_error
from rlgov.simulation.physics import build_tables

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from rlgov.agents.policy import Policy
    from rlgov.journal import Journal
    from rlgov.records import Configuration, Window
    from rlgov.simulation.profile import Profile

_SEED: Final = 0x5AD0
_BLOCK_S: Final = statistics.BLOCK_S

ASSUMPTIONS: Final = (
    "Energy is that of the allotted GPUs, as their meters counted it.",
    "The same requests would have come at the same times, whatever the latency.",
    "Decisions are taken as the journal has them; carried out, they would have changed later windows.",
    "By tables, load is steady within a window and leaves nothing to the next one.",
    "Blind windows, windows without energy and windows during a TP switch are left out.",
    "Intervals are 95 %, over one-minute blocks of this traffic; errors of the profile are stated apart.",
)


@dataclass(frozen=True, slots=True)
class Measured:
    """What the journal holds; ``None`` where there was nothing to measure."""

    windows: int
    blind_windows: int
    used_windows: int  # that both ways could use
    duration_s: float
    energy_j: float
    arrivals: float
    misses: float
    slo_attainment: float | None
    j_per_output_token: float | None


@dataclass(frozen=True, slots=True)
class TableSaving:
    """By tables. ``decided``: against what was in force; ``in_force``: against the fastest."""

    decided: Estimate
    decided_saved_j: float
    in_force: Estimate
    in_force_saved_j: float
    measured_over_predicted: float  # energy at the configurations in force: 1 is a perfect profile
    measured_over_predicted_spread: tuple[float, float] | None  # 5th and 95th percentile of the blocks


@dataclass(frozen=True, slots=True)
class ShadowReport:
    """What came of a governed run."""

    profile: str
    policy_digest: str
    stated_error: float  # the worst relative error the profile states of itself
    scales: Scales  # that the tables' expectations were multiplied by
    measured: Measured
    tables: TableSaving
    simulation: SimulatedSaving | None
    replayed: ReplayedSaving | None  # of the policy that was named, if one was
    no_simulation: str  # why there is none; empty if there is one
    assumptions: tuple[str, ...] = ASSUMPTIONS

    def to_json(self) -> dict[str, Any]:
        """Everything, as JSON takes it."""
        return asdict(self)

    def table(self) -> Table:
        """The two ways side by side, for people."""
        title = (
            f"{self.measured.duration_s / 60:.0f} min, {self.measured.energy_j / 1e3:,.1f} kJ measured; "
            f"profile {self.profile}, stated error {100 * self.stated_error:.1f} %"
        )
        table = Table(title=title, title_justify="left", box=None, pad_edge=False)
        for heading in ("", "by tables", "by simulation"):
            table.add_column(heading, overflow="fold")
        tables, simulated = self.tables, self.simulation
        seen = simulated.shown if simulated is not None else {}
        none = "-"
        table.add_row(
            "decided, against in force",
            _estimate(tables.decided, tables.decided_saved_j),
            _simulated(simulated.decided, simulated.decided_range) if simulated else none,
        )
        table.add_row(
            "in force, against fastest",
            _estimate(tables.in_force, tables.in_force_saved_j),
            _simulated(simulated.in_force, simulated.in_force_range) if simulated else none,
        )
        if self.replayed is not None:
            again = self.replayed
            table.add_row(
                f"{again.policy} deciding anew, against fastest",
                none,
                f"{_percent(again.saving)}, {100 * again.slo_attainment:.2f} % within their limits",
            )
        table.add_row(
            "measured over predicted energy",
            f"{tables.measured_over_predicted:.3f}",
            f"{simulated.measured_over_predicted:.3f}" if simulated else none,
        )
        if self.scales != UNSCALED:
            factors = f"{self.scales.time:.2f} for time, {self.scales.power:.2f} for power"
            table.add_row("factors on what is predicted", factors, none)
        for name in ("in force", "decided", "fastest"):
            table.add_row(f"requests within their limits, {name}", none, seen.get(name, none))
        attained = self.measured.slo_attainment
        table.add_row("the same, measured", none if attained is None else f"{100 * attained:.2f} %", "")
        return table


def shadow_report(
    journal: Journal,
    profile: Profile,
    *,
    policy: Policy | None = None,
    draws: int = 8,
    scales: Scales = UNSCALED,
) -> ShadowReport:
    """Estimate what a governed run saved, and what its decisions would have saved.

    Args:
        journal: Of ``rlgov govern``, in any mode that decides.
        profile: Of the deployment.
        policy: Decides anew on the recorded requests, in simulation.
        draws: How often the simulation is repeated with other values within the profile's ranges.
        scales: Factors on what the tables expect, as adaptation found them; none on the simulation.

    Raises:
        ConfigError: The journal holds no decision, no energy, or is of another deployment than the profile.
    """
    limits = journal.header.limits
    tables = build_tables(profile)
    forecast = Forecast(tables, limits)
    forecast.scales = scales
    pairs = _usable(journal)
    if not pairs:
        raise ConfigError(
            "the journal holds no window with energy after a decision, so there is nothing to compare; "
            "record with `rlgov govern --mode shadow` on GPUs with a meter"
        )
    simulation: SimulatedSaving | None = None
    replayed: ReplayedSaving | None = None
    no_simulation = ""
    if not journal.requests:
        no_simulation = "the journal holds no requests: an attached vLLM does not tell them"
    else:
        try:
            simulation = simulate_run(journal, profile, draws=draws)
            replayed = replay_policy(journal, profile, policy) if policy is not None else None
        except ConfigError as error:
            no_simulation = str(error)
    return ShadowReport(
        profile=profile.name,
        policy_digest=journal.header.policy_digest,
        stated_error=stated_error(profile),
        scales=scales,
        measured=_measured(journal, len(pairs)),
        tables=_by_tables(pairs, forecast, limits.fastest),
        simulation=simulation,
        replayed=replayed,
        no_simulation=no_simulation,
    )


def _usable(journal: Journal) -> list[tuple[Configuration, Window]]:
    """Every window that can be scaled, with the configuration that was decided for it."""
    degrees = journal.header.limits.tp_degrees
    pairs = []
    for before, after in pairwise(journal.intervals):
        window = after.window
        usable = not (window.blind or window.switching) and window.energy_j is not None
        if usable and before.decision is not None and int(window.tp_degree) in degrees:
            pairs.append((before.decision.applied, window))
    return pairs


def _measured(journal: Journal, used: int) -> Measured:
    windows = [interval.window for interval in journal.intervals]
    seen = [window for window in windows if not window.blind]
    arrivals, misses, tokens, energy_j = (
        math.fsum(getattr(window, name) or 0.0 for window in seen)
        for name in ("arrivals", "misses", "output_tokens", "energy_j")
    )
    return Measured(
        windows=len(windows),
        blind_windows=len(windows) - len(seen),
        used_windows=used,
        duration_s=math.fsum(window.duration_s for window in windows),
        energy_j=energy_j,
        arrivals=arrivals,
        misses=misses,
        slo_attainment=max(1.0 - misses / arrivals, 0.0) if arrivals > 0 else None,
        j_per_output_token=energy_j / tokens if tokens > 0 else None,
    )


def _by_tables(
    pairs: list[tuple[Configuration, Window]], forecast: Forecast, fastest: Configuration
) -> TableSaving:
    energies = np.array([_energies(decided, window, forecast, fastest) for decided, window in pairs])
    measured_j, predicted_j, decided_j, fastest_j = energies.T
    scale = measured_j / predicted_j
    start_s = np.array([window.start_s for _, window in pairs])
    span_s = start_s[-1] + pairs[-1][1].duration_s - start_s[0]
    count = statistics.block_count(span_s, _BLOCK_S)

    def blocks(values: NDArray[np.float64]) -> NDArray[np.float64]:
        return statistics.block_sums(start_s - start_s[0], values, span_s, count)

    would_j, unsaved_j = scale * decided_j, scale * fastest_j
    measured, would, unsaved, predicted = map(blocks, (measured_j, would_j, unsaved_j, predicted_j))
    rng = np.random.default_rng(_SEED)
    ratios = measured[predicted > 0] / predicted[predicted > 0]
    spread = np.quantile(ratios, (0.05, 0.95)) if ratios.size >= statistics.MIN_SAMPLES else None
    return TableSaving(
        decided=Estimate.of(
            1.0 - math.fsum(would) / math.fsum(measured), statistics.saving_interval(would, measured, rng)
        ),
        decided_saved_j=math.fsum(measured) - math.fsum(would),
        in_force=Estimate.of(
            1.0 - math.fsum(measured) / math.fsum(unsaved), statistics.saving_interval(measured, unsaved, rng)
        ),
        in_force_saved_j=math.fsum(unsaved) - math.fsum(measured),
        measured_over_predicted=math.fsum(measured) / math.fsum(predicted),
        measured_over_predicted_spread=None if spread is None else (float(spread[0]), float(spread[1])),
    )


def _energies(
    decided: Configuration, window: Window, forecast: Forecast, fastest: Configuration
) -> tuple[float, float, float, float]:
    """Measured, and expected at the configurations in force, decided and fastest; for the window's length."""
    in_force = window.configuration
    expected_j = {
        configuration: forecast.expect(window, configuration).power_w * window.duration_s
        for configuration in {in_force, decided, fastest}  # two of them are mostly one
    }
    return float(window.energy_j or 0.0), expected_j[in_force], expected_j[decided], expected_j[fastest]


def _percent(estimate: Estimate) -> str:
    text = f"{100 * estimate.share:.1f} %"
    if estimate.low is not None and estimate.high is not None:
        text += f" ({100 * estimate.low:.1f} to {100 * estimate.high:.1f})"
    return text


def _estimate(estimate: Estimate, saved_j: float) -> str:
    return f"{_percent(estimate)}, {saved_j / 1e3:,.1f} kJ"


def _simulated(estimate: Estimate, found: tuple[float, float] | None) -> str:
    text = f"{100 * estimate.share:.1f} %"
    if found is not None:
        text += f" ({100 * found[0]:.1f} to {100 * found[1]:.1f} over the profile's ranges)"
    return text
