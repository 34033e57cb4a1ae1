"""Clocks through a stand-in for zeusd; no real one was tried."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from rlgov.clock import VirtualClock
from rlgov.errors import HardwareError
from rlgov.hardware.backends import ClockBackend, ClockKind
from rlgov.hardware.hardware import open_hardware
from rlgov.hardware.nvml import NvmlSession
from rlgov.hardware.zeusd import ZeusdClockPort
from tests.fakes.nvml import NvmlStub
from tests.fakes.zeusd import FakeZeusd
from tests.hardware.keeper.site import Site


@pytest.fixture
def zeusd(stub: NvmlStub, socket_dir: Path) -> Iterator[FakeZeusd]:
    fake = FakeZeusd(socket_dir / "zeusd.sock", stub)
    yield fake
    fake.close()


@pytest.fixture
def port(zeusd: FakeZeusd, session: NvmlSession) -> ZeusdClockPort:
    return ZeusdClockPort(zeusd.path, session, token="")


@pytest.mark.parametrize("addresses", [True, False])
def test_a_group_is_locked_and_restored(
    zeusd: FakeZeusd, stub: NvmlStub, clock: VirtualClock, *, addresses: bool
) -> None:
    zeusd.addresses = addresses
    stub.state.unprivileged = 1  # we have no rights; zeusd has
    backend = ClockBackend(ClockKind.ZEUSD, zeusd_socket=zeusd.path)
    with open_hardware(stub.uuids[1:3], clock, backend=backend, require_clocks=True) as hardware:
        assert hardware.clocks_by == "zeusd"
        hardware.clocks.lock(1207)
        assert stub.locks_mhz() == (None, 1200, 1200, None)
        assert hardware.clocks.check().verified
        hardware.clocks.renew()
    assert stub.locks_mhz() == (None,) * 4
    assert stub.writes == ()


@pytest.mark.parametrize("addresses", [True, False])
def test_the_gpu_is_found_whatever_its_number(
    zeusd: FakeZeusd, port: ZeusdClockPort, stub: NvmlStub, *, addresses: bool
) -> None:
    zeusd.addresses = addresses
    zeusd.order = [3, 1, 0, 2]
    stub.shuffle([3, 1, 0, 2])
    port.set_lock(stub.uuids[0], 1500)
    assert stub.locks_mhz() == (1500, None, None, None)


def test_one_refusal_rolls_the_group_back(zeusd: FakeZeusd, stub: NvmlStub, clock: VirtualClock) -> None:
    backend = ClockBackend(ClockKind.ZEUSD, zeusd_socket=zeusd.path)
    with open_hardware(None, clock, backend=backend) as hardware:
        hardware.clocks.lock(1500)
        zeusd.broken[2] = "Insufficient Permissions"
        with pytest.raises(HardwareError, match="Insufficient Permissions"):
            hardware.clocks.lock(1200)
        zeusd.broken.clear()
        hardware.clocks.lock(1200)
        assert stub.locks_mhz() == (1200,) * 4


def test_probing_tells_what_is_missing_and_changes_nothing(
    zeusd: FakeZeusd, port: ZeusdClockPort, session: NvmlSession, stub: NvmlStub
) -> None:
    uuid = stub.uuids[0]
    port.probe(uuid)
    zeusd.groups = ["gpu-read"]
    with pytest.raises(HardwareError, match="without gpu-control"):
        port.probe(uuid)
    zeusd.groups = ["gpu-control"]
    zeusd.token = "secret"  # noqa: S105  # of the stand-in
    with pytest.raises(HardwareError, match="ZEUSD_TOKEN"):
        port.probe(uuid)
    with pytest.raises(HardwareError, match="status 401"):
        ZeusdClockPort(zeusd.path, session, "wrong").probe(uuid)
    right = ZeusdClockPort(zeusd.path, session, "secret")
    right.probe(uuid)
    zeusd.scopes = ["gpu-read"]
    with pytest.raises(HardwareError, match="lacks the scope"):
        right.probe(uuid)
    assert not [request for request in zeusd.requests if request.startswith("POST")]


def test_what_is_no_zeusd_is_told_so(
    zeusd: FakeZeusd, port: ZeusdClockPort, session: NvmlSession, stub: NvmlStub, tmp_path: Path
) -> None:
    with pytest.raises(HardwareError, match="does not answer"):
        ZeusdClockPort(tmp_path / "nowhere.sock", session, "").set_lock(stub.uuids[0], 1200)
    zeusd.order = []
    with pytest.raises(HardwareError, match="zeusd has no GPU"):
        port.set_lock(stub.uuids[0], 1200)
    for garbage in (b"<html>", b"[]", b"\xff"):
        zeusd.garbage = garbage
        with pytest.raises(HardwareError, match="no zeusd"):
            port.reset_lock(stub.uuids[0])
    zeusd.garbage = b'{"gpus": 3}'
    with pytest.raises(HardwareError, match="zeusd has no GPU"):
        port.reset_lock(stub.uuids[0])


def test_a_keeper_lends_out_what_zeusd_sets(zeusd: FakeZeusd, stub: NvmlStub, socket_dir: Path) -> None:
    """The promise without a privileged process of our own."""
    stub.state.unprivileged = 1
    with Site(stub, socket_dir / "run") as site:
        site.keeper("--backend", "zeusd", "--zeusd-socket", str(zeusd.path))
        client = site.client(*stub.uuids)
        assert None not in stub.locks_mhz()
        client.kill()
        assert site.wait_until(site.restored, 15.0)
