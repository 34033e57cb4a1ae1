"""What a serving stack is given: decided by the command line, or by a test."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from rlgov.engine.switch.feasibility import choose_strategy, infeasible
from rlgov.errors import ConfigError

if TYPE_CHECKING:
    from pathlib import Path

    from rlgov.engine.gateway.settings import GatewaySettings
    from rlgov.engine.switch.feasibility import GpuRoom, ModelShape
    from rlgov.engine.switch.machine import Strategy

SLEEP_ARGUMENT = "--enable-sleep-mode"


@dataclass(frozen=True, slots=True)
class Timing:
    """Bounds and periods, in seconds."""

    start_timeout_s: float = 900.0
    """From launching an engine until it is healthy."""
    warm_up_timeout_s: float = 300.0
    """A first completion, which may compile and capture."""
    sleep_timeout_s: float = 300.0
    """Putting an engine to sleep, or waking it."""
    drain_timeout_s: float = 600.0
    """How long a replaced engine may go on with its requests before its shutdown begins."""
    shutdown_timeout_s: float = 120.0
    """How long a shutdown waits for requests; what is left then is aborted, and that is reported."""
    sample_timeout_s: float = 0.5
    """Reading one engine for an interval."""
    cap_timeout_s: float = 2.0
    """Setting a cap; then the gateway limits instead."""
    watch_s: float = 0.2
    """Between two looks at the engines' processes."""
    health_s: float = 2.0
    """Between two looks at the serving engine's progress."""
    hung_after_s: float = 30.0
    """Without progress on waiting or running requests, an engine gets a probe."""
    idle_probe_s: float = 60.0
    """Between two probes of an engine that has nothing to do."""
    probe_timeout_s: float = 20.0
    """One token, end to end."""
    restart_first_s: float = 1.0
    """Before a dead engine is started for the second time; doubles with every failure."""
    restart_longest_s: float = 60.0
    refuse_first_s: float = 60.0
    """A TP degree that failed is refused for this time; doubles with every failure."""
    refuse_longest_s: float = 3600.0
    poll_s: float = 0.1
    """Between two looks during a switch."""


@dataclass(frozen=True, slots=True)
class StackSettings:
    """One deployment of one model."""

    model: str
    command: tuple[str, ...]
    """The vLLM program."""
    run: Path
    """Folder for state, logs and, unless another is named, the control socket."""
    tp_degrees: tuple[int, ...]
    """Largest first. The first one serves first, unless ``start_degree`` is given."""
    batch_caps: tuple[int, ...]
    """Largest first; the largest is the engines' own maximum."""
    gateway: GatewaySettings
    shape: ModelShape
    room: GpuRoom
    gpu_uuids: tuple[str, ...] = ()
    """Allotted; empty on a machine without GPUs, where engines share the processor."""
    start_degree: int | None = None
    strategy: Strategy | None = None
    """None chooses."""
    max_num_batched_tokens: int = 8192
    arguments: tuple[str, ...] = ()
    """The operator's own vLLM arguments."""
    environment: dict[str, str] = field(default_factory=dict)
    control: Path | None = None
    plugin: bool = True
    restart_hung: bool = False
    kv_capacity_tokens: tuple[int, ...] = ()
    """Estimated, for ``tp_degrees``; 0 where nothing is known."""
    switch_s: tuple[float, ...] = ()
    """Assumed until one was measured, for ``tp_degrees``."""
    timing: Timing = field(default_factory=Timing)

    def __post_init__(self) -> None:
        for name in ("tp_degrees", "batch_caps"):
            axis: tuple[int, ...] = getattr(self, name)
            if not axis or list(axis) != sorted(set(axis), reverse=True) or axis[-1] < 1:
                raise ConfigError(f"{name} must be distinct positive numbers, largest first, not {axis}")
        for name in ("kv_capacity_tokens", "switch_s"):
            if getattr(self, name) and len(getattr(self, name)) != len(self.tp_degrees):
                raise ConfigError(f"{name} needs one number a TP degree")
        if self.start_degree is not None and self.start_degree not in self.tp_degrees:
            raise ConfigError(
                f"TP degree {self.start_degree} to start with is none of those offered, "
                f"{', '.join(map(str, self.tp_degrees))}"
            )

    @property
    def allotted_gpus(self) -> int:
        """On a machine without GPUs: the largest TP degree."""
        return len(self.gpu_uuids) or self.tp_degrees[0]

    @property
    def max_num_seqs(self) -> int:
        """The engines' hard maximum, which no cap exceeds."""
        return self.batch_caps[0]

    @property
    def control_path(self) -> Path:
        """Of the control socket."""
        return self.control if self.control is not None else self.run / "control.sock"


@dataclass(frozen=True, slots=True)
class Offer:
    """What a stack offers after the degrees that can never be had are taken out."""

    tp_degrees: tuple[int, ...]
    infeasible: dict[int, str]
    start_degree: int
    strategy: Strategy


def offer(settings: StackSettings) -> Offer:
    """What can be offered.

    Raises:
        ConfigError: No degree is feasible, or not the one to start with, or not the strategy asked for.
    """
    refused = infeasible(settings.tp_degrees, settings.allotted_gpus, settings.shape, settings.room)
    degrees = tuple(degree for degree in settings.tp_degrees if degree not in refused)
    if not degrees:
        raise ConfigError("no TP degree can be had: " + "; ".join(refused.values()))
    start = settings.start_degree if settings.start_degree is not None else degrees[0]
    if start in refused:
        raise ConfigError(f"cannot start with TP degree {start}: {refused[start]}; start with another")
    strategy = choose_strategy(settings.strategy, degrees, len(settings.gpu_uuids))
    return Offer(degrees, refused, start, strategy)
