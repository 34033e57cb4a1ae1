"""The governor's side of the keeper: clocks that are leased, and lost when they are not renewed."""

from __future__ import annotations

import socket
from typing import TYPE_CHECKING, Any, Final

from rlgov.errors import HardwareError
from rlgov.hardware.clocks import ClockCheck, GpuCheck, Verdict
from rlgov.hardware.keeper.errors import ForeignWriter, KeeperGone, KeeperRefused, LeaseLost
from rlgov.hardware.keeper.protocol import (
    ProtocolError,
    Request,
    get_checked,
    get_lease,
    get_state,
    parse_answer,
    request_line,
)
from rlgov.hardware.keeper.values import Code, Refused

if TYPE_CHECKING:
    from pathlib import Path
    from types import TracebackType
    from typing import Self

    from rlgov.clock import Clock
    from rlgov.hardware.keeper.values import KeeperState, Lease

_RECEIVE_BYTES: Final = 65_536
_LONGEST_ANSWER_BYTES: Final = 1_048_576
_HOLD_OFF_S: Final = 5.0
"""After a keeper did not answer in time, it is not asked again for so long: each wait costs the loop."""


class KeeperLink:
    """One connection to a keeper, made when it is needed. Not safe to share between threads.

    Args:
        path: The keeper's socket.
        timeout_s: Longest wait for one answer.
    """

    def __init__(self, path: Path, timeout_s: float) -> None:
        self._path = path
        self._timeout_s = timeout_s
        self._socket: socket.socket | None = None
        self._received = b""
        self._number = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    @property
    def connected(self) -> bool:
        """Whether there is a connection, as far as we know."""
        return self._socket is not None

    def close(self) -> None:
        """End the connection, and with it the lease; safe to call twice."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None
        self._received = b""

    def state(self) -> KeeperState:
        """The keeper's account of itself. Raises HardwareError."""
        try:
            return get_state(self.ask("state"))
        except (KeyError, TypeError, ValueError) as error:
            raise self._nonsense(error) from error

    def ask(self, do: str, *, anew: bool = False, **fields: Any) -> dict[str, Any]:  # noqa: ANN401  # of a request
        """Ask one thing.

        Args:
            do: What.
            anew: Ask again on a new connection if the old one turns out to have ended. Only without a lease.
            fields: Those that this kind of request has.

        Raises:
            KeeperGone: The keeper cannot be reached, did not answer in time, or does not make sense.
            ForeignWriter: Somebody else set the clock.
            LeaseLost: The lease had ended.
            KeeperRefused: It said no for another reason.
        """
        self._number += 1
        request = Request(self._number, do, **fields)
        old = anew and self.connected
        try:
            answer = self._exchange(request_line(request))
        except KeeperGone as error:
            if not old or isinstance(error.__cause__, TimeoutError):
                raise
            answer = self._exchange(request_line(request))
        try:
            return parse_answer(answer, self._number)
        except Refused as no:
            raise _error(no) from no
        except ProtocolError as error:
            raise self._nonsense(error) from error

    def _exchange(self, line: bytes) -> bytes:
        try:
            connection = self._connect() if self._socket is None else self._socket
            connection.sendall(line)
            while b"\n" not in self._received:
                data = connection.recv(_RECEIVE_BYTES)
                if not data or len(self._received) > _LONGEST_ANSWER_BYTES:
                    raise ConnectionResetError("it closed the connection")
                self._received += data
        except OSError as error:
            self.close()
            late = isinstance(error, TimeoutError)
            raise KeeperGone(
                f"{self._path}: the keeper {'did not answer in time' if late else 'is not there'} ({error}); "
                "see `systemctl status rlgov-keeper`, or start rlgov-keeper"
            ) from error
        answer, _, self._received = self._received.partition(b"\n")
        return answer

    def _connect(self) -> socket.socket:
        connecting = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        connecting.settimeout(self._timeout_s)
        try:
            connecting.connect(str(self._path))
        except BaseException:
            connecting.close()
            raise
        self._socket = connecting
        return connecting

    def _nonsense(self, error: Exception) -> KeeperGone:
        self.close()
        return KeeperGone(
            f"{self._path}: the answer cannot be understood ({error}); "
            "keeper and governor must be of one version"
        )


def _error(no: Refused) -> HardwareError:
    if no.code is Code.FOREIGN_WRITER:
        return ForeignWriter(no.message, no.gpus)
    if no.code in {Code.LEASE_LOST, Code.NO_LEASE}:
        return LeaseLost(no.message)
    return KeeperRefused(no.message, no.code)


