"""The same tuning effort for every baseline: least energy at the stated attainment, on training spans.

A family's knobs form a unit cube. A quarter of the budget goes to its defaults, the rule nearest to the
best static setting and a Sobol sequence, the rest to mutations of the best point so far.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Final

import numpy as np
from scipy.stats import qmc

from rlgov.agents.baselines.tuned import TARGET_ATTAINMENT, TunedRecord
from rlgov.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from numpy.typing import NDArray

    from rlgov.agents.baselines.space import Dimension, Family, PolicyContext, Value
    from rlgov.agents.policy import Policy

EXPLORED_SHARE: Final = 0.25
FIRST_STEP: Final = 0.25  # standard deviation, in knobs' ranges
SMALLEST_STEP: Final = 1 / 64
LARGEST_STEP: Final = 0.5
_MUTATIONS_IN_VAIN: Final = 20
_DRAWS_IN_VAIN: Final = 1000  # random points in a row that were all tried before: the space is used up


@dataclass(frozen=True, slots=True)
class Outcome:
    """What one policy did on the training spans."""

    energy_j: float
    slo_attainment: float

    def rank(self, target_attainment: float) -> tuple[float, float]:
        """Smaller is better: first by how much attainment falls short, then by energy."""
        if not (np.isfinite(self.energy_j) and np.isfinite(self.slo_attainment)):
            return float("inf"), float("inf")
        return max(0.0, target_attainment - self.slo_attainment), self.energy_j


@dataclass(frozen=True, slots=True)
class Trial:
    """One evaluated setting of a family."""

    parameters: dict[str, Value]
    outcome: Outcome


@dataclass(frozen=True, slots=True)
class TunedResult:
    """The best setting found, and every one tried, in order."""

    family: str
    target_attainment: float
    best: Trial
    trials: tuple[Trial, ...] = field(repr=False)

    @property
    def feasible(self) -> bool:
        """Whether the best setting holds the target."""
        return self.best.outcome.slo_attainment >= self.target_attainment

    def record(self, *, profile: str = "", trained_on: Sequence[str] = ()) -> TunedRecord:
        """The best setting, to be stored and named as a policy later."""
        return TunedRecord(
            family=self.family,
            parameters=self.best.parameters,
            profile=profile,
            trained_on=tuple(trained_on),
            target_attainment=self.target_attainment,
            evaluations=len(self.trials),
            **asdict(self.best.outcome),
        )


def tune(
    family: Family,
    evaluate: Callable[[Policy], Outcome],
    budget: int,
    rng: np.random.Generator,
    *,
    context: PolicyContext,
    target_attainment: float = TARGET_ATTAINMENT,
    map_many: Callable[[Callable[[Policy], Outcome], Sequence[Policy]], Iterable[Outcome]] = map,
) -> TunedResult:
    """Search a family's knobs with exactly ``budget`` evaluations (fewer if it has fewer settings).

    Args:
        family: what to tune.
        evaluate: runs a policy on the training spans; never on test spans.
        budget: evaluations, the same for every family that shall be compared.
        rng: makes the search repeatable.
        context: limits and tables to build policies with; its best static setting (of the training
            spans), if known, is a second start besides the defaults.
        target_attainment: share of requests that must meet the SLO.
        map_many: evaluates the exploring quarter, e.g. the ``map`` of a process pool.
    """
    if budget < 1:
        msg = f"tuning {family.name} needs a budget of at least 1 evaluation, got {budget}"
        raise ConfigError(msg)
    dimensions = family.space(context.limits)

    def evaluate_all(settings: Sequence[dict[str, Value]]) -> list[Outcome]:
        return list(map_many(evaluate, [family.build(parameters, context) for parameters in settings]))

    search = _Search(dimensions, family.ordered, evaluate_all, budget, target_attainment)
    starts = [family.defaults(context.limits)]
    if context.best_static is not None:
        starts.append(family.near_static(context.limits, context.best_static))
    first = [[dimension.unit(start[dimension.name]) for dimension in dimensions] for start in starts]
    explored = max(1, round(EXPLORED_SHARE * budget))
    # scrambled by the generator; a power of two keeps the sequence balanced
    sobol = qmc.Sobol(len(dimensions), rng=rng).random_base2(int(np.ceil(np.log2(explored + 1))))
    # the defaults come first: tuning never makes a rule worse on the spans it is tuned on
    search.add(np.vstack((first, sobol))[:explored])
    _refine(search, dimensions, rng)
    best = min(search.trials, key=lambda trial: trial.outcome.rank(target_attainment))
    return TunedResult(family.name, target_attainment, best, tuple(search.trials))


class _Search:
    """Trials so far; evaluates points of the unit cube, none twice and no more than the budget."""

    def __init__(
        self,
        dimensions: Sequence[Dimension],
        ordered: Callable[[dict[str, Value]], dict[str, Value]],
        evaluate_all: Callable[[Sequence[dict[str, Value]]], list[Outcome]],
        budget: int,
        target_attainment: float,
    ) -> None:
        self.trials: list[Trial] = []
        self.best_point: NDArray[np.float64] = np.zeros(len(dimensions))
        self._best_rank = (float("inf"), float("inf"))
        self._dimensions = dimensions
        self._ordered = ordered
        self._evaluate_all = evaluate_all
        self._budget = budget
        self._target_attainment = target_attainment
        self._seen: set[tuple[Value, ...]] = set()

    @property
    def left(self) -> int:
        """Evaluations left."""
        return self._budget - len(self.trials)

    def add(self, points: NDArray[np.float64]) -> tuple[int, bool]:
        """Evaluate the points that are new; how many were, and whether one is the best yet."""
        fresh: list[tuple[NDArray[np.float64], dict[str, Value]]] = []
        for point in points:
            pairs = zip(self._dimensions, point.tolist(), strict=True)
            parameters = self._ordered({dimension.name: dimension.value(unit) for dimension, unit in pairs})
            key = tuple(parameters.values())
            if key not in self._seen and len(fresh) < self.left:
                self._seen.add(key)
                fresh.append((point, parameters))
        improved = False
        outcomes = self._evaluate_all([parameters for _, parameters in fresh])
        for (point, parameters), outcome in zip(fresh, outcomes, strict=True):
            self.trials.append(Trial(parameters, outcome))
            rank = outcome.rank(self._target_attainment)
            if rank < self._best_rank:
                self._best_rank, self.best_point, improved = rank, point, True
        return len(fresh), improved


def _refine(search: _Search, dimensions: Sequence[Dimension], rng: np.random.Generator) -> None:
    """Spend what is left of the budget on mutations of the best point: about two knobs at a time.

    The step grows with success and shrinks without. It found better settings of every family than
    moving one knob at a time did, at equal budget.
    """
    size = len(dimensions)
    step, in_vain = FIRST_STEP, 0
    while search.left and in_vain < _DRAWS_IN_VAIN:
        if in_vain < _MUTATIONS_IN_VAIN:
            moved = rng.random(size) < 2 / size
            moved[rng.integers(size)] = True
            point = np.clip(search.best_point + moved * step * rng.standard_normal(size), 0.0, 1.0)
        else:
            point = rng.random(size)  # the best point's surroundings are used up
        added, improved = search.add(point[None, :])
        if added:
            step = min(step * 1.5, LARGEST_STEP) if improved else max(step * 0.95, SMALLEST_STEP)
        in_vain = 0 if added else in_vain + 1
