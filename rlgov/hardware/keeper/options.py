"""What the administrator says: flags, and a file that only root or the keeper's own user may write."""

from __future__ import annotations

import argparse
import dataclasses
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from rlgov.errors import ConfigError
from rlgov.hardware.claims import DEFAULT_FOLDER, FOLDER_VARIABLE
from rlgov.hardware.keeper.values import KeeperSettings

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

SOCKET_NAME: Final = "keeper.sock"
LONGEST_PROMISED_S: Final = 15.0

_ACTIONS: Final = ("restore_all", "restore_left", "rearm", "status")
_RESERVE_S: Final = 3.0  # for the keeper's own step, and the driver's answer
_WRITABLE_BY_OTHERS: Final = 0o022
_HELP: Final = """Lends GPU clocks to a governor that runs without privileges, and takes them back when that
is killed, hangs, or no longer asks. Runs as root (or with CAP_SYS_ADMIN) until SIGTERM or SIGINT, which
restore every clock. Anyone in its socket's group may lease clocks within the bounds given here."""


@dataclasses.dataclass(frozen=True, slots=True)
class Options:
    """How a keeper runs."""

    settings: KeeperSettings
    gpus: tuple[str, ...] | None  # None: all of the machine
    state_dir: Path
    socket: Path
    claims_dir: Path
    group: str
    backend: str
    zeusd_socket: Path
    action: str  # run, or one of _ACTIONS
    named: tuple[str, ...]  # GPUs to re-arm, none for all


def default_state_dir(environment: Mapping[str, str]) -> Path:
    """The folder that systemd gives a service, else ``/run/rlgov``."""
    given = environment.get("RUNTIME_DIRECTORY", "").split(":")[0]
    return Path(given) if given else DEFAULT_FOLDER


def default_socket(environment: Mapping[str, str]) -> Path:
    """Where a keeper listens if nothing else is said; clients look there, too."""
    return default_state_dir(environment) / SOCKET_NAME


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(prog="rlgov-keeper", description=_HELP)
    parser.add_argument("--config", type=Path, help="TOML file with any of the long flags, without dashes")
    parser.add_argument(
        "--gpu", action="append", metavar="UUID", help="a GPU that may be leased (repeatable)"
    )
    parser.add_argument("--floor-mhz", type=int, help="no lock below this SM clock")
    parser.add_argument("--ceiling-mhz", type=int, help="no lock above this SM clock")
    parser.add_argument(
        "--restore-clock-mhz", type=int, help="clock you hold these GPUs at yourself; without it, no lock"
    )
    parser.add_argument(
        "--longest-lease-s", type=float, help="a lease ends when not renewed for so long (10)"
    )
    parser.add_argument(
        "--state-dir", type=Path, help="saved locks ($RUNTIME_DIRECTORY, else /run/rlgov); should be on tmpfs"
    )
    parser.add_argument("--socket", type=Path, help=f"where to listen ({SOCKET_NAME} in the state folder)")
    parser.add_argument("--claims-dir", type=Path, help=f"common to all who set clocks (${FOLDER_VARIABLE})")
    parser.add_argument("--group", help="who may connect beside root (the keeper's own group)")
    parser.add_argument("--backend", choices=("nvml", "zeusd"), help="who sets the clocks (nvml)")
    parser.add_argument("--zeusd-socket", type=Path, help="of zeusd (/var/run/zeusd.sock)")
    act = parser.add_mutually_exclusive_group()
    act.add_argument(
        "--restore-all",
        action="store_true",
        help="restore every clock and end; a keeper that runs leases nothing more until --rearm",
    )
    act.add_argument(
        "--restore-left",
        action="store_true",
        help="restore what a keeper left that does not run any more, and end; for units at boot",
    )
    act.add_argument(
        "--rearm",
        nargs="*",
        metavar="UUID",
        help="lease GPUs again that were left to somebody else (all of them if none is named), and end",
    )
    act.add_argument("--status", action="store_true", help="print what is leased as JSON, and end")
    return parser


