"""What is said between a keeper and its clients: one JSON object a line, nothing unknown, nothing missing.

A request is ``{"v": 1, "id": 7, "do": "lock", ...}``, its answer ``{"v": 1, "id": 7, "ok": true, "result":
{...}}`` or ``{"v": 1, "id": 7, "ok": false, "code": "taken", "message": "...", "gpus": [...]}``.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from rlgov.hardware.claims import is_file_safe
from rlgov.hardware.clocks import GpuCheck, Verdict
from rlgov.hardware.keeper.values import (
    Checked,
    Code,
    KeeperState,
    Kept,
    Lease,
    Peer,
    Phase,
    Refused,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from typing import NoReturn

VERSION: Final = 1
LONGEST_LINE_BYTES: Final = 8192
MOST_GPUS: Final = 64
_HIGHEST_MHZ: Final = 100_000
_LONGEST_S: Final = 86_400.0
_MOST_ID: Final = 2**53


@dataclass(frozen=True, slots=True)
class Request:
    """What a client asks; fields that its kind does not have keep their defaults."""

    number: int
    do: str
    gpus: tuple[str, ...] = ()
    sm_clock_mhz: int = 0
    ttl_s: float = 0.0


class ProtocolError(Exception):
    """A line that is not of this protocol.

    Args:
        message: What is wrong with it.
        code: ``version`` where it is of another version.
    """

    def __init__(self, message: str, code: Code = Code.MALFORMED) -> None:
        super().__init__(message)
        self.code = code


def _gpus(value: object) -> tuple[str, ...]:
    if not isinstance(value, list) or len(value) > MOST_GPUS:
        raise ProtocolError(f"gpus must be a list of at most {MOST_GPUS} UUIDs")
    for uuid in value:
        if not isinstance(uuid, str) or not is_file_safe(uuid):
            raise ProtocolError("gpus holds something that is no UUID of a GPU")
    return tuple(value)


def _clock_mhz(value: object) -> int:
    if type(value) is not int or not 0 < value <= _HIGHEST_MHZ:
        raise ProtocolError("sm_clock_mhz must be a whole number of MHz above 0")
    return value


def _seconds(value: object) -> float:
    if type(value) not in {int, float} or not 0 < float(str(value)) <= _LONGEST_S:
        raise ProtocolError("ttl_s must be a number of seconds above 0")
    return float(str(value))


_FIELDS: Final[Mapping[str, Callable[[object], object]]] = {
    "gpus": _gpus,
    "sm_clock_mhz": _clock_mhz,
    "ttl_s": _seconds,
}
KINDS: Final[Mapping[str, frozenset[str]]] = {
    "describe": frozenset({"gpus"}),
    "lock": frozenset({"gpus", "sm_clock_mhz", "ttl_s"}),
    "renew": frozenset(),
    "release": frozenset(),
    "check": frozenset(),
    "state": frozenset(),
    "rearm": frozenset({"gpus"}),
    "restore_all": frozenset(),
}


def parse_request(line: bytes) -> Request:
    """Understand one line. Raises ProtocolError."""
    content = _parse(line)
    if content.get("v") != VERSION or type(content["v"]) is not int:
        raise ProtocolError(f"this keeper speaks version {VERSION} of its protocol", Code.VERSION)
    number, do = content.get("id"), content.get("do")
    if type(number) is not int or not 0 <= number <= _MOST_ID:
        raise ProtocolError("id must be a whole number")
    fields = KINDS.get(do) if isinstance(do, str) else None
    if fields is None or not isinstance(do, str):
        raise ProtocolError(f"do must be one of {', '.join(KINDS)}")
    given = set(content) - {"v", "id", "do"}
    if given != fields:
        raise ProtocolError(f"{do} takes {', '.join(sorted(fields)) or 'nothing more'}")
    values: dict[str, Any] = {name: _FIELDS[name](content[name]) for name in fields}
    return Request(number, do, **values)


def request_line(request: Request) -> bytes:
    """A request as it is sent."""
    content: dict[str, object] = {"v": VERSION, "id": request.number, "do": request.do}
    content.update({name: getattr(request, name) for name in KINDS[request.do]})
    return json.dumps(content).encode() + b"\n"


def result_line(number: int, result: Mapping[str, object]) -> bytes:
    """The answer to what was done."""
    return json.dumps({"v": VERSION, "id": number, "ok": True, "result": result}).encode() + b"\n"


def refusal_line(number: int, code: Code, message: str, gpus: tuple[str, ...] = ()) -> bytes:
    """The answer to what was not done."""
    content = {"v": VERSION, "id": number, "ok": False, "code": code, "message": message, "gpus": gpus}
    return json.dumps(content).encode() + b"\n"


def parse_answer(line: bytes, number: int) -> dict[str, Any]:
    """The result in the answer to a request.

    Raises:
        ProtocolError: It is no answer, or one to another request.
        Refused: The answer is no.
    """
    content = _parse(line)
    if content.get("v") != VERSION:
        raise ProtocolError(f"the keeper does not speak version {VERSION} of the protocol", Code.VERSION)
    if content.get("ok") is False:
        try:
            code = Code(content["code"])
            raise Refused(code, str(content["message"]), tuple(str(uuid) for uuid in content["gpus"]))
        except (KeyError, ValueError, TypeError) as error:
            raise ProtocolError(f"a refusal that cannot be understood ({error})") from error
    result = content.get("result")
    if content.get("id") != number or not isinstance(result, dict):
        raise ProtocolError("not the answer to what was asked")
    return result


# ---------------------------------------------------------------------- results


def put_lease(lease: Lease) -> dict[str, object]:
    """A lease as a result."""
    return {
        "gpus": lease.gpus,
        "sm_clock_mhz": lease.sm_clock_mhz,
        "ttl_s": lease.ttl_s,
        "left_s": lease.left_s,
    }


def get_lease(result: Mapping[str, Any]) -> Lease:
    """A lease from a result. Raises KeyError, TypeError or ValueError where it is none."""
    return Lease(
        tuple(result["gpus"]), int(result["sm_clock_mhz"]), float(result["ttl_s"]), float(result["left_s"])
    )


def put_checked(checked: Checked) -> dict[str, object]:
    """A check as a result."""
    return {
        "sm_clock_mhz": checked.sm_clock_mhz,
        "since_lock_s": checked.since_lock_s,
        "left_s": checked.left_s,
        "gpus": [
            {
                "uuid": gpu.uuid,
                "measured_mhz": gpu.measured_mhz,
                "throttle_reasons": sorted(gpu.throttle_reasons),
                "verdict": gpu.verdict,
            }
            for gpu in checked.gpus
        ],
    }


def get_checked(result: Mapping[str, Any]) -> Checked:
    """A check from a result. Raises KeyError, TypeError or ValueError where it is none."""
    gpus = tuple(
        GpuCheck(
            str(gpu["uuid"]),
            None if gpu["measured_mhz"] is None else int(gpu["measured_mhz"]),
            frozenset(str(reason) for reason in gpu["throttle_reasons"]),
            Verdict(gpu["verdict"]),
        )
        for gpu in result["gpus"]
    )
    return Checked(int(result["sm_clock_mhz"]), float(result["since_lock_s"]), float(result["left_s"]), gpus)


def put_state(state: KeeperState) -> dict[str, object]:
    """The keeper's account of itself as a result."""
    return {
        "counts": state.counts,
        "gpus": [
            {
                "uuid": gpu.uuid,
                "phase": gpu.phase,
                "supported_mhz": gpu.supported_mhz,
                "sm_clock_mhz": gpu.sm_clock_mhz,
                "owner": None if gpu.owner is None else {"pid": gpu.owner.pid, "uid": gpu.owner.uid},
                "left_s": gpu.left_s,
                "verdict": gpu.verdict,
                "attempts": gpu.attempts,
                "lost": gpu.lost,
                "why": gpu.why,
            }
            for gpu in state.gpus
        ],
    }


