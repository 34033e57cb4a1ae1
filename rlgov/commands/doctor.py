"""``rlgov doctor``: what works on this machine, and what to do about what does not."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

from rich.table import Table
from rich.text import Text

from rlgov.clock import SystemClock
from rlgov.commands.output import Json, console, put_json
from rlgov.doctor import engine, gpus, machine, server
from rlgov.doctor.finding import Level

if TYPE_CHECKING:
    from collections.abc import Iterator

    from rlgov.clock import Clock
    from rlgov.doctor.finding import Finding

EXIT_FAILED = 1
_STYLES = {Level.OK: "green", Level.WARN: "yellow", Level.FAIL: "bold red"}


def doctor(
    *,
    vllm: Path | None = None,
    url: str | None = None,
    control: Path | None = None,
    run: Path = Path("runs/serve"),
    json: Json = False,
) -> int:
    """What works on this machine, and what to do about what does not. Changes nothing.

    Ends with 0 when serving could run, and everything that was asked about works; else with 1.

    Args:
        vllm: The vllm program; else the one on the PATH, else .venv-vllm/bin/vllm.
        url: Look at a running vLLM or gateway, too, such as http://127.0.0.1:8000.
        control: Look at a serving stack, too: the path of its control socket.
        run: Folder a serving stack would write to.
        json: Report as JSON.
    """
    findings = list(_examine(SystemClock(), vllm, url, control, run))
    possible = all(finding.level is not Level.FAIL for finding in findings)
    if json:
        put_json({"serving": possible, "findings": [dataclasses.asdict(finding) for finding in findings]})
    else:
        _put_table(findings)
    return 0 if possible else EXIT_FAILED


def _examine(
    clock: Clock, vllm: Path | None, url: str | None, control: Path | None, run: Path
) -> Iterator[Finding]:
    yield machine.check_python()
    yield from machine.check_extras()
    yield from engine.check_vllm(vllm)
    yield from gpus.check_gpus(clock)
    yield machine.check_files()
    yield machine.check_shared_memory()
    yield machine.check_run_folder(run)
    if url is not None:
        yield from server.check_url(url, clock)
    if control is not None:
        yield from server.check_control(control)


def _put_table(findings: list[Finding]) -> None:
    table = Table(box=None, pad_edge=False)
    for heading in ("check", "", "found", "to do"):
        table.add_column(heading, overflow="fold", no_wrap=heading in {"check", ""})
    for finding in findings:
        # As Text: brackets in a message are no markup.
        level = Text(finding.level, style=_STYLES[finding.level])
        table.add_row(finding.check, level, Text(finding.said), Text(finding.remedy))
    console().print(table)
