"""Opens a live deployment from what a person names: a control socket, a profile, the GPUs."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, TypeAlias

from rlgov.deployments.live import LiveDeployment
from rlgov.deployments.live_limits import live_limits
from rlgov.deployments.live_parts import LiveSettings, Stack
from rlgov.deployments.measured import MeasuredWindows
from rlgov.engine.control.client import StackClient
from rlgov.errors import DeploymentError
from rlgov.hardware.hardware import open_hardware

if TYPE_CHECKING:
    from rlgov.clock import Clock
    from rlgov.deployments.live_parts import Workload
    from rlgov.engine.samples import StackLimits
    from rlgov.hardware.clocks import ClockControl
    from rlgov.hardware.meter import Meter
    from rlgov.records import Configuration, Limits

_PATIENCE_S = 60.0  # for what is asked once; a busy gateway has a hundred thousand records to tell


class OpenStack(Stack, Protocol):
    """A stack that also tells what it offers."""

    def limits(self) -> StackLimits:
        """What it offers."""
        ...


class GpuGroup(Protocol):
    """Meter and clocks of the allotted GPUs; :class:`rlgov.hardware.hardware.Hardware` is one."""

    @property
    def meter(self) -> Meter:
        """Reads them."""
        ...

    @property
    def clocks(self) -> ClockControl:
        """Sets their SM clock."""
        ...

    def close(self) -> None:
        """Restore the clocks and let go of them."""
        ...


HardwareChoice: TypeAlias = "str | Sequence[str] | GpuGroup"
"""``auto``: the GPUs the stack was given; ``none``; UUIDs; or GPUs that are open already."""


def open_live(
    control: str | Path | OpenStack,
    profile: Limits,
    clock: Clock,
    *,
    hardware: HardwareChoice = "auto",
    workload: Workload | None = None,
    start: Configuration | None = None,
    settings: LiveSettings | None = None,
    acting: bool = True,
) -> LiveDeployment:
    """Connect to a running stack and to its GPUs. Nothing is moved before the first ``start``.

    Args:
        control: The stack's control socket, or a client of one.
        profile: What the policy was made for, with the SLO and the interval that shall hold.
        clock: Paces the intervals.
        hardware: Whose energy is metered and whose clock is set. GPUs that are open already are taken over.
        workload: Traffic to play in every episode.
        start: Configuration of the first window, by default the fastest.
        settings: How it is held, None for the defaults.
        acting: Whether it moves anything, to begin with.

    Raises:
        DeploymentError: The stack cannot be reached, or does not offer what the profile needs.
        HardwareError: The GPUs cannot be opened.
    """
    with ExitStack() as undo:
        if isinstance(control, (str, Path)):
            path = Path(control)
            with StackClient(path, timeout_s=_PATIENCE_S) as patient:
                offer, cursor = patient.limits(), patient.interval(0).traffic.cursor
            stack: Stack = StackClient(path, timeout_s=profile.interval_s)
        else:
            stack = control
            offer, cursor = control.limits(), control.interval(0).traffic.cursor
        undo.callback(stack.close)
        group = open_gpus(hardware, offer.gpu_uuids, clock)
        undo.callback(group.close)
        deployment = LiveDeployment(
            stack,
            live_limits(profile, offer, group.clocks.supported_mhz),
            MeasuredWindows(),
            group.meter,
            group.clocks,
            clock,
            workload=workload,
            start=start,
            cursor=cursor,
            settings=LiveSettings() if settings is None else settings,
            acting=acting,
            closers=(group.close,),
        )
        undo.pop_all()
    return deployment


def open_gpus(hardware: HardwareChoice, allotted: Sequence[str] | None, clock: Clock) -> GpuGroup:
    """Meter and clocks of the GPUs chosen.

    Args:
        hardware: The choice.
        allotted: What ``auto`` stands for: UUIDs, or None for all GPUs of this machine.
        clock: Dates the readings.

    Raises:
        DeploymentError: There is no such choice.
        HardwareError: The GPUs cannot be opened.
    """
    if isinstance(hardware, str):
        if hardware not in {"auto", "none"}:
            msg = f"hardware must be 'auto', 'none' or a list of GPU UUIDs, got {hardware!r}"
            raise DeploymentError(msg)
        return open_hardware(allotted if hardware == "auto" else (), clock)
    if isinstance(hardware, Sequence):
        return open_hardware(tuple(hardware), clock)
    return hardware
