"""Configuration by load level (DynamoLLM's profile lookup): bands of a slow load average, one row each."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

from rlgov.agents.baselines.clock_rule import moving_average
from rlgov.agents.baselines.space import Choice, Family, Real, clocks_dimension, offered_clock
from rlgov.errors import ConfigError, DeploymentError
from rlgov.records import Column, Configuration, Limits

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

    from rlgov.agents.baselines.space import Dimension, Parameters, PolicyContext, Value

LEVELS = 4
_EDGES = tuple(f"edge_{i}_tokens_per_s" for i in range(1, LEVELS))
_CLOCKS = tuple(f"clock_{i}_mhz" for i in range(1, LEVELS + 1))
# What a request weighs besides its prompt: the order of magnitude of a chat reply's decode work.
REQUEST_TOKENS = 400.0


@dataclass(frozen=True, slots=True)
class LoadTable:
    """``configurations[i]`` serves loads from ``edges[i - 1]`` to ``edges[i]``, in tokens/s."""

    edges_tokens_per_s: tuple[float, ...]
    configurations: tuple[Configuration, ...]

    def __post_init__(self) -> None:
        """Raises ConfigError when the table does not fit together."""
        if len(self.configurations) != len(self.edges_tokens_per_s) + 1:
            msg = "load-lookup: give one configuration more than edges"
            raise ConfigError(msg)
        if any(a > b for a, b in pairwise(self.edges_tokens_per_s)):
            msg = f"load-lookup: edges must rise, got {self.edges_tokens_per_s}"
            raise ConfigError(msg)


class LoadLookupPolicy:
    """Rises to a higher level at once; falls to a lower one after ``hold_s`` below it.

    Its load is prompt tokens per second plus ``REQUEST_TOKENS`` for each request per second.
    """

    name = "load-lookup"

    def __init__(
        self, table: LoadTable, *, weight: float = 0.1, hold_s: float = 30.0, guarded: bool = False
    ) -> None:
        self.table = table
        self.guarded = guarded
        self._weight = weight
        self._hold_s = hold_s
        self._indices: NDArray[np.int64] = np.zeros((0, 3), dtype=np.int64)
        self._load: NDArray[np.float64] = np.zeros(0)
        self._level: NDArray[np.int64] = np.zeros(0, dtype=np.int64)
        self._below_s: NDArray[np.float64] = np.zeros(0)

    def start_configuration(self, limits: Limits) -> Configuration:  # noqa: ARG002 - the table has its own
        """The row of the highest load."""
        return self.table.configurations[-1]

    def start(self, limits: Limits, n: int) -> None:
        """Forget the last episode. Raises ConfigError when the table names a setting that is not offered."""
        self._indices = np.array([limits.index(row) for row in self.table.configurations], dtype=np.int64)
        self._load = np.full(n, np.nan)
        self._level = np.full(n, len(self.table.edges_tokens_per_s), dtype=np.int64)
        self._below_s = np.zeros(n)

    def decide(
        self,
        observation: NDArray[np.float32],  # noqa: ARG002 - the seam's
        rows: NDArray[np.float64],
        mask: NDArray[np.bool_],  # noqa: ARG002 - the guard refuses what must not be
    ) -> NDArray[np.int64]:
        """The row of the load's level; the fastest clock and cap when the window is blind."""
        if not self._indices.size:
            msg = f"{self.name}: call start(limits, n) before decide()"
            raise DeploymentError(msg)
        blind = ~(rows[:, Column.BLIND] == 0)
        duration_s = rows[:, Column.DURATION_S]
        tokens = rows[:, Column.PROMPT_TOKENS] + REQUEST_TOKENS * rows[:, Column.ARRIVALS]
        self._load = moving_average(self._load, tokens / duration_s, self._weight, blind)
        level = np.searchsorted(self.table.edges_tokens_per_s, self._load, side="right")
        below_s = np.where(level < self._level, self._below_s + duration_s, 0.0)
        moved = (level > self._level) | (below_s >= self._hold_s - 1e-9)
        self._level = np.where(moved & ~blind, level, self._level)
        self._below_s = np.where(blind, self._below_s, np.where(moved, 0.0, below_s))
        asked = self._indices[self._level]
        asked[blind, :2] = 0
        return asked


def table_from_statics(
    cheapest: Mapping[float, Configuration],
) -> LoadTable:
    """The lookup table from the best static configuration found at each load of the training span.

    Args:
        cheapest: load in tokens/s, as the policy measures it, to the configuration that serves it best.
    """
    if not cheapest:
        msg = "load-lookup: no load level was evaluated; give at least one"
        raise ConfigError(msg)
    loads = sorted(cheapest)
    edges = tuple(float(np.sqrt(a * b)) for a, b in pairwise(loads))  # half-way by ratio
    return LoadTable(edges, tuple(cheapest[load] for load in loads))


def _space(limits: Limits) -> tuple[Dimension, ...]:
    tps: tuple[Value, ...] = tuple(reversed(limits.tp_degrees))
    return (
        *(Real(name, 200.0, 100000.0, log_scale=True) for name in _EDGES),
        *(clocks_dimension(name, limits) for name in _CLOCKS),
        Choice("batch_cap", tuple(reversed(limits.batch_caps))),
        Choice("tp_degree_low", tps),  # of the lower half of the levels
        Choice("tp_degree_high", tps),
        Choice("guarded", (False, True)),
        Real("weight", 0.01, 0.5, log_scale=True),
        Real("hold_s", 1.0, 120.0, log_scale=True),
    )


def _defaults(limits: Limits) -> dict[str, Value]:
    edges = {name: 2000.0 * 4.0**i for i, name in enumerate(_EDGES)}
    clocks = {name: offered_clock(limits, 0.55 + 0.15 * i) for i, name in enumerate(_CLOCKS)}
    return {
        **edges,
        **clocks,
        "batch_cap": limits.batch_caps[0],
        "tp_degree_low": limits.tp_degrees[0],
        "tp_degree_high": limits.tp_degrees[0],
        "guarded": False,
        "weight": 0.1,
        "hold_s": 30.0,
    }


def _build(parameters: Parameters, context: PolicyContext) -> LoadLookupPolicy:
    # edges and clocks come sorted: more load never means a lower clock
    chosen = FAMILY.complete(parameters, context.limits)
    edges = [float(chosen[name] or 0.0) for name in _EDGES]
    clocks = [float(chosen[name] or 0.0) for name in _CLOCKS]
    tps = [int(chosen["tp_degree_low" if i < LEVELS // 2 else "tp_degree_high"] or 0) for i in range(LEVELS)]
    rows = (
        Configuration(int(clock), int(chosen["batch_cap"] or 0), tp)
        for clock, tp in zip(clocks, tps, strict=True)
    )
    return LoadLookupPolicy(
        LoadTable(tuple(edges), tuple(rows)),
        weight=float(chosen["weight"] or 0.0),
        hold_s=float(chosen["hold_s"] or 0.0),
        guarded=bool(chosen["guarded"]),
    )


def _near_static(limits: Limits, configuration: Configuration) -> dict[str, Value]:
    return {
        **_defaults(limits),
        **dict.fromkeys(_CLOCKS, configuration.sm_clock_mhz),
        "batch_cap": configuration.batch_cap,
        "tp_degree_low": configuration.tp_degree,
        "tp_degree_high": configuration.tp_degree,
    }


FAMILY = Family("load-lookup", _space, _defaults, _build, _near_static, rising=(_EDGES, _CLOCKS))