def get_state(result: Mapping[str, Any]) -> KeeperState:
    """The keeper's account from a result. Raises KeyError, TypeError or ValueError where it is none."""
    gpus = []
    for gpu in result["gpus"]:
        values = dict(gpu)
        owner = values.pop("owner")
        peer = None if owner is None else Peer(int(owner["pid"]), int(owner["uid"]))
        values |= {"phase": Phase(gpu["phase"]), "supported_mhz": tuple(gpu["supported_mhz"])}
        gpus.append(Kept(owner=peer, **values))
    return KeeperState(tuple(gpus), {str(name): int(count) for name, count in result["counts"].items()})


# ---------------------------------------------------------------------- lines


def _once(pairs: list[tuple[str, object]]) -> dict[str, object]:
    content = dict(pairs)
    if len(content) != len(pairs):
        raise ProtocolError("a name is given twice")
    return content


def _no_number(text: str) -> NoReturn:
    raise ProtocolError(f"{text} is no number")


def _parse(line: bytes) -> dict[str, Any]:
    try:
        content = json.loads(line.decode(), object_pairs_hook=_once, parse_constant=_no_number)
    except (ValueError, RecursionError) as error:
        raise ProtocolError(f"not a JSON object a line ({type(error).__name__})") from error
    if not isinstance(content, dict) or not all(math.isfinite(value) for value in _floats(content)):
        raise ProtocolError("not a JSON object with finite numbers")
    return content


def _floats(content: dict[str, object]) -> list[float]:
    return [value for value in content.values() if isinstance(value, float)]
