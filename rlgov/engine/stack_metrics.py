"""The stack's state on the gateway's metrics page."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from prometheus_client.core import Metric

    from rlgov.engine.samples import StackState


@dataclass
class Tally:
    """What happened since the stack started."""

    restarts: int = 0
    switches: Counter[tuple[str, str]] = field(default_factory=Counter)  # by strategy and outcome
    switch_s: float = 0.0
    held_s: float = 0.0

    def switched(self, strategy: str, outcome: str, total_s: float, held_s: float) -> None:
        """Count one switch."""
        self.switches[strategy, outcome] += 1
        self.switch_s += total_s
        self.held_s += held_s


class StackCollector(Collector):
    """Reads the state anew for every page.

    Args:
        state: Gives it.
        tally: Counts.
    """

    def __init__(self, state: Callable[[], StackState], tally: Tally) -> None:
        self._state = state
        self._tally = tally

    def describe(self) -> Iterator[Metric]:
        """Nothing: the names are known only from :meth:`collect`, and none of them is taken twice."""
        return iter(())

    def collect(self) -> Iterator[Metric]:
        """The families of this moment."""
        state = self._state()
        for name, value, about in (
            ("rlgov_tp_degree", state.tp_degree, "TP degree of the engine that takes new requests"),
            ("rlgov_batch_cap", state.batch_cap, "Batch cap in force"),
            ("rlgov_switching", state.switching, "1 while a change of the TP degree is in progress"),
            ("rlgov_ready", state.ready, "1 while an engine takes new requests"),
        ):
            yield GaugeMetricFamily(name, about, value=float(value))
        phases = GaugeMetricFamily("rlgov_engines", "Engines by phase", labels=["phase"])
        for phase, count in sorted(Counter(engine.phase for engine in state.engines).items()):
            phases.add_metric([phase], count)
        yield phases
        refused = GaugeMetricFamily(
            "rlgov_tp_refused", "1 for a TP degree that cannot be had", labels=["tp_degree"]
        )
        for degree in sorted(state.tp_refused):
            refused.add_metric([str(degree)], 1.0)
        yield refused
        conditions = GaugeMetricFamily("rlgov_condition", "1 for what is wrong now", labels=["condition"])
        for name in sorted(state.conditions):
            conditions.add_metric([name], 1.0)
        yield conditions
        tally = self._tally
        switches = CounterMetricFamily(
            "rlgov_switches", "Changes of the TP degree", labels=["strategy", "outcome"]
        )
        for (strategy, outcome), count in sorted(tally.switches.items()):
            switches.add_metric([strategy, outcome], count)
        yield switches
        yield CounterMetricFamily(
            "rlgov_switch_seconds", "Time spent in changes of the TP degree", value=tally.switch_s
        )
        yield CounterMetricFamily(
            "rlgov_switch_held_seconds", "Thereof with new requests held", value=tally.held_s
        )
        yield CounterMetricFamily(
            "rlgov_engine_restarts", "Engines started again after they died", value=tally.restarts
        )
