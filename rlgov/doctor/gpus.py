"""Driver, GPUs, and whether their clocks can be set. Nothing is changed."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rlgov.doctor.finding import fail, ok, warn
from rlgov.errors import HardwareError
from rlgov.hardware.clocks import GroupClocks
from rlgov.hardware.hardware import open_hardware
from rlgov.hardware.nvml import PERMISSION_REMEDY, NvmlError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from rlgov.clock import Clock
    from rlgov.doctor.finding import Finding
    from rlgov.hardware.gpus import Gpu
    from rlgov.hardware.hardware import Hardware

_CPU_ONLY = "serving on CPUs works; energy and clocks need an NVIDIA GPU"


def check_gpus(clock: Clock) -> Iterator[Finding]:
    """Everything about the GPUs of this machine.

    Args:
        clock: Paces attempts.
    """
    try:
        hardware = open_hardware(None, clock)
    except HardwareError as error:
        yield fail("nvml", str(error), "mend this GPU, or take it out of the deployment")
        return
    with hardware:
        if not hardware.gpus:
            yield warn("nvml", hardware.note, _CPU_ONLY)
            return
        yield ok("nvml", f"driver {hardware.gpus[0].driver_version}")
        yield ok("gpus", _listed(hardware.gpus))
        yield _clocks(hardware)
        yield from _modes(hardware.gpus)
        yield _meter(hardware)


def _listed(gpus: Sequence[Gpu]) -> str:
    kinds: dict[str, int] = {}
    for gpu in gpus:
        power = "" if gpu.tdp_w is None else f", {gpu.tdp_w:g} W"
        kind = f"{gpu.name} ({gpu.architecture}, {gpu.memory_bytes / 2**30:.0f} GiB{power})"
        kinds[kind] = kinds.get(kind, 0) + 1
    return "; ".join(f"{count} x {kind}" for kind, count in kinds.items())


def _clocks(hardware: Hardware) -> Finding:
    """Asks each GPU for a range that no driver can carry out: refused as wrong, or for want of rights."""
    clocks = hardware.clocks
    if not isinstance(clocks, GroupClocks):
        return warn("clocks", hardware.note, "rlgov can observe here, and leave the clocks alone")
    try:
        clocks.probe()
    except NvmlError as error:
        remedy = PERMISSION_REMEDY if error.code == "NO_PERMISSION" else "rlgov can observe here meanwhile"
        return warn("clocks", f"may not be set: NVML says {error.code}", remedy)
    supported = clocks.supported_mhz
    span = f"{supported[-1]} to {supported[0]} MHz in {len(supported)} steps"
    return ok("clocks", f"{span}; may be set, as far as a refused request tells (nothing was changed)")


def _modes(gpus: Sequence[Gpu]) -> Iterator[Finding]:
    def named(chosen: Sequence[Gpu]) -> str:
        return ", ".join(gpu.uuid for gpu in chosen)

    if partitioned := [gpu for gpu in gpus if gpu.mig]:
        yield warn(
            "mig", f"on: {named(partitioned)}", "switch it off (nvidia-smi -mig 0) to have clocks governed"
        )
    else:
        yield ok("mig", "off")
    if forgetful := [gpu for gpu in gpus if gpu.persistence is False]:
        yield warn(
            "persistence mode",
            f"off: {named(forgetful)}; the driver may unload and forget locked clocks",
            "as root: nvidia-smi -pm 1, or run nvidia-persistenced",
        )
    else:
        yield ok("persistence mode", "on" if any(gpu.persistence for gpu in gpus) else "not told")
    closed = [gpu for gpu in gpus if gpu.compute_mode == "prohibited"]
    exclusive = [gpu for gpu in gpus if gpu.compute_mode.startswith("exclusive")]
    back = "as root: nvidia-smi -c DEFAULT"
    if closed:
        yield fail("compute mode", f"prohibited: {named(closed)}; no engine can start there", back)
    elif exclusive:
        said = (
            f"{exclusive[0].compute_mode}: {named(exclusive)}; two engines cannot share a GPU in a TP switch"
        )
        yield warn("compute mode", said, back)
    else:
        yield ok("compute mode", "default")


def _meter(hardware: Hardware) -> Finding:
    if blind := [gpu.uuid for gpu in hardware.gpus if not gpu.energy_counter]:
        return warn(
            "energy counter",
            f"missing: {', '.join(blind)}",
            "needs Volta or newer and a whole GPU; without it nothing can be governed by energy",
        )
    power = [gpu.power_w for gpu in hardware.meter.read().gpus]
    told = [value for value in power if value is not None]
    return ok("energy counter", f"there, resolution 0.1 s; {sum(told):.0f} W now")
