"""Tunable knobs of a rule and the families of rules that declare them."""

from __future__ import annotations

from dataclasses import dataclass
from math import exp, log
from typing import TYPE_CHECKING, TypeAlias

import numpy as np

from rlgov.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from rlgov.agents.policy import Policy
    from rlgov.records import Configuration, Limits
    from rlgov.simulation.tables import PhysicsTables

Value: TypeAlias = float | int | bool | None  # what a knob may hold: everything JSON can
Parameters: TypeAlias = "Mapping[str, Value]"

REAL_RESOLUTION = 1 / 256  # a real knob is searched on a grid this fine, so that equal settings are equal


@dataclass(frozen=True, slots=True)
class Real:
    """A real knob between ``low`` and ``high``, searched evenly or, with ``log_scale``, by ratio."""

    name: str
    low: float
    high: float
    log_scale: bool = False

    @property
    def step(self) -> float:
        """Smallest move on the unit interval that changes the value."""
        return REAL_RESOLUTION

    def value(self, unit: float) -> float:
        """The knob's value at ``unit`` in [0, 1]."""
        at = round(min(max(unit, 0.0), 1.0) / REAL_RESOLUTION) * REAL_RESOLUTION
        if self.log_scale:
            value = exp(log(self.low) + at * (log(self.high) - log(self.low)))
        else:
            value = self.low + at * (self.high - self.low)
        return float(f"{value:.6g}")  # six digits are exact in JSON and easy to read

    def unit(self, value: Value) -> float:
        """Inverse of :meth:`value`; anything outside the range goes to its nearest end."""
        number = min(max(float(value or 0.0), self.low), self.high)
        if self.log_scale:
            return (log(number) - log(self.low)) / (log(self.high) - log(self.low))
        return (number - self.low) / (self.high - self.low)


@dataclass(frozen=True, slots=True)
class Choice:
    """A knob that takes one of some ordered values."""

    name: str
    values: tuple[Value, ...]

    @property
    def step(self) -> float:
        """Smallest move on the unit interval that changes the value."""
        return 1.0 / len(self.values)

    def value(self, unit: float) -> Value:
        """The knob's value at ``unit`` in [0, 1]."""
        return self.values[min(int(max(unit, 0.0) * len(self.values)), len(self.values) - 1)]

    def unit(self, value: Value) -> float:
        """The middle of the value's share of the unit interval."""
        try:
            return (self.values.index(value) + 0.5) / len(self.values)
        except ValueError:
            msg = f"{self.name} cannot be {value!r}; choose one of {self.values}"
            raise ConfigError(msg) from None


Dimension: TypeAlias = Real | Choice


@dataclass(frozen=True, slots=True)
class PolicyContext:
    """What building a policy by name may need besides its parameters."""

    limits: Limits
    tables: PhysicsTables | None = None  # nominal physics, for rules that predict latency
    best_static: Configuration | None = None  # in hindsight; known after all static settings were run
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Family:
    """One kind of rule: its knobs, their defaults, and how to build it."""

    name: str
    space: Callable[[Limits], tuple[Dimension, ...]]
    defaults: Callable[[Limits], dict[str, Value]]
    build: Callable[[Parameters, PolicyContext], Policy]
    near_static: Callable[[Limits, Configuration], dict[str, Value]]  # the rule closest to a static setting
    rising: tuple[tuple[str, ...], ...] = ()  # knobs of one kind whose values are sorted before use

    def ordered(self, parameters: Parameters) -> dict[str, Value]:
        """The same rule written in one way: knobs of one kind in rising order."""
        chosen = dict(parameters)
        for names in self.rising:
            values = sorted(float(chosen[name] or 0.0) for name in names)
            kinds = [type(chosen[name]) for name in names]
            chosen |= {
                name: int(v) if k is int else v for name, v, k in zip(names, values, kinds, strict=True)
            }
        return chosen

    def complete(self, parameters: Parameters, limits: Limits) -> dict[str, Value]:
        """``parameters`` over the defaults. Raises ConfigError for a knob the family does not have."""
        defaults = self.defaults(limits)
        unknown = sorted(set(parameters) - set(defaults))
        if unknown:
            msg = f"{self.name} has no parameter {', '.join(unknown)}; known: {', '.join(sorted(defaults))}"
            raise ConfigError(msg)
        return self.ordered({**defaults, **parameters})


def clocks_dimension(name: str, limits: Limits) -> Choice:
    """A clock knob in MHz, slowest first."""
    return Choice(name, tuple(reversed(limits.sm_clocks_mhz)))


def fixed_dimensions(limits: Limits) -> tuple[Dimension, ...]:
    """Batch cap, TP degree and guard: the knobs every clock rule holds fixed in an episode."""
    return (
        Choice("batch_cap", tuple(reversed(limits.batch_caps))),
        Choice("tp_degree", tuple(reversed(limits.tp_degrees))),
        Choice("guarded", (False, True)),
    )


def offered_clock(limits: Limits, fraction: float) -> int:
    """The lowest offered clock that is at least ``fraction`` of the highest."""
    wanted_mhz = fraction * limits.sm_clocks_mhz[0]
    return min(clock for clock in limits.sm_clocks_mhz if clock >= wanted_mhz - 1e-6)


def clock_index(limits: Limits, clock_mhz: float) -> int:
    """Index of the lowest offered clock at or above ``clock_mhz``; the fastest when none is."""
    at_least = np.asarray(limits.sm_clocks_mhz) >= clock_mhz - 1e-6
    return max(int(at_least.sum()) - 1, 0)
