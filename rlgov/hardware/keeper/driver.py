"""The keeper's view of NVML."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rlgov.errors import HardwareError
from rlgov.hardware.driver import NvmlClockPort
from rlgov.hardware.gpus import read_gpu
from rlgov.hardware.keeper.values import Offer
from rlgov.hardware.nvml import NvmlError

if TYPE_CHECKING:
    from collections.abc import Callable, Collection

    from rlgov.hardware.clocks import ClockPort, ClockState
    from rlgov.hardware.nvml import NvmlSession

_ANSWERS = frozenset({"NOT_SUPPORTED", "FUNCTION_NOT_FOUND"})


class NvmlKeeperDriver:
    """GPUs through NVML, by UUID. A GPU that does not answer at the start is left out, and told of.

    Args:
        session: NVML.
        allowed: The administrator's choice of GPUs; None for all.
        port: Sets and measures clocks; by default through the same session.
        say: Told about GPUs that are left out.
    """

    def __init__(
        self,
        session: NvmlSession,
        allowed: Collection[str] | None,
        *,
        port: ClockPort | None = None,
        say: Callable[[str], None],
    ) -> None:
        self._session = session
        version = str(session.call("nvmlSystemGetDriverVersion"))
        gpus = []
        for index in range(session.call("nvmlDeviceGetCount")):
            try:
                handle = session.call("nvmlDeviceGetHandleByIndex", index)
                gpus.append(read_gpu(session, str(session.call("nvmlDeviceGetUUID", handle)), version))
            except HardwareError as error:
                say(f"GPU {index} is left out: {error}")
        self._offers = tuple(
            Offer(
                gpu.uuid,
                gpu.sm_clocks_mhz,
                gpu.clock_refusal
                if allowed is None or gpu.uuid in allowed
                else f"{gpu.uuid} is not among the GPUs that the administrator lets rlgov set",
            )
            for gpu in gpus
        )
        if missing := set(allowed or ()) - {gpu.uuid for gpu in gpus}:
            known = ", ".join(gpu.uuid for gpu in gpus) or "none"
            raise HardwareError(f"no GPU has the UUID {', '.join(sorted(missing))}; there are: {known}")
        bounds_mhz = {
            gpu.uuid: (gpu.sm_clocks_mhz[-1], gpu.sm_clocks_mhz[0]) for gpu in gpus if gpu.sm_clocks_mhz
        }
        self._port: ClockPort = NvmlClockPort(session, bounds_mhz) if port is None else port

    def offers(self) -> tuple[Offer, ...]:
        """The GPUs, each with the reason why its clock must not be set, if there is one."""
        return self._offers

    def probe(self) -> None:
        """Raise, with the remedy, unless clocks may be set; changes nothing."""
        for offer in self._offers:
            if not offer.refusal:
                self._port.probe(offer.uuid)

    def inspect(self, uuid: str) -> None:
        """Raise if the clock of this GPU must not be set now: MIG may be switched on at any time."""
        try:
            if any(self._session.call("nvmlDeviceGetMigMode", uuid=uuid)):
                raise HardwareError(
                    f"{uuid} is in MIG mode: its clock belongs to all its slices; "
                    f"switch MIG off (nvidia-smi -i {uuid} -mig 0) or only observe"
                )
        except NvmlError as error:
            if error.code not in _ANSWERS:
                raise

    def set_lock(self, uuid: str, sm_clock_mhz: int) -> None:
        """Hold one GPU at a clock. Raises HardwareError."""
        self._port.set_lock(uuid, sm_clock_mhz)

    def reset_lock(self, uuid: str) -> None:
        """Remove the lock of one GPU. Raises HardwareError."""
        self._port.reset_lock(uuid)

    def clock_state(self, uuid: str) -> ClockState:
        """Measure one GPU. Raises HardwareError."""
        return self._port.clock_state(uuid)
