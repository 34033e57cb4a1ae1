"""``rlgov characterize``: latency and energy over a grid of configurations and loads."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from rlgov.commands.output import Json, Progress, put_fields, put_json
from rlgov.commands.traces import open_trace
from rlgov.config import CharacterizeSettings

if TYPE_CHECKING:
    from pathlib import Path

    from rlgov.characterize.workloads import Lengths

DEFAULTS = CharacterizeSettings()
_REPORT = "rlgov.characterize.report"


def characterize(
    *, settings: Annotated[CharacterizeSettings, Parameter(name="*")] = DEFAULTS, json: Json = False
) -> None:
    """Measure a deployment at every combination of clock, batch cap, TP degree, lengths and load.

    Resumable: after a kill at any moment the same command goes on where it stopped. Clocks, cap and load are
    given back on Ctrl-C, SIGTERM and errors.

    Args:
        settings: What to measure, and on which deployment.
        json: Report as JSON.
    """
    from rlgov.characterize.benches import open_bench
    from rlgov.characterize.campaign import run_campaign, summary
    from rlgov.clock import SystemClock
    from rlgov.deployments.live import exit_on_sigterm

    clock = SystemClock()
    workloads = _workloads(settings)
    with exit_on_sigterm():
        bench = open_bench(settings, {lengths.name: lengths for lengths in workloads}, clock)
        try:
            with Progress() as progress:
                outcome = run_campaign(settings, bench, workloads, clock, progress)
        finally:
            bench.close()
    report = _write_report(settings.out)
    told = summary(outcome) | {"report": [str(path) for path in report]}
    if json:
        put_json(told)
        return
    lists = {name: told.pop(name) for name in ("notes", "files", "report")}
    put_fields("characterisation", {name: "-" if value is None else value for name, value in told.items()})
    sys.stdout.writelines(f"{path}\n" for paths in lists.values() for path in paths)


def _workloads(settings: CharacterizeSettings) -> list[Lengths]:
    from rlgov.characterize.workloads import CLASSES, TraceLengths, length_class

    names = settings.classes or (() if settings.traces else CLASSES)
    classes = [length_class(name, settings.length_scale) for name in dict.fromkeys(names)]
    return [*classes, *(TraceLengths(open_trace(name, seed=settings.seed)) for name in settings.traces)]


def _write_report(folder: Path) -> list[Path]:
    if importlib.util.find_spec(_REPORT) is None:
        return []
    written: list[Path] = importlib.import_module(_REPORT).write_characterization_report(folder)
    return written
