"""Is this vLLM one the plugin may be used in? Asked once, when the engine starts.

vLLM's scheduler is no public interface. Every name relied on is looked up here first, by what it is and not
by how vLLM calls its release alone; where one is missing the plugin steps aside and vLLM goes on as it was.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import inspect
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Collection

PROVEN = ((0, 32), (0, 33))
"""Releases it was run in: from the first one up to, not including, the second."""

SCHEDULER_METHODS = (
    "schedule",
    "update_from_output",
    "add_request",
    "finish_requests",
    "get_request_counts",
    "get_kv_cache_usage",
)
SCHEDULER_ATTRIBUTES = (
    "requests",
    "waiting",
    "kv_holding_waiting",
    "running",
    "finished_req_ids",
    "num_spec_tokens",
)
OUTPUT_FIELDS = (
    "scheduled_new_reqs",
    "scheduled_cached_reqs",
    "num_scheduled_tokens",
    "total_num_scheduled_tokens",
    "finished_req_ids",
    "preempted_req_ids",
)
CACHED_FIELDS = ("num_computed_tokens", "resumed_req_ids")
REQUEST_ATTRIBUTES = ("num_prompt_tokens", "num_computed_tokens", "is_prefill_chunk")


@dataclass(frozen=True, slots=True)
class Report:
    """What the self-test found."""

    checks: dict[str, bool]
    reasons: tuple[str, ...] = ()
    """What is missing, each with what to do about it."""

    @property
    def cap(self) -> bool:
        """Whether the batch cap may be moved."""
        return all(self.checks.get(name, False) for name in ("release", "single_engine", "cap"))

    @property
    def counters(self) -> bool:
        """Whether the engine may be counted."""
        return all(self.checks.get(name, False) for name in ("release", "single_engine", "counters"))

    @property
    def note(self) -> str:
        """The reasons in one line; empty when all is well."""
        return "; ".join(self.reasons)


@dataclass(frozen=True, slots=True)
class Interface:
    """The parts of vLLM that are relied on."""

    scheduler: Any
    output: Any
    cached: Any
    request: Any
    data_parallel_size: int


def installed_version() -> str:
    """Version of vLLM as its distribution states it; ``unknown`` without one."""
    try:
        return importlib.metadata.version("vllm")
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def proven(version: str, *, any_version: bool = False) -> bool:
    """Whether the plugin was run in this release; ``any_version`` takes the operator's word for it."""
    found = re.match(r"(\d+)\.(\d+)", version)
    if found is None:
        return any_version
    release = (int(found[1]), int(found[2]))
    return release >= PROVEN[0] and (any_version or release < PROVEN[1])


def examine(interface: Interface, version: str, *, any_version: bool = False) -> Report:
    """Look up every name relied on.

    Args:
        interface: vLLM's classes.
        version: Of vLLM.
        any_version: The operator set RLGOV_PLUGIN_ANY_VERSION.
    """
    reasons: list[str] = []
    checks = {
        "release": proven(version, any_version=any_version),
        "single_engine": interface.data_parallel_size == 1,
    }
    if not checks["release"]:
        low, high = (".".join(map(str, release)) for release in PROVEN)
        reasons.append(
            f"vLLM {version} is not one the plugin was proven in ({low} up to, not including, {high}); "
            "set RLGOV_PLUGIN_ANY_VERSION=1 to use it in a newer one at your own risk"
        )
    if not checks["single_engine"]:
        reasons.append(
            f"data_parallel_size is {interface.data_parallel_size}, and the plugin governs one engine; "
            "run one server for each replica"
        )
    checks["cap"] = _reads(interface.scheduler, "schedule", ("max_num_active_reqs",))
    if not checks["cap"]:
        reasons.append(
            "this vLLM's scheduler has no max_num_active_reqs that it reads anew in each iteration, "
            "so the batch cap cannot be moved while it runs"
        )
    missing = [
        *_absent(interface.scheduler, SCHEDULER_METHODS, "the scheduler"),
        *_absent_fields(interface.output, OUTPUT_FIELDS, "the scheduler's output"),
        *_absent_fields(interface.cached, CACHED_FIELDS, "its part on known requests"),
    ]
    if not _reads(interface.request, "__init__", REQUEST_ATTRIBUTES):
        missing.append(f"one of {', '.join(REQUEST_ATTRIBUTES)} of a request")
    checks["counters"] = not missing
    if missing:
        reasons.append(f"this vLLM lacks {', '.join(missing)}, so the engine cannot be counted")
    return Report(checks, tuple(reasons))


def examine_scheduler(scheduler: object, report: Report) -> Report:
    """Look at the scheduler that was built, too: its attributes exist only now."""
    checks, reasons = dict(report.checks), list(report.reasons)
    if not isinstance(getattr(scheduler, "max_num_active_reqs", None), int):
        checks["cap"] = False
        reasons.append("the scheduler has no number max_num_active_reqs")
    missing = [name for name in SCHEDULER_ATTRIBUTES if not hasattr(scheduler, name)]
    if missing:
        checks["counters"] = False
        reasons.append(f"the scheduler lacks {', '.join(missing)}")
    return Report(checks, tuple(reasons))


def _reads(owner: Any, method: str, names: Collection[str]) -> bool:
    """Whether the source of ``owner.method``, or of what it inherits, mentions all names."""
    found = _find(owner, method)
    code = getattr(inspect.unwrap(found), "__code__", None) if found is not None else None
    return code is not None and set(names) <= set(code.co_names)


def _find(owner: Any, method: str) -> Callable[..., Any] | None:
    found: Callable[..., Any] | None = getattr(owner, method, None)
    return found


def _absent(owner: Any, names: Collection[str], what: str) -> list[str]:
    return [f"{name} of {what}" for name in names if not callable(getattr(owner, name, None))]


def _absent_fields(owner: Any, names: Collection[str], what: str) -> list[str]:
    if not dataclasses.is_dataclass(owner):
        return [f"the fields of {what}"]
    fields = {field.name for field in dataclasses.fields(owner)}
    return [f"{name} of {what}" for name in names if name not in fields]
