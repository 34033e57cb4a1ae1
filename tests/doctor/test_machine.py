from __future__ import annotations

import importlib.util
import resource
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from rlgov.doctor import machine
from rlgov.doctor.finding import Level


def test_python_and_installed_packages_are_fine() -> None:
    assert machine.check_python().level is Level.OK


@pytest.mark.parametrize(("extra", "level"), [("live", Level.FAIL), ("train", Level.WARN)])
def test_a_missing_package_is_named_with_its_extra(
    monkeypatch: pytest.MonkeyPatch, extra: str, level: Level
) -> None:
    gone = machine.EXTRAS[extra][1]
    whole = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == gone else whole(name))
    findings = {finding.check: finding for finding in machine.check_extras()}
    found = findings[f"packages ({extra})"]
    assert found.level is level
    assert gone in found.said
    assert f"rlgov[{extra}]" in found.remedy


@pytest.mark.parametrize(
    ("soft", "level"), [(1024, Level.WARN), (65_536, Level.OK), (resource.RLIM_INFINITY, Level.OK)]
)
def test_few_open_files_are_a_warning(monkeypatch: pytest.MonkeyPatch, soft: int, level: Level) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (soft, resource.RLIM_INFINITY))
    found = machine.check_files()
    assert found.level is level
    assert ("ulimit -n" in found.remedy) == (level is Level.WARN)


@pytest.mark.parametrize(("free_bytes", "level"), [(64 * 2**20, Level.WARN), (8 * machine.GIB, Level.OK)])
def test_little_shared_memory_is_a_warning(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, free_bytes: int, level: Level
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=free_bytes))
    assert machine.check_shared_memory(tmp_path).level is level
    assert machine.check_shared_memory(tmp_path / "nowhere").level is Level.WARN


def test_the_run_folder_is_judged_before_it_is_there(tmp_path: Path) -> None:
    assert machine.check_run_folder(tmp_path / "runs" / "serve").level is not Level.FAIL
    assert not (tmp_path / "runs").exists()
    file = tmp_path / "file"
    file.touch()
    found = machine.check_run_folder(file / "serve")
    assert found.level is Level.FAIL
    assert "--run" in found.remedy
