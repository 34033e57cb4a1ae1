"""Iterations of the serving engine, fetched while a point is held, before its ring forgets them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import requests

from rlgov.characterize.measure import RING_COLUMNS
from rlgov.engine.plugin.counters import ROWS_PER_ANSWER
from rlgov.engine.samples import EngineIterations
from rlgov.errors import DeploymentError, RlgovError

if TYPE_CHECKING:
    from collections.abc import Collection

    from numpy.typing import NDArray

    from rlgov.engine.control.client import StackClient


@dataclass(frozen=True, slots=True, eq=False)
class Told:
    """Rows since the last :meth:`IterationSource.take`."""

    rows: NDArray[np.float64]  # (n, len(RING_COLUMNS))
    dropped: int


class IterationSource(Protocol):
    """Where the serving engine tells its iterations."""

    @property
    def gpu_uuids(self) -> Collection[str]:
        """GPUs of the serving engine; empty where that is not known."""
        ...

    @property
    def problem(self) -> str:
        """Why the engine does not tell; empty where it does, or where nobody asks."""
        ...

    def skip(self) -> None:
        """Forget what came so far."""
        ...

    def fetch(self) -> None:
        """Read what is new; never raises for an engine that does not tell."""
        ...

    def take(self, axis_s: float) -> Told | None:
        """What came since :meth:`skip`, times counted from ``axis_s``; None if the engine does not tell."""
        ...

    def close(self) -> None:
        """Let go of the connection."""
        ...


class NoIterations:
    """The engine cannot tell."""

    gpu_uuids: Collection[str] = ()
    problem = ""

    def skip(self) -> None:
        """Nothing to forget."""

    def fetch(self) -> None:
        """Nothing to read."""

    def take(self, axis_s: float) -> Told | None:  # noqa: ARG002  # the protocol's signature
        """Nothing."""
        return None

    def close(self) -> None:
        """Nothing to let go of."""


class _Ring:
    """Collects answers of one engine after another."""

    def __init__(self) -> None:
        self.engine_id = ""
        self.cursor = 0
        self.failure = ""
        self._rows: list[tuple[float, ...]] = []
        self._dropped = 0

    def add(self, answer: EngineIterations) -> bool:
        """Note an answer; returns whether there is more to ask for at once.

        A busy engine has always gone on meanwhile: only an answer that is full means that more was there.
        """
        if answer.engine_id != self.engine_id:
            self.engine_id = answer.engine_id
            self._rows.clear()
            self._dropped = 0
        order = [answer.columns.index(name) for name in RING_COLUMNS]
        self._rows += [tuple(row[i] for i in order) for row in answer.rows]
        self._dropped += answer.dropped
        self.cursor = answer.cursor
        return len(answer.rows) >= ROWS_PER_ANSWER

    def clear(self) -> None:
        """Forget the rows, keep the cursor."""
        self._rows.clear()
        self._dropped = 0

    def told(self, axis_s: float) -> Told | None:
        """The rows, unless no answer ever came."""
        if not self.engine_id or self.failure:
            return None
        rows = np.array(self._rows, dtype=np.float64).reshape(-1, len(RING_COLUMNS))
        rows[:, 0] -= axis_s
        return Told(rows, self._dropped)


class StackIterations:
    """Through the control socket of ``rlgov serve``."""

    def __init__(self, client: StackClient) -> None:
        self._client = client
        self._ring = _Ring()
        self._gpus: tuple[str, ...] = ()

    @property
    def gpu_uuids(self) -> Collection[str]:
        """GPUs of the engine that serves."""
        return self._gpus

    @property
    def problem(self) -> str:
        """Why the last fetch failed."""
        return self._ring.failure

    def skip(self) -> None:
        """Forget what came so far."""
        self.fetch()
        self._ring.clear()

    def fetch(self) -> None:
        """Read what is new."""
        try:
            serving = [info for info in self._client.state().engines if info.phase == "active"]
            self._gpus = serving[0].gpu_uuids if serving else ()
            while self._ring.add(self._client.iterations(self._ring.cursor, self._ring.engine_id)):
                pass
        except (RlgovError, ValueError) as error:
            self._ring.failure = str(error)
        else:
            self._ring.failure = ""

    def take(self, axis_s: float) -> Told | None:
        """What came since :meth:`skip`."""
        return self._ring.told(axis_s)

    def close(self) -> None:
        """Close the connection."""
        self._client.close()


class PluginIterations:
    """Of an engine whose plugin is asked directly.

    Args:
        url: The engine.
        token: What it was given as RLGOV_PLUGIN_TOKEN.
        timeout_s: Longest wait for an answer.
    """

    gpu_uuids: Collection[str] = ()

    def __init__(self, url: str, token: str, timeout_s: float) -> None:
        self._url = f"{url.rstrip('/')}/rlgov/v1/iterations"
        self._timeout_s = timeout_s
        self._session = requests.Session()
        self._session.trust_env = False  # no proxies and no credentials but ours
        self._session.headers["Authorization"] = f"Bearer {token}"
        self._ring = _Ring()

    @property
    def problem(self) -> str:
        """Why the last fetch failed."""
        return self._ring.failure

    def skip(self) -> None:
        """Forget what came so far."""
        self.fetch()
        self._ring.clear()

    def fetch(self) -> None:
        """Read what is new."""
        try:
            while self._ring.add(self._ask()):
                pass
        except (requests.RequestException, RlgovError, ValueError, KeyError) as error:
            self._ring.failure = str(error)
        else:
            self._ring.failure = ""

    def take(self, axis_s: float) -> Told | None:
        """What came since :meth:`skip`."""
        return self._ring.told(axis_s)

    def close(self) -> None:
        """Close the connections."""
        self._session.close()

    def _ask(self) -> EngineIterations:
        answer = self._session.get(
            self._url, params={"after": self._ring.cursor}, timeout=self._timeout_s, allow_redirects=False
        )
        content: Any = answer.json()
        if answer.status_code != requests.codes.ok or not isinstance(content, dict):
            msg = f"{self._url} answered with status {answer.status_code}: {content}"
            raise DeploymentError(msg)
        return EngineIterations(
            engine_id="attached",
            cursor=content["cursor"],
            dropped=content["dropped"],
            columns=tuple(content["columns"]),
            rows=tuple(tuple(map(float, row)) for row in content["rows"]),
        )
