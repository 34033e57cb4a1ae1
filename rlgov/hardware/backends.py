"""Who sets the clocks: this process itself, a keeper, zeusd, or nobody."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING

from rlgov.hardware.claims import DEFAULT_FOLDER, GpuClaims, claims_folder
from rlgov.hardware.clocks import GroupClocks
from rlgov.hardware.driver import NvmlClockPort
from rlgov.hardware.gpus import common_clocks_mhz
from rlgov.hardware.null import NullClocks

if TYPE_CHECKING:
    from rlgov.clock import Clock
    from rlgov.hardware.clocks import ClockControl
    from rlgov.hardware.gpus import Gpu
    from rlgov.hardware.nvml import NvmlSession

SHORTEST_LEASE_S = 3.0
LEASE_INTERVALS = 3


class ClockKind(StrEnum):
    """Who sets the clocks."""

    DIRECT = "direct"  # this process: restores at its exit, not when it is killed
    KEEPER = "keeper"  # a keeper, under a lease: restores whatever happens to this process
    ZEUSD = "zeusd"  # zeusd: as direct, without privileges of our own
    NONE = "none"  # nobody


@dataclass(frozen=True, slots=True)
class ClockBackend:
    """Who sets the clocks, and where to find it."""

    kind: ClockKind = ClockKind.DIRECT
    keeper_socket: Path = DEFAULT_FOLDER / "keeper.sock"
    zeusd_socket: Path = Path("/var/run/zeusd.sock")
    ttl_s: float = SHORTEST_LEASE_S
    """Of a lease; see :func:`lease_s`."""


def lease_s(interval_s: float) -> float:
    """The time a lease should live for a control interval."""
    return max(SHORTEST_LEASE_S, LEASE_INTERVALS * interval_s)


def open_clocks(
    backend: ClockBackend,
    session: NvmlSession,
    gpus: tuple[Gpu, ...],
    clock: Clock,
    restore_clock_mhz: int | None,
) -> ClockControl:
    """The clocks of a group that may be set.

    Args:
        backend: Who sets them.
        session: NVML.
        gpus: The group.
        clock: For pauses.
        restore_clock_mhz: What to restore in place of "no lock"; with a keeper, its administrator says that.

    Raises:
        HardwareError: The keeper is not there, or does not lease these GPUs.
    """
    uuids = tuple(gpu.uuid for gpu in gpus)
    supported_mhz = common_clocks_mhz(gpus)
    claims = GpuClaims(claims_folder(), "rlgov")
    match backend.kind:
        case ClockKind.KEEPER:
            from rlgov.hardware.keeper.client import KeeperClocks  # noqa: PLC0415  # only where it is used

            return KeeperClocks(backend.keeper_socket, uuids, clock, ttl_s=backend.ttl_s)
        case ClockKind.ZEUSD:
            from rlgov.hardware.zeusd import ZeusdClocks  # noqa: PLC0415  # only where it is used

            return ZeusdClocks(
                backend.zeusd_socket,
                session,
                uuids,
                supported_mhz,
                clock,
                restore_clock_mhz=restore_clock_mhz,
                claims=claims,
            )
        case ClockKind.NONE:
            return NullClocks()
        case ClockKind.DIRECT:
            bounds_mhz = {gpu.uuid: (gpu.sm_clocks_mhz[-1], gpu.sm_clocks_mhz[0]) for gpu in gpus}
            port = NvmlClockPort(session, bounds_mhz)
            return GroupClocks(
                port, uuids, supported_mhz, clock, restore_clock_mhz=restore_clock_mhz, claims=claims
            )
