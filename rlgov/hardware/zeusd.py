"""Clocks through zeusd, the Zeus project's privileged daemon, over its Unix socket.

zeusd has no leases: what it locked stays locked when its client is killed. With ``rlgov-keeper --backend
zeusd`` the keeper lends the clocks out and zeusd sets them; that keeps rlgov's promise without a privileged
process of its own. Without a keeper, :class:`ZeusdClocks` restores at the exit of its own process only.

zeusd names GPUs by number. The number belongs to a UUID by the PCI address that zeusd tells, or, where an
older zeusd tells none, by NVML's own order; it is looked up anew for every change.
"""

from __future__ import annotations

import http.client
import json
import os
import socket
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import urlencode

from rlgov.errors import HardwareError
from rlgov.hardware.clocks import GroupClocks
from rlgov.hardware.driver import NvmlClockPort

if TYPE_CHECKING:
    from pathlib import Path
    from types import TracebackType
    from typing import Self

    from rlgov.clock import Clock
    from rlgov.hardware.claims import Claims
    from rlgov.hardware.clocks import ClockState
    from rlgov.hardware.nvml import NvmlSession

TOKEN_VARIABLE: Final = "ZEUSD_TOKEN"  # noqa: S105  # a name
_TIMEOUT_S: Final = 2.0
_OK: Final = 200
_LARGEST_BYTES: Final = 1_048_576
_CONTROL: Final = "gpu-control"


class ZeusdClockPort:
    """One GPU at a time through zeusd. Implements :class:`rlgov.hardware.clocks.ClockPort`.

    Args:
        path: zeusd's socket.
        session: NVML, to measure and to tell GPUs apart; needs no privilege.
        token: A token of zeusd's with the scope gpu-control, where it asks for one; ``ZEUSD_TOKEN`` if not
            given.
    """

    def __init__(self, path: Path, session: NvmlSession, token: str | None = None) -> None:
        self._path = path
        self._session = session
        self._measuring = NvmlClockPort(session, {})
        token = os.environ.get(TOKEN_VARIABLE, "") if token is None else token
        self._headers = {"Authorization": f"Bearer {token}"} if token else {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Nothing to let go of: every call has a connection of its own."""

    def probe(self, uuid: str) -> None:
        """Raise HardwareError, with the remedy, unless zeusd would set this GPU's clock for us."""
        discovered = self._discover()
        if _CONTROL not in _texts(discovered.get("enabled_api_groups")):
            raise HardwareError(f"{self._path}: zeusd runs without {_CONTROL}; start it with that API group")
        if discovered.get("auth_required") is True:
            if not self._headers:
                raise HardwareError(f"{self._path}: zeusd asks for a token; put one into {TOKEN_VARIABLE}")
            scopes = _texts(self._call("GET", "/auth/whoami").get("scopes"))
            if _CONTROL not in scopes:
                raise HardwareError(
                    f"{self._path}: the token in {TOKEN_VARIABLE} lacks the scope {_CONTROL}; issue one"
                )
        self._number(uuid, discovered)

    def set_lock(self, uuid: str, sm_clock_mhz: int) -> None:
        """Hold one GPU at a clock. Raises HardwareError."""
        number = self._number(uuid, self._discover())
        bounds = {"min_clock_mhz": sm_clock_mhz, "max_clock_mhz": sm_clock_mhz}
        self._change("set_gpu_locked_clocks", number, bounds)

    def reset_lock(self, uuid: str) -> None:
        """Remove the lock of one GPU. Raises HardwareError."""
        self._change("reset_gpu_locked_clocks", self._number(uuid, self._discover()), {})

    def clock_state(self, uuid: str) -> ClockState:
        """Measure one GPU, through NVML. Raises HardwareError."""
        return self._measuring.clock_state(uuid)

    def _discover(self) -> dict[str, Any]:
        return self._call("GET", "/discover")

    def _number(self, uuid: str, discovered: dict[str, Any]) -> int:
        """What zeusd calls a GPU."""
        listed = discovered.get("gpus")
        gpus = [gpu for gpu in listed if isinstance(gpu, dict)] if isinstance(listed, list) else []
        told = [gpu for gpu in gpus if isinstance(gpu.get("pci_address"), str)]
        if told:
            address = self._session.call("nvmlDeviceGetPciInfo", uuid=uuid).busId
            ours = _pci(address.decode() if isinstance(address, bytes) else str(address))
            found = [gpu.get("id") for gpu in told if _pci(gpu["pci_address"]) == ours]
        else:
            index = int(self._session.call("nvmlDeviceGetIndex", uuid=uuid))
            found = [gpu.get("id") for gpu in gpus if gpu.get("id") == index]
        if len(found) != 1 or type(found[0]) is not int:
            raise HardwareError(f"{self._path}: zeusd has no GPU {uuid}; does it run on this machine?")
        number: int = found[0]
        return number

    def _change(self, what: str, number: int, values: dict[str, int]) -> None:
        query = urlencode({"gpu_ids": number, **values, "block": "true"})
        self._call("POST", f"/gpu/{what}?{query}")

    def _call(self, method: str, target: str) -> dict[str, Any]:
        connection = _UnixConnection(self._path)
        try:
            connection.request(method, target, headers=self._headers)
            response = connection.getresponse()
            text = response.read(_LARGEST_BYTES)
        except (OSError, http.client.HTTPException) as error:
            raise HardwareError(
                f"{self._path}: zeusd does not answer ({error}); see whether it runs, and "
                "whether this user may use its socket"
            ) from error
        finally:
            connection.close()
        if response.status != _OK:
            said = text[:500].decode(errors="replace").strip()
            what = target.partition("?")[0]
            raise HardwareError(f"{self._path}: zeusd refused {what} (status {response.status}): {said}")
        try:
            content = json.loads(text) if text.strip() else {}
        except ValueError:
            content = None
        if not isinstance(content, dict):
            raise HardwareError(f"{self._path}: this is no zeusd, or one of another version: it sent no JSON")
        return content


class ZeusdClocks(GroupClocks):
    """The GPUs of one group, all of them or none, through zeusd and without a lease.

    Args:
        path: zeusd's socket.
        session: NVML, to measure.
        uuids: The GPUs of the group.
        supported_mhz: SM clocks that all of them have.
        clock: For the time that settling takes.
        restore_clock_mhz: Clock an operator holds the GPUs at; None if they were not locked.
        claims: Keep other processes off these GPUs.

    Raises:
        HardwareError: As GroupClocks.
    """

    def __init__(
        self,
        path: Path,
        session: NvmlSession,
        uuids: tuple[str, ...],
        supported_mhz: tuple[int, ...],
        clock: Clock,
        *,
        restore_clock_mhz: int | None = None,
        claims: Claims | None = None,
    ) -> None:
        port = ZeusdClockPort(path, session)
        super().__init__(
            port, uuids, supported_mhz, clock, restore_clock_mhz=restore_clock_mhz, claims=claims
        )


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: Path) -> None:
        super().__init__("localhost", timeout=_TIMEOUT_S)
        self._path = path

    def connect(self) -> None:
        """Connect to the socket in place of a host."""
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        self.sock.settimeout(_TIMEOUT_S)
        self.sock.connect(str(self._path))


def _texts(value: object) -> frozenset[str]:
    return (
        frozenset(item for item in value if isinstance(item, str)) if isinstance(value, list) else frozenset()
    )


def _pci(address: str) -> tuple[int, ...] | str:
    """A PCI address in a form that compares: domains are written with four digits or with eight."""
    try:
        return tuple(int(part, 16) for part in address.replace(".", ":").split(":"))
    except ValueError:
        return address
