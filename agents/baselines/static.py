"""Static settings: vLLM's default (the fastest), any one setting, the best one in hindsight."""

from __future__ import annotations

import re
from itertools import product
from typing import TYPE_CHECKING

import numpy as np

from rlgov.agents.baselines.space import Choice, Family, clocks_dimension
from rlgov.errors import ConfigError
from rlgov.records import Configuration, Limits

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from rlgov.agents.baselines.space import Dimension, Parameters, PolicyContext, Value


class StaticPolicy:
    """One configuration throughout; it never runs under the guard, which would change it."""

    guarded = False

    def __init__(self, configuration: Configuration | None, name: str | None = None) -> None:
        """``None`` stands for the fastest setting of whatever limits it is started with."""
        self.configuration = configuration
        self.name = name or ("fastest" if configuration is None else static_name(configuration))
        self._asked: NDArray[np.int64] = np.zeros((0, 3), dtype=np.int64)

    def start_configuration(self, limits: Limits) -> Configuration:
        """The setting itself."""
        return limits.fastest if self.configuration is None else self.configuration

    def start(self, limits: Limits, n: int) -> None:
        """Raises ConfigError when the setting is not offered."""
        self._asked = np.tile(
            np.array(limits.index(self.start_configuration(limits)), dtype=np.int64), (n, 1)
        )

    def decide(
        self,
        observation: NDArray[np.float32],  # noqa: ARG002 - the seam's
        rows: NDArray[np.float64],  # noqa: ARG002 - the seam's
        mask: NDArray[np.bool_],  # noqa: ARG002 - the seam's
    ) -> NDArray[np.int64]:
        """The same index for every row."""
        return self._asked.copy()


def fastest() -> StaticPolicy:
    """Highest clock, largest cap, highest TP degree: what an operator runs today."""
    return StaticPolicy(None)


def static_name(configuration: Configuration) -> str:
    """``static:CLOCK/CAP/TP``, the inverse of :func:`parse_static`."""
    return f"static:{configuration.sm_clock_mhz}/{configuration.batch_cap}/{configuration.tp_degree}"


def parse_static(name: str) -> Configuration:
    """The configuration of ``static:CLOCK/CAP/TP``."""
    match = re.fullmatch(r"static:(\d+)/(\d+)/(\d+)", name)
    if match is None:
        msg = f"{name!r} is not a static setting; write static:CLOCK_MHZ/BATCH_CAP/TP, e.g. static:1380/256/2"
        raise ConfigError(msg)
    clock_mhz, cap, tp = (int(group) for group in match.groups())
    return Configuration(clock_mhz, cap, tp)


def every_static(limits: Limits) -> list[StaticPolicy]:
    """All settings on offer, fastest first."""
    axes = (limits.tp_degrees, limits.batch_caps, limits.sm_clocks_mhz)
    return [StaticPolicy(Configuration(clock, cap, tp)) for tp, cap, clock in product(*axes)]


def _space(limits: Limits) -> tuple[Dimension, ...]:
    return (
        clocks_dimension("sm_clock_mhz", limits),
        Choice("batch_cap", tuple(reversed(limits.batch_caps))),
        Choice("tp_degree", tuple(reversed(limits.tp_degrees))),
    )


def _defaults(limits: Limits) -> dict[str, Value]:
    return _near_static(limits, limits.fastest)


def _build(parameters: Parameters, context: PolicyContext) -> StaticPolicy:
    chosen = FAMILY.complete(parameters, context.limits)
    clock_mhz, cap, tp = (int(chosen[key] or 0) for key in ("sm_clock_mhz", "batch_cap", "tp_degree"))
    return StaticPolicy(Configuration(clock_mhz, cap, tp))


def _near_static(limits: Limits, configuration: Configuration) -> dict[str, Value]:  # noqa: ARG001 - the family's seam
    return {
        "sm_clock_mhz": configuration.sm_clock_mhz,
        "batch_cap": configuration.batch_cap,
        "tp_degree": configuration.tp_degree,
    }


FAMILY = Family("static", _space, _defaults, _build, _near_static)