class KeeperClocks:
    """The GPUs of one group, leased from a keeper. Implements :class:`rlgov.hardware.clocks.ClockControl`.

    The lease begins with the first lock. It must be renewed within its time to live, by :meth:`renew` or by a
    change of clock; when this process ends, hangs or stops, the keeper restores the clocks. After any error
    nothing is held, and :meth:`lock` may be called again.

    Args:
        path: The keeper's socket.
        uuids: The GPUs of the group.
        clock: For pauses.
        ttl_s: Time to live: three control intervals, and no less than 3 s. The keeper may grant less.
        timeout_s: Longest wait for one answer.

    Raises:
        KeeperGone: There is no keeper.
        HardwareError: It does not lease these GPUs.
    """

    def __init__(
        self, path: Path, uuids: tuple[str, ...], clock: Clock, *, ttl_s: float = 3.0, timeout_s: float = 1.0
    ) -> None:
        self._link = KeeperLink(path, timeout_s)
        self._uuids = uuids
        self._clock = clock
        self._ttl_s = ttl_s
        self._lease: Lease | None = None
        self._ends_s = 0.0
        self._silent_until_s = float("-inf")
        try:
            told = self._link.ask("describe", gpus=uuids)
            self._supported_mhz = tuple(int(clock_mhz) for clock_mhz in told["supported_mhz"])
            self._pause_s = float(told["write_interval_s"])
        except (KeyError, TypeError, ValueError) as error:
            self._link.close()
            raise KeeperGone(f"{path}: the answer cannot be understood ({error})") from error
        except BaseException:
            self._link.close()
            raise

    @property
    def present(self) -> bool:
        """True: there is a keeper that sets clocks."""
        return True

    @property
    def supported_mhz(self) -> tuple[int, ...]:
        """SM clocks that every GPU of the group has within the administrator's bounds, descending."""
        return self._supported_mhz

    @property
    def applied_mhz(self) -> int | None:
        """The clock that was set, as far as we know; None: nothing is leased."""
        return None if self._lease is None else self._lease.sm_clock_mhz

    @property
    def lease_left_s(self) -> float | None:
        """Until the keeper restores without a further word; None: nothing is leased."""
        return None if self._lease is None else max(0.0, self._ends_s - self._clock.monotonic_s())

    def lock(self, sm_clock_mhz: int) -> None:
        """Lease the group if it is not leased, and hold all its GPUs at a clock, or none.

        Raises:
            HardwareError: As :meth:`KeeperLink.ask` says.
        """
        wish = {"gpus": self._uuids, "sm_clock_mhz": sm_clock_mhz, "ttl_s": self._ttl_s}
        began_s = self._clock.monotonic_s()
        try:
            told = self._ask("lock", **wish)
        except KeeperRefused as error:
            if error.code != Code.TOO_SOON:
                raise
            self._clock.sleep_s(self._pause_s)
            began_s = self._clock.monotonic_s()
            told = self._ask("lock", **wish)
        self._note(told, began_s)

    def renew(self) -> None:
        """Say that the lock is still wanted; without one, nothing. Raises as :meth:`lock`."""
        if self._lease is None:
            return
        began_s = self._clock.monotonic_s()
        self._note(self._ask("renew"), began_s)

    def restore(self) -> None:
        """Give the clocks back; safe to call at any time, and twice.

        Raises:
            HardwareError: The keeper is gone, or could not restore a GPU yet; it goes on trying.
        """
        if self._lease is None:
            return
        still = self._ask("release").get("open", ())
        self._lease = None
        if still:
            raise KeeperRefused(
                f"the keeper could not restore {', '.join(still)} yet; it goes on trying: "
                "see rlgov-keeper --status"
            )

    def close(self) -> None:
        """End the connection; the keeper restores what is leased."""
        self._lease = None
        self._link.close()

    def check(self) -> ClockCheck:
        """What the keeper measures now. Never raises: what cannot be asked is unverified."""
        lease = self._lease
        if lease is None:
            return ClockCheck(None, ())
        try:
            checked = get_checked(self._patiently("check"))
        except (HardwareError, KeyError, TypeError, ValueError):
            # `renew` and `lock` say what is wrong; to say it here would end a control loop.
            unknown = tuple(GpuCheck(uuid, None, frozenset(), Verdict.UNVERIFIED) for uuid in self._uuids)
            return ClockCheck(lease.sm_clock_mhz, unknown)
        return ClockCheck(checked.sm_clock_mhz, checked.gpus, checked.since_lock_s)

    def rearm(self) -> None:
        """Have the group leased again after somebody else's change. Raises HardwareError."""
        self._ask("rearm", gpus=self._uuids)

    def state(self) -> KeeperState:
        """The keeper's account of itself. Raises HardwareError."""
        return self._link.state()

    def _ask(self, do: str, **fields: Any) -> dict[str, Any]:  # noqa: ANN401  # the fields of a request
        try:
            return self._patiently(do, **fields)
        except (KeeperGone, LeaseLost, ForeignWriter):
            self._lease = None
            raise

    def _patiently(self, do: str, **fields: Any) -> dict[str, Any]:  # noqa: ANN401  # the fields of a request
        """Ask, but for a while not at all after an answer did not come in time."""
        left_s = self._silent_until_s - self._clock.monotonic_s()
        if left_s > 0:
            raise KeeperGone(f"the keeper did not answer in time; it is asked again in {left_s:.0f} s")
        try:
            return self._link.ask(do, anew=self._lease is None, **fields)
        except KeeperGone as error:
            if isinstance(error.__cause__, TimeoutError):
                self._silent_until_s = self._clock.monotonic_s() + _HOLD_OFF_S
            raise

    def _note(self, told: dict[str, Any], began_s: float) -> None:
        try:
            self._lease = get_lease(told)
        except (KeyError, TypeError, ValueError) as error:
            self.close()
            raise KeeperGone(f"the keeper's answer cannot be understood ({error})") from error
        self._ends_s = began_s + self._lease.left_s
