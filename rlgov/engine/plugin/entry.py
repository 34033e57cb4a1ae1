"""Where vLLM enters: the names that pyproject.toml gives to its plugin groups.

Nothing happens without RLGOV_PLUGIN=1, so that an rlgov that lies beside a vLLM never changes it. For the
same reason there is no stat logger among the entry points: vLLM turns its statistics on as soon as one is
installed, and every one of its processes that finds none of the expected class refuses to start.
"""

from __future__ import annotations

import os
from typing import Any

from rlgov.engine.plugin import rpc


def active() -> bool:
    """Whether this process is to be governed."""
    return os.environ.get("RLGOV_PLUGIN") == "1"


def register() -> None:
    """vllm.general_plugins: runs in every process of vLLM; adds the methods that the API server calls.

    The scheduler adds them too. This is for an engine started without it: then they say so.
    """
    if active():
        rpc.attach()


def endpoint() -> Any:
    """vllm.endpoint_plugins: the HTTP interface; vLLM asks for it only if VLLM_PLUGINS names rlgov."""
    if not active():
        return Inert()
    from rlgov.engine.plugin.endpoint import Endpoint

    return Endpoint(os.environ.get("RLGOV_PLUGIN_TOKEN", ""))


class Inert:
    """An endpoint plugin that adds nothing."""

    name = "rlgov"
    required_tasks = None

    def attach_router(self, app: object) -> None:
        """Add no route."""

    async def init_state(self, engine_client: object, state: object, args: object) -> None:
        """Take nothing."""
