"""``rlgov study``: the study behind the claim."""

from __future__ import annotations

import sys
from typing import Annotated

from cyclopts import Parameter

from rlgov.clock import SystemClock
from rlgov.commands.output import Json, put_json
from rlgov.commands.traces import open_trace
from rlgov.config import StudySettings

DEFAULTS = StudySettings()


def study(*, settings: Annotated[StudySettings, Parameter(name="*")] = DEFAULTS, json: Json = False) -> None:
    """Set learned policies against every static setting and every tuned rule, on test spans.

    Static settings and tuned rules are kept in the output folder: a rerun goes on where the last one
    stopped, and with other bundles it plays only those.

    Args:
        settings: What to study, and with how much effort.
        json: Report as JSON.
    """
    from rlgov.agents.study import run_study
    from rlgov.agents.study_report import markdown, write_study

    clock = SystemClock()
    begin_s = clock.monotonic_s()

    def say(what: str) -> None:
        sys.stderr.write(f"{clock.monotonic_s() - begin_s:7.1f} s  {what}\n")
        sys.stderr.flush()

    result = run_study(settings, [open_trace(str(path)) for path in settings.trace], say)
    files = write_study(result)
    if json:
        put_json(result.to_json())
        return
    sys.stdout.write(markdown(result) + "\n")
    for path in files.values():
        sys.stdout.write(f"{path}\n")
