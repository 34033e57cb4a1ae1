"""What a server says of itself: its model, its version, how long a request may be."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any, Final

import requests

from rlgov.errors import CharacterizationError

_ANSWER_S: Final = 10.0


@dataclass(frozen=True, slots=True)
class Server:
    """An OpenAI-compatible server."""

    model: str
    most_tokens: int | None  # prompt and output of one request; None: it does not tell
    version: str | None  # of vLLM
    root: str = ""  # where the model's files come from, whatever name it is served under; empty: not told

    @property
    def versions(self) -> dict[str, str]:
        """For the header of a campaign."""
        return {} if self.version is None else {"vllm": self.version}


def ask_server(url: str, api_key_env: str | None) -> Server:
    """Ask a vLLM server, or one behind a gateway, about itself.

    Raises:
        CharacterizationError: Nothing answers there, or it names no model.
    """
    base = url.rstrip("/").removesuffix("/v1")
    key = os.environ.get(api_key_env or "")
    where = f"{base}/v1/models"
    with requests.Session() as session:
        session.trust_env = False  # no proxies and no credentials but ours
        if key:
            session.headers["Authorization"] = f"Bearer {key}"
        try:
            first = _ask(session, where)["data"][0]
            model = str(first["id"])
        except (requests.exceptions.RequestException, ValueError, KeyError, IndexError, TypeError) as error:
            msg = f"{where} does not tell its model ({error}); check that a vLLM server runs there"
            raise CharacterizationError(msg) from error
        try:
            version = str(_ask(session, f"{base}/version")["version"])
        except (requests.exceptions.RequestException, ValueError, KeyError, TypeError):
            version = None  # vLLM's own, which other servers lack
    most = first.get("max_model_len")
    root = first.get("root")
    known = root if isinstance(root, str) else ""
    return Server(model, most if isinstance(most, int) else None, version, known)


def _ask(session: requests.Session, where: str) -> Any:  # noqa: ANN401  # JSON
    answer = session.get(where, timeout=_ANSWER_S, allow_redirects=False)
    answer.raise_for_status()
    return answer.json()