def read_options(arguments: Sequence[str], environment: Mapping[str, str]) -> Options:
    """Flags over file over defaults.

    Raises:
        ConfigError: A value or the file cannot be used.
    """
    parsed = vars(build_parser().parse_args(arguments))
    path: Path | None = parsed.pop("config")
    given: dict[str, Any] = {} if path is None else read_file(path)
    given |= {name: value for name, value in parsed.items() if value is not None and value is not False}
    state_dir = Path(given.get("state_dir") or default_state_dir(environment))
    action = next((name for name in _ACTIONS if name in given), "run")
    return Options(
        settings=_settings(given),
        gpus=tuple(given["gpu"]) if "gpu" in given else None,
        state_dir=state_dir,
        socket=Path(given.get("socket") or state_dir / SOCKET_NAME),
        claims_dir=Path(given.get("claims_dir") or environment.get(FOLDER_VARIABLE) or DEFAULT_FOLDER),
        group=str(given.get("group", "")),
        backend=str(given.get("backend", "nvml")),
        zeusd_socket=Path(given.get("zeusd_socket", "/var/run/zeusd.sock")),
        action=action,
        named=tuple(given.get("rearm", ())),
    )


def read_file(path: Path) -> dict[str, Any]:
    """The administrator's file.

    Raises:
        ConfigError: Others may write it, it cannot be read, or a name or value in it is wrong.
    """
    try:
        with path.open("rb") as file:
            status = os.fstat(file.fileno())
            text = file.read()
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from error
    if status.st_mode & _WRITABLE_BY_OTHERS or status.st_uid not in {0, os.geteuid()}:
        raise ConfigError(
            f"{path}: others than root and the keeper's user may write it; chown root and chmod go-w"
        )
    import tomllib  # noqa: PLC0415  # a megabyte that a keeper without a file does not need

    try:
        content = tomllib.loads(text.decode())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: {error}") from error
    known = _file_types()
    for name, value in content.items():
        wanted = known.get(name)
        if wanted is None:
            raise ConfigError(f"{path}: {name!r} is no setting; there are {', '.join(known)}")
        kept = float(value) if wanted is float and type(value) is int else value
        if type(kept) is not wanted or (wanted is list and not all(isinstance(item, str) for item in value)):
            raise ConfigError(f"{path}: {name} must be {_NAMES[wanted]}, not {value!r}")
    if content.get("backend", "nvml") not in {"nvml", "zeusd"}:
        raise ConfigError(f"{path}: backend must be nvml or zeusd, not {content['backend']!r}")
    return content


_NAMES: Final = {int: "a whole number", float: "a number", str: "a text", list: "a list of UUIDs"}


def _file_types() -> dict[str, type]:
    return {
        "gpu": list, "floor_mhz": int, "ceiling_mhz": int, "restore_clock_mhz": int, "longest_lease_s": float,
        "state_dir": str, "socket": str, "claims_dir": str, "group": str, "backend": str, "zeusd_socket": str,
    }  # fmt: skip


def _settings(given: Mapping[str, Any]) -> KeeperSettings:
    names = ("floor_mhz", "ceiling_mhz", "restore_clock_mhz", "longest_lease_s")
    settings = KeeperSettings(**{name: given[name] for name in names if name in given})
    if settings.floor_mhz > settings.ceiling_mhz:
        raise ConfigError(
            f"floor {settings.floor_mhz} MHz lies above ceiling {settings.ceiling_mhz} MHz; swap them"
        )
    most_s = LONGEST_PROMISED_S - _RESERVE_S
    if not settings.shortest_lease_s <= settings.longest_lease_s <= most_s:
        raise ConfigError(
            f"longest_lease_s must lie between {settings.shortest_lease_s:g} and {most_s:g} s: "
            f"rlgov promises restored clocks within {LONGEST_PROMISED_S:g} s"
        )
    return settings
