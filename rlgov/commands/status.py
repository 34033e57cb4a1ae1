"""``rlgov status`` and ``rlgov tell``: what a running governor does, and what it should do."""

from __future__ import annotations

import json as json_format
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from rlgov.clock import SystemClock
from rlgov.commands.output import Json, console, put_json
from rlgov.errors import ConfigError, DeploymentError

if TYPE_CHECKING:
    from rlgov.governor.client import SurfaceClient

EXIT_NOT_READY = 1


def status(
    *,
    control: Path | None = None,
    url: str | None = None,
    watch: bool = False,
    every_s: float = 1.0,
    json: Json = False,
) -> int:
    """What a running governor sees, decides and does, and what to check next.

    Ends with 0 when the governor lives and nothing keeps it from governing; else with 1.

    Args:
        control: Unix socket of the governor; runs/govern/governor.sock if neither this nor --url is given.
        url: Address of the governor instead, such as http://127.0.0.1:9120.
        watch: Go on until Ctrl-C.
        every_s: With --watch, seconds between two looks.
        json: Report as JSON; with --watch one line each time.
    """
    from rlgov.governor.client import SurfaceClient

    client = SurfaceClient(_target(control, url))
    if watch:
        if every_s <= 0:
            raise ConfigError(f"--every-s must be above 0, got {every_s:g}")
        return _watch(client, every_s, json=json)
    document = client.status()
    if json:
        put_json(document)
    else:
        from rlgov.governor.terminal import render

        console().print(render(document))
    return 0 if document["health"]["alive"] and document["health"]["ready"] else EXIT_NOT_READY


def tell(
    order: Literal["observe", "shadow", "active", "rearm"],
    /,
    *,
    control: Path | None = None,
    url: str | None = None,
    token_file: Path | None = None,
    json: Json = False,
) -> None:
    """Tell a running governor how far it may go, or to begin again after it has stopped acting by itself.

    Args:
        order: A mode; or rearm, after a trip or a foreign change of the clocks was looked into.
        control: Unix socket of the governor; runs/govern/governor.sock if neither this nor --url is given.
        url: Address of the governor instead, such as http://127.0.0.1:9120; needs the token.
        token_file: File with the governor's token.
        json: Report as JSON.
    """
    from rlgov.governor.client import SurfaceClient
    from rlgov.governor.listen import read_token
    from rlgov.governor.records import Command, CommandKind, Mode

    token = read_token(token_file) if token_file is not None else None
    client = SurfaceClient(_target(control, url), token=token)
    command = Command(CommandKind.REARM) if order == "rearm" else Command(CommandKind.MODE, Mode(order))
    client.order(command)
    if json:
        put_json({"accepted": order})
    else:
        sys.stdout.write(f"{order}: accepted; it takes effect at the next tick\n")


def _target(control: Path | None, url: str | None) -> str:
    from rlgov.governor.listen import DEFAULT_SOCKET

    if control is not None and url is not None:
        raise ConfigError("--control and --url name two governors; give one of them")
    return url if url is not None else str(control or DEFAULT_SOCKET)


def _watch(client: SurfaceClient, every_s: float, *, json: bool) -> int:
    """Look again and again; a governor that is gone for a while is waited for."""
    from rich.live import Live
    from rich.text import Text

    from rlgov.governor.terminal import render

    clock = SystemClock()
    if json or not sys.stdout.isatty():
        while True:
            document = client.status()
            if json:
                sys.stdout.write(json_format.dumps(document, allow_nan=False) + "\n")
            else:
                console().print(render(document))
            sys.stdout.flush()
            clock.sleep_s(every_s)
    with Live(console=console(), auto_refresh=False, screen=True) as live:
        while True:
            try:
                shown = render(client.status())
            except DeploymentError as error:
                shown = Text(str(error), style="bold red")
            live.update(shown, refresh=True)
            clock.sleep_s(every_s)
