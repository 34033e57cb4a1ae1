"""NVML through its own binding: one session, every error in words, transient ones tried again.

The binding (``pynvml``, of the distribution nvidia-ml-py) is imported when a session opens, so that machines
without it can import this module.
"""

from __future__ import annotations

import importlib
from collections import Counter
from typing import TYPE_CHECKING, Any

from rlgov.errors import HardwareError

if TYPE_CHECKING:
    from types import ModuleType, TracebackType
    from typing import Self

    from rlgov.clock import Clock

ATTEMPTS = 3
RETRY_PAUSE_S = 0.02
"""Between attempts: all of them together stay far below a control interval."""

PERMISSION_REMEDY = (
    "changing clocks needs root or CAP_SYS_ADMIN: run as root, give the container that capability, or only "
    "observe (nothing is lost but the savings)"
)

_TRANSIENT = frozenset({"TIMEOUT", "UNKNOWN", "IN_USE", "NOT_READY", "IRQ_ISSUE", "INSUFFICIENT_RESOURCES"})
_REMEDIES = {
    "UNINITIALIZED": "the driver went away under the session; see whether it was reloaded (dmesg)",
    "INVALID_ARGUMENT": "this GPU or driver does not take that value; see `rlgov doctor`",
    "NOT_SUPPORTED": "this GPU does not have it; see `rlgov doctor`",
    "NO_PERMISSION": PERMISSION_REMEDY,
    "NOT_FOUND": "no GPU has that UUID; `nvidia-smi -L` lists them",
    "GPU_NOT_FOUND": "no GPU has that UUID; `nvidia-smi -L` lists them",
    "INSUFFICIENT_POWER": "connect the GPU's power cables",
    "DRIVER_NOT_LOADED": "load the NVIDIA driver; `nvidia-smi` must work first",
    "TIMEOUT": "the driver is busy or the GPU hangs; see dmesg for Xid lines",
    "IRQ_ISSUE": "the kernel has a problem with the GPU's interrupts; see dmesg",
    "LIBRARY_NOT_FOUND": "there is no libnvidia-ml.so.1: install the NVIDIA driver, or give the container "
    "its utilities (NVIDIA_DRIVER_CAPABILITIES=utility,compute)",
    "FUNCTION_NOT_FOUND": "the driver is too old for it; update the NVIDIA driver",
    "CORRUPTED_INFOROM": "the GPU's infoROM is damaged; have the GPU serviced",
    "GPU_IS_LOST": "the GPU fell off the bus; take its work away and reboot the node",
    "RESET_REQUIRED": "the GPU needs a reset: take its work away, then reset it or reboot the node",
    "OPERATING_SYSTEM": "the system denies access; check /dev/nvidia* and the device rules of the cgroup",
    "LIB_RM_VERSION_MISMATCH": "the driver was updated without a reload; reload it or reboot",
    "IN_USE": "another process holds the GPU in this respect; end it or try later",
    "MEMORY": "the machine is out of memory",
    "NO_DATA": "the driver has not measured it yet; try again",
    "INSUFFICIENT_RESOURCES": "the driver is out of resources; try again later",
    "FREQ_NOT_SUPPORTED": "the GPU does not have that clock; `nvidia-smi -q -d SUPPORTED_CLOCKS` lists them",
    "ARGUMENT_VERSION_MISMATCH": "binding and driver do not fit; update nvidia-ml-py and the driver",
    "DEPRECATED": "the driver has dropped it; update rlgov",
    "NOT_READY": "the driver is still starting; try again",
    "INVALID_STATE": "the GPU is in a state that does not allow it; see dmesg",
}
_OTHERWISE = "see dmesg for Xid lines, and whether `nvidia-smi` works"


class NvmlError(HardwareError):
    """NVML refused.

    Args:
        function: The NVML function.
        code: Name of the answer without its prefix, such as ``NO_PERMISSION``; ``CODE_n`` for one that the
            binding does not know.
        uuid: The GPU, if it was about one.
    """

    def __init__(self, function: str, code: str, uuid: str | None = None) -> None:
        about = "" if uuid is None else f" of {uuid}"
        super().__init__(f"{function}{about}: NVML says {code}; {_REMEDIES.get(code, _OTHERWISE)}")
        self.function = function
        self.code = code
        self.uuid = uuid


