"""The other end of the control socket: synchronous, standard library and pydantic only."""

from __future__ import annotations

import http.client
import json
from typing import TYPE_CHECKING, Self
from urllib.parse import quote

from pydantic import TypeAdapter, ValidationError

from rlgov.engine.control.schema import (
    INTERVAL,
    ITERATIONS,
    LIMITS,
    SCHEMA_HEADER,
    STATE,
    ConfigurationRequest,
    schema_digest,
)
from rlgov.engine.control.unix_socket import UnixConnection
from rlgov.errors import DeploymentError, EngineError

if TYPE_CHECKING:
    from pathlib import Path
    from types import TracebackType
    from typing import TypeVar

    from rlgov.engine.samples import EngineIterations, StackInterval, StackLimits, StackState

    Value = TypeVar("Value")

_OK = 200
_UNAVAILABLE = 503


class StackClient:
    """A serving stack behind its control socket. Not safe to share between threads.

    Args:
        socket_path: Of ``rlgov serve``; it prints the path when it starts.
        timeout_s: Longest wait for one answer.
    """

    def __init__(self, socket_path: Path, timeout_s: float = 5.0) -> None:
        self._connection = UnixConnection(socket_path, timeout_s)
        self._path = socket_path

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def limits(self) -> StackLimits:
        """What the stack offers. Raises DeploymentError where it cannot be asked."""
        return self._get("/v1/limits", LIMITS)

    def state(self) -> StackState:
        """What is in force. Raises DeploymentError where the stack cannot be asked."""
        return self._get("/v1/state", STATE)

    def interval(self, after: int) -> StackInterval:
        """One reading of everything.

        Args:
            after: The cursor of the last reading's traffic; 0 at first.

        Raises:
            DeploymentError: The stack cannot be asked.
        """
        return self._get(f"/v1/interval?after={after}", INTERVAL)

    def iterations(self, after: int, engine_id: str = "") -> EngineIterations:
        """Iterations of the engine that takes new requests, a few thousand at most: ask again for more.

        Args:
            after: The cursor of the last answer; 0 at first.
            engine_id: The engine of the last answer. When another one serves by now, all of its are given.

        Raises:
            DeploymentError: The stack cannot be asked.
            EngineError: No engine serves, or it has no plugin to tell.
        """
        engine = f"&engine={quote(engine_id, safe='')}" if engine_id else ""
        return self._get(f"/v1/iterations?after={after}{engine}", ITERATIONS)

    def configure(
        self, *, batch_cap: int | None = None, tp_degree: int | None = None, lease_s: float | None = None
    ) -> StackState:
        """Ask for a configuration; what is not given stays as it is.

        A TP degree begins a switch in the background: the answer says ``switching``. It is passed over,
        and ``tp_refused`` says why, while that degree cannot be had; it is passed over while another
        switch is in progress.

        Args:
            batch_cap: Requests that may run at once.
            tp_degree: One of the degrees offered.
            lease_s: The cap falls back to the maximum unless it is asked for again within this time.

        Raises:
            DeploymentError: The stack cannot be asked, or does not offer what was asked for.
            EngineError: No engine could take it.
        """
        try:
            asked = ConfigurationRequest(batch_cap=batch_cap, tp_degree=tp_degree, lease_s=lease_s)
        except ValidationError as error:
            raise DeploymentError(f"not a configuration: {error.errors()[0]['msg']}") from error
        body = asked.model_dump_json(exclude_none=True).encode()
        return self._read("POST", "/v1/configuration", STATE, body)

    def close(self) -> None:
        """Close the connection; safe to call twice."""
        self._connection.close()

    def _get(self, path: str, adapter: TypeAdapter[Value]) -> Value:
        return self._read("GET", path, adapter, None)

    def _read(self, method: str, path: str, adapter: TypeAdapter[Value], body: bytes | None) -> Value:
        status, digest, content = self._exchange(method, path, body)
        if digest != schema_digest():
            raise DeploymentError(
                f"{self._path}: the stack speaks another version of the control protocol "
                f"({digest or 'none'}, here {schema_digest()}); run both from one rlgov"
            )
        if status != _OK:
            kind = EngineError if status == _UNAVAILABLE else DeploymentError
            raise kind(f"{self._path}: {_reason(content, status)}")
        try:
            return adapter.validate_json(content)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            where = ".".join(str(part) for part in first["loc"])
            raise DeploymentError(
                f"{self._path}: answered {path} with something else than it should "
                f"({where}: {first['msg']}); look at the log of rlgov serve"
            ) from error

    def _exchange(self, method: str, path: str, body: bytes | None) -> tuple[int, str, bytes]:
        fresh = self._connection.sock is None
        try:
            return self._once(method, path, body)
        except (http.client.RemoteDisconnected, BrokenPipeError, ConnectionResetError) as error:
            self._connection.close()
            if fresh:
                raise self._unreachable(error) from error
        except (OSError, http.client.HTTPException) as error:
            self._connection.close()
            raise self._unreachable(error) from error
        # A kept connection that the other side has closed in the meantime: once more on a fresh one.
        try:
            return self._once(method, path, body)
        except (OSError, http.client.HTTPException) as error:
            self._connection.close()
            raise self._unreachable(error) from error

    def _once(self, method: str, path: str, body: bytes | None) -> tuple[int, str, bytes]:
        headers = {"Content-Type": "application/json"} if body is not None else {}
        self._connection.request(method, path, body=body, headers=headers)
        response = self._connection.getresponse()
        content = response.read()
        return response.status, response.headers.get(SCHEMA_HEADER, ""), content

    def _unreachable(self, error: Exception) -> DeploymentError:
        if isinstance(error, TimeoutError):
            return DeploymentError(
                f"{self._path}: no answer within {self._connection.timeout:g} s; "
                "look at the log of rlgov serve, it hangs or the machine is overloaded"
            )
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        return DeploymentError(
            f"{self._path}: cannot be reached ({reason}); start `rlgov serve`, or name its control socket"
        )


def _reason(content: bytes, status: int) -> str:
    try:
        told = json.loads(content)["error"]
    except (ValueError, KeyError, TypeError):
        return f"answered with HTTP status {status}; look at the log of rlgov serve"
    return str(told)
