"""The other end of a governor's surface: standard library only."""

from __future__ import annotations

import http.client
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import urlsplit

from rlgov.engine.control.unix_socket import UnixConnection
from rlgov.errors import ConfigError, DeploymentError
from rlgov.governor.status import STATUS_SCHEMA

if TYPE_CHECKING:
    from rlgov.governor.records import Command

_LARGEST_ANSWER_BYTES: Final = 4 * 1024 * 1024
_OK: Final = 200
_ACCEPTED: Final = 202


class SurfaceClient:
    """Asks a running governor, and tells it what an operator wants.

    Args:
        target: Path of its Unix socket, or its address such as ``http://127.0.0.1:9120``.
        token: What orders over TCP have to show.
        timeout_s: Longest wait for an answer.

    Raises:
        ConfigError: The address is none.
    """

    def __init__(self, target: str, *, token: str | None = None, timeout_s: float = 5.0) -> None:
        self._target = target
        self._token = token
        self._timeout_s = timeout_s
        if "://" in target:
            parts = urlsplit(target)
            if parts.scheme not in {"http", "https"} or not parts.hostname:
                raise ConfigError(f"{target!r} is no address of a governor; give http://HOST:PORT")

    def status(self) -> dict[str, Any]:
        """The status page.

        Raises:
            DeploymentError: The governor cannot be asked, or speaks another version.
        """
        status, content = self._exchange("GET", "/status", None)
        document = self._parsed(content)
        if status != _OK:
            raise self._failed(status, document)
        if document.get("schema") != STATUS_SCHEMA:
            raise DeploymentError(
                f"{self._target}: the governor speaks version {document.get('schema')!r} of the status page, "
                f"here it is {STATUS_SCHEMA}; run both from one rlgov"
            )
        return document

    def order(self, command: Command) -> None:
        """Give an order. The governor carries it out at its next tick.

        Raises:
            DeploymentError: The governor cannot be asked, or refuses.
        """
        body = {"mode": command.mode.value} if command.mode is not None else {}
        status, content = self._exchange("POST", f"/v1/{command.kind.value}", json.dumps(body).encode())
        if status != _ACCEPTED:
            raise self._failed(status, self._parsed(content))

    def _exchange(self, method: str, path: str, body: bytes | None) -> tuple[int, bytes]:
        headers = {}
        if body is not None:
            headers["Content-Type"] = "application/json"
            if self._token is not None:
                headers["Authorization"] = f"Bearer {self._token}"
        connection = self._connect()
        try:
            connection.request(method, path, body=body, headers=headers)
            response = connection.getresponse()
            return response.status, response.read(_LARGEST_ANSWER_BYTES)
        except (OSError, http.client.HTTPException) as error:
            reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
            raise DeploymentError(
                f"{self._target}: no governor answers there ({reason}); start `rlgov govern`, "
                "or name its socket with --control or its address with --url"
            ) from error
        finally:
            connection.close()

    def _connect(self) -> http.client.HTTPConnection:
        if "://" not in self._target:
            return UnixConnection(Path(self._target), self._timeout_s)
        parts = urlsplit(self._target)
        kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        return kind(parts.hostname or "", parts.port, timeout=self._timeout_s)

    def _parsed(self, content: bytes) -> dict[str, Any]:
        try:
            document = json.loads(content)
        except ValueError:
            document = None
        if not isinstance(document, dict):
            raise DeploymentError(
                f"{self._target}: answers, but not as a governor does; name the governor's socket or address"
            )
        return document

    def _failed(self, status: int, document: dict[str, Any]) -> DeploymentError:
        return DeploymentError(f"{self._target}: {document.get('error', f'HTTP status {status}')}")
