"""Why a GPU does not run at the clock it was given: names for the driver's reasons, and which excuse it."""

from __future__ import annotations

GPU_IDLE = "gpu_idle"
APPLICATION_CLOCKS = "application_clocks"
SW_POWER_CAP = "sw_power_cap"
HW_SLOWDOWN = "hw_slowdown"
SYNC_BOOST = "sync_boost"
SW_THERMAL = "sw_thermal"
HW_THERMAL = "hw_thermal"
HW_POWER_BRAKE = "hw_power_brake"
DISPLAY_CLOCKS = "display_clocks"

# Bits of nvmlClocksEventReasons; written here so that names need no binding.
_NAMES = {
    0x001: GPU_IDLE,
    0x002: APPLICATION_CLOCKS,
    0x004: SW_POWER_CAP,
    0x008: HW_SLOWDOWN,
    0x010: SYNC_BOOST,
    0x020: SW_THERMAL,
    0x040: HW_THERMAL,
    0x080: HW_POWER_BRAKE,
    0x100: DISPLAY_CLOCKS,
}

POWER_REASONS = frozenset({SW_POWER_CAP, HW_POWER_BRAKE})
"""The GPU is slower because of its power limit."""

LIMITING_REASONS = POWER_REASONS | {HW_SLOWDOWN, SW_THERMAL, HW_THERMAL}
"""Power or heat makes the GPU slower than asked: not the fault of who set the clock."""

EXCUSING_REASONS = LIMITING_REASONS | {SYNC_BOOST}
"""Every reason that explains a clock below the one that was set."""


def reason_names(bits: int) -> frozenset[str]:
    """The names of a bit set of clock-event reasons; an unknown bit keeps its number, as ``0x200``."""
    names = {name for bit, name in _NAMES.items() if bits & bit}
    unknown = bits & ~sum(_NAMES)
    while unknown:
        lowest = unknown & -unknown
        names.add(hex(lowest))
        unknown ^= lowest
    return frozenset(names)
