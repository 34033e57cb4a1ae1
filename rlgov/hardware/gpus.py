"""What GPUs there are, and what about them matters to a governor."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from rlgov.errors import HardwareError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rlgov.hardware.nvml import NvmlSession

_ARCHITECTURES = {
    2: "Kepler",
    3: "Maxwell",
    4: "Pascal",
    5: "Volta",
    6: "Turing",
    7: "Ampere",
    8: "Ada",
    9: "Hopper",
    10: "Blackwell",
    13: "Rubin",
}
_COMPUTE_MODES = {0: "default", 1: "exclusive thread", 2: "prohibited", 3: "exclusive process"}
_VIRTUALIZATION = {0: "none", 1: "passthrough", 2: "vGPU", 3: "vGPU host", 4: "vSGA host"}
_SHARED = frozenset({"vGPU", "vGPU host", "vSGA host"})


@dataclass(frozen=True, slots=True)
class Gpu:
    """One GPU. ``None``: GPU or driver do not tell."""

    uuid: str
    name: str
    architecture: str
    driver_version: str
    memory_bytes: int
    power_limit_w: float | None  # in force
    tdp_w: float | None  # the limit it came with
    memory_clock_mhz: int | None  # the highest
    sm_clocks_mhz: tuple[int, ...]  # supported at that memory clock, descending; empty if not told
    mig: bool
    virtualization: str  # none, passthrough, vGPU, vGPU host or vSGA host
    persistence: bool | None
    compute_mode: str  # default, exclusive thread, prohibited or exclusive process
    energy_counter: bool

    @property
    def clock_refusal(self) -> str:
        """Why the clock of this GPU must not be set, empty if it may."""
        if self.mig:
            return (
                f"{self.uuid} is in MIG mode: its clock belongs to all its slices; "
                f"switch MIG off (nvidia-smi -i {self.uuid} -mig 0) or only observe"
            )
        if self.virtualization in _SHARED:
            return (
                f"{self.uuid} is shared ({self.virtualization}): the clock is not ours to set; only observe"
            )
        if not self.sm_clocks_mhz:
            return f"{self.uuid} ({self.name}) does not tell its supported clocks; only observe"
        return ""


def list_gpus(session: NvmlSession) -> tuple[Gpu, ...]:
    """Every GPU that NVML shows, in the driver's order of the moment. Raises HardwareError."""
    driver = str(session.call("nvmlSystemGetDriverVersion"))
    uuids = []
    for index in range(session.call("nvmlDeviceGetCount")):
        handle = session.call("nvmlDeviceGetHandleByIndex", index)
        uuids.append(str(session.call("nvmlDeviceGetUUID", handle)))
    return tuple(read_gpu(session, uuid, driver) for uuid in uuids)


def read_gpu(session: NvmlSession, uuid: str, driver_version: str) -> Gpu:
    """One GPU, by UUID. Raises HardwareError."""
    memory_clocks = session.optional("nvmlDeviceGetSupportedMemoryClocks", uuid=uuid) or []
    memory_clock_mhz = max(memory_clocks, default=None)
    sm_clocks = (
        session.optional("nvmlDeviceGetSupportedGraphicsClocks", memory_clock_mhz, uuid=uuid) or []
        if memory_clock_mhz is not None
        else []
    )
    limit_mw = session.optional("nvmlDeviceGetEnforcedPowerLimit", uuid=uuid)
    default_mw = session.optional("nvmlDeviceGetPowerManagementDefaultLimit", uuid=uuid)
    mig = session.optional("nvmlDeviceGetMigMode", uuid=uuid)
    persistence = session.optional("nvmlDeviceGetPersistenceMode", uuid=uuid)
    mode = session.optional("nvmlDeviceGetComputeMode", uuid=uuid)
    virtualization = session.optional("nvmlDeviceGetVirtualizationMode", uuid=uuid)
    return Gpu(
        uuid=uuid,
        name=str(session.call("nvmlDeviceGetName", uuid=uuid)),
        architecture=_ARCHITECTURES.get(session.optional("nvmlDeviceGetArchitecture", uuid=uuid), "unknown"),
        driver_version=driver_version,
        memory_bytes=int(session.call("nvmlDeviceGetMemoryInfo", uuid=uuid).total),
        power_limit_w=None if limit_mw is None else limit_mw / 1000,
        tdp_w=None if default_mw is None else default_mw / 1000,
        memory_clock_mhz=memory_clock_mhz,
        sm_clocks_mhz=tuple(sorted({int(clock) for clock in sm_clocks}, reverse=True)),
        mig=mig is not None and any(mig),  # now, or from the next reset on
        virtualization=_VIRTUALIZATION.get(virtualization or 0, f"mode {virtualization}"),
        persistence=None if persistence is None else bool(persistence),
        compute_mode=_COMPUTE_MODES.get(mode or 0, f"mode {mode}"),
        energy_counter=session.optional("nvmlDeviceGetTotalEnergyConsumption", uuid=uuid) is not None,
    )


def common_clocks_mhz(gpus: Sequence[Gpu]) -> tuple[int, ...]:
    """SM clocks that all of these GPUs have, descending."""
    if not gpus:
        return ()
    return tuple(sorted(set.intersection(*(set(gpu.sm_clocks_mhz) for gpu in gpus)), reverse=True))


def select_gpus(gpus: Sequence[Gpu], uuids: Sequence[str] | None) -> tuple[Gpu, ...]:
    """The GPUs named by UUID, in that order; all of them for None.

    Raises:
        HardwareError: A UUID is not there or named twice; lists those that are there.
    """
    if uuids is None:
        return tuple(gpus)
    known = {gpu.uuid: gpu for gpu in gpus}
    missing = [uuid for uuid in uuids if uuid not in known]
    if missing or len(set(uuids)) != len(uuids):
        what = f"no GPU has the UUID {', '.join(missing)}" if missing else f"a GPU is named twice in {uuids}"
        raise HardwareError(f"{what}; there are: {', '.join(known) or 'none'}")
    return tuple(known[uuid] for uuid in uuids)
