"""Fixtures that more than one area of the tests uses."""

from __future__ import annotations

import importlib.util
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import hypothesis
import pytest

if TYPE_CHECKING:
    from tests.fakes.nvml import NvmlStub

REPOSITORY = Path(__file__).resolve().parents[1]

# How long an example takes says something about the machine's load, not about us.
hypothesis.settings.register_profile("rlgov", deadline=None)
hypothesis.settings.load_profile("rlgov")

if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    # `make test &` in a script starts us with SIGINT ignored, as shells do for what runs in the background.
    # Every program a test starts would inherit that, and no Ctrl-C could be tested.
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def repository() -> Path:
    """The root of the checkout."""
    return REPOSITORY


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """The folder of shared measurements and traces next to the checkout; the test is skipped without it."""
    shared = REPOSITORY.parent / "shared"
    if not (shared / "data").is_dir():
        pytest.skip(f"needs the measurements and traces in {shared.name}/data next to the checkout")
    return shared


def _load_fake(name: str) -> ModuleType:
    known = f"rlgov_fake_{name}"
    spec = importlib.util.spec_from_file_location(known, REPOSITORY / "tests" / "fakes" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[known] = module  # where dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def fake_stack() -> ModuleType:
    """The module tests/fakes/world.py: a serving stack with its GPUs, in virtual time."""
    return _load_fake("world")


@pytest.fixture(scope="session")
def nvml_fake() -> ModuleType:
    """The module tests/fakes/nvml.py."""
    return _load_fake("nvml")


@pytest.fixture(scope="session")
def nvml_library(nvml_fake: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a stand-in for the NVIDIA driver's library; the test is skipped without a C compiler."""
    if nvml_fake.compiler() is None:
        pytest.skip("needs a C compiler (cc, gcc or clang) to build the stand-in for the NVIDIA driver")
    folder: Path = nvml_fake.build(tmp_path_factory.mktemp("nvml"))
    return folder


@pytest.fixture
def make_nvml_stub(
    nvml_fake: ModuleType, nvml_library: Path, tmp_path: Path
) -> Iterator[Callable[..., NvmlStub]]:
    """Makes stand-ins for the NVIDIA driver; see NvmlStub in tests/fakes/nvml.py for the arguments."""
    made: list[NvmlStub] = []

    def make(gpus: int = 4, library: Path = nvml_library, **more: object) -> NvmlStub:
        stub: NvmlStub = nvml_fake.NvmlStub(tmp_path / f"nvml{len(made)}", library, gpus, **more)
        made.append(stub)
        return stub

    yield make
    for stub in made:
        stub.close()


@pytest.fixture
def nvml_stub(make_nvml_stub: Callable[..., NvmlStub]) -> NvmlStub:
    """Four GPUs behind a stand-in for the NVIDIA driver; give its ``environment`` to who reads them."""
    return make_nvml_stub()
