"""Faults the driver tells of."""

from __future__ import annotations

import pytest

from rlgov.clock import VirtualClock
from rlgov.errors import HardwareError
from rlgov.hardware.events import XidEvents
from rlgov.hardware.hardware import open_hardware
from rlgov.hardware.null import NullEvents
from rlgov.hardware.nvml import NvmlSession
from tests.fakes.nvml import NvmlStub


def test_events_name_gpu_and_advice_once_each(
    session: NvmlSession, stub: NvmlStub, clock: VirtualClock
) -> None:
    events = XidEvents(session, stub.uuids, clock)
    assert events.poll() == ()
    stub.xid(2, 79)
    stub.xid(0, 31)
    stub.gpu(2).lost = 1  # it no longer even tells its UUID
    lost, fault = events.poll()
    assert (lost.uuid, lost.xid, lost.fatal) == (stub.uuids[2], 79, True)
    assert "reboot" in lost.advice
    assert (fault.uuid, fault.xid, fault.fatal) == (stub.uuids[0], 31, False)
    assert fault.at_s == clock.monotonic_s()
    assert events.poll() == ()
    events.close()
    events.close()
    assert stub.state.open_event_sets == 0


def test_only_the_groups_events_are_heard(stub: NvmlStub, clock: VirtualClock) -> None:
    with open_hardware([stub.uuids[1]], clock) as hardware:
        stub.xid(0, 48)
        stub.xid(1, 48)
        assert [event.uuid for event in hardware.events.poll()] == [stub.uuids[1]]


def test_a_lost_gpu_that_breaks_the_waiting_is_an_event(
    session: NvmlSession, stub: NvmlStub, clock: VirtualClock
) -> None:
    events = XidEvents(session, stub.uuids, clock)
    stub.fail("GPU_IS_LOST", "nvmlEventSetWait_v2", times=1)
    (event,) = events.poll()
    assert event.uuid is None
    assert event.fatal
    stub.fail("UNKNOWN", "nvmlEventSetWait_v2", times=1)
    with pytest.raises(HardwareError, match="UNKNOWN"):
        events.poll()
    events.close()


def test_events_are_heard_again_after_the_driver_was_reloaded(stub: NvmlStub, clock: VirtualClock) -> None:
    with open_hardware(None, clock) as hardware:
        stub.reload_driver()
        hardware.meter.read()  # joins the driver again
        stub.xid(1, 48)
        assert [event.uuid for event in hardware.events.poll()] == [stub.uuids[1]]


def test_gpus_without_events_do_not_stand_in_the_way(stub: NvmlStub, clock: VirtualClock) -> None:
    stub.fail("NOT_SUPPORTED", "nvmlDeviceRegisterEvents", gpu=0)
    with open_hardware(None, clock) as hardware:
        stub.xid(3, 48)
        assert len(hardware.events.poll()) == 1
    stub.fail("NOT_SUPPORTED", "nvmlDeviceRegisterEvents")
    with open_hardware(None, clock) as hardware:
        assert isinstance(hardware.events, NullEvents)
        assert "Xid" in hardware.note
        assert hardware.clocks.present
    assert stub.state.open_event_sets == 0
