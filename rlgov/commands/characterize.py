"""``rlgov characterize``: latency and energy over a grid of configurations and loads."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from rlgov.commands.output import Json, Progress, put_fields, put_json
from rlgov.commands.traces import open_trace
from rlgov.config import CharacterizeSettings

if TYPE_CHECKING:
    from rlgov.characterize.campaign import Outcome
    from rlgov.characterize.workloads import Lengths

DEFAULTS = CharacterizeSettings()


def characterize(
    *,
    settings: Annotated[CharacterizeSettings, Parameter(name="*")] = DEFAULTS,
    report_only: Path | None = None,
    json: Json = False,
) -> None:
    """Measure a deployment at every combination of clock, batch cap, TP degree, lengths and load.

    Resumable: after a kill at any moment the same command goes on where it stopped. Clocks, cap and load are
    given back on Ctrl-C, SIGTERM and errors.

    Args:
        settings: What to measure, and on which deployment.
        report_only: Measure nothing: write tables and report of this run folder, as far as it got.
        json: Report as JSON.
    """
    from rlgov.characterize.campaign import gather, summary
    from rlgov.characterize.report import write_characterization_report

    outcome = _run(settings) if report_only is None else gather(report_only)
    told = summary(outcome)
    told["report"] = [str(path) for path in write_characterization_report(outcome.folder)]
    if json:
        put_json(told)
        return
    lists = {name: told.pop(name) for name in ("notes", "files", "report")}
    put_fields("characterisation", {name: "-" if value is None else value for name, value in told.items()})
    sys.stdout.writelines(f"{path}\n" for paths in lists.values() for path in paths)


def _run(settings: CharacterizeSettings) -> Outcome:
    from rlgov.characterize.benches import open_bench
    from rlgov.characterize.campaign import run_campaign
    from rlgov.clock import SystemClock
    from rlgov.deployments.live import exit_on_sigterm

    clock = SystemClock()
    workloads = _workloads(settings)
    with exit_on_sigterm():
        bench = open_bench(settings, {lengths.name: lengths for lengths in workloads}, clock)
        try:
            with Progress() as progress:
                return run_campaign(settings, bench, workloads, clock, progress)
        finally:
            bench.close()


def _workloads(settings: CharacterizeSettings) -> list[Lengths]:
    from rlgov.characterize.workloads import CLASSES, TraceLengths, length_class

    names = settings.classes or (() if settings.traces else CLASSES)
    found: list[Lengths] = [length_class(name, settings.length_scale) for name in dict.fromkeys(names)]
    from_s, to_s = settings.trace_from_s, settings.trace_to_s
    for name in dict.fromkeys(settings.traces):
        trace = open_trace(name, seed=settings.seed)
        if from_s or to_s is not None:
            trace = trace.slice(from_s, trace.duration_s if to_s is None else to_s)
        found.append(TraceLengths(trace))
    return found
