"""The same effort for every rule of a study: tuned on training stretches, jointly over the loads of a cell.

Outcomes are of a mix of the loads: attainment is that of the worst load, and the energy is the mean
over the loads of energy relative to the fastest setting, times what the fastest setting spends on all.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np

from rlgov.agents.baselines import FAMILIES, TUNED_RULES, PolicyContext
from rlgov.agents.baselines.static import every_static
from rlgov.agents.playback import figures, hold
from rlgov.agents.side_by_side import Entry, play_side_by_side
from rlgov.agents.tuning import Outcome, tune
from rlgov.simulation.batch import SimulationBatch

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from rlgov.agents.baselines.tuned import TunedRecord
    from rlgov.agents.playback import Figures
    from rlgov.agents.policy import Policy
    from rlgov.agents.study_grid import Cell
    from rlgov.records import Configuration

RULES: Final = TUNED_RULES
_ROWS_AT_ONCE: Final = 512  # bounds the memory of candidates that are evaluated side by side


@dataclass(frozen=True, slots=True)
class TrainingStatics:
    """What static settings did on a cell's training stretches."""

    best: Configuration
    """Least mean relative energy among those that hold the target at every load."""
    outcome: Outcome
    fastest_energy_j: tuple[float, ...]
    """Of the fastest setting, load by load."""


def training_statics(cell: Cell, target_attainment: float) -> TrainingStatics:
    """Try every static setting on the training stretches."""
    limits = cell.limits
    longest = max(len(episode.trace) for scenario in cell.scenarios for episode in scenario.training)
    batch = SimulationBatch(limits, 1, cell.tables, capacity=longest)

    def played(configuration: Configuration) -> list[tuple[Figures, ...]]:
        return [
            tuple(
                figures(hold(batch, episode.trace, cell.tables, episode.schedule, configuration))
                for episode in scenario.training
            )
            for scenario in cell.scenarios
        ]

    fastest_j = tuple(_energy_j(load) for load in played(limits.fastest))
    best, best_outcome = limits.fastest, Outcome(float("inf"), 0.0)
    for static in every_static(limits):
        configuration = static.start_configuration(limits)
        outcome = _mixed(played(configuration), fastest_j)
        if outcome.rank(target_attainment) < best_outcome.rank(target_attainment):
            best, best_outcome = configuration, outcome
    return TrainingStatics(best, best_outcome, fastest_j)


def tune_rule(
    cell: Cell,
    rule: str,
    statics: TrainingStatics,
    *,
    budget: int,
    seed: int,
    target_attainment: float,
    profile: str,
) -> TunedRecord:
    """Tune one rule on a cell's training stretches."""

    def many(_: Callable[[Policy], Outcome], policies: Sequence[Policy]) -> list[Outcome]:
        rows = sum(len(scenario.training) for scenario in cell.scenarios)
        step = max(1, _ROWS_AT_ONCE // rows)
        outcomes: list[Outcome] = []
        for k in range(0, len(policies), step):
            outcomes += evaluate(cell, policies[k : k + step], statics.fastest_energy_j)
        return outcomes

    result = tune(
        FAMILIES[rule],
        lambda policy: evaluate(cell, [policy], statics.fastest_energy_j)[0],
        budget,
        np.random.default_rng(seed),
        context=PolicyContext(cell.limits, cell.tables, statics.best, seed),
        target_attainment=target_attainment,
        map_many=many,
    )
    loads = ", ".join(scenario.label for scenario in cell.scenarios)
    span = f"training span of {cell.workload} at {loads}, SLO x {cell.slo_scale:g}"
    return result.record(profile=profile, trained_on=(span,))


def evaluate(
    cell: Cell, policies: Sequence[Policy], fastest_j: Sequence[float], *, observe: bool = False
) -> list[Outcome]:
    """What policies do on a cell's training stretches; ``observe`` if any of them reads observations."""
    episodes = tuple(episode for scenario in cell.scenarios for episode in scenario.training)
    entries = [Entry(policy, episodes) for policy in policies]
    outcomes = []
    for played in play_side_by_side(entries, cell.limits, cell.tables, observe=observe):
        rest = iter(played)
        by_load = [tuple(next(rest) for _ in scenario.training) for scenario in cell.scenarios]
        outcomes.append(_mixed(by_load, fastest_j))
    return outcomes


def _mixed(by_load: Sequence[Sequence[Figures]], fastest_j: Sequence[float]) -> Outcome:
    relative = [_energy_j(load) / energy_j for load, energy_j in zip(by_load, fastest_j, strict=True)]
    attainment = [
        sum(part.slo_attainment * part.arrivals for part in load) / sum(part.arrivals for part in load)
        for load in by_load
    ]
    return Outcome(float(np.mean(relative)) * sum(fastest_j), min(attainment))


def _energy_j(parts: Sequence[Figures]) -> float:
    return sum(part.energy_j for part in parts)
