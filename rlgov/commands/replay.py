"""``rlgov replay``: a trace through policies, or a recorded run through its own decisions."""

from __future__ import annotations

import sys
from typing import Annotated

from cyclopts import Parameter

from rlgov.commands.output import Json, Progress, put_json
from rlgov.commands.traces import open_trace
from rlgov.config import ReplaySettings


def replay(*, settings: Annotated[ReplaySettings, Parameter(name="*")], json: Json = False) -> None:
    """Put a trace through policies and baselines, deterministically: table, CSV, JSON and plots.

    Args:
        settings: What to replay.
        json: Report as JSON.
    """
    from rich.console import Console

    from rlgov.agents.replay import ReplaySpec
    from rlgov.agents.replay import replay as run_replay
    from rlgov.agents.report import policies_table, write_report

    spec = ReplaySpec(
        trace=settings.trace,
        profile=settings.profile,
        policies=settings.policy,
        from_s=settings.from_s,
        to_s=settings.to_s,
        rate_scale=settings.rate_scale,
        slo_scale=settings.slo_scale,
        seeds=settings.seeds,
        workers=settings.workers,
        target_attainment=settings.target_attainment,
    )
    with Progress() as progress:
        result = run_replay(spec, trace=open_trace(settings.trace), progress=progress)
    files = write_report(result, settings.out)
    if json:
        put_json(result.to_json())
        return
    Console().print(policies_table(result))
    for path in files.values():
        sys.stdout.write(f"{path}\n")
