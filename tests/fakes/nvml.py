"""A stand-in for the NVIDIA driver's libnvidia-ml.so.1, built from nvml_stub.c, with its state in a file.

The real binding loads it through ``LD_LIBRARY_PATH``. Tests see every lock that was set, and plan faults:
an error code of a function at its n-th call, on one GPU or all; locks that are accepted and ignored; a power
limit; a lost GPU; Xid events; a driver that was reloaded. Its power model is INVENTED (see the C file): it
proves the way of the data and nothing else.

Use the fixture ``nvml_stub`` of tests/conftest.py.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import shutil
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

LIBRARY = "libnvidia-ml.so.1"
STATE_VARIABLE = "RLGOV_NVML_STUB"
CLAIMS_VARIABLE = "RLGOV_CLAIMS_DIR"
SOURCE = Path(__file__).with_name("nvml_stub.c")

CODES = {
    "INVALID_ARGUMENT": 2, "NOT_SUPPORTED": 3, "NO_PERMISSION": 4, "NOT_FOUND": 6, "INSUFFICIENT_SIZE": 7,
    "INSUFFICIENT_POWER": 8, "DRIVER_NOT_LOADED": 9, "TIMEOUT": 10, "IRQ_ISSUE": 11,
    "FUNCTION_NOT_FOUND": 13, "CORRUPTED_INFOROM": 14, "GPU_IS_LOST": 15, "RESET_REQUIRED": 16,
    "OPERATING_SYSTEM": 17, "LIB_RM_VERSION_MISMATCH": 18, "IN_USE": 19, "MEMORY": 20, "NO_DATA": 21,
    "INSUFFICIENT_RESOURCES": 23, "FREQ_NOT_SUPPORTED": 24, "ARGUMENT_VERSION_MISMATCH": 25,
    "DEPRECATED": 26, "NOT_READY": 27, "GPU_NOT_FOUND": 28, "INVALID_STATE": 29, "UNKNOWN": 999,
    "CODE_777": 777,  # one that the binding does not know
}  # fmt: skip

_MAX_GPUS = 8


class Gpu(ctypes.Structure):
    """One GPU; every field may be read and written at any time."""

    _fields_ = (
        ("uuid_bytes", ctypes.c_char * 64),
        ("name_bytes", ctypes.c_char * 64),
        ("memory_bytes", ctypes.c_uint64),
        ("reasons", ctypes.c_uint64),
        ("energy_mj", ctypes.c_double),
        ("energy_at_s", ctypes.c_double),
        ("load", ctypes.c_double),
        ("tdp_mw", ctypes.c_uint32),
        ("memory_clock_mhz", ctypes.c_uint32),
        ("clock_count", ctypes.c_uint32),
        ("clocks_mhz", ctypes.c_uint32 * 64),
        ("locked_low_mhz", ctypes.c_uint32),
        ("locked_high_mhz", ctypes.c_uint32),
        ("ignores_locks", ctypes.c_uint32),
        ("capped_mhz", ctypes.c_uint32),
        ("mig", ctypes.c_uint32),
        ("virtualization", ctypes.c_uint32),
        ("persistence", ctypes.c_uint32),
        ("compute_mode", ctypes.c_uint32),
        ("architecture", ctypes.c_uint32),
        ("lost", ctypes.c_uint32),
        ("no_field_values", ctypes.c_uint32),
    )


class _Fault(ctypes.Structure):
    _fields_ = (
        ("function", ctypes.c_char * 64),
        ("gpu", ctypes.c_int32),
        ("skip", ctypes.c_int32),
        ("count", ctypes.c_int32),
        ("code", ctypes.c_int32),
    )


class _Event(ctypes.Structure):
    _fields_ = (("gpu", ctypes.c_int32), ("xid", ctypes.c_uint32))


class _Write(ctypes.Structure):
    _fields_ = (
        ("gpu", ctypes.c_int32),
        ("low_mhz", ctypes.c_uint32),
        ("high_mhz", ctypes.c_uint32),
        ("reset", ctypes.c_uint32),
    )


class _State(ctypes.Structure):
    _fields_ = (
        ("size", ctypes.c_uint32),
        ("gpu_count", ctypes.c_uint32),
        ("order", ctypes.c_uint32 * _MAX_GPUS),
        ("sessions", ctypes.c_uint32),
        ("forgotten", ctypes.c_uint32),
        ("unprivileged", ctypes.c_uint32),
        ("fault_count", ctypes.c_uint32),
        ("event_count", ctypes.c_uint32),
        ("write_count", ctypes.c_uint32),
        ("open_event_sets", ctypes.c_uint32),
        ("spare", ctypes.c_uint32),
        ("now_s", ctypes.c_double),
        ("energy_step_s", ctypes.c_double),
        ("faults", _Fault * 32),
        ("events", _Event * 16),
        ("writes", _Write * 1024),
        ("gpus", Gpu * _MAX_GPUS),
    )


def compiler() -> str | None:
    """A C compiler of this machine, or None."""
    return next((found for name in ("cc", "gcc", "clang") if (found := shutil.which(name))), None)


def build(folder: Path, without: Sequence[str] = ()) -> Path:
    """Build the library into a folder.

    Args:
        folder: Where to; made if it is not there.
        without: Functions that shall be absent, as in an older driver.

    Returns:
        The folder, for ``LD_LIBRARY_PATH``.
    """
    command = compiler()
    if command is None:
        raise FileNotFoundError("no C compiler (cc, gcc or clang)")
    folder.mkdir(parents=True, exist_ok=True)
    hidden = []
    if without:
        script = folder / "hidden.map"
        script.write_text("{ local: " + " ".join(f"{name};" for name in without) + " };", encoding="utf-8")
        hidden = [f"-Wl,--version-script={script}"]
    library = folder / LIBRARY
    flags = ["-shared", "-fPIC", "-O1", "-Wall", "-Wextra", "-Werror", f"-Wl,-soname,{LIBRARY}", *hidden]
    subprocess.run([command, *flags, "-o", str(library), str(SOURCE), "-lm"], check=True)
    return folder


class NvmlStub:
    """The state of one stand-in driver; close it.

    Args:
        path: State file; made anew.
        library: Folder of the library, from :func:`build`.
        gpus: How many GPUs.
        clocks_mhz: Supported SM clocks of each.
    """

    def __init__(
        self,
        path: Path,
        library: Path,
        gpus: int = 4,
        clocks_mhz: Sequence[int] = tuple(range(1980, 1035, -15)),
    ) -> None:
        path.write_bytes(bytes(ctypes.sizeof(_State)))
        self.path = path
        self.library = library
        with path.open("r+b") as file:
            self._mapped = mmap.mmap(file.fileno(), 0)
        self.state = _State.from_buffer(self._mapped)
        self.state.size = ctypes.sizeof(_State)
        self.state.gpu_count = gpus
        self.state.energy_step_s = 0.1
        for number in range(gpus):
            self.state.order[number] = number
            gpu = self.state.gpus[number]
            gpu.uuid_bytes = f"GPU-00000000-0000-4000-8000-{(number * 37 + 11) % 256:012x}".encode()
            gpu.name_bytes = b"NVIDIA Stub 80GB"
            gpu.memory_bytes = 80 * 2**30
            gpu.tdp_mw = 700_000
            gpu.memory_clock_mhz = 2619
            gpu.energy_mj = 1e6 * (number + 1)
            gpu.load = 0.5
            gpu.persistence = 1
            gpu.architecture = 9
            gpu.clock_count = len(clocks_mhz)
            gpu.clocks_mhz[: len(clocks_mhz)] = list(clocks_mhz)

    def close(self) -> None:
        """Let go of the file."""
        self.state.forgotten = 1  # a session left open in this process must not keep the file
        del self.state
        with contextlib.suppress(BufferError):  # a test still holds a GPU of it
            self._mapped.close()

    @property
    def environment(self) -> dict[str, str]:
        """What a process needs to find this driver; add it to that of the process."""
        return {
            "LD_LIBRARY_PATH": str(self.library),
            STATE_VARIABLE: str(self.path),
            # Every stand-in has GPUs of the same names, so each needs its own folder of who holds them.
            CLAIMS_VARIABLE: f"{self.path}-claims",
        }

    @property
    def uuids(self) -> tuple[str, ...]:
        """The GPUs, by number."""
        return tuple(self.gpu(number).uuid_bytes.decode() for number in range(self.state.gpu_count))

    def locks_mhz(self) -> tuple[int | None, ...]:
        """The clock each GPU is locked at; None: not locked."""
        return tuple(self.gpu(number).locked_high_mhz or None for number in range(self.state.gpu_count))

    @property
    def writes(self) -> tuple[tuple[int, int | None], ...]:
        """Every lock and reset that was carried out: number of the GPU, and the clock (None: reset)."""
        if self.state.write_count > len(self.state.writes):
            raise RuntimeError("more writes than the stub remembers")
        return tuple(
            (write.gpu, None if write.reset else write.high_mhz)
            for write in self.state.writes[: self.state.write_count]
        )

    def gpu(self, number: int) -> Gpu:
        """One GPU; set its fields to change what the driver tells."""
        gpu: Gpu = self.state.gpus[number]
        return gpu

    def fail(
        self, code: int | str, function: str = "", *, gpu: int = -1, after: int = 0, times: int = -1
    ) -> None:
        """Plan a fault.

        Args:
            code: Answer, by number or name.
            function: NVML function as the library exports it; any if empty.
            gpu: Number of the GPU; any if -1.
            after: So many calls go well first.
            times: Then so many fail; all if -1.
        """
        fault = self.state.faults[self.state.fault_count]
        fault.function, fault.gpu, fault.skip, fault.count = function.encode(), gpu, after, times
        fault.code = CODES[code] if isinstance(code, str) else code
        self.state.fault_count += 1

    def heal(self) -> None:
        """No more planned faults."""
        self.state.fault_count = 0

    def xid(self, gpu: int, xid: int) -> None:
        """Let a GPU report an Xid event."""
        event = self.state.events[self.state.event_count]
        event.gpu, event.xid = gpu, xid
        self.state.event_count += 1

    def shuffle(self, order: Sequence[int]) -> None:
        """Give the GPUs other indices: ``order[index]`` is a GPU's number."""
        self.state.order[: len(order)] = list(order)

    def reload_driver(self) -> None:
        """What a driver's reload does: sessions end, energy counts from zero, locks are gone."""
        self.state.forgotten = 1
        for number in range(self.state.gpu_count):
            gpu = self.gpu(number)
            gpu.energy_mj = gpu.locked_low_mhz = gpu.locked_high_mhz = 0
