"""The stand-in for the NVIDIA driver under the real binding, in the test's own process."""

from __future__ import annotations

import ctypes
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pynvml
import pytest

from rlgov.clock import VirtualClock
from rlgov.hardware.nvml import NvmlSession
from tests.fakes.nvml import LIBRARY, NvmlStub


@pytest.fixture
def clock() -> VirtualClock:
    return VirtualClock(monotonic_s=100.0)


@pytest.fixture
def stub(nvml_stub: NvmlStub, load_stub: Callable[[NvmlStub], None]) -> NvmlStub:
    """Four GPUs that this process sees."""
    load_stub(nvml_stub)
    return nvml_stub


@pytest.fixture
def load_stub(monkeypatch: pytest.MonkeyPatch) -> Callable[[NvmlStub], None]:
    """Makes this process see a stand-in. The loader finds a library by name where one of it is loaded."""

    def load(stub: NvmlStub) -> None:
        ctypes.CDLL(str(stub.library / LIBRARY))
        monkeypatch.setattr(pynvml, "nvmlLib", None)
        monkeypatch.setattr(pynvml, "_nvmlGetFunctionPointer_cache", {})
        for name, value in stub.environment.items():
            monkeypatch.setenv(name, value)

    return load


@pytest.fixture
def session(stub: NvmlStub, clock: VirtualClock) -> Iterator[NvmlSession]:
    """NVML over ``stub``."""
    assert stub.state.sessions == 0
    with NvmlSession(clock) as opened:
        yield opened


@pytest.fixture
def socket_dir() -> Iterator[Path]:
    """A folder with a short name: the path of a socket may have some hundred characters at most."""
    with tempfile.TemporaryDirectory(prefix="rlgov-") as folder:
        yield Path(folder)
