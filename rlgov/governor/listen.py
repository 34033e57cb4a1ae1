"""Where the governor's surface listens: a Unix socket, or TCP where somebody asked for it."""

from __future__ import annotations

import ipaddress
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final, TypeAlias

from rlgov.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterable

DEFAULT_SOCKET: Final = Path("runs/govern/governor.sock")
"""Where a governor listens unless it is told otherwise."""

SHORTEST_TOKEN: Final = 16
_LARGEST_TOKEN_FILE_BYTES: Final = 4096
_HIGHEST_PORT: Final = 65_535
_FORMS: Final = "a path such as /run/rlgov/governor.sock, or HOST:PORT such as 127.0.0.1:9120"


@dataclass(frozen=True, slots=True)
class UnixAddress:
    """A Unix socket; its mode, 0660, says who may use it."""

    path: Path

    def __str__(self) -> str:
        return f"unix:{self.path}"


@dataclass(frozen=True, slots=True)
class TcpAddress:
    """A TCP port; 0 takes a free one. Everybody who reaches it may read; orders need a token."""

    host: str
    port: int

    @property
    def loopback(self) -> bool:
        """Whether only this machine reaches it. A name counts only if it is ``localhost``."""
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"

    def __str__(self) -> str:
        return f"http://[{self.host}]:{self.port}" if ":" in self.host else f"http://{self.host}:{self.port}"


Address: TypeAlias = UnixAddress | TcpAddress


def parse_address(text: str) -> Address:
    """Read ``unix:PATH``, a path with a slash in it, ``HOST:PORT`` or ``[IPV6]:PORT``.

    Raises:
        ConfigError: It is none of these.
    """
    if text.startswith("unix:") or "/" in text:
        path = text.removeprefix("unix:")
        if path:
            return UnixAddress(Path(path))
    host, colon, port = text.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if colon and host and port.isascii() and port.isdigit() and int(port) <= _HIGHEST_PORT:
        return TcpAddress(host, int(port))
    raise ConfigError(f"--listen {text!r} is no place to listen at; give {_FORMS}")


def parse_addresses(texts: Iterable[str], token: str | None) -> tuple[Address, ...]:
    """Read several places, and refuse what would be open to a network without a token.

    Args:
        texts: See :func:`parse_address`.
        token: What orders over TCP have to show.

    Raises:
        ConfigError: A place cannot be read, is named twice, or needs a token and there is none.
    """
    addresses = tuple(parse_address(text) for text in texts)
    if len(set(addresses)) < len(addresses):
        raise ConfigError("--listen names one place twice; leave one out")
    for address in addresses:
        if isinstance(address, TcpAddress) and not address.loopback and token is None:
            raise ConfigError(
                f"--listen {address.host}:{address.port} can be reached from other machines and there is no "
                "token; give one with --token-file, or listen at 127.0.0.1 or a Unix socket"
            )
    return addresses


def read_token(path: Path) -> str:
    """The token that orders over TCP have to show: the only line of a file that only its owner may read.

    Raises:
        ConfigError: The file cannot be read, is open to others, or holds no usable token.
    """
    try:
        with path.open("rb") as file:
            mode = stat.S_IMODE(path.stat().st_mode)
            content = file.read(_LARGEST_TOKEN_FILE_BYTES)
    except OSError as error:
        raise ConfigError(
            f"{path}: the token cannot be read ({error.strerror}); check --token-file"
        ) from error
    if mode & (stat.S_IROTH | stat.S_IWOTH | stat.S_IWGRP):
        raise ConfigError(f"{path}: others than its owner may read or change the token; chmod 640 {path}")
    token = content.decode("ascii", errors="replace").strip()
    if len(token) < SHORTEST_TOKEN or not token.isprintable() or not token.isascii() or " " in token:
        raise ConfigError(
            f"{path}: holds no usable token; write at least {SHORTEST_TOKEN} letters and digits into it, "
            f"such as: openssl rand -hex 32 > {path}"
        )
    return token
