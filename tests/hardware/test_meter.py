"""Energy by counter differences, and everything else a reading holds."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlgov.clock import VirtualClock
from rlgov.errors import HardwareError
from rlgov.hardware.hardware import open_hardware
from rlgov.hardware.meter import GpuReading, MeterReading, NvmlMeter, energy_between
from rlgov.hardware.null import NullMeter
from rlgov.hardware.nvml import NvmlError, NvmlSession
from tests.fakes.nvml import CODES, NvmlStub

READS = {
    "nvmlDeviceGetTotalEnergyConsumption": "energy_j",
    "nvmlDeviceGetClockInfo": "sm_clock_mhz",
}


@pytest.fixture
def meter(session: NvmlSession, stub: NvmlStub, clock: VirtualClock) -> NvmlMeter:
    return NvmlMeter(session, stub.uuids, clock)


def _advance(stub: NvmlStub, clock: VirtualClock, by_s: float) -> None:
    clock.advance_s(by_s)
    stub.state.now_s = clock.monotonic_s()


def test_energy_is_power_times_time_of_all_gpus(
    meter: NvmlMeter, stub: NvmlStub, clock: VirtualClock
) -> None:
    _advance(stub, clock, 0.0)
    before = meter.read()
    assert before.at_s == 100.0
    _advance(stub, clock, 2.0)
    after = meter.read()
    power_w = sum(gpu.power_w or 0.0 for gpu in after.gpus)
    assert energy_between(before, after) == pytest.approx(2.0 * power_w, rel=1e-3)
    assert after.gpus[0].sm_clock_mhz == 1980
    assert after.gpus[0].energy_j != after.gpus[1].energy_j


def test_a_lower_clock_uses_less(stub: NvmlStub, clock: VirtualClock) -> None:
    used_j = []
    stub.state.now_s = clock.monotonic_s()
    with open_hardware(None, clock) as hardware:
        for mhz in (1980, 1200):
            hardware.clocks.lock(mhz)
            _advance(stub, clock, 0.0)
            before = hardware.meter.read()
            _advance(stub, clock, 1.0)
            used_j.append(energy_between(before, hardware.meter.read()))
    assert used_j[0] is not None
    assert used_j[1] is not None
    assert used_j[1] < used_j[0]


def test_a_counter_that_starts_anew_is_no_energy(meter: NvmlMeter, stub: NvmlStub) -> None:
    before = meter.read()
    stub.gpu(2).energy_mj = 5.0
    after = meter.read()
    assert [gpu.reset for gpu in after.gpus] == [False, False, True, False]
    assert energy_between(before, after) is None
    assert energy_between(after, meter.read()) is not None


def test_a_reset_during_an_outage_is_noticed(meter: NvmlMeter, stub: NvmlStub) -> None:
    meter.read()
    stub.gpu(1).lost = 1
    missing = meter.read()
    assert missing.gpus[1].energy_j is None
    stub.gpu(1).lost, stub.gpu(1).energy_mj = 0, 5.0
    assert meter.read().gpus[1].reset


@pytest.mark.parametrize("function", READS)
@pytest.mark.parametrize("code", sorted(CODES))
def test_whatever_the_driver_answers_is_missing_with_a_reason(
    stub: NvmlStub, clock: VirtualClock, code: str, function: str
) -> None:
    with NvmlSession(clock) as session:
        meter = NvmlMeter(session, stub.uuids, clock)
        whole = meter.read()
        stub.fail(code, function, gpu=2)
        reading = meter.read()
        broken = reading.gpus[2]
        assert getattr(broken, READS[function]) is None
        assert code in broken.note
        assert function in broken.note
        assert broken.power_w is not None
        assert all(gpu.energy_j is not None and not gpu.note for gpu in reading.gpus if gpu is not broken)
        assert (energy_between(whole, reading) is None) == (READS[function] == "energy_j")
    stub.heal()


def test_power_falls_back_to_the_averaged_reading(meter: NvmlMeter, stub: NvmlStub) -> None:
    stub.gpu(0).no_field_values = 1
    stub.fail("NOT_SUPPORTED", "nvmlDeviceGetFieldValues", gpu=1)
    for _ in range(2):
        assert all(gpu.power_w is not None and not gpu.note for gpu in meter.read().gpus)
    stub.fail("NOT_SUPPORTED", "nvmlDeviceGetPowerUsage", gpu=1)
    assert meter.read().gpus[1].power_w is None


def test_what_a_gpu_does_not_have_is_not_asked_for_ever(meter: NvmlMeter, stub: NvmlStub) -> None:
    stub.fail("NOT_SUPPORTED", "nvmlDeviceGetTotalEnergyConsumption", gpu=0, times=1)
    assert "NOT_SUPPORTED" in meter.read().gpus[0].note
    assert meter.read().gpus[0].energy_j is None  # the stub would answer by now


def test_throttle_reasons_are_named(meter: NvmlMeter, stub: NvmlStub) -> None:
    stub.gpu(0).capped_mhz = 1500
    stub.gpu(1).reasons = 0x20 | 0x400
    stub.gpu(2).load = 0.0
    readings = meter.read().gpus
    assert readings[0].throttle_reasons == {"sw_power_cap"}
    assert readings[0].sm_clock_mhz == 1500
    assert readings[1].throttle_reasons == {"sw_thermal", "0x400"}
    assert readings[2].throttle_reasons == {"gpu_idle"}
    assert readings[3].throttle_reasons == frozenset()


def test_the_driver_may_be_reloaded_under_a_session(meter: NvmlMeter, stub: NvmlStub) -> None:
    before = meter.read()
    stub.reload_driver()
    stub.shuffle([2, 3, 0, 1])
    after = meter.read()
    assert [gpu.uuid for gpu in after.gpus] == list(stub.uuids)
    assert all(gpu.reset for gpu in after.gpus)
    assert energy_between(before, after) is None


def test_a_driver_that_does_not_come_back_is_an_error_in_words(session: NvmlSession, stub: NvmlStub) -> None:
    stub.fail("DRIVER_NOT_LOADED", "nvmlInitWithFlags")
    stub.reload_driver()
    with pytest.raises(NvmlError, match="UNINITIALIZED"):
        session.call("nvmlDeviceGetCount")
    assert session.failures["DRIVER_NOT_LOADED"] >= 1


@pytest.mark.parametrize("code", sorted(CODES))
def test_every_code_is_explained(stub: NvmlStub, session: NvmlSession, code: str) -> None:
    stub.fail(code, "nvmlDeviceGetName", gpu=1)
    with pytest.raises(HardwareError, match=code) as caught:
        session.call("nvmlDeviceGetName", uuid=stub.uuids[1])
    told = str(caught.value)
    assert stub.uuids[1] in told
    assert len(told.split("; ")[1]) > 10
    assert session.call("nvmlDeviceGetName", uuid=stub.uuids[0])
    if code in {"TIMEOUT", "UNKNOWN", "IN_USE"}:
        assert session.failures[code] == 3


def test_sessions_close_once_and_do_not_mind_a_driver_that_is_gone(
    stub: NvmlStub, clock: VirtualClock
) -> None:
    session = NvmlSession(clock)
    stub.fail("GPU_IS_LOST", "nvmlShutdown", times=1)
    session.close()
    session.close()
    assert session.failures == {"GPU_IS_LOST": 1}


def _reading(values: dict[str, float | None], resets: set[str]) -> MeterReading:
    return MeterReading(
        0.0, tuple(GpuReading(name, value, 1.0, 1, reset=name in resets) for name, value in values.items())
    )


counters = st.dictionaries(st.sampled_from("abc"), st.one_of(st.none(), st.floats(0, 1e9)), max_size=3)


@given(before=counters, after=counters, resets=st.sets(st.sampled_from("abc")))
def test_energy_is_known_of_all_gpus_or_of_none(
    before: dict[str, float | None], after: dict[str, float | None], resets: set[str]
) -> None:
    energy_j = energy_between(_reading(before, set()), _reading(after, resets))
    pairs = [(before.get(name), after.get(name)) for name in before.keys() | after.keys()]
    known = bool(pairs) and not (resets & after.keys())
    total = 0.0
    for start, end in pairs:
        known = known and start is not None and end is not None and end >= start
        total += (end or 0.0) - (start or 0.0)
    if known:
        assert energy_j == pytest.approx(total)
        assert energy_j is not None
        assert energy_j >= 0
    else:
        assert energy_j is None


def test_without_a_meter_energy_is_absent_not_zero() -> None:
    meter = NullMeter(VirtualClock())
    assert energy_between(meter.read(), meter.read()) is None
