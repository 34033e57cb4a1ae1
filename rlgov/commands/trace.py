"""``rlgov trace``: look at request traces, fetch public ones, generate others."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from rlgov.commands.output import Json, put_json

Kind = Literal["auto", "azure", "burstgpt", "mooncake", "tidy"]


def show(
    file: Path,
    *,
    kind: Kind = "auto",
    failed: Literal["drop", "error"] | None = None,
    plot: Path | None = None,
    from_s: float = 0.0,
    to_s: float | None = None,
    json: Json = False,
) -> None:
    """Summarise a trace and, with --plot, draw it.

    Args:
        file: Azure, BurstGPT or tidy CSV, or Mooncake JSONL; plain or gzipped.
        kind: Its format; told from the header if not given.
        failed: What to do with requests of zero tokens; BurstGPT has them for failures, and drops them.
        plot: PNG file to draw to.
        from_s: Begin of the part to look at.
        to_s: End of that part.
        json: Report as JSON.
    """
    from rlgov.workload.commands import trace_show

    record = trace_show(file, kind=kind, failed=failed, plot=plot, from_s=from_s, to_s=to_s, quiet=json)
    if json:
        put_json(record)


def fetch(name: str | None = None, *, directory: Path = Path("traces"), json: Json = False) -> None:
    """Download a public trace, verify it and keep it; without a name, list what there is.

    Args:
        name: Name of a public trace.
        directory: Folder to keep it in.
        json: Report as JSON.
    """
    from rlgov.workload.commands import trace_fetch, trace_list

    record = trace_list(quiet=json) if name is None else trace_fetch(name, directory=directory, quiet=json)
    if json:
        put_json(record)


def synth(
    spec: str,
    *,
    out: Path,
    seed: int = 0,
    duration_s: float | None = None,
    rate_per_s: float | None = None,
    low: float | None = None,
    high: float | None = None,
    phase: float | None = None,
    json: Json = False,
) -> None:
    """Generate a trace as tidy CSV: equal seeds give equal traces.

    Args:
        spec: conversation, code or day.
        out: File to write.
        seed: Fixes the trace.
        duration_s: Length of the trace.
        rate_per_s: Mean arrivals a second at full load.
        low: Lowest load of the day, as a share of the full one.
        high: Highest load of the day.
        phase: Time of day it starts at, as a share of a day; 0 is the deepest night.
        json: Report as JSON.
    """
    from rlgov.workload.commands import trace_synth

    record = trace_synth(
        spec,
        out,
        seed=seed,
        duration_s=duration_s,
        rate_per_s=rate_per_s,
        low=low,
        high=high,
        phase=phase,
        quiet=json,
    )
    if json:
        put_json(record)
