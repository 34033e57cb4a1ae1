from __future__ import annotations

import contextlib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlgov.errors import ConfigError
from rlgov.governor.listen import TcpAddress, UnixAddress, parse_address, parse_addresses, read_token


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("unix:/run/rlgov/governor.sock", UnixAddress(Path("/run/rlgov/governor.sock"))),
        ("/run/rlgov/governor.sock", UnixAddress(Path("/run/rlgov/governor.sock"))),
        ("runs/govern/governor.sock", UnixAddress(Path("runs/govern/governor.sock"))),
        ("127.0.0.1:9120", TcpAddress("127.0.0.1", 9120)),
        ("localhost:0", TcpAddress("localhost", 0)),
        ("[::1]:9120", TcpAddress("::1", 9120)),
    ],
)
def test_places_are_read(text: str, address: UnixAddress | TcpAddress) -> None:
    assert parse_address(text) == address


@pytest.mark.parametrize(
    "text", ["", "9120", ":9120", "host:", "host:port", "host:99999", "host:-1", "unix:"]
)
def test_what_is_no_place_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"give a path such as .* HOST:PORT"):
        parse_address(text)


@given(st.text(max_size=30))
def test_any_text_is_a_place_or_refused(text: str) -> None:
    with contextlib.suppress(ConfigError):
        parse_address(text)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.1", "example.org", "127.0.0.1.example.org"])  # noqa: S104  # must be refused
def test_a_network_needs_a_token(host: str) -> None:
    text = f"[{host}]:9120" if ":" in host else f"{host}:9120"
    with pytest.raises(ConfigError, match="--token-file"):
        parse_addresses([text], None)
    assert parse_addresses([text], "a-token-of-16-letters") == (TcpAddress(host, 9120),)


def test_loopback_and_sockets_need_none() -> None:
    texts = ["127.0.0.1:1", "127.9.9.9:1", "[::1]:1", "localhost:1", "/tmp/s"]  # noqa: S108  # nothing is made there
    assert len(parse_addresses(texts, None)) == 5


def test_one_place_twice_is_refused() -> None:
    with pytest.raises(ConfigError, match="twice"):
        parse_addresses(["localhost:1", "localhost:1"], None)


def _file(folder: Path, content: bytes, mode: int) -> Path:
    path = folder / "token"
    path.write_bytes(content)
    path.chmod(mode)
    return path


@pytest.mark.parametrize("mode", [0o400, 0o600, 0o640, 0o440])
def test_a_token_is_read(tmp_path: Path, mode: int) -> None:
    assert read_token(_file(tmp_path, b"0123456789abcdef0123\n", mode)) == "0123456789abcdef0123"


@pytest.mark.parametrize("mode", [0o644, 0o666, 0o660, 0o604])
def test_a_token_that_others_may_read_or_change_is_refused(tmp_path: Path, mode: int) -> None:
    with pytest.raises(ConfigError, match="chmod 640"):
        read_token(_file(tmp_path, b"0123456789abcdef0123\n", mode))


@pytest.mark.parametrize(
    "content", [b"", b"\n", b"short", b"two words of a token", b"0123456789abcdef\nx", b"\xff" * 32]
)
def test_a_useless_token_is_refused(tmp_path: Path, content: bytes) -> None:
    with pytest.raises(ConfigError, match="openssl rand"):
        read_token(_file(tmp_path, content, 0o600))


def test_a_missing_token_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="none: the token cannot be read"):
        read_token(tmp_path / "none")