class NvmlSession:
    """NVML, initialised. GPUs are named by UUID: an index may mean another GPU once the driver is reloaded.

    Args:
        clock: For the pause between attempts.

    Raises:
        HardwareError: The binding is not installed, or NVML cannot be initialised.
    """

    SM_CLOCK = 1  # nvmlClockType

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._binding = _load_binding()
        self._handles: dict[str, Any] = {}
        self._open = False
        self.generation = 0
        """Grows when NVML had to be initialised anew: what was made before, such as event sets, is void."""
        self.failures: Counter[str] = Counter()
        """Answers other than success, by name; those that a further attempt cured included."""
        self._names = {
            getattr(self._binding, name): name.removeprefix("NVML_ERROR_")
            for name in dir(self._binding)
            if name.startswith("NVML_ERROR_")
        }
        self.call("nvmlInit")
        self._open = True

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the session; a second call does nothing, and an answer other than success is only counted."""
        if not self._open:
            return
        self._open = False
        self._handles.clear()
        try:
            self._once("nvmlShutdown", (), None)
        except NvmlError as error:
            self.failures[error.code] += 1

    def call(self, function: str, *arguments: Any, uuid: str | None = None, attempts: int = ATTEMPTS) -> Any:  # noqa: ANN401  # whatever NVML answers
        """Call an NVML function; answers that may pass are tried again, a driver that was reloaded is joined.

        Args:
            function: Its name in the binding.
            arguments: What follows the GPU's handle.
            uuid: The GPU it is about, if any.
            attempts: At most so many.

        Raises:
            NvmlError: The last answer was not success.
        """
        for left in range(attempts - 1, -1, -1):
            try:
                return self._once(function, arguments, uuid)
            except NvmlError as error:
                self.failures[error.code] += 1
                again = error.code in _TRANSIENT or (error.code == "UNINITIALIZED" and self._join())
                if not (again and left):
                    raise
            self._clock.sleep_s(RETRY_PAUSE_S)
        raise HardwareError(f"{function}: attempts must be 1 or more, got {attempts}")

    def optional(self, function: str, *arguments: Any, uuid: str | None = None) -> Any:  # noqa: ANN401  # as call
        """As :meth:`call`, but None where GPU, driver or rights do not give it."""
        try:
            return self.call(function, *arguments, uuid=uuid)
        except NvmlError as error:
            if error.code in {
                "NOT_SUPPORTED",
                "FUNCTION_NOT_FOUND",
                "NO_PERMISSION",
                "NO_DATA",
                "DEPRECATED",
            }:
                return None
            raise

    def uuid_of(self, handle: Any) -> str | None:  # noqa: ANN401  # an opaque pointer
        """The GPU a handle belongs to, also when the GPU no longer answers; None if it is not one of ours."""
        ctypes = importlib.import_module("ctypes")

        def address(pointer: Any) -> int | None:  # noqa: ANN401  # as handle
            value: int | None = ctypes.cast(pointer, ctypes.c_void_p).value
            return value

        return next(
            (uuid for uuid, known in self._handles.items() if address(known) == address(handle)), None
        )

    def _join(self) -> bool:
        """Initialise again after the driver was loaded anew."""
        self._handles.clear()
        try:
            self._once("nvmlInit", (), None)
        except NvmlError as error:
            self.failures[error.code] += 1
            return False
        self.generation += 1
        return True

    def _once(self, function: str, arguments: tuple[Any, ...], uuid: str | None) -> Any:  # noqa: ANN401  # as call
        try:
            if uuid is None:
                return getattr(self._binding, function)(*arguments)
            if uuid not in self._handles:
                self._handles[uuid] = self._binding.nvmlDeviceGetHandleByUUID(uuid)
            return getattr(self._binding, function)(self._handles[uuid], *arguments)
        except self._binding.NVMLError as error:
            raise NvmlError(function, self._names.get(error.value, f"CODE_{error.value}"), uuid) from error
        except self._binding.NVMLLibraryMismatchError as error:
            raise NvmlError(function, "FUNCTION_NOT_FOUND", uuid) from error


def _load_binding() -> ModuleType:
    try:
        return importlib.import_module("pynvml")
    except ModuleNotFoundError as error:
        raise HardwareError(
            "the binding to the NVIDIA driver (nvidia-ml-py) is not installed; pip install 'rlgov[live]'"
        ) from error
