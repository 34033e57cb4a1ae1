from __future__ import annotations

import dataclasses
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest

from rlgov.engine.plugin.selftest import (
    CACHED_FIELDS,
    OUTPUT_FIELDS,
    SCHEDULER_ATTRIBUTES,
    SCHEDULER_METHODS,
    Interface,
    examine,
    examine_scheduler,
    proven,
)


class Scheduler:
    max_num_active_reqs = 8

    def schedule(self) -> int:
        return self.max_num_active_reqs


for _name in set(SCHEDULER_METHODS) - {"schedule"}:
    setattr(Scheduler, _name, lambda self: None)  # noqa: ARG005  # only its presence counts


class Request:
    def __init__(self) -> None:
        self.num_prompt_tokens = self.num_computed_tokens = 0
        self.is_prefill_chunk = False


def _interface(**changes: Any) -> Interface:
    whole = Interface(
        scheduler=Scheduler,
        output=dataclasses.make_dataclass("Output", OUTPUT_FIELDS),
        cached=dataclasses.make_dataclass("Cached", CACHED_FIELDS),
        request=Request,
        data_parallel_size=1,
    )
    return dataclasses.replace(whole, **changes)


@pytest.mark.parametrize(
    ("version", "is_proven", "with_leave"),
    [
        ("0.32.0", True, True),
        ("0.32.0+cpu", True, True),
        ("0.32.1.dev7+gabc", True, True),
        ("0.31.2", False, False),
        ("0.33.0", False, True),
        ("1.0", False, True),
        ("unknown", False, True),
        ("", False, True),
    ],
)
def test_releases(version: str, *, is_proven: bool, with_leave: bool) -> None:
    assert proven(version) is is_proven
    assert proven(version, any_version=True) is with_leave


def test_a_whole_interface_passes() -> None:
    report = examine(_interface(), "0.32.0")
    assert report.cap
    assert report.counters
    assert report.note == ""


def test_an_unproven_release_says_how_to_use_it_all_the_same() -> None:
    report = examine(_interface(), "0.40.1")
    assert not report.cap
    assert not report.counters
    assert "0.40.1" in report.note
    assert "RLGOV_PLUGIN_ANY_VERSION=1" in report.note


def test_a_scheduler_that_does_not_read_the_limit_anew_is_not_capped_but_counted() -> None:
    class Fixed(Scheduler):
        def schedule(self) -> int:
            return 8

    report = examine(_interface(scheduler=Fixed), "0.32.0")
    assert not report.cap
    assert report.counters
    assert "max_num_active_reqs" in report.note


def test_an_inherited_schedule_is_looked_at() -> None:
    class Derived(Scheduler):
        pass

    assert examine(_interface(scheduler=Derived), "0.32.0").cap


@pytest.mark.parametrize(
    ("part", "without", "said"),
    [
        ("output", dataclasses.make_dataclass("Output", OUTPUT_FIELDS[1:]), "scheduled_new_reqs"),
        ("cached", dataclasses.make_dataclass("Cached", CACHED_FIELDS[1:]), "num_computed_tokens"),
        ("cached", object, "the fields of"),
        ("request", object, "is_prefill_chunk"),
    ],
)
def test_what_is_missing_ends_the_counting_and_leaves_the_cap(part: str, without: type, said: str) -> None:
    report = examine(_interface(**{part: without}), "0.32.0")
    assert report.cap
    assert not report.counters
    assert said in report.note


def test_replicas_are_not_governed() -> None:
    report = examine(_interface(data_parallel_size=2), "0.32.0")
    assert not report.cap
    assert not report.counters
    assert "data_parallel_size is 2" in report.note


def test_the_scheduler_that_was_built_is_looked_at_too() -> None:
    report = examine(_interface(), "0.32.0")
    built = SimpleNamespace(max_num_active_reqs=8, **dict.fromkeys(SCHEDULER_ATTRIBUTES))
    assert examine_scheduler(built, report) == report
    del built.kv_holding_waiting
    built.max_num_active_reqs = None
    after = examine_scheduler(built, report)
    assert not after.cap
    assert not after.counters
    assert "kv_holding_waiting" in after.note


def test_the_plugin_brings_nothing_heavy_into_vllms_processes() -> None:
    """Not even what rlgov needs elsewhere: it runs in whatever environment vLLM has."""
    program = (
        "import sys; before = set(sys.modules);"
        "import rlgov.engine.plugin.entry, rlgov.engine.plugin.scheduler, rlgov.engine.plugin.endpoint;"
        "new = {name.partition('.')[0] for name in set(sys.modules) - before};"
        "print(*sorted(new - set(sys.stdlib_module_names) - {'rlgov'}))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
