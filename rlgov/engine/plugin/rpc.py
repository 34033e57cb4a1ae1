"""What the engine's process answers to the API server: methods added to vLLM's engine core.

The API server reaches them by vLLM's utility calls, which also work while the engine is idle. Results are
plain types only: one that vLLM cannot serialise would end the thread that sends all of its outputs.
An error comes back as a value for the same reason.
"""

from __future__ import annotations

import sys
from typing import Any

from rlgov.engine.plugin.selftest import Report, installed_version

NOT_GOVERNED = (
    "the engine does not run rlgov's scheduler; start vLLM with RLGOV_PLUGIN=1 and "
    "--scheduler-cls rlgov.engine.plugin.scheduler.RlgovScheduler"
)
METHODS = ("rlgov_state", "rlgov_cap", "rlgov_iterations", "rlgov_cost")
_aside: list[Report] = []


def step_aside(report: Report) -> None:
    """Remember why this process has no governed scheduler."""
    _aside[:] = [report]


def attach() -> bool:
    """Add the methods to the engine core of this process. False where the process has none."""
    module = sys.modules.get("vllm.v1.engine.core")
    if module is None:
        return False
    for name in METHODS:
        setattr(module.EngineCore, name, globals()[name])
    return True


def rlgov_state(core: Any) -> dict[str, Any]:
    """The engine at this moment, and what the plugin can do in it."""
    scheduler = _governed(core)
    sample, note = None, ""
    if scheduler is not None:
        try:
            sample = scheduler.rlgov_sample()
        except Exception as error:  # noqa: BLE001  # a reading that fails must not look like a failed engine
            note = f"the engine cannot be read: {error!r}"
    report = _report(scheduler)
    return {
        "sample": sample,
        "vllm_version": installed_version(),
        "cap_supported": scheduler is not None and report.cap,
        "note": "; ".join(filter(None, (report.note, note))),
        "checks": {name: bool(value) for name, value in report.checks.items()},
        "asleep": _asleep(core),
    }


def rlgov_cap(core: Any, batch_cap: int | None, lease_s: float | None) -> dict[str, Any]:
    """Move the batch cap."""
    scheduler = _governed(core)
    report = _report(scheduler)
    if scheduler is None or not report.cap:
        return {"error": report.note or NOT_GOVERNED}
    try:
        in_force = scheduler.rlgov_ask(batch_cap, lease_s)
    except ValueError as error:
        return {"error": str(error)}
    return {"batch_cap": int(in_force), "max_num_seqs": int(scheduler.scheduler_config.max_num_seqs)}


def rlgov_iterations(core: Any, after: int) -> dict[str, Any]:
    """Rows of the last iterations."""
    scheduler = _governed(core)
    if scheduler is None or not scheduler.rlgov_counting:
        return {"error": _report(scheduler).note or NOT_GOVERNED}
    rows: dict[str, Any] = scheduler.rlgov_counters.rows(after)
    return rows


def rlgov_cost(core: Any) -> dict[str, Any]:
    """What the plugin itself takes of the engine's time."""
    scheduler = _governed(core)
    if scheduler is None:
        return {"error": NOT_GOVERNED}
    counters = scheduler.rlgov_counters
    times_s = sorted(counters.own_times_s)
    return {
        "iterations": counters.iterations,
        "busy_s": counters.busy_s,
        "own_s": counters.own_s,  # with every pause the machine made meanwhile, so look at the median, too
        "own_median_s": times_s[len(times_s) // 2] if times_s else None,
    }


def _governed(core: Any) -> Any:
    scheduler = getattr(core, "scheduler", None)
    return scheduler if hasattr(scheduler, "rlgov_report") else None


def _report(scheduler: Any) -> Report:
    if scheduler is not None:
        report: Report = scheduler.rlgov_report
        return report
    return _aside[0] if _aside else Report({}, (NOT_GOVERNED,))


def _asleep(core: Any) -> bool:
    try:
        return bool(core.model_executor.is_sleeping)
    except Exception:  # noqa: BLE001  # an executor without the notion does not sleep
        return False
