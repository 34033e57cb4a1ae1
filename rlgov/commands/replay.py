"""``rlgov replay``: a trace through policies, or a recorded run through its own decisions."""

from __future__ import annotations

import json as json_format
import sys
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from rlgov.commands.output import Json, Progress, console, put_json
from rlgov.commands.traces import open_trace
from rlgov.config import DEFAULT_BASELINES, ReplaySettings
from rlgov.errors import ConfigError

EXIT_DIVERGED = 1
DEFAULTS = ReplaySettings()


def replay(*, settings: Annotated[ReplaySettings, Parameter(name="*")] = DEFAULTS, json: Json = False) -> int:
    """Put a trace through policies and baselines, deterministically: table, CSV, JSON and plots.

    With --journal, the recorded run of that file goes through the decision code of one --policy again;
    the exit code is 1 if any decision or observation is another one now.

    Args:
        settings: What to replay.
        json: Report as JSON.
    """
    if settings.journal is not None:
        return _audit(settings, settings.journal, json=json)
    _replay(settings, json=json)
    return 0


def _replay(settings: ReplaySettings, *, json: bool) -> None:
    from rlgov.agents.replay import ReplaySpec, replay
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
        result = replay(spec, trace=open_trace(settings.trace), progress=progress)
    files = write_report(result, settings.out)
    if json:
        put_json(result.to_json())
        return
    console().print(policies_table(result))
    for path in files.values():
        sys.stdout.write(f"{path}\n")


def _audit(settings: ReplaySettings, journal_file: Path, *, json: bool) -> int:
    from rlgov.agents.audit import audit_journal
    from rlgov.agents.baselines import PolicyContext, by_name
    from rlgov.agents.bundle import BundlePolicy
    from rlgov.agents.fallback import with_fallback
    from rlgov.journal import GOVERNOR_MODE, read_journal
    from rlgov.simulation.physics import build_tables
    from rlgov.simulation.profile import load_profile

    if settings.policy == DEFAULT_BASELINES or len(settings.policy) != 1:
        raise ConfigError("an audit needs the one policy that took the decisions; name it with --policy")
    journal = read_journal(journal_file)
    limits = journal.header.limits
    tables = build_tables(load_profile(settings.profile))
    policy = by_name(settings.policy[0], PolicyContext(limits, tables))
    if isinstance(policy, BundlePolicy) and GOVERNOR_MODE in journal.header.versions:
        policy = with_fallback(policy, tables, limits)  # as a governor runs it
    found = audit_journal(journal, policy)
    report = found.to_json()
    settings.out.mkdir(parents=True, exist_ok=True)
    path = settings.out / "audit.json"
    path.write_text(json_format.dumps(report, indent=2) + "\n", encoding="utf-8")
    if json:
        put_json(report)
    else:
        console().print(found.table())
        sys.stdout.write(f"{path}\n")
    return 0 if found.equal else EXIT_DIVERGED
